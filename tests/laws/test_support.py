"""Laws of every owner of gates under a budget: one support, the size on schedule, noise, copies and checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import l0hooks
from l0hooks import Budget, FeatureGate, Gate, HybridGate, SampleGate, iter_gates, penalty, set_budget

STEPS, KEPT, N = 8, 5, 12


class Bare(nn.Module):
    """A gate that a user put under a budget by hand."""

    def __init__(self, **options):
        super().__init__()
        self.gate = Gate(N, **options)
        set_budget(self.gate, Budget(keep=KEPT, steps=STEPS))

    def forward(self, x):
        return x * self.gate().to(x.dtype)


class Attached(nn.Module):
    """The gates of a layer's weight."""

    def __init__(self, **options):
        super().__init__()
        self.linear = nn.Linear(N, 1, bias=False)
        with torch.no_grad():
            self.linear.weight.fill_(1.0).requires_grad_(False)
        spec = l0hooks.GateSpec(granularity="weight", **options)
        l0hooks.sparsify(self, spec, budget=Budget(keep=KEPT, steps=STEPS))

    def forward(self, x):
        return x * self.linear.weight


class Last(nn.Module):
    """A module over items, asked along the last axis."""

    def __init__(self, items):
        super().__init__()
        self.items = items

    def forward(self, x):
        return self.items(x, dim=-1)


OWNERS = {
    "Gate": Bare,
    "sparsify": Attached,
    "SampleGate": lambda **o: Last(SampleGate(N, KEPT, steps=STEPS, **o)),
    "FeatureGate": lambda **o: Last(FeatureGate(N, KEPT, steps=STEPS, **o)),
    "FeatureGate, each example": lambda **o: Last(FeatureGate(N, KEPT, steps=STEPS, noise="example", **o)),
    "HybridGate": lambda **o: Last(HybridGate(N, 2 * KEPT, 0.5, 0.5, steps=STEPS, **o)),
}
FAMILIES = ["hard_concrete", "straight_through", "stg", "deterministic"]
owners = pytest.mark.parametrize("owner", OWNERS)


def made(owner, **options):
    torch.manual_seed(0)
    return OWNERS[owner](**options)


def gate_of(model):
    return next(gate for _, gate in iter_gates(model))


def x(rows=3):
    return torch.linspace(0.5, 2, rows * N).view(rows, N)


def worth():
    return torch.randn(N, generator=torch.Generator().manual_seed(3))


def train(model, optimizer, steps=1):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (-(model(x()) * worth()).sum() + 0.01 * penalty(model, l0=1.0)).backward()
        optimizer.step()


def adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.3)


@owners
@pytest.mark.parametrize("family", FAMILIES)
def test_the_expected_size_and_the_penalty_are_on_schedule_after_every_step(owner, family):
    model = made(owner, family=family)
    optimizer, gate = adam(model), gate_of(model)
    assert gate.rule.expected() == gate.rule.start
    for _ in range(STEPS + 2):
        train(model, optimizer)
        assert gate.rule.expected() == pytest.approx(gate.rule.scheduled, rel=1e-5)
        assert penalty(model, l0=1.0).item() == pytest.approx(gate.rule.scheduled, rel=1e-4)
    assert gate.rule.finished
    assert gate.expected_l0().item() == pytest.approx(KEPT, rel=1e-4)


@owners
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_zero_exactly_outside_the_support(owner, family):
    model = made(owner, family=family)
    optimizer, gate = adam(model), gate_of(model)
    for _ in range(STEPS + 1):
        train(model, optimizer)
        out = model.eval()(x())
        assert torch.equal(out != 0, gate.support().flatten().expand_as(out))
        assert int(gate.support().sum()) == int(gate.rule.scheduled)
    kept = gate.support().flatten()
    assert gate.log_alpha.flatten()[kept].min() >= gate.log_alpha.flatten()[~kept].max()
    assert torch.equal(model.train()(x()), model.eval()(x()))


@owners
def test_training_draws_anew_and_a_seed_repeats_it_and_evaluation_draws_nothing(owner):
    model = made(owner, init_mean=0.5)
    assert not torch.equal(model(x()), model(x()))
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(torch.stack([model(x()) for _ in range(3)]))
    assert torch.equal(*runs)
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(x()), model(x()))
    assert torch.equal(torch.get_rng_state(), state)


@owners
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("steps", [0, 3, STEPS])
def test_a_copy_is_equal_and_goes_on_by_itself(owner, how, steps):
    if owner == "sparsify" and how != "deepcopy":
        pytest.skip("parametrized modules are saved by their state")
    model = made(owner)
    train(model, adam(model), steps)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(twin.eval()(x()), model.eval()(x()))
    train(twin, adam(twin), STEPS - steps + 1)
    assert gate_of(twin).rule is not gate_of(model).rule
    assert gate_of(twin).rule.finished
    assert gate_of(model).rule.step == steps
    assert int(gate_of(twin).support().sum()) == KEPT
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@owners
@pytest.mark.parametrize("stop", [0, 3, STEPS, STEPS + 2])
def test_half_trained_and_resumed_is_as_if_uninterrupted(owner, stop):
    model = made(owner)
    optimizer = adam(model)
    train(model, optimizer, stop)
    saved, state = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    train(model, optimizer, STEPS)
    other = made(owner)
    resumed = adam(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(state)
    train(other, resumed, STEPS)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.eval()(x()), other.eval()(x()))


@owners
def test_gates_stay_in_float32_and_the_result_has_the_dtype_of_the_data(owner):
    if owner == "sparsify":
        pytest.skip("its dtype is the weight's")
    model = made(owner).to(torch.bfloat16)
    assert gate_of(model).log_alpha.dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for mode in (True, False):
            assert model.train(mode)(x().to(dtype)).dtype == dtype
