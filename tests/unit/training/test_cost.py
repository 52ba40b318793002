"""Sizes: what a model costs by the numbers of gates that stay, against what pruning really leaves."""

import itertools

import numpy as np
import pytest
import torch
from coupled_models import MODELS, coupled_groups, gates_of, mlp, models, set_support
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from l0hooks import prune, sparsify
from l0hooks.attach.walk import iter_gated
from l0hooks.training.cost import size_of
from l0hooks.training.size import Size, fitting


class Tied(nn.Module):
    """An embedding whose weight is also that of the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Embedding(7, 6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 7, bias=False),
        )  # fmt: skip
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(self.embed(x)))))


def size(model, unit="params", x=None, whole=True):
    every = list(iter_gated(model))
    return size_of(model, every, every, unit, None if x is None else (x,), whole=whole)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, x):
    """Multiply-adds of one example."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() / 2 / len(x)


def random_supports(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    keeps = [int(torch.randint(1, n + 1, (), generator=generator)) for n in counts]
    return [torch.randperm(n, generator=generator) < k for n, k in zip(counts, keeps, strict=True)]


# --- the whole -------------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("spec", ["coupled", "weight", "output"])
def test_with_every_gate_open_it_is_the_number_of_parameters(name, spec):
    model, x = MODELS[name][0](), MODELS[name][1]()
    expected = parameters(model)
    sparsify(model, spec, example_inputs=(x,), groups=coupled_groups(name) if spec == "coupled" else None)
    assert size(model).whole == expected


@pytest.mark.parametrize("name", ["mlp", "branched", "residual"])
@pytest.mark.parametrize("spec", ["coupled", "weight", "output"])
def test_with_every_gate_open_it_is_the_number_of_multiply_adds(name, spec):
    model, x = MODELS[name][0](), MODELS[name][1]()
    expected = macs(model, x)
    sparsify(model, spec, example_inputs=(x,), groups=coupled_groups(name) if spec == "coupled" else None)
    assert size(model, "macs", x).whole == expected


def test_tied_weights_count_once_as_parameters_and_at_each_use_as_multiply_adds():
    model, x = Tied(), torch.randint(7, (2, 3))
    expected = parameters(model)
    sparsify(model, dict.fromkeys(("embed", "up", "down", "head"), "weight"))
    assert size(model).whole == expected
    assert size(model, "macs", x).whole == 3 * (6 * 9 + 9 * 6 + 6 * 7)
    tied = next(n for n, one in enumerate(iter_gated(model)) if len(one.sites) == 2)
    assert size(model).linear[tied] == 1
    assert size(model, "macs", x).linear[tied] == 3


def test_a_layer_used_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(torch.relu(self.inner(x)))

    model = Twice()
    sparsify(model, "weight")
    assert size(model, "macs", torch.randn(3, 4)).whole == 2 * 16


def test_a_part_counts_what_its_gates_remove_from():
    model = mlp(5, 6, 4, 3)
    sparsify(model, {"0": "weight", "2": "output"})
    assert size(model, whole=False).whole == 5 * 6 + 6 * 4
    assert size(model, "gates").whole == 5 * 6 + 4


# --- what pruning leaves ---------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_cutting_coupled_groups_leaves(name, seed):
    model, x = MODELS[name][0](), MODELS[name][1]()
    sparsify(model.eval(), "coupled", example_inputs=(x,), groups=coupled_groups(name))
    supports = random_supports([gate.log_alpha.numel() for gate in gates_of(model)], seed)
    set_support(model, supports)
    kept = np.array([float(support.sum()) for support in supports])
    assert size(model).of(kept) == parameters(prune(model, example_inputs=(x,)))


@pytest.mark.parametrize("name", ["mlp", "branched", "residual"])
def test_it_is_the_multiply_adds_that_cutting_leaves(name):
    model, x = MODELS[name][0](), MODELS[name][1]()
    sparsify(model.eval(), "coupled", example_inputs=(x,), groups=coupled_groups(name))
    supports = random_supports([gate.log_alpha.numel() for gate in gates_of(model)], 1)
    set_support(model, supports)
    kept = np.array([float(support.sum()) for support in supports])
    assert size(model, "macs", x).of(kept) == macs(prune(model, example_inputs=(x,)), x)


def test_a_tied_embedding_with_coupled_gates():
    model, x = Tied().eval(), torch.randint(7, (2, 3))
    sparsify(model, "coupled", example_inputs=(x,))
    counts = [gate.log_alpha.numel() for gate in gates_of(model)]
    for seed in range(3):
        supports = random_supports(counts, seed)
        set_support(model, supports)
        kept = np.array([float(support.sum()) for support in supports])
        small = prune(model, example_inputs=(x,))
        assert size(model).of(kept) == parameters(small)
        uses = (small.up, small.down, small.head)
        assert size(model, "macs", x).of(kept) == 3 * sum(layer.weight.numel() for layer in uses)


@pytest.mark.parametrize("seed", range(3))
def test_what_pruning_leaves_of_a_mixture_is_never_more(seed):
    model, x = mlp(5, 8, 7, 3).eval(), torch.randn(3, 5)
    sparsify(model, {"0": "weight", "2": "weight", "4": "coupled"}, example_inputs=(x,))
    gated = {site.name for one in iter_gated(model) if one.coupled is None for site in one.sites}
    supports = [torch.rand(one.gate.log_alpha.shape) < 0.5 for one in iter_gated(model)]
    for support in supports:
        support.view(-1)[0] = True
    set_support(model, supports)
    kept = np.array([float(support.sum()) for support in supports])
    small = prune(model, example_inputs=(x,))
    left = sum(int(p.count_nonzero()) if n in gated else p.numel() for n, p in small.named_parameters())
    assert left <= size(model).of(kept)


@pytest.mark.parametrize("spec", ["weight", "input", "output", (2, 1)])
def test_gates_on_single_layers_cost_the_weights_under_them(spec):
    model = mlp(4, 6, 4)
    sparsify(model, spec)
    total, supports = parameters(mlp(4, 6, 4)), [torch.rand(g.log_alpha.shape) < 0.5 for g in gates_of(model)]
    set_support(model, supports)
    kept = np.array([float(support.sum()) for support in supports])
    closed = sum(int((getattr(m, "weight") == 0).sum()) for m in model.eval() if isinstance(m, nn.Linear))  # noqa: B009
    assert size(model).of(kept) == total - closed


# --- expectations ----------------------------------------------------------------------------------------------------


@models
def test_the_expected_size_is_the_mean_over_drawn_supports(name):
    model, x = MODELS[name][0](), MODELS[name][1]()
    sparsify(model, "coupled", example_inputs=(x,), groups=coupled_groups(name))
    found = size(model)
    p = [np.random.default_rng(n).uniform(0.1, 0.9, count) for n, count in enumerate(found.counts)]
    rng = np.random.default_rng(0)
    drawn = [found.of(np.array([float((rng.random(len(q)) < q).sum()) for q in p])) for _ in range(4000)]
    expected = found.of(np.array([q.sum() for q in p]), np.array([(q * (1 - q)).sum() for q in p]))
    assert abs(np.mean(drawn) - expected) < 4 * np.std(drawn) / np.sqrt(len(drawn))


@models
def test_the_price_is_the_derivative(name):
    model, x = MODELS[name][0](), MODELS[name][1]()
    sparsify(model, "coupled", example_inputs=(x,), groups=coupled_groups(name))
    found = size(model)
    kept = np.random.default_rng(0).uniform(1, found.counts)
    for number, unit in enumerate(np.eye(len(kept))):
        slope = (found.of(kept + 1e-3 * unit) - found.of(kept - 1e-3 * unit)) / 2e-3
        assert found.gradient(kept)[number] == pytest.approx(slope)
    assert np.array_equal(found.square, found.square.T)


# --- which gates fit -------------------------------------------------------------------------------------------------


def greedy(found, array_of, allowed):
    """The definition, one gate at a time."""
    kept, fits, ran_out = np.zeros(len(found.counts)), np.zeros(len(array_of), bool), False
    for place, array in enumerate(array_of):
        more = kept + np.eye(len(kept))[array]
        if found.of(more) > allowed:
            ran_out = True
            continue
        kept, fits[place] = more, True
    return fits, ran_out


def random_size(rng, arrays, *, squares):
    counts = rng.integers(1, 6, arrays)
    square = rng.integers(0, 3, (arrays, arrays)).astype(float)
    return Size(
        counts, float(rng.integers(0, 5)), rng.integers(0, 9, arrays).astype(float), squares * (square + square.T)
    )


@pytest.mark.parametrize("seed", range(40))
def test_as_many_fit_as_one_at_a_time(seed):
    rng = np.random.default_rng(seed)
    found = random_size(rng, int(rng.integers(1, 5)), squares=seed % 2)
    array_of = rng.permutation(np.repeat(np.arange(len(found.counts)), found.counts))
    allowed = rng.uniform(found.constant, found.whole)
    expected, _ = greedy(found, array_of, allowed)
    fits = fitting(found, array_of, allowed)
    assert np.array_equal(fits, expected)
    kept = np.bincount(array_of[fits], minlength=len(found.counts)).astype(float)
    assert found.of(kept) <= allowed


@pytest.mark.parametrize("seed", range(10))
def test_with_gates_of_one_price_no_other_choice_is_larger(seed):
    rng = np.random.default_rng(seed)
    found = Size(np.array([3, 4]), 2.0, np.array([1.0, 1.0]), np.zeros((2, 2)))
    worth = rng.normal(size=7)
    order = np.argsort(-worth)
    array_of = np.repeat([0, 1], found.counts)[order]
    allowed = rng.uniform(3, 8)
    fits = fitting(found, array_of, allowed)
    chosen = worth[order][fits] + 10  # so that more is better
    subsets = [c for n in range(8) for c in itertools.combinations(worth + 10, n) if 2 + n <= allowed]
    assert chosen.sum() == pytest.approx(max(map(sum, subsets)))


def test_many_gates_without_a_price_all_fit_at_once():
    found = Size(np.array([3, 300_000]), 0.0, np.array([10.0, 0.0]), np.zeros((2, 2)))
    fits = fitting(found, np.concatenate([np.zeros(3, np.int64), np.ones(300_000, np.int64)]), 15.0)
    assert fits.sum() == 1 + 300_000


def test_many_cheap_gates_fill_the_room_behind_a_dear_one():
    found = Size(np.array([2, 300_000]), 0.0, np.array([200_000.0, 1.0]), np.zeros((2, 2)))
    fits = fitting(found, np.concatenate([np.zeros(2, np.int64), np.ones(300_000, np.int64)]), 350_000.0)
    assert fits[0]
    assert not fits[1]
    assert fits.sum() == 1 + 150_000


def test_nothing_fits_into_less_than_the_constant():
    found = Size(np.array([2]), 5.0, np.array([1.0]), np.zeros((1, 1)))
    assert not fitting(found, np.zeros(2, np.int64), 5.0).any()
