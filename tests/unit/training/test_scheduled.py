"""Temperatures and strengths that follow a schedule: one step for each step of an optimiser, and they resume."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from l0hooks import (
    Budget,
    Gate,
    Scheduled,
    iter_gates,
    param_groups,
    penalty,
    set_budget,
    sparsify,
    temperature_schedule,
)
from l0hooks.errors import InvalidValueError, SpecError, StateError
from l0hooks.schedules import cosine, cubic, exponential, linear


def network(spec="weight", **settings):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    sparsify(model, spec, **settings)
    return model


def sgd(model):
    return torch.optim.SGD(param_groups(model, lr=0.01, gate_lr=0.1), momentum=0.9)


def train(model, optimizer, steps, strength=None):
    for _ in range(steps):
        optimizer.zero_grad()
        (
            model(torch.randn(8, 4)).square().mean() + penalty(model, l0=0.1 if strength is None else strength.value)
        ).backward()
        optimizer.step()


def temperatures(model):
    return [gate.temperature for _, gate in iter_gates(model)]


# --- temperatures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, cosine, cubic, exponential])
def test_the_temperature_is_the_schedules_value_at_every_step(make):
    model, schedule = network(), make(1.0, 0.25, 5)
    temperature_schedule(model, schedule)
    optimizer = sgd(model)
    for step in range(8):
        assert temperatures(model) == [schedule(step)] * 2
        train(model, optimizer, 1)


def test_only_steps_of_the_optimiser_count():
    model = network()
    temperature_schedule(model, linear(1.0, 0.5, 10))
    optimizer = sgd(model)
    for _ in range(3):
        model(torch.randn(8, 4)).sum().backward()
    model.eval()(torch.randn(8, 4))
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()
    assert temperatures(model) == [1.0, 1.0]
    optimizer.step()
    assert temperatures(model) == pytest.approx([0.95, 0.95])


def test_patterns_give_parts_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    sparsify(model, "weight")
    temperature_schedule(model, {"0": linear(1.0, 0.0001, 2), "[01]": linear(0.8, 0.4, 2)})
    assert temperatures(model) == [1.0, 0.8, pytest.approx(2 / 3)]
    train(model, sgd(model), 2)
    assert temperatures(model) == [0.0001, 0.4, pytest.approx(2 / 3)]


def test_calls_on_disjoint_parts_add_up_and_a_new_schedule_starts_anew():
    model = network()
    temperature_schedule(model, {"0": linear(1.0, 0.5, 2)})
    optimizer = sgd(model)
    train(model, optimizer, 1)
    temperature_schedule(model, {"2": linear(0.9, 0.1, 2)})
    train(model, optimizer, 1)
    assert temperatures(model) == [0.5, 0.5]
    temperature_schedule(model, linear(2.0, 1.0, 2))
    train(model, optimizer, 1)
    assert temperatures(model) == [1.5, 1.5]


def test_coupled_and_standalone_gates_follow_too():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    sparsify(model, "coupled", example_inputs=(torch.zeros(1, 4),))
    whole = nn.ModuleDict({"model": model, "select": Gate(3)})
    temperature_schedule(whole, linear(1.0, 0.5, 2))
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    optimizer.step()
    assert temperatures(whole) == [0.75, 0.75]


@pytest.mark.parametrize("stop", [0, 3, 9])
def test_a_run_resumes_with_its_temperature_and_step(stop):
    model = network()
    temperature_schedule(model, cosine(1.0, 0.2, 8))
    optimizer = sgd(model)
    train(model, optimizer, stop)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(1)
    train(model, optimizer, 3)
    again = network()
    temperature_schedule(again, cosine(1.0, 0.2, 8))
    second = sgd(again)
    again.load_state_dict(states[0])
    second.load_state_dict(states[1])
    assert temperatures(again) == [cosine(1.0, 0.2, 8)(stop)] * 2
    torch.manual_seed(1)
    train(again, second, 3)
    assert temperatures(again) == temperatures(model) == [cosine(1.0, 0.2, 8)(stop + 3)] * 2
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_copy_has_its_own_step():
    model = network()
    temperature_schedule(model, linear(1.0, 0.5, 10))
    twin = copy.deepcopy(model)
    train(twin, sgd(twin), 2)
    assert temperatures(model) == [1.0, 1.0]
    assert temperatures(twin) == [0.9, 0.9]


@pytest.mark.parametrize("method", ["shift", "lagrangian"])
def test_a_support_that_is_fixed_keeps_its_temperature(method):
    model = network(budget=Budget(sparsity=0.5, steps=3, method=method))
    temperature_schedule(model, linear(1.0, 0.4, 6))
    optimizer = sgd(model)
    for step in range(5):
        optimizer.zero_grad()
        (model(torch.randn(8, 4)).square().mean() + penalty(model, budget=1.0)).backward()
        optimizer.step()
        if step == 2:
            held = [gate().detach().clone() for _, gate in iter_gates(model)]
    assert temperatures(model) == pytest.approx([0.7, 0.7])
    for (_, gate), value in zip(iter_gates(model), held, strict=True):
        assert torch.equal(gate(), value)
        assert torch.equal(gate.eval()(), value)


def test_the_shift_meets_the_schedule_at_the_new_temperature():
    model = network(budget=Budget(sparsity=0.5, steps=10))
    temperature_schedule(model, linear(2.0, 0.2, 10))
    optimizer, rule = sgd(model), next(iter_gates(model))[1].rule
    for _ in range(10):
        train(model, optimizer, 1)
        assert rule.expected() == pytest.approx(rule.scheduled, rel=1e-4)


def test_a_bad_schedule_is_refused_and_changes_nothing():
    model = network()
    before = temperatures(model)
    with pytest.raises(InvalidValueError, match=r"temperature_schedule: (.|\n)*0\.0"):
        temperature_schedule(model, {"2": linear(1.0, 0.5, 2), "0": linear(0.0, 1.0, 2)})
    assert temperatures(model) == before
    assert all(gate.schedule is None for _, gate in iter_gates(model))


def test_a_schedule_that_turns_bad_is_refused_at_that_step():
    gate = Gate(3)
    temperature_schedule(gate, linear(1.0, 0.0, 2))
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    optimizer.step()
    with pytest.raises(InvalidValueError, match=r"temperature(.|\n)*got: 0\.0|temperature(.|\n)*0\.0"):
        optimizer.step()
    assert (gate.temperature, gate.scheduled_steps) == (0.5, 1)


def test_models_without_gates_and_patterns_without_match_are_refused():
    with pytest.raises(StateError, match=r"temperature_schedule: the model must hold gates"):
        temperature_schedule(nn.Linear(2, 2), linear(1.0, 0.5, 2))
    with pytest.raises(SpecError, match=r"temperature_schedule(.|\n)*nothing"):
        temperature_schedule(network(), {"nothing": linear(1.0, 0.5, 2)})


# --- strengths ------------------------------------------------------------------------------------------------------


def test_a_strength_counts_the_steps_of_its_optimiser():
    model = network()
    optimizer = sgd(model)
    strength = Scheduled(linear(0.0, 0.4, 4), optimizer)
    for step in range(6):
        assert strength.steps == step
        assert strength.value == linear(0.0, 0.4, 4)(step)
        penalty(model, l0=strength.value).backward()  # passes that accumulate do not count
        train(model, optimizer, 1, strength)


def test_a_strength_can_be_advanced_by_hand():
    strength = Scheduled(linear(0.0, 1.0, 4))
    train(model := network(), sgd(model), 2, strength)
    assert strength.value == 0.0
    strength.step()
    assert (strength.value, strength.steps) == (0.25, 1)
    assert repr(strength) == "Scheduled(value=0.25, steps=1)"


def test_several_strengths_count_for_themselves():
    first, second = Scheduled(linear(0.0, 1.0, 4)), Scheduled(cosine(1.0, 0.0, 2))
    first.step()
    assert (first.value, second.value) == (0.25, 1.0)
    twin = copy.deepcopy(first)
    twin.step()
    assert (first.value, twin.value) == (0.25, 0.5)


def test_a_strength_resumes():
    strength = Scheduled(linear(0.0, 1.0, 4))
    for _ in range(3):
        strength.step()
    again = Scheduled(linear(0.0, 1.0, 4))
    again.load_state_dict(strength.state_dict())
    assert again.value == 0.75
    strength.step()
    assert again.value == 0.75  # a state is a copy


@pytest.mark.parametrize("state", [{}, {"steps": -1}, {"steps": 1.5}, {"steps": 1, "more": 2}])
def test_a_state_of_something_else_is_refused(state):
    strength = Scheduled(linear(0.0, 1.0, 4))
    with pytest.raises(InvalidValueError, match=r"must be a Scheduled's(.|\n)*" + re.escape(str(state))):
        strength.load_state_dict(state)
    assert strength.steps == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_counts_for_no_schedule(fused):
    gate = Gate(6)
    (rule,) = set_budget(gate, Budget(keep=2, steps=9, schedule="linear"))
    temperature_schedule(gate, linear(1.0, 0.5, steps=10))
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1, fused=fused)
    strength = Scheduled(linear(0.0, 1.0, steps=10), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, True, False):
        optimizer.zero_grad()
        before = gate.log_alpha.detach().clone()
        scaler.scale((gate() * torch.arange(6.0)).sum()).backward()
        if bad:
            gate.log_alpha.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(gate.log_alpha, before) == bad
    assert (rule.step, gate.scheduled_steps, strength.steps) == (2, 2, 2)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_counts_the_steps_of_the_optimizer_that_came_with_it(copied):
    gate = Gate(4)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    strength = Scheduled(linear(0.0, 1.0, 10), optimizer)
    for first in ((strength, optimizer), (optimizer, strength)):
        again = copied(first)
        its, steps = (again[0], again[1].step) if first[0] is strength else (again[1], again[0].step)
        before = strength.steps
        steps(), steps()
        assert (its.steps, strength.steps) == (before + 2, before)
    optimizer.step()
    assert strength.steps == 1


def test_a_copy_without_an_optimizer_counts_its_own_steps():
    again = copy.deepcopy(Scheduled(linear(0.0, 1.0, 10)))
    again.step()
    assert again.value == 0.1
