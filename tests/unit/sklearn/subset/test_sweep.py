"""The gains of changes of a support: differences of losses, however they are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from subset_reference import data, loss_of

from l0hooks.sklearn.subset.design import Design
from l0hooks.sklearn.subset.support_gains import SquaresProblem
from l0hooks.sklearn.subset.sweep import Tableau


def test_gains_of_the_tableau_are_differences_of_losses() -> None:
    x, y = data(5)
    problem = SquaresProblem(Design(x), y[:, None], alpha=0.1)
    tableau = problem.tableau(list(range(9)))
    tableau.load([2, 6, 7])
    before = tableau.loss
    gains = tableau.swap_gains(np.array([0, 4, 8]))
    outside = problem.exchanges([2, 6, 7])
    for row, out in enumerate([2, 6, 7]):
        for place, item in enumerate([0, 4, 8]):
            tableau.load([2, 6, 7])
            tableau.swap(out, item)
            assert before - tableau.loss == pytest.approx(gains[row, place], abs=1e-12)
            assert outside[row, item] == pytest.approx(gains[row, place], abs=1e-12)
    tableau.load([2, 6, 7])
    adds, costs = tableau.add_gains(), tableau.drop_costs()
    assert problem.add_gains([2, 6, 7])[[0, 4, 8]] == pytest.approx(adds[[0, 4, 8]], abs=1e-12)
    tableau.enter(4)
    assert before - tableau.loss == pytest.approx(adds[4], abs=1e-12)
    tableau.leave(4)
    tableau.leave(6)
    assert tableau.loss - before == pytest.approx(costs[1], abs=1e-12)


def test_a_tableau_that_grows_and_sweeps_at_once_is_the_one_made_anew_by_pivots() -> None:
    x, y = data(7, n=50, p=20)
    problem = SquaresProblem(Design(x), y[:, None], alpha=0.05)
    part = problem.tableau([3, 8, 1, 15])
    grown, whole = problem.tableau([3, 8, 1, 15, 0, 19], part), problem.tableau([3, 8, 1, 15, 0, 19])
    grown.load([0, 2, 4, 5])  # formed in one step
    for item in (0, 2, 4, 5):
        whole.enter(item)
    assert grown.loss == pytest.approx(whole.loss, rel=1e-12)
    assert grown.coefficients() == pytest.approx(whole.coefficients(), rel=1e-9)
    assert grown.swap_gains(np.array([1, 3])) == pytest.approx(whole.swap_gains(np.array([1, 3])), abs=1e-10)
    assert grown.drop_costs() == pytest.approx(whole.drop_costs(), rel=1e-9)
    assert grown.swept.tolist() == whole.swept.tolist()


@pytest.mark.parametrize("dependent", [False, True])
def test_what_enters_is_what_gains_most_by_any_exchange(dependent: bool) -> None:
    x, y = data(8, n=60, p=80)
    if dependent:
        x[:, 5] = x[:, 2]
    problem = SquaresProblem(Design(x), y[:, None])
    items = [2, 5, 40]
    best = problem.exchanges(items).max(0)
    found, gains = problem.entering(items, 4, 1e-9)
    assert gains == pytest.approx(best[found], abs=1e-12)
    assert gains.max() == pytest.approx(best.max(), abs=1e-12)
    none, _ = problem.entering(items, 4, float(best.max()) + 1e-9)
    assert len(none) == 0


@pytest.mark.parametrize("groups", [None, [[0, 3], [1], [2, 4, 5], [6], [7, 8]]])
def test_gains_alone_are_those_of_the_residual(groups: Any) -> None:
    x, y = data(11)
    indices = None if groups is None else [np.array(g) for g in groups]
    problem = SquaresProblem(Design(x), y[:, None], groups=indices)
    tableau = problem.tableau(list(range(problem.n_items)))
    tableau.load([1, 2])
    columns, b = tableau.fitted()
    gains = problem.gains_alone(problem.columns(range(problem.n_items))[columns], b)
    fitted = [1, 2] if groups is None else [1, 2, 4, 5]
    full = np.column_stack([np.ones(len(y)), x[:, fitted]])
    left = y - full @ np.linalg.lstsq(full, y, rcond=None)[0]
    for item in range(problem.n_items):
        own = [item] if groups is None else groups[item]
        assert gains[item] == pytest.approx(2 * (loss_of(x, left, []) - loss_of(x, left, own)), abs=1e-12)


def test_a_tableau_stays_exact_over_many_pivots() -> None:
    x, y = data(6, n=50, p=20)
    tableau = SquaresProblem(Design(x), y[:, None]).tableau(list(range(20)))
    rng = np.random.default_rng(0)
    for _ in range(1500):
        item = int(rng.integers(20))
        (tableau.leave if item in tableau.items else tableau.enter)(item)
    assert tableau.loss / 2 == pytest.approx(loss_of(x, y, tableau.items), rel=1e-9)


def test_squares_are_summed_over_responses() -> None:
    gram, cross = np.eye(3), np.array([[1.0, 0.0], [0.6, 0.9], [0.0, 0.5]])
    assert Tableau(gram, cross, 10.0).add_gains() == pytest.approx([1.0, 0.36 + 0.81, 0.25])
