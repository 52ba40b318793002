"""Hybrid gates: the laws of gates over items for their gated part, and a random part that is uniform."""

import math

import numpy as np
import pytest
import torch
from item_gate_laws import AllGatedLaws, ItemGateLaws, finish, scattered

from l0hooks import HybridGate
from l0hooks.errors import InvalidValueError


class TestHybridGateWithoutRandomItems(AllGatedLaws):
    axis = 0

    def make(self, n, k, **options):
        return HybridGate(n, k, 1.0, 0.0, **options)


class TestHybridGate(ItemGateLaws):
    """With random items half of the k are gated."""

    axis = 0

    def make(self, n, k, **options):
        return HybridGate(n, k, **options)

    def gated(self, k):
        return (k + 1) // 2

    def learned(self, gate, indices):
        chosen = gate.chosen().nonzero().flatten().tolist()
        assert set(chosen) <= set(indices)
        return chosen


@pytest.mark.parametrize(
    ("n", "k", "share", "gated"),
    [(10, 4, 0.25, 1), (10, 4, 0.5, 2), (10, 5, 0.5, 3), (10, 3, 0.5, 2), (10, 10, 0.3, 3), (10, 4, 1.0, 4)],
)
def test_a_hybrid_has_exactly_k_items_with_the_split_asked_for(n, k, share, gated):
    gate, wanted = scattered(HybridGate(n, k, share, 1 - share))
    assert (gate.n_gated, gate.n_random, gate.k) == (gated, k - gated, k)
    for seed in range(20):
        x = torch.randn(n, 2)
        selected, indices, origin = gate.select(x, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(selected, x[indices])
        assert indices.tolist() == sorted(set(indices.tolist()))
        assert len(indices) == len(origin) == k
        assert indices[torch.from_numpy(origin == "gated")].tolist() == wanted
        assert (origin == "random").sum() == k - gated


def test_the_random_part_is_reproducible_and_uniform_among_the_rest():
    gate, wanted = scattered(HybridGate(8, 4, 0.5, 0.5))
    x, generator = np.arange(8), torch.Generator().manual_seed(0)
    first = gate.select(x, generator=torch.Generator().manual_seed(0))[1]
    assert np.array_equal(gate.select(x, generator=generator)[1], first)
    counts = np.zeros(8)
    for _ in range(3000):
        counts[gate.select(x, generator=generator)[1]] += 1
    assert (counts[wanted] == 3000).all()
    rest = np.delete(counts, wanted)
    assert np.abs(rest / 3000 - 2 / 6).max() < 4 * math.sqrt(2 / 9 / 3000)
    torch.manual_seed(4)
    one = gate.select(x)[1]
    torch.manual_seed(4)
    assert np.array_equal(gate.select(x)[1], one)


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_weights_of_random_items_represent_all_items_that_are_not_gated(preserve, share):
    gate, wanted = scattered(HybridGate(9, 4, share, 1 - share, steps=1, automatic=False))
    finish(gate)
    w = np.linspace(1, 3, 9)
    _, weights, indices, origin = gate.select_weighted(
        w, w, preserve_total=preserve, generator=torch.Generator().manual_seed(0)
    )
    z = gate.gate.final().numpy()
    random = origin == "random"
    expected = np.where(random, w[indices], w[indices] * z[indices])
    if preserve:
        part = random if random.any() else ~random
        expected[part] *= (w.sum() - expected[~part].sum()) / expected[part].sum()
        assert weights.sum() == pytest.approx(w.sum())
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert indices[~random].tolist() == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 0.5, 0.4), "sum to 1"),
        ((10, 4, 0.7, 0.7), "sum to 1"),
        ((10, 4, -0.5, 1.5), "sum to 1"),
        ((10, 4, float("nan"), 0.5), "sum to 1"),
        ((10, 4, 0.0, 1.0), "at least one item must be gated"),
        ((10, 4, 0.1, 0.9), "at least one item must be gated"),
        ((10, 11, 0.5, 0.5), "1 <= k <= 10"),
        ((10, 0, 0.5, 0.5), "1 <= k <= 10"),
    ],
    ids=str,
)
def test_invalid_hybrids_are_refused(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        HybridGate(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    gate = HybridGate(50, 10, steps=3).cuda()
    x = torch.randn(50, 2, device="cuda")
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(4):
        gate(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    selected, indices, _ = gate.select(x)
    assert indices.is_cuda
    assert torch.equal(selected, x[indices])
    assert len(gate.select(x.cpu())[1]) == len(indices) == 10
    assert gate.select_weighted(x, torch.ones(50, device="cuda"), preserve_total=True)[1].sum().item() == pytest.approx(
        50
    )
