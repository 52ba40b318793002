"""Representative subsets: distances against dense formulas, exchanges against brute force, and errors."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.datasets import load_digits

from l0hooks import HybridGate
from l0hooks.errors import InvalidValueError, UnsupportedModuleError
from l0hooks.select.matching import match_samples
from l0hooks.select.mean_distance import (
    Features,
    Kernel,
    Moments,
    distance,
    fourier_features,
    greedy,
    median_distance,
    swap,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=40, d=3, seed=0):
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def weights(n=40, seed=1):
    w = torch.rand(n, generator=seeded(seed), dtype=torch.float64)
    return w / w.sum()


def standardised(x, p):
    x = np.asarray(x)
    mean = p @ x
    return (x - mean) / np.sqrt(p @ (x - mean) ** 2)


def forms(p):
    """Each quadratic form, and its features."""
    z = data()
    matrix = (z @ z.T + 1) ** 3
    values, vectors = torch.linalg.eigh(matrix)
    products = (z[:, :, None] * z[:, None]).flatten(1)
    return {
        "kernel": (Kernel(matrix, p), vectors * values.clamp(min=0).sqrt()),
        "features": (Features(z.sin(), p), z.sin()),
        "moments": (Moments(z, p), torch.cat([z, products], 1)),
    }


def by_hand(phi, p, rows):
    return float((phi[rows].mean(0) - p @ phi).norm())


@pytest.mark.parametrize("name", ["kernel", "features", "moments"])
@pytest.mark.parametrize("p", [torch.full((40,), 1 / 40, dtype=torch.float64), weights()], ids=["alike", "weighted"])
def test_the_distance_is_that_of_the_means_of_the_features(name, p):
    form, phi = forms(p)[name]
    for rows in (torch.tensor([3]), torch.arange(7), torch.arange(40)):
        assert distance(form, rows) == pytest.approx(by_hand(phi, p, rows), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(form.column(5), phi @ phi[5])
    torch.testing.assert_close(form.diagonal, phi.square().sum(1))


@pytest.mark.parametrize("name", ["kernel", "features", "moments"])
def test_greedy_takes_the_best_next_one_and_no_single_swap_helps_in_the_end(name):
    p = weights()
    form, phi = forms(p)[name]
    chosen = []
    for _ in range(6):
        options = [i for i in range(40) if i not in chosen]
        chosen.append(min(options, key=lambda i: by_hand(phi, p, torch.tensor([*chosen, i]))))
    start = greedy(form, 6)
    assert start.tolist() == chosen
    rows, swaps = swap(form, start, 50)
    best = distance(form, rows)
    assert swaps > 0
    assert len(set(rows.tolist())) == 6
    for place, i in itertools.product(range(6), range(40)):
        other = rows.clone()
        other[place] = i
        assert i in rows or by_hand(phi, p, other) >= best * (1 - 1e-6)


def test_swaps_never_make_it_worse_and_none_are_made_when_none_are_asked_for():
    form, _ = forms(weights())["features"]
    for seed in range(10):
        start = torch.randperm(40, generator=seeded(seed))[:8]
        values = [distance(form, swap(form, start, sweeps)[0]) for sweeps in range(5)]
        assert values == sorted(values, reverse=True)
        assert torch.equal(swap(form, start, 0)[0], start)


def test_the_best_pair_is_found_where_all_can_be_tried():
    x = data(12, 2)
    found = match_samples(x, 2, objective="moments", generator=seeded())
    p = np.full(12, 1 / 12)
    z = torch.from_numpy(standardised(x, p))
    phi = torch.cat([z, (z[:, :, None] * z[:, None]).flatten(1)], 1)
    every = sorted(by_hand(phi, torch.from_numpy(p), torch.tensor(s)) for s in itertools.combinations(range(12), 2))
    assert found.distance == pytest.approx(by_hand(phi, torch.from_numpy(p), torch.from_numpy(found.indices)))
    assert found.distance <= every[2]


@pytest.mark.parametrize("w", [None, weights(60).numpy() * 7])
def test_the_kernel_mean_distance_is_that_of_the_formula(w):
    x = data(60, 3)
    p = np.full(60, 1 / 60) if w is None else w / w.sum()
    found = match_samples(x, 9, sample_weight=w, generator=seeded())
    z = standardised(x, p)
    apart = np.linalg.norm(z[:, None] - z[None], axis=-1)
    median = torch.from_numpy(apart[np.triu_indices(60, 1)]).median()
    assert found.bandwidth == pytest.approx(float(median))
    kernel = np.exp(-(apart**2) / 2 / found.bandwidth**2)
    q = np.zeros(60)
    q[found.indices] = 1 / 9
    assert found.distance == pytest.approx(np.sqrt((q - p) @ kernel @ (q - p)), rel=1e-6)


def test_random_features_estimate_the_kernel():
    z = data(50, 4)
    phi = fourier_features(z, 20_000, 1.7, seeded())
    wanted = torch.exp(-torch.cdist(z, z).square() / 2 / 1.7**2)
    assert phi.shape == (50, 20_000)
    assert (phi @ phi.T - wanted).abs().max() < 0.05
    assert fourier_features(z, 7, 1.0).shape == (50, 6)


def test_the_bandwidth_of_equal_and_single_samples():
    assert median_distance(torch.zeros(5, 2, dtype=torch.float64)) == 1.0
    assert median_distance(torch.zeros(1, 2, dtype=torch.float64)) == 1.0
    mostly = torch.zeros(10, 1, dtype=torch.float64)
    mostly[0] = 3
    assert median_distance(mostly) == pytest.approx(3 * 9 / 45)
    assert 0.5 < median_distance(data(3000, 1), seeded()) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("k", [50, 100])
def test_on_digits_the_distance_of_the_full_kernel_is_at_most_half_of_chance(k):
    x, _ = load_digits(return_X_y=True)
    p = np.full(len(x), 1 / len(x))
    exact = match_samples(x, k, generator=seeded())
    assert exact.features is None
    assert exact.ratio <= 0.45
    approximate = match_samples(x, k, features=512, sweeps=3, generator=seeded())
    assert approximate.features == 512
    spread = x.std(0)
    z = torch.from_numpy((x - x.mean(0)) / np.where(spread > 0, spread, 1))
    form = Kernel((torch.cdist(z, z).square() / (-2 * exact.bandwidth**2)).exp(), torch.from_numpy(p))
    assert distance(form, torch.from_numpy(exact.indices)) == pytest.approx(exact.distance, rel=1e-6)
    assert distance(form, torch.from_numpy(approximate.indices)) <= 0.5 * exact.random


def test_a_loss_of_the_users_own():
    x = data(200, 2)

    def median_is_the_same(z):
        share = z.double() / z.sum()
        return ((share @ x) - 0.5).square().sum()

    found = match_samples(x, 15, objective=median_is_the_same, steps=150)
    assert found.objective == "median_is_the_same"
    assert len(set(found.indices.tolist())) == 15
    assert found.distance == pytest.approx(float((x[found.indices].mean(0) - 0.5).square().sum()), rel=1e-5)
    assert found.ratio < 0.3


@pytest.mark.parametrize("objective", ["kernel_mean", "moments", lambda z: (z - 0.5).square().sum()])
@pytest.mark.parametrize("k", [1, 29, 30])
def test_sizes_of_one_all_but_one_and_all(objective, k):
    found = match_samples(data(30), k, objective=objective, steps=4, draws=3, generator=seeded())
    assert found.indices.tolist() == sorted(set(found.indices.tolist()))
    assert len(found.indices) == found.k == k
    assert found.indices.dtype == np.int64
    if k == 30 and isinstance(objective, str):
        assert found.distance == pytest.approx(0, abs=1e-6)


def test_a_generator_reproduces_a_choice_and_every_kind_of_data_gives_the_same():
    x = data(80)
    runs = [
        match_samples(y, 10, features=64, generator=seeded(3))
        for y in (x, x, x.numpy(), pd.DataFrame(x.numpy()), x.T.contiguous().T, x.clone().requires_grad_())
    ]
    for run in runs[1:]:
        assert run.indices.tolist() == runs[0].indices.tolist()
        assert (run.distance, run.random) == (runs[0].distance, runs[0].random)
    state = torch.get_rng_state()
    match_samples(x, 10, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_heavy_samples_pull_the_subset_and_weightless_ones_do_not_count():
    x = torch.cat([data(50), data(50, seed=5) + 20])
    w = np.r_[np.ones(50), np.zeros(50)]
    found = match_samples(x, 10, sample_weight=pd.Series(w), generator=seeded())
    assert found.indices.max() < 50
    ints = match_samples(x.round().int(), 10, sample_weight=torch.from_numpy(w).int(), generator=seeded())
    assert ints.indices.max() < 50
    assert match_samples(x > 0, 3, generator=seeded()).distance >= 0


def test_constant_and_repeated_columns_are_allowed():
    x = torch.cat([data(30), torch.full((30, 2), 0.1, dtype=torch.float64), data(30)], 1)
    for objective in ("kernel_mean", "moments"):
        assert match_samples(x, 5, objective=objective, generator=seeded()).ratio < 1
    same = match_samples(torch.ones(6, 2), 2)
    assert same.distance == same.random == 0
    assert np.isnan(same.ratio)


def test_it_prints_how_close_it_is():
    text = str(match_samples(data(1500, 2), 100, draws=5, generator=seeded()))
    assert text.startswith("100 of 1,500 samples by kernel_mean: distance 0.0")
    assert text.endswith("(mean of 5)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "1 <= k <= 40"),
        ({"k": 41}, "1 <= k <= 40"),
        ({"k": 2.5}, "must be an integer"),
        ({"objective": "moment"}, "objective must be known(.|\n)*did you mean 'moments'"),
        ({"sample_weight": np.ones(3)}, r"one weight(.|\n)*\(40,\)"),
        ({"sample_weight": -np.ones(40)}, "not negative"),
        ({"sample_weight": np.zeros(40)}, "not all zero"),
        ({"sample_weight": np.full(40, np.nan)}, "finite"),
        ({"sweeps": -1}, "sweeps must"),
        ({"starts": 0}, "starts must"),
        ({"draws": 0}, "draws must"),
        ({"features": 1}, "features must"),
        ({"features": 8, "objective": "moments"}, "no random features"),
        ({"features": 8, "objective": torch.sum}, "your own loss takes neither"),
        ({"steps": 0, "objective": torch.sum}, "steps must"),
        ({"x": torch.full((40, 2), torch.nan)}, "must be finite"),
        ({"x": torch.ones(40, 2, dtype=torch.complex64)}, "real and dense"),
        ({"x": torch.eye(40).to_sparse()}, "real and dense"),
        ({"x": torch.zeros(40)}, "rows and columns"),
        ({"x": np.zeros((0, 3))}, "rows and columns"),
        ({"x": pd.DataFrame()}, "rows and columns"),
        ({"x": pd.DataFrame({"a": ["u"] * 40})}, "must be real numbers"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(InvalidValueError, match=message):
        match_samples(**{"x": data(), "k": 5, **options})


def test_sparse_data_and_lists_are_refused_by_name():
    for x in (sp.csr_array(np.eye(4)), [[1.0]]):
        with pytest.raises(UnsupportedModuleError, match=type(x).__name__):
            match_samples(x, 1)


@pytest.mark.parametrize("generator", [0, np.random.default_rng(0), "cpu"])
def test_a_generator_of_another_kind_is_refused(generator):
    with pytest.raises(InvalidValueError, match=r"must be torch's(?s:.)*manual_seed"):
        match_samples(torch.randn(6, 2), 2, generator=generator)
    with pytest.raises(InvalidValueError, match=r"must be torch's(?s:.)*manual_seed"):
        HybridGate(6, 4).select(torch.randn(6, 2), generator=generator)
