"""A schedule that has not ended: what is said of it, and ``finish_budget``."""

import pytest
import torch
from test_budget import made, sgd, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

from l0hooks import Budget, Gate, finish_budget, param_groups, prune, set_budget, sparsify, summary
from l0hooks.errors import L0HooksWarning, StateError

UNFINISHED = "the schedule of a budget has not ended"


@pytest.mark.parametrize("spec", ["weight", "coupled"])
@pytest.mark.parametrize("method", ["shift", "lagrangian"])
def test_prune_names_target_step_and_size_of_a_schedule_that_has_not_ended(spec, method):
    model, x, rule = made(spec, unit="params", method=method, steps=100)
    with pytest.warns(L0HooksWarning, match=UNFINISHED) as caught:
        _, report = prune(model, example_inputs=(x,), return_report=True)
    (message,) = (str(one.message) for one in caught)
    kept = report.model_parameters_kept
    assert f"expected: {rule.target:,.0f} params after 100 steps" in message
    assert f"got: {kept:,} params at step 0" in message
    assert "finish_budget(model)" in message
    assert kept > rule.target
    assert f"step 0 of 100, {kept:,} of {report.model_parameters:,} params kept, the target is" in str(report)
    assert report.to_dict()["budgets"][0]["target"] == rule.target
    assert str(summary(model)).count("budget not reached") == 1


@pytest.mark.parametrize("spec", ["weight", "output", "coupled"])
@pytest.mark.parametrize("method", ["shift", "lagrangian"])
@pytest.mark.parametrize("steps", [0, 3])
def test_finish_budget_gives_the_size_that_the_schedule_would_have_given(spec, method, steps):
    model, x, rule = made(spec, unit="params", method=method, steps=100)
    optimizer = torch.optim.SGD(nn.ParameterList(gate.log_alpha for gate in rule.gates), lr=0.5)
    if method == "shift":
        train(model, x, optimizer, steps)
    order = torch.cat([gate.log_alpha.detach().flatten() for gate in rule.gates]).argsort()
    assert finish_budget(model) == [rule]
    assert rule.finished
    assert torch.equal(torch.cat([gate.log_alpha.detach().flatten() for gate in rule.gates]).argsort(), order)
    if method == "shift":
        assert rule.expected() == pytest.approx(rule.target, rel=1e-5)
    _, report = prune(model, example_inputs=(x,), return_report=True)
    assert rule.target * 0.8 < report.model_parameters_kept <= rule.target
    assert "not reached" not in str(report)
    before = [gate.log_alpha.clone() for gate in rule.gates]
    train(model, x, torch.optim.Adam(param_groups(model, lr=0.1, gate_lr=0.1)), 2)
    assert all(torch.equal(gate.log_alpha, log_alpha) for gate, log_alpha in zip(rule.gates, before, strict=True))
    torch.testing.assert_close(model.train()(x), model.eval()(x))


def test_finish_budget_finishes_every_budget_once_and_leaves_those_that_have_ended():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsify(model, budget={"0": Budget(keep=30, steps=2), "2": Budget(keep=9, steps=50)})
    train(model, torch.randn(4, 8), sgd(model), 4)
    first = model[0].weight.clone()
    one, other = finish_budget(model)
    assert (one.step, other.step) == (2, 50)
    assert torch.equal(model[0].weight, first)
    model.eval()
    assert [int(layer.weight.count_nonzero()) for layer in model[::2]] == [30, 9]


def test_finish_budget_refuses_models_without_budgets_and_gates_that_are_no_numbers():
    with pytest.raises(StateError, match=r"must hold gates with a budget(?s:.)*no gates"):
        finish_budget(nn.Linear(2, 2))
    gate = Gate(4)
    with pytest.raises(StateError, match=r"must hold gates with a budget(?s:.)*gates without budgets"):
        finish_budget(gate)
    (rule,) = set_budget(gate, Budget(keep=2, steps=5))
    with torch.no_grad():
        gate.log_alpha[0] = torch.nan
    with pytest.raises(StateError, match="NaN"):
        finish_budget(gate)
    assert rule.step == 0


def test_an_averaged_copy_whose_rule_stands_still_is_named_and_can_be_finished():
    model, x, rule = made(steps=4)
    averaged = AveragedModel(model)
    optimizer = sgd(model)
    for _ in range(6):
        train(model, x, optimizer)
        averaged.update_parameters(model)
    assert rule.finished
    with pytest.warns(L0HooksWarning, match="at step 0"):
        prune(averaged.module)
    finish_budget(averaged)
    assert sum(int(layer.weight.count_nonzero()) for layer in prune(averaged.module)[::2]) == rule.target


@pytest.mark.parametrize("spec", ["weight", "output", "coupled"])
def test_prune_says_when_the_order_of_equal_gates_has_decided(spec):
    model, x, rule = made(spec, prior=0.0)
    finish_budget(model)
    gates, kept = sum(gate.log_alpha.numel() for gate in rule.gates), int(rule.target)
    with pytest.warns(
        L0HooksWarning, match=rf"equal log_alpha(?s:.)*got: {gates} gates that are equal, of which {kept}"
    ):
        prune(model, example_inputs=(x,))
    with torch.no_grad():
        for gate in rule.gates:
            gate.log_alpha += torch.rand_like(gate.log_alpha)
    prune(model, example_inputs=(x,))


# --- an optimiser that does not hold the gates ---------------------------------------------------------------------


def weights_of(model):
    return [p for name, p in model.named_parameters() if not name.endswith("log_alpha")]


def steps_of(model, x, optimizer, *, closure=False):
    def work():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        if closure:
            optimizer.step(work)
        else:
            work()
            optimizer.step()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_an_optimizer_built_before_sparsify_is_told_once_at_its_first_step(closure, stepped):
    model, x = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if stepped:
        steps_of(model, x, optimizer)
    sparsify(model, budget=Budget(keep=20, steps=5))
    with pytest.warns(L0HooksWarning, match="no optimizer holds the gates") as caught:
        steps_of(model, x, optimizer, closure=closure)
    (message,) = (str(one.message) for one in caught)
    assert "expected: 20 gates after 5 steps" in message
    assert "at step 0" in message
    assert "param_groups" in message
    assert caught[0].filename == __file__


def test_an_optimizer_is_not_told_where_another_one_holds_the_gates():
    model, x, rule = made()
    other = torch.optim.SGD([gate.log_alpha for gate in rule.gates], lr=0.1)
    steps_of(model, x, torch.optim.SGD(weights_of(model), lr=0.1))  # in the meantime the other has not stepped
    other.step()
    assert rule.step == 1


@pytest.mark.parametrize("why", ["manual", "finished", "frozen", "another model"])
def test_an_optimizer_is_not_told_of_gates_that_no_optimizer_needs_to_hold(why):
    model, x, rule = made(automatic=why != "manual")
    trained = nn.Linear(5, 2) if why == "another model" else model
    if why == "finished":
        finish_budget(model)
    for gate in rule.gates if why == "frozen" else ():
        gate.log_alpha.requires_grad_(False)
    steps_of(trained, x, torch.optim.SGD(weights_of(trained), lr=0.1))


def test_two_budgets_one_of_which_is_held():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsify(model, budget={"0": Budget(keep=30, steps=9), "2": Budget(keep=9, steps=50)})
    gate = model[0].parametrizations.weight[0].gate
    with pytest.warns(L0HooksWarning, match=r"expected: 9 gates after 50 steps\n"):
        steps_of(model, torch.randn(4, 8), torch.optim.SGD([gate.log_alpha, *weights_of(model)], lr=0.1))
