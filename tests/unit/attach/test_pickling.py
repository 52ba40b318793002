"""A gated model that went through a pickle is the model that it was, and trains on."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from l0hooks import (
    Budget,
    FeatureGate,
    GateSpec,
    SampleGate,
    iter_gates,
    param_groups,
    penalty,
    prune,
    set_budget,
    sparsify,
    temperature_schedule,
)
from l0hooks.schedules import cosine, cubic, exponential, linear
from l0hooks.training.budget_rule import BudgetRule
from tests.shared.coupled_models import MODELS


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Rebuilt(nn.Linear):
    """A layer that says itself what a pickle of it is: how it is built, and nothing else."""

    def __reduce__(self):
        return type(self), (self.in_features, self.out_features)


class Counting(nn.Linear):
    """A layer with a state of its own."""

    def __getstate__(self):
        return {**self.__dict__, "saved": True}


def plain():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def build(name):
    """A gated model under the name of what is special about it."""
    torch.manual_seed(0)
    if name == "tied":
        model = Tied()
        sparsify(model)
    elif name == "coupled":
        model = plain()
        sparsify(model, "coupled", example_inputs=(torch.zeros(2, 5),))
    elif name == "example noise":
        model = plain()
        sparsify(model, GateSpec(granularity="coupled", noise="example"), example_inputs=(torch.zeros(2, 5),))
    elif name == "lagrangian":
        model = plain()
        sparsify(model, budget=Budget(sparsity=0.5, steps=6, method="lagrangian"))
    elif name == "other parametrizations":
        model = plain()
        parametrize.register_parametrization(model[0], "bias", nn.Softplus(), unsafe=True)
        sparsify(model, {"0": "weight"})
    elif name == "feature gate":
        model = nn.Sequential(FeatureGate(5, k=3), *plain())
        sparsify(model, {"1": "output"})
    else:
        model = plain()
        sparsify(model, {"0": "output", "2": "weight"})
        if name == "budget":
            set_budget(model, Budget(sparsity=0.5, steps=6))
        if name == "schedule":
            temperature_schedule(model, exponential(0.7, 0.1, steps=9))
    return model


NAMES = (
    *("gates", "budget", "lagrangian", "schedule", "coupled", "example noise", "tied"),
    *("feature gate", "other parametrizations"),
)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def train(model, steps, optimizer=None):
    groups = param_groups(model, lr=0.01, gate_lr=0.1)
    optimizer = torch.optim.SGD(groups) if optimizer is None else optimizer
    priced = any(gate.multipliers is not None for _, gate in iter_gates(model))
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(torch.randn(4, 5)).square().mean() + penalty(model, l0=1e-3)
        loss = loss + penalty(model, budget=1.0) if priced else loss
        loss.backward()
        optimizer.step()


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(one, other):
    first, second = state_of(one), state_of(other)
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("through", [through_pickle, through_torch, copy.deepcopy])
@pytest.mark.parametrize("name", NAMES)
def test_what_comes_back_is_the_model_and_trains_on(name, through):
    model = build(name)
    train(model, 2)
    x = torch.randn(3, 5)
    expected = model.eval()(x).detach()
    twin = through(model)
    assert_same_state(model, twin)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    train(model, 3)
    train(twin, 3)  # the same seeds, hence the same noise
    assert_same_state(model, twin)
    assert [len(g["params"]) for g in param_groups(twin, lr=1, gate_lr=1)] == [
        len(g["params"]) for g in param_groups(model, lr=1, gate_lr=1)
    ]
    if name == "feature gate":
        return  # prune leaves standalone gates to their own ``select``
    inputs = (x,) if name in ("coupled", "example noise") else None
    one, other = (prune(m.eval(), example_inputs=inputs) for m in (model, twin))
    torch.testing.assert_close(one(x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_forward_of_what_comes_back_has_fresh_noise(name):
    twin = through_pickle(build(name)).train()
    with torch.no_grad():
        for _, gate in iter_gates(twin):
            gate.log_alpha.zero_()
    x = torch.randn(64, 5)
    assert not torch.equal(twin(x), twin(x))


@pytest.mark.parametrize("method", ["shift", "lagrangian"])
def test_a_budget_goes_on_where_it_was(method):
    model = plain()
    (rule,) = sparsify(model) and set_budget(model, Budget(sparsity=0.5, steps=6, method=method))
    train(model, 2)
    twin = through_pickle(model)
    (other,) = {id(gate.rule): gate.rule for _, gate in iter_gates(twin)}.values()
    assert isinstance(other, BudgetRule)
    assert other is not rule
    assert (other.step, other.start, other.target, other.scheduled) == (2, rule.start, rule.target, rule.scheduled)
    train(twin, 4)
    assert other.finished
    assert not rule.finished


def test_tied_weights_stay_one():
    twin = through_pickle(build("tied"))
    first, second = twin.first.parametrizations.weight, twin.second.parametrizations.weight
    assert first.original is second.original
    assert first[0].gate is second[0].gate
    twin.double()
    assert first.original is second.original


@pytest.mark.parametrize("schedule", [linear, cosine, cubic, exponential])
def test_schedules_pickle(schedule):
    value = schedule(1.0, 0.25, 8)
    other = pickle.loads(pickle.dumps(value))
    assert [other(n) for n in range(10)] == [value(n) for n in range(10)]


@pytest.mark.slow
def test_another_process_reads_it_and_new_hooks_do_not_replace_stored_ones(tmp_path):
    model = nn.Sequential(*build("example noise"), nn.Identity())
    torch.save(model, tmp_path / "model.pt")
    torch.save(torch.ones(2, 5), tmp_path / "x.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
hooks = [(m, dict(m._forward_pre_hooks)) for m in model.modules()]
for module, before in hooks:
    module.register_forward_pre_hook(lambda *_: None)
    assert all(module._forward_pre_hooks[key] is hook for key, hook in before.items())
from l0hooks import iter_gates, prune, summary
assert type(model[0]).__name__ in ("Linear", "ParametrizedLinear")
print(float(model.eval()(torch.load({str(tmp_path / "x.pt")!r})).sum()), summary(model).gates)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    total, gates = run.stdout.split()
    assert float(total) == pytest.approx(float(model.eval()(torch.ones(2, 5)).detach().sum()), abs=1e-6)
    assert int(gates) == 6


@pytest.mark.parametrize("kind", [Rebuilt, Counting])
def test_a_class_with_a_pickle_of_its_own_keeps_its_gates(kind):
    model = kind(5, 3)
    sparsify(model)
    x = torch.randn(4, 5)
    twin = through_pickle(model)
    assert isinstance(twin, kind)
    assert isinstance(twin.weight, torch.Tensor)
    assert next(iter_gates(twin))[1].log_alpha.shape == (3, 5)
    torch.testing.assert_close(twin.parametrizations.weight.original, model.parametrizations.weight.original)
    if kind is Counting:
        assert twin.saved
        assert not vars(model).get("saved")
        torch.testing.assert_close(twin.eval()(x), model.eval()(x))
    assert type(prune(twin)) is kind


@pytest.mark.parametrize("name", ["branched", "attentive"])
def test_larger_coupled_models(name):
    make, example = MODELS[name]
    model, x = make().eval(), example()
    sparsify(model, "coupled", example_inputs=(x,))
    twin = through_torch(model.eval())
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(prune(twin, example_inputs=(x,))(x), prune(model, example_inputs=(x,))(x))


def test_a_shallow_copy_is_one_layer_with_the_same_tensors():
    model = nn.Linear(3, 2)
    sparsify(model)
    twin = copy.copy(model)
    assert twin.parametrizations.weight.original is model.parametrizations.weight.original
    torch.testing.assert_close(twin.eval()(torch.ones(1, 3)), model.eval()(torch.ones(1, 3)))


def test_gates_over_samples_pickle():
    gate = SampleGate(7, k=3)
    torch.testing.assert_close(through_torch(gate).state_dict(), gate.state_dict())
