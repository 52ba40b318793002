"""Budgets whose sizes stand in a config: equal numbers in groups of one kind, and multiples."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from l0hooks import Budget, iter_gates, param_groups, penalty, prune, set_budget, sparsify
from l0hooks.errors import InvalidValueError, SpecError, StateError
from l0hooks.training.blocks import largest_blocks
from l0hooks.training.size import Size


class Block(nn.Module):
    """A residual branch with hidden neurons."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def stack(hidden: tuple[int, ...] = (24, 24, 24, 10)) -> nn.Sequential:
    return nn.Sequential(*(Block(12, n) for n in hidden), nn.Linear(12, 3))


X = (torch.randn(5, 12, generator=torch.Generator().manual_seed(1)),)


def trained(budget: Budget, steps: int, model: nn.Module | None = None, gate_lr: float = 0.5) -> nn.Module:
    torch.manual_seed(2)
    model = stack() if model is None else model
    sparsify(model, "coupled", example_inputs=X, budget=budget)
    train(model, steps, gate_lr)
    return model


def train(model: nn.Module, steps: int, gate_lr: float = 0.5) -> None:
    optimizer = torch.optim.SGD(param_groups(model, lr=0.01, gate_lr=gate_lr))
    for step in range(steps):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(16, 12)), torch.randint(3, (16,)))
        (loss + penalty(model, budget=1.0)).backward()
        optimizer.step()


def kept(model: nn.Module) -> list[int]:
    return [int(gate.support().sum()) for _, gate in iter_gates(model)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- the choice -------------------------------------------------------------------------------------------------------


@st.composite
def choices(draw: Any) -> tuple[Size, list[Any], list[Any], float, int]:
    """A size with sets, log-odds, gates that are closed, and what is allowed."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 13), st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3))
    counts = np.array([n for n, times, _ in shapes for _ in range(times)], np.int64)
    multiple = np.array([m for _, times, m in shapes for _ in range(times)], np.int64)
    ends = np.cumsum([times for _, times, _ in shapes])
    sets = tuple(tuple(range(end - times, end)) for end, (_, times, _) in zip(ends, shapes, strict=True))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    half = random.integers(0, 3, (len(counts), len(counts))).astype(np.float64)
    size = Size(
        counts, 5.0, random.integers(1, 9, len(counts)).astype(np.float64), half + half.T,
        floor=np.ones(len(counts), np.int64), sets=sets, multiple=multiple,
    )  # fmt: skip
    values = [np.round(random.normal(size=n), 1) for n in counts]
    closed = [random.random(n) < 0.1 * draw(st.booleans()) for n in counts]
    least = size.of(size.least(1))
    return size, values, closed, least + draw(st.floats(0, 1)) * (size.whole - least), 1


@settings(max_examples=200, deadline=None)
@given(choices())
def test_as_many_blocks_as_fit_of_the_best_members(case: tuple[Size, list[Any], list[Any], float, int]) -> None:
    size, values, closed, allowed, min_keep = case
    masks = largest_blocks(size, values, closed, allowed, min_keep)
    number = np.array([int(mask.sum()) for mask in masks], np.float64)
    least = size.least(min_keep)
    there = [len(v) - int(c.sum()) for v, c in zip(values, closed, strict=True)]
    if not any(c.any() for c in closed):
        assert size.of(number) <= allowed + 1e-9 or (number == least).all()
        assert (number >= least).all()
    for arrays in size.sets or ():
        width = size.widths[arrays[0]]
        assert len({int(number[n]) for n in arrays}) == 1
        assert number[arrays[0]] % width == 0
        if all(number[n] + width <= there[n] for n in arrays):  # one more block is too much
            more = number.copy()
            more[list(arrays)] += width
            assert size.of(more) > allowed
    for mask, value, shut in zip(masks, values, closed, strict=True):
        assert not (mask & shut).any()
        others = value[~mask & ~shut]
        assert not mask.any() or not len(others) or value[mask].min() >= others.max()


def test_single_arrays_without_multiples_are_chosen_as_ever() -> None:
    model = trained(Budget(sparsity=0.4, unit="params", steps=6), 4)
    rule = next(iter_gates(model))[1].rule
    plain = rule.support_at(rule.scheduled)
    sets = tuple((n,) for n in range(len(rule.size.counts)))
    size = Size(rule.size.counts, rule.size.constant, rule.size.linear, rule.size.square, rule.size.floor, sets)
    values = [gate.log_alpha.detach().double().numpy() for gate in rule.gates]
    none = [np.zeros(len(v), np.bool_) for v in values]
    masks = largest_blocks(size, values, none, rule.scheduled, 1)
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(plain, masks, strict=True))


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["params", "macs", "gates"])
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("method", ["shift", "lagrangian"])
def test_groups_of_one_kind_and_size_keep_the_same_number(unit: Any, round_to: int, method: Any) -> None:
    budget = Budget(sparsity=0.35, unit=unit, steps=8, uniform=True, round_to=round_to, method=method)
    model = trained(budget, 8)
    rule = next(iter_gates(model))[1].rule
    first, *rest, other = kept(model)
    assert rest == [first, first]
    assert first % round_to == other % round_to == 0
    small = prune(model, example_inputs=X)
    assert [small[n].up.out_features for n in range(4)] == kept(model)
    block = np.array([3 * round_to, round_to]) @ [rule.size.gradient(rule.size.counts * 1.0)[n] for n in (0, 3)]
    assert rule.target - block <= rule.size.of(np.array(kept(model), np.float64)) <= rule.target
    if unit == "params":
        assert parameters(small) <= rule.target
    torch.testing.assert_close(model.eval()(*X), small.eval()(*X), rtol=1e-5, atol=1e-6)


def test_multiples_alone_leave_the_groups_their_own_numbers() -> None:
    model = stack()
    with torch.no_grad():
        model[1].up.weight.mul_(0.1)
    trained(Budget(sparsity=0.4, unit="params", steps=8, round_to=4, prior=5.0), 8, model)
    found = kept(model)
    assert all(n % 4 == 0 for n in found)
    assert len(set(found[:3])) > 1


def test_a_group_with_fewer_members_keeps_all() -> None:
    model = trained(Budget(sparsity=0.25, unit="params", steps=8, round_to=16), 8)
    found = kept(model)
    assert found[3] == 10
    assert all(n == 16 for n in found[:3])


@pytest.mark.slow
def test_a_multiple_by_kind() -> None:
    encoder = nn.TransformerEncoderLayer(32, 4, 50, batch_first=True)
    inputs = (torch.randn(2, 5, 32),)
    budget = Budget(sparsity=0.3, unit="params", steps=0, round_to={"neuron": 8})
    sparsify(encoder, "coupled", example_inputs=inputs, budget=budget)
    small = prune(encoder, example_inputs=inputs)
    assert small.linear1.out_features % 8 == 0


def test_at_every_step_sets_expect_equally_many_and_the_whole_is_on_schedule() -> None:
    torch.manual_seed(2)
    model = stack()
    budget = Budget(sparsity=0.4, unit="params", steps=12, uniform=True, prior=3.0)
    sparsify(model, "coupled", example_inputs=X, budget=budget)
    rule = next(iter_gates(model))[1].rule
    for _ in range(11):
        train(model, 1, gate_lr=3.0)
        numbers = [float(gate.keep_prob().detach().sum()) for gate in rule.gates]
        assert max(numbers[:3]) - min(numbers[:3]) <= 0.02 * np.mean(numbers[:3])
        assert abs(rule.expected() - rule.scheduled) <= 1e-5 * rule.scheduled
        assert len(set(kept(model)[:3])) == 1


def test_gradients_that_would_pull_a_set_apart_are_taken_out() -> None:
    """What is left is what dense algebra leaves: no change of any array's expected number but a common one."""
    torch.manual_seed(2)
    model = nn.Sequential(Block(12, 24), Block(12, 24), nn.Linear(12, 3))
    budget = Budget(sparsity=0.4, unit="params", steps=12, uniform=True, prior=3.0, automatic=False)
    sparsify(model, "coupled", example_inputs=X, budget=budget)
    rule = next(iter_gates(model))[1].rule
    gates = [gate.log_alpha for gate in rule.gates]
    slopes = []
    for gate in rule.gates:
        location = gate.log_alpha.detach().clone().requires_grad_()
        p = gate.family.keep_prob(location, gate.temperature)
        slopes.append(torch.autograd.grad(p.sum(), location)[0])
    inside = torch.randn(24)
    inside -= slopes[0] * inside.sum() / slopes[0].sum()  # moves no expected number by itself
    gates[0].grad, gates[1].grad = inside + 3 * slopes[0], -2 * slopes[1]
    rule.before_step()
    torch.testing.assert_close(gates[0].grad, inside, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gates[1].grad, torch.zeros(24), rtol=0, atol=1e-5)


def test_what_is_cut_while_training_ends_uniform() -> None:
    budget = Budget(sparsity=0.5, unit="params", steps=30, uniform=True, round_to=2, cut_every=5)
    model = trained(budget, 32, gate_lr=4.0)
    found = kept(model)
    assert found[0] == found[1] == found[2]
    assert found[0] % 2 == found[3] % 2 == 0
    assert model[0].up.out_features == found[0] < 24
    assert parameters(prune(model, example_inputs=X)) <= next(iter_gates(model))[1].rule.target


def test_a_checkpoint_goes_on_and_another_budget_is_refused() -> None:
    budget = Budget(sparsity=0.4, unit="params", steps=10, uniform=True, round_to=2)
    whole = trained(budget, 10)
    half = trained(budget, 5)
    saved = copy.deepcopy(half.state_dict())
    again = trained(budget, 0)
    again.load_state_dict(saved)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(param_groups(again, lr=0.01, gate_lr=0.5))
    for step in range(5, 10):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(again(torch.randn(16, 12)), torch.randint(3, (16,))).backward()
        optimizer.step()
    for (_, one), (_, other) in zip(iter_gates(again), iter_gates(whole), strict=True):
        assert torch.equal(one.log_alpha, other.log_alpha)
    for other_budget, word in (
        (Budget(sparsity=0.4, unit="params", steps=10, round_to=2), "uniform, round_to 2"),
        (Budget(sparsity=0.4, unit="params", steps=10, uniform=True, round_to={"neuron": 2}), "round_to by kind"),
    ):
        with pytest.raises(StateError, match=word):
            trained(other_budget, 0).load_state_dict(saved)


def test_single_weights_have_no_members() -> None:
    with pytest.raises(SpecError, match=re.escape("members of coupled groups are counted")):
        sparsify(stack(), "weight", budget=Budget(sparsity=0.5, uniform=True))


def test_an_unknown_kind_is_refused_and_nothing_is_changed() -> None:
    model = stack()
    with pytest.raises(SpecError, match=r"expected: 'neuron'\s+got: 'neurons'\s+try: .*'neuron'"):
        sparsify(model, "coupled", example_inputs=X, budget=Budget(sparsity=0.5, round_to={"neurons": 8}))
    assert not list(iter_gates(model))


@pytest.mark.parametrize("round_to", [0, -8, 1.5, True, {"neuron": 0}])
def test_multiples_are_positive_integers(round_to: Any) -> None:
    with pytest.raises(InvalidValueError, match="round_to must be a number of members"):
        Budget(sparsity=0.5, round_to=round_to)


def test_a_size_that_multiples_cannot_reach_is_refused() -> None:
    model = stack()
    with pytest.raises(InvalidValueError, match="the size must be one that the gates can reach"):
        sparsify(model, "coupled", example_inputs=X, budget=Budget(sparsity=0.8, unit="params", round_to=16))
    sparsify(model, "coupled", example_inputs=X)
    assert set_budget(model, Budget(sparsity=0.8, unit="params"))
