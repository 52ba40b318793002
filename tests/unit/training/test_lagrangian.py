"""``Budget(method="lagrangian")``: its price, multipliers that ascend, and the support at its end."""

import copy

import numpy as np
import pytest
import torch
from parameters import slow
from torch import nn

from l0hooks import Budget, Gate, iter_gates, param_groups, penalty, prune, set_budget, sparsify, summary
from l0hooks.errors import InvalidValueError, StateError

CONSTRAINTS = ["inequality", "equality"]


def lagrangian(**settings):
    return Budget(**{"sparsity": 0.8, "steps": 10, "method": "lagrangian", **settings})


def network(**settings):
    """A small network under a budget that counts steps of its optimiser, and the rule."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    sparsify(model, "weight", budget=lagrangian(**settings))
    return model, next(iter_gates(model))[1].rule


def train(model, optimizer, steps, strength=1.0):
    for _ in range(steps):
        x = torch.randn(16, 6)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean() + penalty(model, budget=strength)
        loss.backward()
        optimizer.step()


def adam(model, **rates):
    return torch.optim.Adam(param_groups(model, **{"lr": 1e-2, "gate_lr": 0.1, **rates}))


def one_gate(constraint, **settings):
    gate = Gate(10, init_keep_prob=0.5)
    (rule,) = set_budget(gate, lagrangian(constraint=constraint, **settings))
    return gate, rule


# --- the price --------------------------------------------------------------------------------------------------------


def test_the_price_of_an_inequality_is_lambda_times_the_excess():
    gate, rule = one_gate("inequality", schedule=lambda start, stop, steps: lambda step: 3.0)
    with torch.no_grad():
        gate.multipliers.fill_(2.0)
    price = penalty(gate, budget=1.0)
    assert price.item() == pytest.approx(2 * (5 - 3) / 10)
    price.backward()
    assert gate.multipliers.grad.item() == pytest.approx((5 - 3) / 10)
    torch.testing.assert_close(gate.log_alpha.grad, torch.full((10,), 2 * 0.25 / 10))
    assert rule.scheduled == 3.0


def test_the_price_of_an_equality_is_linear_and_quadratic_in_the_sparsity():
    gate, _ = one_gate("equality", schedule=lambda start, stop, steps: lambda step: 3.0)
    with torch.no_grad():
        gate.multipliers.copy_(torch.tensor([-0.5, 4.0]))
    price = penalty(gate, budget=1.0)
    s, t = 0.5, 0.7
    assert price.item() == pytest.approx(-0.5 * (s - t) + 4 * (s - t) ** 2)
    price.backward()
    assert gate.multipliers.grad.tolist() == pytest.approx([s - t, (s - t) ** 2])
    slope = (-0.5 + 2 * 4 * (s - t)) * -0.25 / 10  # ds/dlog_alpha of one gate is -p(1 - p)/10
    torch.testing.assert_close(gate.log_alpha.grad, torch.full((10,), slope))


def test_a_price_of_zero_moves_nothing_but_the_multiplier():
    gate, _ = one_gate("inequality", schedule="linear")
    (penalty(gate, budget=1.0)).backward()
    assert torch.equal(gate.log_alpha.grad, torch.zeros(10))
    assert gate.multipliers.grad.abs().item() < 1e-6  # the schedule starts where the gates are


def test_the_expected_size_of_coupled_gates_is_that_of_products():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    budget = lagrangian(sparsity=0.5, unit="params")
    sparsify(model, "coupled", example_inputs=(torch.zeros(1, 3),), budget=budget)
    (_, a), (_, b) = iter_gates(model)
    for gate in (a, b):
        nn.init.normal_(gate.log_alpha)
    rule, whole = a.rule, 4 * 4 + 5 * 5 + 6 * 2
    assert rule.size.whole == whole
    p, q = a.keep_prob(), b.keep_prob()
    by_hand = 4 * p.sum() + p.sum() * q.sum() + q.sum() + 2 * q.sum() + 2
    excess = rule.excess()
    torch.testing.assert_close(excess, (by_hand - rule.scheduled) / whole)
    assert excess.item() * whole + rule.scheduled == pytest.approx(rule.expected(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rule.excess(), excess)
    given, wanted = (torch.autograd.grad(e, (a.log_alpha, b.log_alpha)) for e in (excess, by_hand / whole))
    torch.testing.assert_close(given, wanted)


def test_the_price_is_told_once_for_a_rule_and_not_at_all_by_others():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    sparsify(model, "weight")
    rules = set_budget(model, {"0": lagrangian(), "[12]": lagrangian(), "3": Budget(sparsity=0.5)})
    for rule, value in zip(rules[:2], (2.0, 3.0), strict=True):
        nn.init.constant_(rule.multipliers, value)
        rule.step = 5
    wanted = 2 * rules[0].excess() + 3 * rules[1].excess()
    torch.testing.assert_close(penalty(model, budget=1.0), wanted)
    torch.testing.assert_close(penalty(model, budget=0.5), wanted / 2)
    assert penalty(Gate(3), budget=1.0).item() == 0.0
    assert rules[2].penalty().item() == 0.0


# --- the multipliers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_multipliers_ascend(constraint):
    gate, rule = one_gate(constraint, schedule=lambda start, stop, steps: lambda step: 3.0)
    optimizer = torch.optim.SGD(param_groups(gate, lr=0.0, gate_lr=0.0, multiplier_lr=0.5))
    penalty(gate, budget=1.0).backward()
    optimizer.step()
    wanted = [0.5 * 0.2] if constraint == "inequality" else [0.5 * -0.2, 0.5 * 0.04]
    assert gate.multipliers.tolist() == pytest.approx(wanted, rel=1e-5)
    assert rule.step == 1


def test_the_multiplier_restarts_at_zero_as_soon_as_the_inequality_holds():
    gate, rule = one_gate("inequality", schedule=lambda start, stop, steps: lambda step: 5.5)
    nn.init.constant_(gate.multipliers, 7.0)
    optimizer = torch.optim.SGD(param_groups(gate, lr=0.0, gate_lr=0.0, multiplier_lr=0.01))
    penalty(gate, budget=1.0).backward()
    optimizer.step()
    assert rule.expected() < rule.scheduled
    assert gate.multipliers.item() == 0.0


def test_the_multiplier_is_never_negative():
    gate, _ = one_gate("inequality", schedule=lambda start, stop, steps: lambda step: 4.0)
    optimizer = torch.optim.SGD(param_groups(gate, lr=0.0, gate_lr=0.0, multiplier_lr=1.0))
    gate.multipliers.grad = torch.tensor([-3.0])  # from another term of the loss, say
    optimizer.step()
    assert gate.multipliers.item() == 0.0


def test_an_equality_keeps_the_sign_of_its_linear_multiplier():
    gate, _ = one_gate("equality", schedule=lambda start, stop, steps: lambda step: 5.5)
    nn.init.constant_(gate.multipliers, -1.0)
    gate.multipliers.grad = torch.zeros(2)
    torch.optim.SGD(param_groups(gate, lr=0.0, gate_lr=0.0)).step()
    assert gate.multipliers.tolist() == [-1.0, 0.0]


def test_multipliers_are_a_group_of_their_own():
    model, rule = network()
    weights, gates, multipliers = param_groups(model, lr=0.1, gate_lr=0.2, weight_decay=0.5)
    assert multipliers == {"params": [rule.multipliers], "lr": 0.2, "weight_decay": 0.0, "maximize": True}
    assert "maximize" not in weights
    assert "maximize" not in gates
    every = [id(p) for group in (weights, gates, multipliers) for p in group["params"]]
    assert len(every) == len(set(every))
    assert set(every) == {id(p) for p in model.parameters()}
    assert param_groups(model, lr=0.1, gate_lr=0.2, multiplier_lr=0.3)[2]["lr"] == 0.3


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_negative_rate_is_refused(value):
    with pytest.raises(InvalidValueError, match=r"param_groups: multiplier_lr must not be negative(.|\n)*got: "):
        param_groups(Gate(2), lr=0.1, gate_lr=0.1, multiplier_lr=value)


def test_an_optimiser_that_would_lower_them_is_refused_before_anything_moves():
    model, rule = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"multipliers of a budget must ascend(.|\n)*try: .*param_groups\(model"):
        train(model, optimizer, 1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert rule.step == 0


def test_a_loss_without_the_price_is_refused():
    model, _ = network()
    optimizer = adam(model)
    model(torch.randn(4, 6)).sum().backward()
    with pytest.raises(StateError, match=r"must hold the penalty(.|\n)*try: loss \+ penalty\(model, budget=1.0\)"):
        optimizer.step()


def test_multipliers_may_have_an_optimiser_of_their_own():
    model, rule = network(steps=30, sparsity=0.5)
    *primal, dual = param_groups(model, lr=1e-2, gate_lr=0.1)
    first, second = torch.optim.Adam(primal), torch.optim.SGD([dual], lr=1.0)
    for step in range(1, 6):
        x = torch.randn(16, 6)
        first.zero_grad()
        second.zero_grad()
        (model(x).square().mean() + penalty(model, budget=1.0)).backward()
        first.step()
        second.step()
        assert rule.step == step
    assert rule.multipliers.item() > 0


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_multipliers_are_no_part_of_the_size(constraint):
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    size = sum(p.numel() for p in plain.parameters())
    model, rule = network(constraint=constraint, unit="params")
    assert rule.size.whole == size
    assert summary(model).model_parameters == size
    assert len(list(iter_gates(model))) == 2
    assert penalty(model, params=1.0).item() == pytest.approx(sum(g.expected_l0().item() for _, g in iter_gates(model)))
    other = nn.Sequential(model, nn.Linear(3, 2))
    sparsify(other, {"1": "weight"}, budget=Budget(keep=90, unit="params"))
    assert other[1].parametrizations.weight[0].gate.rule.size.whole == size + 8


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_what_is_exported_meets_the_target_and_then_stays(constraint):
    model, rule = network(constraint=constraint)
    optimizer = adam(model)
    train(model, optimizer, 10)
    assert rule.finished
    assert sum(int(gate.support().sum()) for _, gate in iter_gates(model)) == rule.target == 14
    small, report = prune(model, return_report=True)
    assert report.exported_parameters == 14 + 11
    assert sum(int(small[n].weight.count_nonzero()) for n in (0, 2)) == 14
    gates = [gate for _, gate in iter_gates(model)]
    fixed = [copy.deepcopy((g.log_alpha, g.support(), g.multipliers)) for g in gates]
    weight = model[0].parametrizations.weight.original.detach().clone()
    train(model, optimizer, 3)
    for gate, (log_alpha, support, multipliers) in zip(gates, fixed, strict=True):
        assert torch.equal(gate.log_alpha, log_alpha)
        assert torch.equal(gate.support(), support)
        assert multipliers is None or torch.equal(gate.multipliers, multipliers)
    assert not torch.equal(model[0].parametrizations.weight.original, weight)
    assert penalty(model, budget=1.0).item() == 0.0


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_coupled_groups_meet_the_target(unit):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(4, 6)
    sparsify(model, "coupled", example_inputs=(x,), budget=lagrangian(sparsity=0.6, unit=unit))
    rule = next(iter_gates(model))[1].rule
    train(model, adam(model), 10)
    small = prune(model, example_inputs=(x,))
    linear = [m for m in small.modules() if isinstance(m, nn.Linear)]
    size = sum(m.weight.numel() + (m.bias.numel() if unit == "params" else 0) for m in linear)
    assert size <= rule.target < size + 40
    assert not any("multipliers" in name for name, _ in small.named_parameters())


@pytest.mark.parametrize("constraint", [CONSTRAINTS[0], *slow(CONSTRAINTS[1:])])
def test_the_gates_come_to_the_target_by_the_price_alone(constraint):
    wanted = torch.linspace(0, 1, 200)
    gate = Gate(200)
    (rule,) = set_budget(gate, lagrangian(steps=800, sparsity=0.75, constraint=constraint))
    optimizer = torch.optim.Adam(param_groups(gate, lr=0.0, gate_lr=0.05, multiplier_lr=0.05))
    for _ in range(799):
        optimizer.zero_grad()
        (penalty(gate, budget=1.0) - (wanted * gate.keep_prob()).mean()).backward()
        optimizer.step()
    tolerance = 1.0 if constraint == "equality" else 10.0  # an inequality with restarts swings around its bound
    assert rule.expected() == pytest.approx(50, abs=tolerance)
    penalty(gate, budget=1.0).backward()
    optimizer.step()
    assert rule.finished
    assert int(gate.support().sum()) == 50
    assert wanted[gate.support()].mean() > 0.8  # those that the loss likes best


def test_a_budget_that_is_not_automatic_counts_by_hand():
    gate, rule = one_gate("inequality", automatic=False, steps=2)
    optimizer = torch.optim.SGD(param_groups(gate, lr=0.0, gate_lr=0.1))
    penalty(gate, budget=1.0).backward()
    optimizer.step()
    assert rule.step == 0
    before = gate.log_alpha.detach().clone()
    for _ in range(3):
        rule.advance()
    assert (rule.step, rule.finished) == (2, True)
    assert torch.equal(gate.log_alpha, before)


def test_accumulation_and_evaluation_do_not_count():
    model, rule = network()
    optimizer = adam(model)
    for _ in range(3):
        (model(torch.randn(4, 6)).sum() + penalty(model, budget=1.0)).backward()
    model.eval()(torch.randn(4, 6))
    assert rule.step == 0
    optimizer.step()
    assert rule.step == 1


# --- keeping ----------------------------------------------------------------------------------------------------------


def test_multipliers_are_in_the_state_dict_at_the_first_gate():
    model, rule = network(constraint="equality")
    (key,) = [key for key in model.state_dict() if "multipliers" in key]
    assert key == "0.parametrizations.weight.0.gate.multipliers"
    assert rule.multipliers.shape == (2,)
    shifted = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    sparsify(shifted, "weight", budget=Budget(sparsity=0.8))
    assert set(model.state_dict()) - set(shifted.state_dict()) == {key}


def test_a_dense_checkpoint_still_loads():
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model, rule = network()
    nn.init.constant_(rule.multipliers, 2.0)
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model[0].parametrizations.weight.original, dense[0].weight)
    assert rule.multipliers.item() == 2.0


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("stop", [4, 10, 12])
def test_a_run_resumes_to_the_same_bits(constraint, stop, assign):
    model, rule = network(constraint=constraint)
    optimizer = adam(model)
    train(model, optimizer, stop)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(1)
    train(model, optimizer, 5)
    again, resumed = network(constraint=constraint)
    again.load_state_dict(states[0], assign=assign)
    second = adam(again)
    second.load_state_dict(states[1])
    assert (resumed.step, resumed.finished) == (min(stop, 10), stop >= 10)
    torch.manual_seed(1)
    train(again, second, 5)
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    for (_, gate), (_, twin) in zip(iter_gates(model), iter_gates(again), strict=True):
        assert torch.equal(gate.support(), twin.support())
    assert rule.step == resumed.step


def test_a_copy_has_its_own():
    model, rule = network()
    twin = copy.deepcopy(model)
    other = next(iter_gates(twin))[1].rule
    train(twin, adam(twin), 3)
    assert (rule.step, other.step) == (0, 3)
    assert rule.multipliers.item() == 0.0
    assert other.multipliers.item() > 0.0
    assert other.multipliers is next(iter_gates(twin))[1].multipliers


def test_multipliers_stay_in_float32():
    model, rule = network()
    state = {key: value.bfloat16() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.bfloat16()
    assert rule.multipliers.dtype == torch.float32
    model.load_state_dict(state, assign=True)
    assert rule.multipliers.dtype == torch.float32


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lagrange"}, r"Budget: the method must be known(.|\n)*'shift' or 'lagrangian'(.|\n)*'lagrange'"),
        ({"method": None}, "Budget: the method must be known"),
        ({"constraint": "equal"}, r"Budget: the constraint must be known(.|\n)*expected: 'inequality' or 'equality'"),
        (
            {"method": "shift", "constraint": "equality"},
            r"a shift takes no constraint(.|\n)*try: method=\"lagrangian\"",
        ),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(InvalidValueError, match=message):
        lagrangian(**settings)


def test_a_size_out_of_reach_is_refused_and_leaves_no_multipliers():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(InvalidValueError, match="must be one that the gates can reach"):
        sparsify(model, "weight", budget=lagrangian(keep=1, sparsity=None, unit="params"))
    assert not any("multipliers" in name for name, _ in model.named_parameters())


def test_the_excess_counts_members_that_a_layer_both_reads_and_writes() -> None:
    """E[k²] = E[k]² + Var k for a layer with one group on both sides; against draws of the gates."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.middle, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = torch.relu(self.stem(x))
            return self.head(h + self.middle(h))

    model = Residual()
    budget = lagrangian(sparsity=0.3, unit="params")
    sparsify(model, "coupled", example_inputs=(torch.ones(2, 4),), budget=budget)
    ((_, gate),) = iter_gates(model)
    rule = gate.rule
    assert rule.size.square.any()
    with torch.no_grad():
        gate.log_alpha.uniform_(-2, 2)
    excess = rule.excess().item()
    drawn = (torch.rand(20_000, 6) < gate.keep_prob().detach()).double().sum(1)
    sizes = torch.tensor([rule.size.of(np.array([k])) for k in range(7)], dtype=torch.float64)[drawn.long()]
    error = (sizes.std() / len(sizes) ** 0.5 / rule.size.whole).item()
    assert excess == pytest.approx((sizes.mean().item() - rule.scheduled) / rule.size.whole, abs=4 * error)
    assert excess == pytest.approx((rule.expected() - rule.scheduled) / rule.size.whole, rel=1e-5)
