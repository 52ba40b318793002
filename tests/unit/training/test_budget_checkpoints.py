"""A checkpoint goes on under the same budget only; any other is refused before anything is loaded."""

import copy
import pickle

import pytest
import torch
from mutations import mutations
from torch import nn

from l0hooks import Budget, SampleGate, iter_gates, prune, set_budget, sparsify
from l0hooks.errors import StateError

X = torch.randn(4, 5)
BUDGET = {"sparsity": 0.5, "steps": 8}


def made(budget=None, spec="weight", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    sparsify(model, spec, example_inputs=(X,), budget=None if budget is None else Budget(**budget))
    return model


def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def held(model):
    states = {name: value.clone() for name, value in model.state_dict().items()}
    return states, [id(parameter) for parameter in model.parameters()]


def same(one, other):
    return one[1] == other[1] and all(torch.equal(value, other[0][name]) for name, value in one[0].items())


OTHERS = {
    "without one": (None, "no budget"),
    "other steps": ({**BUDGET, "steps": 9}, "in 9 steps"),
    "another size": ({**BUDGET, "sparsity": 0.6}, "38 of 96 gates"),
    "another unit": ({**BUDGET, "unit": "params"}, "of 111 params"),
    "another schedule": ({**BUDGET, "schedule": "linear"}, "schedule linear"),
    "another method": ({**BUDGET, "method": "lagrangian"}, "method lagrangian"),
    "another least": ({**BUDGET, "min_keep": 2}, "min_keep 2"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("into", ["the other", "its own"])
def test_a_checkpoint_of_another_budget_is_refused_before_anything_is_loaded(name, into, assign, strict):
    budget, words = OTHERS[name]
    model, other = train(made(BUDGET), 3), made(budget, seed=1)
    if into == "its own":
        model, other = other, model
    before = held(other)
    with pytest.raises(StateError, match="load_state_dict: a checkpoint must be of gates under") as caught:
        other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign, strict=strict)
    assert words in str(caught.value)
    assert "48 of 96 gates in 8 steps" in str(caught.value) or into == "the other"
    assert same(held(other), before)


@pytest.mark.parametrize("through", ["as it is", "a deepcopy", "a pickle", "a wrapper"])
def test_it_is_refused_through_copies_and_wrappers_too(through):
    model, other = train(made(BUDGET), 3), made(seed=1)
    state = model.state_dict()
    if through == "a deepcopy":
        other = copy.deepcopy(other)
    elif through == "a pickle":
        other = pickle.loads(pickle.dumps(other))
    elif through == "a wrapper":
        other, state = nn.Sequential(other), {f"0.{name}": value for name, value in state.items()}
    before = held(other)
    with pytest.raises(StateError, match="under the same budget"):
        other.load_state_dict(state)
    assert same(held(other), before)


@pytest.mark.parametrize("spec", ["weight", "coupled", "output"])
@pytest.mark.parametrize("assign", [False, True])
def test_the_same_budget_goes_on(spec, assign):
    model, other = train(made(BUDGET, spec), 3), made(BUDGET, spec, seed=1)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    (rule,) = {gate.rule for _, gate in iter_gates(other)}
    assert rule.step == 3
    train(other, 5)
    assert rule.finished


def test_log_odds_without_their_step_are_refused():
    model, other = train(made(BUDGET), 3), made(BUDGET, seed=1)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    before = held(other)
    with pytest.raises(StateError, match="log-odds under a budget must come with its step"):
        other.load_state_dict(state, strict=False)
    assert same(held(other), before)


def test_a_budget_may_be_set_after_loading():
    other = made(seed=1)
    other.load_state_dict(made().state_dict())
    set_budget(other, Budget(**BUDGET))
    assert next(iter_gates(other))[1].rule.step == 0


def test_dense_weights_load_beside_a_budget():
    model = train(made(BUDGET), 3)
    dense = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    model.load_state_dict(dense.state_dict())
    assert next(iter_gates(model))[1].rule.step == 3
    assert torch.equal(model[0].parametrizations.weight.original, dense[0].weight)


def test_a_pruned_model_has_no_hook_left():
    small = prune(made(spec="coupled"), example_inputs=(X,))
    assert not any(module._load_state_dict_pre_hooks for module in small.modules())


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_an_extra_state_that_was_changed_is_refused(budget):
    model = train(made(budget), 2)
    name, gate = next(iter_gates(model))
    key = f"{name}._extra_state"
    state = copy.deepcopy(model.state_dict())
    before = held(model)
    changes = [value for _, value in mutations(state[key].numpy())] + [value for _, value in mutations([])]
    changes += [torch.as_tensor(value) for value in changes if hasattr(value, "dtype") and value.dtype.kind in "fi"]
    for place in range(len(state[key])):
        for new in (float("nan"), float("inf"), -1.0, 0.5, 1e300):
            changes.append(state[key].clone())
            changes[-1][place] = new
    refused = 0
    for changed in changes:
        try:
            model.load_state_dict({**copy.deepcopy(state), key: changed})
        except StateError:
            refused += 1
            assert same(held(model), before)
        assert isinstance(gate.temperature, float)
        assert 0 < gate.temperature < float("inf")
        assert isinstance(gate.scheduled_steps, int)
        model.load_state_dict(copy.deepcopy(state))
    assert refused > 0.8 * len(changes)


def test_a_sample_gate_of_other_steps_is_refused():
    with pytest.raises(StateError, match=r"(?s)under the same budget.*in 5 steps.*in 9 steps"):
        SampleGate(20, k=4, steps=5).load_state_dict(SampleGate(20, k=4, steps=9).state_dict())
