"""The rules that choose a size: prices, extended BIC, risk inflation, held-out losses."""

from __future__ import annotations

import numpy as np
import pytest
from subset_reference import data, path_of

from l0hooks.sklearn.subset.results import smallest
from l0hooks.sklearn.subset.size_choice import (
    Task,
    ebic_gamma,
    held_out,
    largest_size,
    ric_indices,
    with_price,
    with_ric,
)


def test_a_price_takes_the_size_of_least_loss_and_price() -> None:
    x, y = data(19)
    path = path_of(x, y, range(10))
    for price in (0.0, 0.01, 0.1, 10.0):
        assert smallest(with_price(path, price).criterion) == np.argmin(path.loss + price * np.arange(10))


def test_ebic_is_bic_with_few_columns_and_strict_with_many() -> None:
    assert ebic_gamma(10_000, 5) == 0
    assert 0.55 < ebic_gamma(500, 1000) < ebic_gamma(500, 100_000) < 1


def test_a_held_out_weight_is_that_many_copies_of_the_row() -> None:
    x, y = data(3)
    weight = np.random.default_rng(0).integers(0, 4, len(y))
    path, task = path_of(x, y, range(4)), Task("squared")
    losses, mass = held_out(path, x, y, weight.astype(float), task)
    expected, count = held_out(path, x.repeat(weight, axis=0), y.repeat(weight), None, task)
    assert losses == pytest.approx(expected)
    assert mass == count == weight.sum()
    residual = y - y.mean()
    assert losses[0] == pytest.approx(weight @ residual**2 / 2 / mass)  # of no columns: the mean of y alone


class TestRic:
    @pytest.mark.parametrize("seed", range(5))
    def test_the_sizes_proposed_minimise_the_criterion_for_some_price(self, seed: int) -> None:
        x, y = data(seed, n=60, p=200)
        path, task = path_of(x, y, range(12)), Task("squared")
        indices = ric_indices(path, task, 60.0)
        rss = 2 * path.loss
        risk = {int(np.argmin(60 * np.log(rss) + c * path.k * np.log(200))) for c in np.linspace(1.5, 2.5, 41)}
        assert indices.tolist() == sorted(risk)

    def test_with_few_columns_the_price_is_that_of_bic(self) -> None:
        x, y = data(1, n=2000, p=6)
        path = path_of(x, y, range(7))
        bic = 2000 * np.log(2 * path.loss) + path.k * np.log(2000)
        assert ric_indices(path, Task("squared"), 2000.0).tolist() == [int(np.argmin(bic))]

    def test_further_columns_of_a_group_cost_two_each(self) -> None:
        x, y = data(2, n=80, p=60)
        groups = tuple(np.arange(3 * g, 3 * g + 3) for g in range(20))
        path = path_of(x, y, range(5), groups=groups)
        indices = ric_indices(path, Task("squared", groups=groups), 80.0)
        value = 80 * np.log(2 * path.loss) + path.k * (2 * np.log(20) + 2 * 2)
        assert int(np.argmin(value)) in indices

    def test_the_largest_size_that_loses_at_most_half_a_standard_error(self) -> None:
        path = path_of(*data(3), range(5))
        steps = np.array([[3.0, 1.0, 1.0 + a, 1.5] for a in (-0.02, 0.0, 0.01, 0.02, 0.01)])  # mean .004, error .0068
        folds = [(row, 10.0) for row in steps]
        chosen, place = with_ric(path, np.array([0, 2, 3, 4]), folds)
        assert place == 2
        assert chosen.criterion[[0, 2, 3, 4]] == pytest.approx(steps.mean(0))
        assert np.isnan(chosen.criterion[1])
        steps[:, 2] -= 0.001  # mean .003
        assert with_ric(path, np.array([0, 2, 3, 4]), [(row, 10.0) for row in steps])[1] == 3

    def test_a_fold_that_cannot_be_predicted_rules_its_size_out(self) -> None:
        path = path_of(*data(3), range(3))
        folds = [(np.array([2.0, 1.0, np.inf]), 5.0), (np.array([2.0, 1.1, 1.0]), 5.0)]
        assert with_ric(path, np.array([0, 1, 2]), folds)[1] == 1


@pytest.mark.parametrize(("n", "p", "expected"), [(500, 1000, 48), (1e6, 10_000, 100), (5, 50, 1), (9, 2, 2)])
def test_the_largest_size(n: float, p: int, expected: int) -> None:
    assert largest_size(n, p) == expected
