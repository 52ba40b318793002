"""Budgets: the expected size at every step, the gradient along it, and the support at the end."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coupled_models import MODELS, coupled_groups, fingerprint, gates_of, mlp, perceptron_groups
from test_cost import size
from torch import nn
from torch.utils.checkpoint import checkpoint

from l0hooks import Budget, Gate, GateSpec, channel_groups, prune, set_budget, sparsify
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import InvalidValueError, SpecError, StateError
from l0hooks.training.budget_rule import BudgetRule
from l0hooks.training.lagrangian import LagrangianRule

FAMILIES = ("hard_concrete", "straight_through", "stg", "deterministic")
UNITS = ("gates", "params", "macs")
SPECS = {
    "weight": "weight",
    "output": "output",
    "coupled": "coupled",
    "example": GateSpec(granularity="coupled", noise="example"),
    "mixed": {"0": "weight", "2": "coupled"},
}


def made(spec="weight", name="mlp", seed=0, **options):
    """A model under a budget, its input and its rule."""
    torch.manual_seed(seed)
    model, x = (mlp(5, 12, 8, 3), torch.randn(6, 5)) if name == "mlp" else (MODELS[name][0](), MODELS[name][1]())
    groups = None
    if "coupled" in str(spec):
        groups = perceptron_groups(5, 12, 8, 3) if name == "mlp" else coupled_groups(name)
    budget = Budget(**{"sparsity": 0.5, "steps": 8, **options})
    sparsify(model, spec, example_inputs=(x,), groups=groups, budget=budget)
    return model, x, gates_of(model)[0].rule


def train(model, x, optimizer, steps=1):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def sgd(model, lr=0.5, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def on_schedule(rule):
    return rule.expected() == pytest.approx(rule.scheduled, rel=1e-5)


def scatter(rule, seed=1):
    """Random gates, and the next step's shift takes them to the schedule."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in rule.gates:
            gate.log_alpha.add_(torch.randn(gate.log_alpha.shape, generator=generator))


def log_alphas(model):
    return torch.cat([gate.log_alpha.detach().flatten().clone() for gate in gates_of(model)])


def parameters_of(small, model):
    """Parameters of a pruned model: zeros under gates on single weights do not count."""
    gated = {site.name for one in iter_gated(model) if one.coupled is None for site in one.sites}
    return sum(int(p.count_nonzero()) if n in gated else p.numel() for n, p in small.named_parameters())


# --- every step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("unit", UNITS)
def test_the_expected_size_is_what_the_schedule_says_after_every_step(spec, unit):
    model, x, rule = made(SPECS[spec], unit=unit)
    optimizer = sgd(model)
    before = rule.expected()
    assert before == rule.start
    for step in range(1, 9):
        train(model, x, optimizer)
        assert rule.step == step
        assert on_schedule(rule)
    assert rule.finished
    assert rule.scheduled == rule.target


@pytest.mark.parametrize("name", ["branched", "attentive", "residual"])
@pytest.mark.parametrize("unit", UNITS)
def test_the_expected_size_of_other_structures(name, unit):
    model, x, rule = made("coupled", name, unit=unit, sparsity=0.4)
    scatter(rule)
    optimizer = sgd(model, 0.01)
    for _ in range(8):
        train(model, x, optimizer)
        assert on_schedule(rule)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["weight", "coupled"])
def test_the_expected_size_of_every_family(family, granularity):
    model, x, rule = made(GateSpec(granularity=granularity, family=family), unit="params", sparsity=0.4)
    scatter(rule)
    optimizer = sgd(model, 0.1)
    for _ in range(8):
        train(model, x, optimizer)
        assert on_schedule(rule)


@pytest.mark.parametrize(
    "schedule", ["cubic", "linear", "cosine", "exponential", lambda a, b, n: lambda k: a + (b - a) * (k / n) ** 2]
)
def test_the_expected_size_on_every_schedule(schedule):
    model, x, rule = made(schedule=schedule, sparsity=0.8)
    optimizer, seen = sgd(model), []
    for _ in range(8):
        train(model, x, optimizer)
        assert on_schedule(rule)
        seen.append(rule.expected())
    assert seen == sorted(seen, reverse=True)
    if schedule == "linear":
        expected = [rule.start + (rule.target - rule.start) * k / 8 for k in range(1, 9)]
        assert seen == pytest.approx(expected, rel=1e-5)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True, weight_decay=0.5),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True, weight_decay=0.5),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.95])
def test_any_optimizer_keeps_the_size_and_after_the_end_moves_weights_alone(kind, sparsity):
    model, x, rule = made(unit="gates", sparsity=sparsity)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(8):
        train(model, x, optimizer)
        assert on_schedule(rule)
        model.eval()(x)
        assert sum(int(g.support().sum()) for g in rule.gates) == int(rule.scheduled)
    before, weights = log_alphas(model), copy.deepcopy(model.state_dict())
    train(model, x, optimizer, 5)
    assert torch.equal(log_alphas(model), before)
    name = "0.parametrizations.weight.original"
    assert not torch.equal(model.state_dict()[name], weights[name])


def test_lbfgs_and_closures():
    model, x, rule = made()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(8):
        optimizer.step(closure)
        assert on_schedule(rule)
    before = log_alphas(model)
    for _ in range(3):
        optimizer.step(closure=closure)
    assert torch.equal(log_alphas(model), before)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"weight_decay": 0.5}])
def test_a_closure_gets_the_gradient_along_the_constraint_and_none_after_the_end(options):
    model, x, rule = made()
    optimizer = sgd(model, **options)
    sums = []

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    handle = optimizer.register_step_post_hook(
        lambda *_: sums.append([g.log_alpha.grad.sum() for g in rule.gates if g.log_alpha.grad is not None])
    )
    for _ in range(8):
        optimizer.step(closure)
        assert on_schedule(rule)
        assert abs(sum(sums[-1])) < 1e-5 * sum(map(abs, sums[-1])) + 1e-4
    handle.remove()
    before = log_alphas(model)
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(log_alphas(model), before)


def test_accumulated_gradients_and_evaluation_between():
    model, x, rule = made("coupled", unit="params")
    optimizer = sgd(model, 0.05)
    for step in range(8):
        optimizer.zero_grad()
        for part in x.chunk(2):
            model.train()(part).square().sum().backward()
            model.eval()(part)
        assert rule.step == step
        optimizer.step()
        assert on_schedule(rule)


def test_a_step_that_a_scaler_skips_does_not_count():
    model, x, rule = made()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        if bad:
            next(iter(rule.gates)).log_alpha.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert on_schedule(rule)
    assert rule.step == 2


def gates_and_weights(model):
    gates = [p for n, p in model.named_parameters() if n.endswith("log_alpha")]
    return gates, [p for n, p in model.named_parameters() if not n.endswith("log_alpha")]


def test_an_optimizer_for_gates_and_one_for_weights():
    model, x, rule = made()
    gates, weights = gates_and_weights(model)
    one, other = torch.optim.Adam(gates, lr=0.5), torch.optim.SGD(weights, lr=0.1)
    for step in range(1, 9):
        model(x).square().sum().backward()
        for optimizer in (other, one):
            optimizer.step()
            optimizer.zero_grad()
        assert rule.step == step
        assert on_schedule(rule)


@pytest.mark.parametrize("first", [0, 1])
def test_gates_in_two_optimizers_count_once_a_step_and_stay_on_schedule(first):
    model, x, rule = made()
    gates, weights = gates_and_weights(model)
    pair = [torch.optim.SGD([*gates[:1], *weights], lr=0.5, momentum=0.9), torch.optim.Adam(gates[1:], lr=0.5)]
    order = (pair[first], pair[1 - first])
    for step in range(1, 9):
        model.zero_grad()
        model(x).square().sum().backward()
        for optimizer in order:
            optimizer.step()
            assert rule.step == step
            assert on_schedule(rule)
    before = log_alphas(model)
    for _ in range(3):
        model.zero_grad()
        model(x).square().sum().backward()
        for optimizer in order:
            optimizer.step()
    assert torch.equal(log_alphas(model), before)


def test_optimizers_that_take_turns_count_all_their_steps():
    model, x, rule = made(steps=20)
    gates, _ = gates_and_weights(model)
    pair = [torch.optim.SGD(gates[:1], lr=0.5), torch.optim.SGD(gates[1:], lr=0.5)]
    for optimizer in [pair[0]] * 3 + [pair[1]] * 3:
        train(model, x, optimizer)
        assert on_schedule(rule)
    assert rule.step == 5  # the first of the second one's cannot be told from a part of the same step


def test_steps_count_although_the_first_gate_is_in_no_optimizer():
    model, x, rule = made()
    gates, weights = gates_and_weights(model)
    gates[0].requires_grad_(False)
    optimizer = torch.optim.SGD([*gates[1:], *weights], lr=0.1)
    for step in range(1, 9):
        train(model, x, optimizer)
        assert rule.step == step
        assert on_schedule(rule)


def test_another_models_optimizer_does_not_count():
    _, _, rule = made()
    other, x, its = made()
    train(other, x, sgd(other), 3)
    assert (rule.step, its.step) == (0, 3)


def test_by_hand():
    model, x, rule = made(automatic=False)
    optimizer = sgd(model)
    for step in range(8):
        train(model, x, optimizer)
        assert rule.step == step
        rule.advance()
        assert on_schedule(rule)
    rule.advance()
    assert rule.step == 8
    assert rule.finished


def test_by_hand_a_fused_optimizer_moves_the_support_too():
    model, x, rule = made(automatic=False, steps=100)
    rule.advance()
    model.eval()(x)
    before = torch.cat([g.support().flatten() for g in rule.gates])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    optimizer.zero_grad()
    for gate in rule.gates:
        gate.log_alpha.grad = torch.randn_like(gate.log_alpha)
    optimizer.step()
    mask = torch.cat([g.support().flatten() for g in rule.gates])
    ranked = log_alphas(model)
    assert not torch.equal(mask, before)
    assert ranked[mask].min() >= ranked[~mask].max() or int((ranked[mask] < ranked[~mask].max()).sum()) <= len(
        rule.gates
    )


def test_a_schedule_may_ask_for_more_than_gates_can_do():
    model, x, rule = made(schedule=lambda a, b, n: lambda k: -100.0 if k < 4 else 1e9, unit="params")
    optimizer = sgd(model)
    for _ in range(8):
        train(model, x, optimizer)
        assert log_alphas(model).isfinite().all()
        assert size_within(rule)
    assert on_schedule(rule)


def size_within(rule):
    return rule.size.constant <= rule.expected() <= rule.size.whole * (1 + 1e-6)


def test_a_schedule_that_is_not_a_number_is_refused_before_it_spoils_the_gates():
    model, x, _ = made(schedule=lambda a, b, n: lambda k: float("nan") if k else a)
    with pytest.raises(InvalidValueError, match="finite at step 1"):
        train(model, x, sgd(model))
    assert log_alphas(model).isfinite().all()


# --- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "residual", "branched"])
@pytest.mark.parametrize("unit", UNITS)
def test_the_gradient_is_that_of_the_loss_over_gates_shifted_to_the_constraint(name, unit):
    _, _, rule = made("coupled", name, unit=unit, sparsity=0.3)
    scatter(rule)
    rule.advance()
    wanted = rule.expected()
    start = [g.log_alpha.detach().double() for g in rule.gates]
    slopes = [torch.randn_like(a) for a in start]
    family, temperature = rule.gates[0].family, rule.gates[0].temperature
    linear, square = torch.from_numpy(rule.size.linear), torch.from_numpy(rule.size.square)

    def expected(arrays, shift):
        p = [family.keep_prob(a + shift, temperature) for a in arrays]
        kept, spread = torch.stack([q.sum() for q in p]), torch.stack([(q * (1 - q)).sum() for q in p])
        return rule.size.constant + linear @ kept + kept @ square @ kept + square.diagonal() @ spread

    def loss(arrays):
        low, high = -60.0, 60.0
        for _ in range(60):  # to the last bit of a double
            middle = (low + high) / 2
            low, high = (middle, high) if expected(arrays, middle) < wanted else (low, middle)
        return sum((torch.sin(a + low) * s).sum() for a, s in zip(arrays, slopes, strict=True))

    for gate, a, s in zip(rule.gates, start, slopes, strict=True):
        gate.log_alpha.grad = (torch.cos(a) * s).float()
    rule.before_step()
    for n, gate in enumerate(rule.gates):
        for i in range(len(start[n])):
            ends = []
            for sign in (1, -1):
                moved = [a.clone() for a in start]
                moved[n][i] += sign * 1e-5
                ends.append(float(loss(moved)))
            assert float(gate.log_alpha.grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=2e-4)


def test_the_gradient_has_no_share_along_a_common_shift_and_taking_it_out_twice_changes_nothing():
    model, x, rule = made(unit="macs")
    model(x).square().sum().backward()
    rule.before_step()
    once = [g.log_alpha.grad.clone() for g in rule.gates]
    assert abs(sum(float(g.sum()) for g in once)) < 1e-4
    rule.before_step()
    for before, gate in zip(once, rule.gates, strict=True):
        torch.testing.assert_close(gate.log_alpha.grad, before, atol=1e-5, rtol=1e-4)


def test_gates_without_a_gradient():
    model, x, rule = made()
    model(x).square().sum().backward()
    rule.gates[1].log_alpha.grad = None
    rule.before_step()
    assert rule.gates[1].log_alpha.grad is None
    for gate in rule.gates:
        gate.log_alpha.grad = None
    sgd(model).step()
    assert rule.step == 1
    assert on_schedule(rule)


def test_a_gradient_that_is_not_finite_stays_where_it_is():
    model, x, rule = made()
    model(x).square().sum().backward()
    rule.gates[0].log_alpha.grad[0] = torch.nan
    rule.before_step()
    assert rule.gates[1].log_alpha.grad.isfinite().all()


def test_one_gate_that_is_not_a_number_does_not_spread():
    model, _, rule = made()
    with torch.no_grad():
        rule.gates[0].log_alpha[0, 0] = torch.nan
    rule.advance()
    assert int(log_alphas(model).isnan().sum()) == 1


# --- the end ---------------------------------------------------------------------------------------------------------


def test_of_equal_gates_the_first_stay():
    gates = nn.ModuleList([Gate(4), Gate(5)])
    (rule,) = set_budget(gates, Budget(keep=5, steps=2, min_keep=0))
    with torch.no_grad():
        for gate in gates:
            gate.log_alpha.fill_(0.5)
        gates[1].log_alpha[3] = 1.0
    assert [mask.tolist() for mask in rule.support_at(5)] == [[True] * 4, [False] * 3 + [True, False]]


@pytest.mark.parametrize("count", [100, 5_000])
def test_of_equal_gates_that_a_layer_has_to_keep_the_first_stay(count):
    gates = nn.ModuleList([Gate(count), Gate(5)])
    (rule,) = set_budget(gates, Budget(keep=6, steps=2, min_keep=2))
    with torch.no_grad():
        gates[0].log_alpha.fill_(-1.0)
        gates[1].log_alpha.fill_(1.0)
    assert [mask.nonzero().flatten().tolist() for mask in rule.support_at(6)] == [[0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("spec", ["weight", "output", "coupled", "mixed"])
@pytest.mark.parametrize("unit", ["gates", "params"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
def test_what_is_exported_is_never_over_the_budget_and_as_near_as_one_gate(spec, unit, sparsity):
    for seed in range(2):
        torch.manual_seed(seed)
        model, x = mlp(10, 40, 30, 3), torch.randn(4, 10)
        whole = sum(p.numel() for p in model.parameters())
        groups = perceptron_groups(10, 40, 30, 3) if "coupled" in str(SPECS[spec]) else None
        sparsify(model, SPECS[spec], example_inputs=(x,), groups=groups)
        budget, found = Budget(sparsity=sparsity, unit=unit, steps=4), size(model, unit)
        if found.of(found.least(1)) > budget.target(found.whole):
            with pytest.raises(InvalidValueError, match="at least"):
                set_budget(model, budget)
            continue
        (rule,) = set_budget(model, budget)
        scatter(rule, seed)
        train(model, x, sgd(model, 0.01), 6)
        kept = [float(gate.support().sum()) for gate in rule.gates]
        assert rule.finished
        if unit == "gates":
            assert sum(kept) == rule.target == int(rule.size.whole * (1 - sparsity) + 1e-9)
        else:
            inputs = None if spec in ("weight", "output") else (x,)  # with inputs more is cut out
            left = parameters_of(prune(model, example_inputs=inputs), model)
            assert left <= (1 - sparsity) * whole
            largest = rule.size.gradient(np.array(kept) + 1).max()
            assert left > rule.target - (whole if spec == "mixed" else largest)  # what hangs on a cut channel goes, too


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95, 0.98])
def test_weights_end_at_exactly_the_target(sparsity):
    torch.manual_seed(0)
    model, x = mlp(20, 50, 40, 5), torch.randn(4, 20)
    whole = sum(p.numel() for p in model.parameters())
    biases = sum(p.numel() for n, p in model.named_parameters() if "bias" in n)
    budget = Budget(sparsity=sparsity, unit="params", steps=3)
    if (1 - sparsity) * whole < biases + 3:
        with pytest.raises(InvalidValueError, match=f"{biases + 3:,} of {whole:,}"):
            sparsify(model, budget=budget)
        return
    sparsify(model, budget=budget)
    train(model, x, sgd(model), 3)
    assert parameters_of(prune(model), model) == int(whole * (1 - sparsity) + 1e-6)


@pytest.mark.parametrize("min_keep", [0, 1, 4])
def test_the_support_are_the_largest_with_some_of_each_layer(min_keep):
    model, _, rule = made(keep=30, sparsity=None, min_keep=min_keep, automatic=False, steps=1)
    scatter(rule)
    with torch.no_grad():
        rule.gates[0].log_alpha.sub_(20)  # so that without min_keep none of these would stay
    rule.advance()
    forced = [set(g.log_alpha.flatten().topk(min_keep).indices.tolist()) for g in rule.gates]
    values = [(a, n, v) for a, g in enumerate(rule.gates) for n, v in enumerate(g.log_alpha.flatten().tolist())]
    ranked = sorted(((n in forced[a], v, a, n) for a, n, v in values), reverse=True)
    expected = {(a, n) for _, _, a, n in ranked[:30]}
    found = {(a, int(n)) for a, g in enumerate(rule.gates) for n in g.support().flatten().nonzero()}
    assert found == expected
    assert int(rule.gates[0].support().sum()) == min_keep
    assert model.eval() is not None


def test_ties_are_resolved():
    gate = Gate(100)
    (rule,) = set_budget(gate, Budget(keep=37, steps=2, automatic=False))
    rule.advance()
    rule.advance()
    assert int(gate.support().sum()) == 37
    assert len(gate.log_alpha.unique()) == 1


@pytest.mark.parametrize("min_keep", [0, 1])
def test_a_coupled_group_keeps_one_and_that_counts(min_keep):
    torch.manual_seed(0)
    model, x = mlp(5, 12, 8, 3), torch.randn(6, 5)
    least = 5 + 1 + 1 + 1 + 3 + 3
    budget = Budget(keep=least, unit="params", min_keep=min_keep, steps=1)
    sparsify(model, "coupled", example_inputs=(x,), budget=budget)
    train(model, x, sgd(model, 0.01))
    assert sum(p.numel() for p in prune(model, example_inputs=(x,)).parameters()) == least


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("estimator", ["median", "paper", "mean"])
def test_after_the_end_training_is_evaluation_and_pruning_keeps_it(spec, estimator):
    model, x, rule = made(SPECS[spec])
    for gate in rule.gates:
        gate.estimator = estimator
    scatter(rule)
    train(model, x, sgd(model, 0.01), 8)
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    torch.testing.assert_close(prune(model, example_inputs=(x,)).eval()(x), model(x))
    for gate in rule.gates:
        assert torch.equal(gate.value() > 0, gate.support())
        assert float(gate.value()[gate.support()].min().detach()) >= 0.5
    model.train().zero_grad()
    model(x).square().sum().backward()
    for gate in rule.gates:
        assert gate.log_alpha.grad is not None
        assert not gate.log_alpha.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_after_the_end_of_every_family(family):
    model, x, rule = made(GateSpec(family=family))
    scatter(rule)
    train(model, x, sgd(model, 0.01), 8)
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    assert sum(int((g.value() > 0).sum()) for g in rule.gates) == rule.target


def test_after_the_end_the_support_is_not_looked_for_again(monkeypatch):
    model, x, rule = made()
    optimizer = sgd(model, 0.01)
    train(model, x, optimizer, 8)
    model(x)
    monkeypatch.setattr(rule._support, "masks", lambda allowed: pytest.fail("sorted again"))
    train(model, x, optimizer, 3)
    model.eval()(x)


def test_after_the_end_evaluation_without_gradients_comes_first():
    for mode in (torch.inference_mode, torch.no_grad):
        model, x, _ = made()
        optimizer = sgd(model, 0.01)
        train(model, x, optimizer, 8)
        with mode():
            expected = model.eval()(x).clone()
        torch.testing.assert_close(model.train()(x), expected)
        train(model, x, optimizer, 2)


def test_during_training_evaluation_in_inference_mode_comes_first():
    model, x, _ = made()
    optimizer = sgd(model, 0.01)
    train(model, x, optimizer, 2)
    with torch.inference_mode():
        model.eval()(x)
    model(x).sum().backward()


def test_a_new_temperature_after_the_end_reaches_training_too():
    model, x, rule = made()
    scatter(rule)
    train(model, x, sgd(model, 0.01), 8)
    model(x)
    for gate in rule.gates:
        gate.temperature = 0.4
    torch.testing.assert_close(model.train()(x), model.eval()(x))


def test_what_evaluation_keeps_is_never_stale():
    model, x, rule = made(steps=20, automatic=False)

    def fresh():
        model.train()
        return model.eval()(x)

    for change in (
        rule.advance,
        lambda: scatter(rule, 5),
        lambda: rule.gates[-1].log_alpha.detach()[0].add_(9.0),
        lambda: model.load_state_dict(copy.deepcopy(made(steps=20)[0].state_dict())),
        lambda: model.load_state_dict(copy.deepcopy(made(steps=20, seed=3)[0].state_dict()), assign=True),
        lambda: setattr(rule.gates[1], "temperature", 0.3),
        lambda: setattr(rule.gates[1], "estimator", "mean"),
    ):
        model.eval()(x)
        change()
        seen = model(x)
        torch.testing.assert_close(seen, fresh(), rtol=0, atol=0)


# --- checkpoints and copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 3, 8, 10])
@pytest.mark.parametrize("spec", ["weight", "coupled"])
def test_a_checkpoint_resumes_bit_for_bit(stop, spec):
    def run(model, optimizer, x, steps, seed):
        torch.manual_seed(seed)
        train(model, x, optimizer, steps)

    model, x, _ = made(spec, unit="params")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    run(model, optimizer, x, stop, 1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, x, 5, 2)
    other, _, rule = made(spec, unit="params", seed=7)
    resumed = torch.optim.Adam(other.parameters(), lr=0.1)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert rule.step == min(stop, 8)
    run(other, resumed, x, 5, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("save", [nn.Module.state_dict, copy.deepcopy, pickle.dumps])
def test_saving_and_copying_change_no_bit_of_what_follows(save, spec):
    ends = []
    for saves in (False, True):
        model, x, _ = made(spec, unit="params")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(10):
            train(model, x, optimizer)
            kept = save(model) if saves else None
        ends.append(model.state_dict())
    assert kept is not None
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_copy_goes_on_like_the_original():
    model, x, _ = made(unit="params")
    train(model, x, sgd(model), 3)
    other = copy.deepcopy(model)
    for one in (model, other):
        torch.manual_seed(1)
        train(one, x, sgd(one), 3)
    assert torch.equal(log_alphas(model), log_alphas(other))


def test_a_budget_set_after_a_warm_up_resumes_from_its_own_start():
    def warm(shift):
        torch.manual_seed(0)
        model = mlp(5, 12, 8, 3)
        sparsify(model)
        with torch.no_grad():
            for gate in gates_of(model):
                gate.log_alpha.add_(shift)
        return model, set_budget(model, Budget(sparsity=0.5, steps=8))[0]

    (model, rule), (other, its) = warm(-2.0), warm(0.0)
    train(model, torch.randn(2, 5), sgd(model), 3)
    other.load_state_dict(model.state_dict())
    assert (its.step, its.start, its.scheduled) == (rule.step, rule.start, rule.scheduled)


def test_a_deepcopy_has_a_rule_of_its_own():
    model, x, rule = made()
    train(model, x, sgd(model), 2)
    other = copy.deepcopy(model)
    its = gates_of(other)[0].rule
    assert its is not rule
    assert {id(g) for g in its.gates} == set(map(id, gates_of(other)))
    train(other, x, sgd(other), 6)
    assert (rule.step, its.step) == (2, 8)
    assert on_schedule(rule)
    assert on_schedule(its)


def test_other_dtypes():
    model, x, rule = made()
    scatter(rule)
    model.to(torch.bfloat16)
    optimizer = sgd(model, 0.01)
    for _ in range(8):
        train(model, x.bfloat16(), optimizer)
        assert on_schedule(rule)
    train(model, x.bfloat16(), optimizer, 2)
    expected = model.eval()(x.bfloat16())
    torch.testing.assert_close(model.train()(x.bfloat16()), expected)
    model.to(torch.float64)
    torch.testing.assert_close(model.eval()(x.double()), model.train()(x.double()))
    assert sum(int(g.support().sum()) for g in rule.gates) == rule.target


# --- how models run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["weight", "coupled", "example"])
def test_activation_checkpointing(spec):
    grads = []
    for recompute in (False, True):
        model, x, _ = made(SPECS[spec])
        optimizer = sgd(model, 0.01)
        torch.manual_seed(3)
        for _ in range(10):
            optimizer.zero_grad()
            out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
            out.square().sum().backward()
            optimizer.step()
        grads.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", ["coupled", "example"])  # the others in tests/integrations/test_precision.py
def test_compiled(spec):
    torch._dynamo.reset()
    model, x, rule = made(SPECS[spec])
    compiled, optimizer = torch.compile(model, fullgraph=True, backend="aot_eager"), sgd(model, 0.01)
    for _ in range(10):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
        assert on_schedule(rule)
    torch.testing.assert_close(compiled(x), model.eval()(x))
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    expected = prune(model, example_inputs=(x,)).eval()(x)
    model.eval()
    torch.testing.assert_close(compiled(x), expected)


def test_gradients_of_each_example_after_the_end():
    model, x, _ = made()
    train(model, x, sgd(model, 0.01), 8)
    weights = dict(model.named_parameters())
    rest = {k: v for k, v in weights.items() if "log_alpha" not in k}

    def loss(chosen, row):
        return torch.func.functional_call(model, {**weights, **chosen}, (row[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(rest, x)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, grad in each.items():
        torch.testing.assert_close(grad.sum(0), weights[name].grad)


# --- several, and standalone gates -----------------------------------------------------------------------------------


def test_several_budgets_over_parts():
    torch.manual_seed(0)
    model, x = mlp(5, 12, 8, 3), torch.randn(6, 5)
    budgets = {"0": Budget(keep=20, steps=4), "2": Budget(sparsity=0.75, unit="params", steps=6)}
    sparsify(model, budget=budgets)
    first, second, third = (gate.rule for gate in gates_of(model))
    assert third is None
    optimizer = sgd(model)
    for _ in range(6):
        train(model, x, optimizer)
        assert on_schedule(first)
        assert on_schedule(second)
    assert int((model.eval()[0].weight != 0).sum()) == 20
    assert int((model[2].weight != 0).sum()) == 24


def test_a_budget_in_multiply_adds_is_set_with_other_inputs_than_the_gates_were():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    x = torch.randn(4, 7, 5)
    for wrap in (lambda m: m, Wrapped):
        model = mlp(5, 12, 8, 3)
        sparsify(model, "coupled", example_inputs=(x[0],))
        (rule,) = set_budget(wrap(model), Budget(sparsity=0.5, unit="macs", steps=4), example_inputs=(x,))
        assert rule.size.whole == 7 * (5 * 12 + 12 * 8 + 8 * 3)
        train(model, x, sgd(model, 0.01), 4)
        small = prune(model, example_inputs=(x,))
        macs = 7 * sum(m.weight.numel() for m in small if isinstance(m, nn.Linear))
        largest = rule.size.gradient(np.array([float(g.support().sum()) for g in rule.gates]) + 1).max()
        assert rule.target - largest < macs <= rule.target


def test_standalone_gates():
    gate = Gate((4, 5))
    optimizer = torch.optim.Adam([gate.log_alpha], lr=0.5)
    (rule,) = set_budget(gate, Budget(keep=7, steps=5))
    worth = torch.randperm(20).view(4, 5).float()
    for _ in range(5):
        optimizer.zero_grad()
        (-(gate() * worth).sum()).backward()
        optimizer.step()
        assert on_schedule(rule)
    assert int(gate.support().sum()) == 7
    assert torch.equal(gate.train()(), gate.eval()())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"sparsity": 0.5, "keep": 3}, "exactly one"),
        ({"sparsity": 0}, "share to remove"),
        ({"sparsity": 1}, "share to remove"),
        ({"sparsity": 1.0}, "share to remove"),
        ({"sparsity": float("nan")}, "share to remove"),
        ({"sparsity": True}, "share to remove"),
        ({"keep": 0}, "number to keep"),
        ({"keep": True}, "number to keep"),
        ({"keep": 1.5}, "number to keep"),
        ({"keep": -1}, "number to keep"),
        ({"keep": 5, "unit": "param"}, "params"),
        ({"keep": 5, "schedule": "cubik"}, "cubic"),
        ({"keep": 5, "schedule": None}, "schedule must be known"),
        ({"keep": 5, "steps": 0.5}, "steps must be"),
        ({"keep": 5, "steps": -1}, "steps must be"),
        ({"keep": 5, "steps": float("nan")}, "steps must be"),
        ({"keep": 5, "min_keep": -1}, "min_keep"),
        ({"keep": 5, "min_keep": 1.5}, "min_keep"),
    ],
)
def test_budgets_that_cannot_be(options, message):
    with pytest.raises(InvalidValueError, match=message):
        Budget(**options)


def untouched(model):
    """What a call that failed must leave; hanging gates in and taking them out counts up a tensor's version."""
    modules, parameters, buffers, hooks = fingerprint(model)
    return modules, [(name, key, grad) for name, key, _, grad in parameters], [b[:2] for b in buffers], hooks


def failing(*_):
    raise ZeroDivisionError("mine")


REFUSED = {
    "unreachable": ("weight", Budget(sparsity=0.9, unit="params"), InvalidValueError, "at least .* 26 of 203, .*0.87"),
    "whole": ("weight", Budget(keep=180), InvalidValueError, "less than the whole"),
    "more than the whole": ("weight", Budget(keep=10_000, unit="params"), InvalidValueError, "less than the whole"),
    "min_keep": ("weight", Budget(keep=20, min_keep=30), InvalidValueError, "smaller min_keep"),
    "no inputs": ("weight", Budget(sparsity=0.5, unit="macs"), SpecError, "example_inputs"),
    "pattern": ("weight", {"0": Budget(keep=9), "nothing": Budget(keep=9)}, SpecError, "nothing"),
    "schedule": ("weight", Budget(keep=9, schedule=failing), ZeroDivisionError, "mine"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_refused_budget_leaves_the_model_as_it_was(case, earlier):
    spec, budget, kind, message = REFUSED[case]
    model, x = mlp(5, 12, 8, 3), torch.randn(2, 5)
    if earlier:
        sparsify(model, {"0": "weight"})
        spec = {"2": spec, "4": spec}
    state, before, expected = copy.deepcopy(model.state_dict()), untouched(model), model.eval()(x)
    model.train()
    with pytest.raises(kind, match=message):
        sparsify(model, spec, budget=budget)
    assert untouched(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(gate.rule is None for gate in gates_of(model))
    assert torch.equal(model.eval()(x), expected)


def test_a_refused_budget_of_coupled_gates_leaves_the_model_as_it_was():
    model, x = mlp(5, 12, 8, 3), torch.randn(2, 5)
    before = untouched(model)
    parts = {"0": Budget(sparsity=0.3, unit="params"), "2": Budget(sparsity=0.3, unit="params")}
    with pytest.raises(SpecError, match="share no tensor"):
        sparsify(model, "coupled", example_inputs=(x,), budget=parts)
    assert untouched(model) == before
    with pytest.raises(InvalidValueError, match="at least"):
        sparsify(model, "coupled", example_inputs=(x,), budget=Budget(sparsity=0.99, unit="params"))
    assert untouched(model) == before


def test_coupled_groups_that_share_no_tensor_have_budgets_of_their_own():
    model, x = nn.Sequential(mlp(5, 12, 4), nn.Tanh(), mlp(4, 9, 3)), torch.randn(2, 5)
    first, _, last = channel_groups(model, (x,))  # without the one between the two perceptrons
    parts = {"0.*": Budget(keep=61, unit="params", steps=0), "2.*": Budget(keep=43, unit="params", steps=0)}
    sparsify(model, "coupled", example_inputs=(x,), groups=(first, last), budget=parts)
    small = prune(model, example_inputs=(x,))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (small[0], small[2])]
    assert (small[0][0].out_features, small[2][0].out_features) == (6, 5)
    assert sizes == [6 * 6 + 4 * 7, 5 * 5 + 3 * 6]


def test_gates_have_one_budget():
    model, _, _ = made()
    with pytest.raises(StateError, match="gates that have budgets"):
        set_budget(model, Budget(keep=9))
    with pytest.raises(StateError, match="none"):
        set_budget(mlp(2, 2), Budget(keep=9))


def test_a_standalone_gate_has_no_parameters():
    with pytest.raises(SpecError, match="standalone"):
        set_budget(Gate(9), Budget(keep=3, unit="params"))


def test_the_best_that_can_be_reached_can_be():
    for spec, unit in itertools.product(("weight", "coupled"), ("gates", "params")):
        torch.manual_seed(0)
        model, x = mlp(5, 12, 8, 3), torch.randn(2, 5)
        with pytest.raises(InvalidValueError) as caught:
            sparsify(model, spec, example_inputs=(x,), budget=Budget(keep=1, unit=unit))
        least = int(str(caught.value).split("size of ")[1].split(" of ")[0])
        sparsify(model, spec, example_inputs=(x,), budget=Budget(keep=least, unit=unit, steps=2))
        train(model, x, sgd(model, 0.01), 2)
        assert F.relu(model.eval()(x)).isfinite().all()
        assert gates_of(model)[0].rule.size.of(gates_of(model)[0].rule.size.least(1)) == least


# --- the prior -------------------------------------------------------------------------------------------------------


def test_larger_weights_start_more_open_and_the_expected_size_is_that_of_equal_starts():
    torch.manual_seed(0)
    model = mlp(6, 10, 4)
    plain = copy.deepcopy(model)
    sparsify(model, budget=Budget(sparsity=0.5, prior=2.0))
    sparsify(plain, budget=Budget(sparsity=0.5, prior=0.0))
    rule, other = gates_of(model)[0].rule, gates_of(plain)[0].rule
    assert rule.start == pytest.approx(other.start, rel=1e-5)
    assert rule.expected() == rule.start
    weights = torch.cat([layer.parametrizations.weight.original.flatten().abs() for layer in (model[0], model[2])])
    found = torch.cat([gate.log_alpha.detach().flatten() for gate in gates_of(model)])
    z = (weights.log() - weights.log().mean()) / weights.log().std(correction=0)
    expected = 2 * z.clamp(-3, 3)
    torch.testing.assert_close(found - found.mean(), expected - expected.mean())
    assert all(bool((gate.log_alpha == gate.log_alpha.flatten()[0]).all()) for gate in gates_of(plain))


@pytest.mark.parametrize("spec", ["output", "input", "coupled", (2, 2)])
def test_the_prior_of_channels_is_the_size_of_the_weights_behind_them_within_their_layer(spec):
    torch.manual_seed(0)
    model = mlp(6, 10, 4)
    with torch.no_grad():
        model[2].weight.mul_(100)  # another scale must not close the other layer
    sparsify(model, spec, example_inputs=(torch.randn(2, 6),), budget=Budget(sparsity=0.5))
    site = next(s for s in iter_sites(model) if s.name == "2.weight")
    squares = site.weight.detach().square()
    sizes = {
        "output": lambda: squares.mean(1),
        "input": lambda: squares.mean(0),
        "coupled": lambda: squares.mean(0),
        (2, 2): lambda: squares.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).mean((1, 3)),
    }[spec]()
    gate = site.gating.gates[0]
    assert torch.equal(gate.log_alpha.flatten().argsort(), sizes.flatten().argsort())
    spreads = [g.log_alpha.detach().std(correction=0) for g in gates_of(model) if g.log_alpha.numel() > 4]
    assert all(0.9 < float(spread) < 1.1 for spread in spreads)


def test_weights_that_are_zero_or_alike_have_a_prior_too():
    model = mlp(6, 10, 4)
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[2].weight.fill_(0.5)
    sparsify(model, budget=Budget(sparsity=0.5))
    log_alpha = gates_of(model)[0].log_alpha.detach()
    assert all(bool(g.log_alpha.isfinite().all()) for g in gates_of(model))
    assert log_alpha[:3].max() < log_alpha[3:].max()
    alike = nn.Sequential(nn.Linear(4, 3))
    nn.init.constant_(alike[0].weight, 0.3)
    sparsify(alike, budget=Budget(sparsity=0.5))
    assert gates_of(alike)[0].rule.expected() == pytest.approx(gates_of(alike)[0].rule.start)


def test_a_prior_that_is_no_number_is_refused():
    for prior in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidValueError, match="prior must not be negative"):
            Budget(keep=3, prior=prior)


@pytest.mark.parametrize(
    ("kind", "name"), [(BudgetRule, "start_from"), (LagrangianRule, "start_from"), (LagrangianRule, "add_multipliers")]
)
def test_an_interrupted_call_leaves_the_gates_as_they_were(monkeypatch, kind, name):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    sparsify(model, "weight")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    limits = [one.gate.limits for one in iter_gated(model)]
    original = getattr(kind, name)

    def interrupted(rule, *args):
        original(rule, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, name, interrupted)
    method = "lagrangian" if kind is LagrangianRule else "shift"
    with pytest.raises(KeyboardInterrupt):
        set_budget(model, Budget(sparsity=0.5, steps=3, method=method))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [(one.gate.rule, one.gate.limits) for one in iter_gated(model)] == [(None, limit) for limit in limits]
