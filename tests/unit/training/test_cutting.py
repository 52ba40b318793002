"""Members that are closed for good are cut while training goes on: the run is that of the uncut model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import l0hooks
from l0hooks import Budget, GateSpec
from l0hooks.attach.coupled_weight import CoupledWeight
from l0hooks.errors import InvalidValueError, L0HooksWarning, SpecError, StateError
from l0hooks.training import BudgetRule
from l0hooks.training.closing import CLOSED

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.arange(64) % 4
Optimizer = Callable[[Any], torch.optim.Optimizer]


class Residual(nn.Module):
    """Convolutions with a norm, a residual sum and a tied head: groups with several writers and readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.up, self.down = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 1)
        self.hidden, self.head = nn.Linear(12, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(x)))
        h = h + self.down(F.relu(self.up(h)))
        return self.head(F.relu(self.hidden(h.mean((2, 3)))))


class Attention(nn.Module):
    """Heads whose count the code reads from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 6
        self.embed, self.out = nn.Linear(24, 24), nn.Linear(24, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.flatten(2).transpose(1, 2).reshape(len(x), 8, 24))
        b, t, _ = h.shape
        q, k, v = (layer(h).view(b, t, self.heads, self.width).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        return self.out((h + self.o(mixed)).mean(1))


def gated(make: type[nn.Module] = Residual, *, cut: bool = True, noise: Any = "step", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    budget = Budget(**{"sparsity": 0.7, "unit": "params", "steps": 60, "cut_every": 10, **options})
    l0hooks.sparsify(model, GateSpec(granularity="coupled", noise=noise), example_inputs=(X[:4],), budget=budget)
    if not cut:
        rule_of(model)._stays_whole = True  # what is closed for good is closed, and nothing else happens
    return model


def rule_of(model: nn.Module) -> BudgetRule:
    rule = next(gate.rule for _, gate in l0hooks.iter_gates(model))
    assert isinstance(rule, BudgetRule)
    return rule


def sgd(groups: Any) -> torch.optim.Optimizer:
    for group in groups:
        group["lr"] = 1.0 if group["weight_decay"] == 0 else 0.05
    return torch.optim.SGD(groups, momentum=0.9)


def adam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups)


def fast(model: nn.Module) -> torch.optim.Optimizer:
    """Gates that part quickly, so that members are closed for good long before the schedule ends."""
    return torch.optim.Adam(l0hooks.param_groups(model, lr=2e-3, gate_lr=0.5))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return l0hooks.param_groups(model, lr=2e-3, gate_lr=0.15, weight_decay=1e-4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        rows = torch.randint(64, (16,))
        loss = F.cross_entropy(model(X[rows]), Y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "noise", "optimizer"),
    [
        (Residual, "step", adam),
        (Attention, "example", sgd),
        pytest.param(Residual, "example", sgd, marks=pytest.mark.slow),
        pytest.param(Attention, "step", adam, marks=pytest.mark.slow),
    ],
)
def test_the_run_is_that_of_the_uncut_model(make: type[nn.Module], noise: str, optimizer: Optimizer) -> None:
    ours, theirs = gated(make, noise=noise), gated(make, cut=False, noise=noise)
    whole = parameters(ours)
    a, b = (train(model, optimizer(groups_of(model)), 80) for model in (ours, theirs))
    assert parameters(ours) < whole / 2
    assert parameters(theirs) == whole
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-3, atol=1e-4)
    small, other = (l0hooks.prune(model, example_inputs=(X[:4],)) for model in (ours, theirs))
    assert parameters(small) == parameters(other)
    torch.testing.assert_close(small.eval()(X), other.eval()(X), rtol=1e-2, atol=1e-3)


def test_parameters_stay_the_same_objects_and_optimisers_keep_their_state() -> None:
    model = gated()
    before = dict(model.named_parameters())
    optimizer = adam(groups_of(model))
    train(model, optimizer, 60)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert any(p.shape[0] < 12 for p in before.values())
    for p, state in optimizer.state.items():
        assert {value.shape for value in state.values() if value.dim()} == {p.shape}
        assert p.grad is None or p.grad.shape == p.shape


@pytest.mark.slow
def test_only_what_is_closed_for_good_is_cut_before_the_end() -> None:
    model = gated(steps=200)
    optimizer = fast(model)
    sizes = [parameters(model)]
    for start in range(0, 200, 10):
        train(model, optimizer, 10, start)
        sizes.append(parameters(model))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 3  # bit by bit
    assert l0hooks.summary(model).sparsity == 0  # all that is left stays
    rule = rule_of(model)
    assert (
        rule.size.of(rule.size.counts * 0.0) <= parameters(l0hooks.prune(model, example_inputs=(X[:4],))) <= rule.target
    )


def test_the_report_counts_what_was_cut() -> None:
    model = gated()
    plain = Residual()
    train(model, adam(groups_of(model)), 60)
    report = l0hooks.summary(model)
    cut = report.budgets[0].cut
    assert cut == parameters(plain) - report.model_parameters > 0
    assert f"cut while training: {cut:,} parameters" in str(report)
    assert report.budgets[0].whole == parameters(plain)


@pytest.mark.slow
def test_a_checkpoint_of_a_cut_model_goes_on() -> None:
    model = gated(steps=200)
    optimizer = fast(model)
    train(model, optimizer, 120)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again = gated(steps=200)
    assert parameters(again) > parameters(model)
    second = fast(again)
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert parameters(again) == parameters(model)
    assert train(again, second, 90, 120) == train(model, optimizer, 90, 120)
    with pytest.raises(StateError, match="cut further than the checkpoint"):
        again.load_state_dict(saved[0])


def test_a_checkpoint_is_of_the_same_cuts() -> None:
    saved = gated().state_dict()
    with pytest.raises(StateError, match="cut_every 10"):
        gated(cut_every=None).load_state_dict(saved)


class Convex(nn.Module):
    """A size in the code that no attribute holds: such a model comes out as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.mean((2, 3)))).view(len(x), 12))


def test_a_model_that_cannot_be_cut_in_place_trains_on_and_says_so() -> None:
    model = gated(Convex)
    whole = parameters(model)
    with pytest.warns(L0HooksWarning, match="only where the model's own modules stay") as caught:
        train(model, adam(groups_of(model)), 60)
    assert len(caught) == 1
    assert parameters(model) == whole
    with pytest.warns(L0HooksWarning, match="graph"):
        assert parameters(l0hooks.prune(model, example_inputs=(X[:4],))) < whole / 2


def test_an_optimiser_with_a_state_of_another_shape_keeps_the_model_whole() -> None:
    model = gated()
    with pytest.warns(L0HooksWarning, match="Adafactor, which keeps 'row_var'"):
        train(model, torch.optim.Adafactor(groups_of(model)), 60)


def test_a_copy_is_not_cut_and_says_so() -> None:
    model = copy.deepcopy(gated())
    whole = parameters(model)
    with pytest.warns(L0HooksWarning, match="a copy"):
        train(model, adam(groups_of(model)), 60)
    assert parameters(model) == whole


def test_an_interrupted_cut_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated(steps=10_000)
    rule = rule_of(model)
    optimizer = adam(groups_of(model))
    train(model, optimizer, 5)
    close_three(rule)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), model.eval()(X).detach()))
    model.train()
    follow, calls = CoupledWeight.follow, []

    def interrupted(self: CoupledWeight, *arguments: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        follow(self, *arguments)

    monkeypatch.setattr(CoupledWeight, "follow", interrupted)
    assert rule.cutter is not None
    with pytest.raises(KeyboardInterrupt):
        rule.cutter.cut(rule.gates, [gate.log_alpha <= CLOSED for gate in rule.gates], all_of_them=True)
    monkeypatch.undo()
    for old, new in zip(before[0].values(), model.state_dict().values(), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(model.eval()(X), before[2])
    assert model.stem.out_channels == 12
    states = zip(before[1]["state"].values(), optimizer.state_dict()["state"].values(), strict=True)
    assert all(torch.equal(old[name], new[name]) for old, new in states for name in old)


def close_three(rule: BudgetRule) -> None:
    assert rule._closed is not None
    rule._closed.close([torch.arange(len(gate.log_alpha)) < 3 for gate in rule.gates])


def test_random_numbers_of_training_are_left_alone() -> None:
    model = gated()
    rule = rule_of(model)
    close_three(rule)
    state = torch.get_rng_state()
    assert rule.cutter is not None
    assert rule.cutter.cut(rule.gates, [gate.log_alpha <= CLOSED for gate in rule.gates]) == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_loss_that_is_still_held_does_not_disturb_the_next_step() -> None:
    model = gated()
    optimizer = adam(groups_of(model))
    held = []
    for step in range(60):
        loss = F.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        held.append(loss)
        assert step < 60
    assert parameters(model) < parameters(Residual())


def test_two_optimisers_one_for_the_gates() -> None:
    model = gated()
    weights, gates = groups_of(model)
    first, second = torch.optim.SGD([gates], lr=0.5), torch.optim.Adam([weights])
    for _ in range(60):
        loss = F.cross_entropy(model(X), Y)
        model.zero_grad()
        loss.backward()
        first.step()  # cuts, when the gradients of the weights are still wanted
        second.step()
    assert parameters(model) < parameters(Residual()) / 2


@pytest.mark.parametrize("value", [0, 2.5, -1, True])
def test_a_wrong_interval_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValueError, match="cut_every must be a number of steps"):
        Budget(sparsity=0.5, cut_every=value)


def test_what_cannot_be_cut_is_refused_at_once() -> None:
    with pytest.raises(InvalidValueError, match="multipliers may open any gate again"):
        Budget(sparsity=0.5, cut_every=5, method="lagrangian")
    model = Residual()
    with pytest.raises(SpecError, match="other gates on 'stem'"):
        l0hooks.sparsify(model, "weight", example_inputs=(X,), budget=Budget(sparsity=0.5, cut_every=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not list(l0hooks.iter_gates(model))
