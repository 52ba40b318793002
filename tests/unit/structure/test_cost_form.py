"""Sizes as polynomials, products of three among them, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from l0hooks import Budget, GateSpec, iter_gates, set_budget, sparsify
from l0hooks.attach.walk import iter_gated
from l0hooks.structure.cost_form import Cubes
from l0hooks.training.cost import size_of
from l0hooks.training.size import Size, fitting

SPEC = GateSpec(granularity="coupled", kinds=("neuron", "layer"))


class Wide(nn.Module):
    """x + f(x) with two coupled groups, one between two gated layers: products of three."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.c(self.b(self.a(x).relu()).relu())


def model_and_input() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), Wide(), Wide(), nn.Linear(3, 1)), torch.randn(4, 2)


def brute(model: nn.Module, kept: dict[str, int], *, biases: bool = True) -> float:
    """Parameters left, counted layer by layer from the definition; the stream is a group, too, in all blocks."""
    stream = kept["0"]
    total = 2 * stream + stream + biases * (stream + 1)
    for number in (1, 2):
        a, b = kept[f"{number}.a"], kept[f"{number}.b"]
        total += kept[f"{number}"] * (stream * a + a * b + b * stream + biases * (a + b + stream))
    return total


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_the_size_is_that_of_brute_force_for_every_support(unit: str) -> None:
    model, x = model_and_input()
    sparsify(model, SPEC, example_inputs=(x,))
    every = list(iter_gated(model))
    size = size_of(model, every, every, unit, (x,), whole=True)  # type: ignore[arg-type]
    names = [one.name for one in every]
    assert sorted(names) == ["0", "1", "1.a", "1.b", "2", "2.a", "2.b"]
    for counts in itertools.product(*(range(n + 1) for n in size.counts.tolist())):
        kept = dict(zip(names, counts, strict=True))
        wanted = brute(model, kept, biases=unit == "params")
        assert size.of(np.array(counts, np.float64)) == pytest.approx(wanted)


def sizes() -> tuple[Size, np.random.Generator]:
    """Two blocks with a group on both sides of a weight, and one group in both, on both axes of a weight."""
    random = np.random.default_rng(1)
    counts = np.array([2, 3, 2, 1, 1])
    squares = {}
    for layer in (3, 4):
        square = np.zeros((5, 5))
        square[:3, :3] = random.integers(0, 4, (3, 3))
        squares[layer] = square + square.T
    plain = np.zeros((5, 5))
    plain[0, 0] = 1.0
    return Size(counts, 5.0, random.random(5), plain, cubes=Cubes.of_blocks(squares)), random


def test_the_expected_size_is_the_mean_over_all_draws() -> None:
    size, random = sizes()
    owner = np.repeat(np.arange(5), size.counts)
    p = random.random(len(owner))
    mean = 0.0
    for draw in itertools.product((0, 1), repeat=len(owner)):
        z = np.array(draw)
        probability = np.where(z, p, 1 - p).prod()
        mean += probability * size.of(np.bincount(owner, z, minlength=5))
    kept, variance = np.bincount(owner, p, minlength=5), np.bincount(owner, p * (1 - p), minlength=5)
    assert size.of(kept, variance) == pytest.approx(mean)
    whole = size.cubes.expected(torch.tensor(kept).float(), torch.tensor(variance).float())
    assert float(whole) == pytest.approx(size.cubes.of(kept, variance), rel=1e-5)


def test_gradients_are_finite_differences() -> None:
    size, random = sizes()
    kept, variance = random.random(5), random.random(5)
    steps = 1e-6 * np.eye(5)
    by_kept = [(size.of(kept + h, variance) - size.of(kept - h, variance)) / 2e-6 for h in steps]
    by_variance = [(size.of(kept, variance + h) - size.of(kept, variance - h)) / 2e-6 for h in steps]
    assert size.gradient(kept, variance) == pytest.approx(by_kept, rel=1e-4)
    assert size.spread(kept) == pytest.approx(by_variance, rel=1e-4)
    assert size.bent.tolist() == [True, True, True, False, False]


def test_gates_are_taken_one_by_one_in_order_as_long_as_they_fit() -> None:
    size, random = sizes()
    for _ in range(30):
        array_of = random.permutation(np.repeat(np.arange(5), size.counts))
        allowed = 5 + random.random() * (size.whole - 5)
        chosen = fitting(size, array_of, allowed)
        kept = np.bincount(array_of[chosen], minlength=5).astype(float)
        assert size.of(kept) <= allowed
        for n in np.flatnonzero(~chosen):  # nothing that was left would fit
            assert size.of(kept + np.eye(5)[array_of[n]]) > allowed


def test_under_a_budget_the_expected_size_is_on_schedule_and_the_penalty_and_the_report_agree() -> None:
    from l0hooks import penalty, summary
    from l0hooks.attach.measured_size import expected_size

    model, x = model_and_input()
    sparsify(model, SPEC, example_inputs=(x,))
    (rule,) = set_budget(model, Budget(sparsity=0.5, unit="params", steps=10, automatic=False))
    torch.manual_seed(1)
    for _, gate in iter_gates(model):
        gate.log_alpha.data += torch.randn(gate.log_alpha.shape)
    for _ in range(9):
        rule.advance()
        assert rule.expected() == pytest.approx(rule.scheduled, rel=1e-5)
        report = summary(model)
        assert expected_size(model, report, "params") == pytest.approx(rule.expected(), rel=1e-5)
        outside = report.model_parameters - report.parameters
        assert outside + float(penalty(model, params=1.0).detach()) == pytest.approx(rule.expected(), rel=1e-5)
    rule.advance()
    kept = {one.name: one.gate.kept() for one in iter_gated(model)}
    assert brute(model, kept) == summary(model).model_parameters_kept <= rule.target


def test_the_lagrangian_sees_the_same_expected_size() -> None:
    model, x = model_and_input()
    sparsify(model, SPEC, example_inputs=(x,))
    (rule,) = set_budget(model, Budget(sparsity=0.5, unit="params", steps=10, method="lagrangian"))
    excess = float(rule.excess().detach()) * rule.size.whole  # type: ignore[attr-defined]
    assert excess + rule.scheduled == pytest.approx(rule.expected(), rel=1e-5)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("min_keep", "least"), [(0, 0), (1, 0), (2, 0), (3, 1)])
def test_min_keep_counts_the_entries_of_a_list(min_keep: int, least: int, uniform: bool) -> None:
    """Four entries, two with gates: the others stay anyway."""
    model, x = model_and_input()
    sparsify(model, SPEC, example_inputs=(x,))
    for one in iter_gated(model):
        one.gate.log_alpha.data.fill_(-5.0 if one.layer else 3.0)
    budget = Budget(sparsity=0.1, unit="params", steps=1, min_keep=min_keep, prior=0.0, uniform=uniform)
    (rule,) = set_budget(model, budget)
    size = rule.size
    layers = [n for n, one in enumerate(iter_gated(model)) if one.layer]
    masks = rule.support_at(size.of(size.least(min_keep)))
    assert sum(int(masks[n].sum()) for n in layers) == least
