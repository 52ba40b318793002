"""Best subsets for least squares: against every subset, dense algebra, and the data in other clothes."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from l0hooks.errors import InvalidValueError
from l0hooks.sklearn.subset.design import Design
from l0hooks.sklearn.subset.least_squares import SubsetSearch, best_subsets
from l0hooks.sklearn.subset.results import smallest
from l0hooks.sklearn.subset.size_choice import (
    Task,
    ebic_gamma,
    fit_path,
    largest_size,
    ric_places,
    with_ebic,
    with_price,
    with_ric,
)
from l0hooks.sklearn.subset.support_gains import SquaresProblem
from l0hooks.sklearn.subset.sweep import Tableau

FORMATS = ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"]


def data(seed: int, n: int = 30, p: int = 9, rho: float = 0.7) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    for j in range(1, p):
        x[:, j] += rho * x[:, j - 1]
    return x, x[:, [1, p // 2, p - 2]].sum(1) + rng.normal(size=n)


def loss_of(x: Any, y: Any, columns: Any, weight: Any = None, alpha: float = 0.0) -> float:
    """Half the mean squared residual with ridge, by dense algebra on centred columns."""
    w = np.ones(len(y)) if weight is None else weight
    z, t = x[:, list(columns)] - np.average(x[:, list(columns)], axis=0, weights=w), y - np.average(y, weights=w)
    root = np.sqrt(w / w.sum())
    rows = np.vstack([z * root[:, None], np.sqrt(alpha) * np.eye(len(columns))])
    b = np.linalg.lstsq(rows, np.append(t * root, np.zeros(len(columns))), rcond=None)[0]
    return float(np.sum((np.append(t * root, np.zeros(len(columns))) - rows @ b) ** 2) / 2)


def path_of(x: Any, y: Any, sizes: Any, weight: Any = None, **task: Any) -> Any:
    return fit_path(x, y, weight, Task("squared", **task), sizes)[0]


def columns_of(subset: Any) -> list[int]:
    return np.flatnonzero(subset.support).tolist()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_where_there_are_few_subsets_the_best_of_all_is_found(alpha: float) -> None:
    for seed in range(15):
        x, y = data(seed)
        path = path_of(x, y, range(1, 6), alpha=alpha)
        for subset in path:
            best = min(loss_of(x, y, s, alpha=alpha) for s in combinations(range(9), subset.k))
            assert subset.loss == pytest.approx(loss_of(x, y, columns_of(subset), alpha=alpha), rel=1e-9)
            assert subset.loss == pytest.approx(best, rel=1e-9)


def test_the_best_of_all_is_found_with_fewer_rows_than_columns_and_with_dependent_ones() -> None:
    for seed in range(40):
        x, y = data(seed, n=9, p=10, rho=0.9)
        x[:, 3] = x[:, 2] + x[:, 4]
        x[:, 7] = 1
        for subset in path_of(x, y, [3, 5, 6]):
            best = min(loss_of(x, y, s) for s in combinations(range(10), subset.k))
            assert subset.loss == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_no_search_does_better_than_the_best_of_all_and_most_do_as_well() -> None:
    equal = 0
    for seed in range(15):
        x, y = data(seed)
        problem = SquaresProblem(Design(x), y[:, None])
        for size, found in best_subsets(problem, range(1, 6), max_enumerated=0).items():
            best, loss = min(loss_of(x, y, s) for s in combinations(range(9), size)), found.loss / 2
            assert loss == pytest.approx(loss_of(x, y, found.items), abs=1e-10)
            assert loss >= best - 1e-10
            equal += loss <= best + 1e-10
    assert equal >= 73  # of 75


@pytest.mark.parametrize("rho", [0.0, 0.9, 1.0])
def test_no_single_exchange_improves_a_support(rho: float) -> None:
    x, y = data(3, n=60, p=120, rho=rho)
    for subset in path_of(x, y, [4, 9]):
        inside = columns_of(subset)
        for out in inside:
            rest = [j for j in inside if j != out]
            for j in set(range(120)) - set(inside):
                assert loss_of(x, y, [*rest, j]) >= subset.loss * (1 - 1e-7)


def test_the_loss_never_rises_with_the_size() -> None:
    x, y = data(4, n=40, p=60)
    assert (np.diff(path_of(x, y, range(31)).loss) <= 1e-12).all()


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
def test_gains_alone_are_those_of_what_is_left_of_y(groups: Any) -> None:
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


def test_columns_hidden_behind_many_others_are_found_by_what_is_left_of_y() -> None:
    rng = np.random.default_rng(5)
    strong = rng.normal(size=(300, 12))
    decoys = np.repeat(strong, 9, axis=1) + 0.05 * rng.normal(size=(300, 108))
    weak = rng.normal(size=(300, 300))
    x = np.column_stack([decoys, strong, weak])
    y = strong.sum(1) + 0.1 * weak[:, 7]
    problem = SquaresProblem(Design(x), y[:, None])
    search = SubsetSearch(problem, [13], {12: range(108, 120)})
    hidden, known = 120 + 7, [search.working.index(i) for i in range(108, 120)]
    assert hidden not in search.working
    search.tableau.load(known)
    search.join_by_correlation()
    assert hidden in search.working
    assert sorted(search.tableau.items) == sorted(known)
    assert search.run()[13].items == (*range(108, 120), hidden)


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


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["array", "matrix"])
def test_sparse_gives_what_dense_gives(form: str, kind: str) -> None:
    x = sparse.random(40, 12, density=0.3, random_state=0, format="csr")
    y = np.asarray(x @ np.arange(12.0)) + np.random.default_rng(1).normal(size=40)
    weight = np.random.default_rng(2).integers(0, 4, 40).astype(float)
    given = (sparse.csr_array(x) if kind == "array" else sparse.csr_matrix(x)).asformat(form)
    one, other = path_of(given, y, range(6), weight, alpha=0.01), path_of(x.toarray(), y, range(6), weight, alpha=0.01)
    for a, b in zip(one, other, strict=True):
        assert a.support.tolist() == b.support.tolist()
        assert a.coef == pytest.approx(b.coef, rel=1e-9, abs=1e-12)
        assert a.intercept == pytest.approx(b.intercept, rel=1e-9)


def test_a_sparse_matrix_too_large_to_densify() -> None:
    n, p = 200_000, 400_000  # 640 GB dense
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.integers(0, n, 300_000), np.tile(np.arange(2000), 2)])
    columns = np.concatenate([rng.integers(0, p, 300_000), np.repeat([7, 70_000], 2000)])
    x = sparse.csr_array((rng.normal(size=304_000), (rows, columns)), (n, p))
    y = np.asarray(x[:, [7, 70_000]] @ np.array([3.0, -3.0])) + 1
    assert columns_of(path_of(x, y, [2])[0]) == [7, 70_000]


@pytest.mark.parametrize("as_sparse", [False, True])
def test_weights_are_repeats(as_sparse: bool) -> None:
    x, y = data(7)
    weight = np.random.default_rng(0).integers(0, 4, len(y))
    repeated = np.repeat(np.arange(len(y)), weight)
    given = sparse.csr_array(x) if as_sparse else x
    one, other = path_of(given, y, range(5), weight.astype(float)), path_of(x[repeated], y[repeated], range(5))
    for a, b in zip(one, other, strict=True):
        assert a.support.tolist() == b.support.tolist()
        assert a.coef == pytest.approx(b.coef, rel=1e-9)
        assert a.deviance == pytest.approx(b.deviance, rel=1e-9)


def test_rows_of_weight_zero_may_hold_anything() -> None:
    x, y = data(8)
    weight = np.ones(len(y))
    weight[:4] = 0
    wild, odd = x.copy(), y.copy()
    wild[:4], odd[:4] = 1e12, -1e12
    assert path_of(wild, odd, [3], weight)[0].coef == pytest.approx(path_of(x[4:], y[4:], [3])[0].coef)


def test_columns_in_another_order_scale_and_place() -> None:
    x, y = data(9, n=50, p=30)
    order = np.random.default_rng(0).permutation(30)
    scale, shift = np.random.default_rng(1).uniform(1e-4, 1e4, 30), np.random.default_rng(2).normal(size=30) * 1e5
    plain, moved = path_of(x, y, [4])[0], path_of((x * scale + shift)[:, order], 5 * y - 3, [4])[0]
    assert moved.support.tolist() == plain.support[order].tolist()
    assert moved.coef[0] == pytest.approx(5 * (plain.coef[0] / scale)[order], rel=1e-5)
    assert moved.loss == pytest.approx(25 * plain.loss, rel=1e-6)


def test_without_an_intercept_nothing_is_centred() -> None:
    x, y = data(10)
    subset = path_of(x + 2, y + 3, [3], intercept=False)[0]
    expected = np.linalg.lstsq((x + 2)[:, subset.support], y + 3, rcond=None)[0]
    assert subset.coef[0, subset.support] == pytest.approx(expected)
    assert subset.intercept.tolist() == [0]


class TestDegenerateColumns:
    @pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 11, 12])
    def test_the_support_has_exactly_k_columns(self, k: int) -> None:
        x, y = data(11, n=8)  # rank 7 after centring
        wide = np.column_stack([x, x[:, 3], x[:, 1] + x[:, 2], np.full(8, 5.0)])
        subset = path_of(wide, y, [k])[0]
        assert subset.support.sum() == k
        assert np.isfinite(subset.coef).all()
        assert subset.loss == pytest.approx(loss_of(wide, y, columns_of(subset)), abs=1e-12)

    def test_a_constant_column_comes_last_and_counts_nothing(self) -> None:
        x, y = data(12)
        wide = np.column_stack([np.full(30, 1e8), np.zeros(30), x])
        assert columns_of(path_of(wide, y, [9])[0]) == list(range(2, 11))
        everything = path_of(wide, y, [11])[0]
        assert everything.support.all()
        assert everything.coef[0, :2].tolist() == [0, 0]

    def test_duplicates_share_and_fit_as_one(self) -> None:
        x, y = data(13)
        subset = path_of(np.column_stack([x[:, 1], x[:, 1]]), y, [2])[0]
        assert subset.coef[0, 0] == pytest.approx(subset.coef[0, 1])
        assert subset.loss == pytest.approx(loss_of(x, y, [1]))

    def test_a_constant_response_needs_no_column(self) -> None:
        path = with_ebic(path_of(data(14)[0], np.full(30, 2.0), range(5)), Task("squared"), 30.0)
        assert smallest(path.criterion) == 0
        assert path.support.sum(1).tolist() == [0, 1, 2, 3, 4]

    def test_an_exact_fit_is_found_at_its_size(self) -> None:
        x, _ = data(15)
        path = with_ebic(path_of(x, x[:, 2] - 2 * x[:, 6], range(6)), Task("squared"), 30.0)
        assert columns_of(path[smallest(path.criterion)]) == [2, 6]


class TestGroups:
    GROUPS = (np.array([0, 4]), np.array([1]), np.array([2, 3, 5]), np.array([6]), np.array([7, 8]))

    @pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
    def test_against_every_choice_of_groups(self, k: int) -> None:
        equal = 0
        for seed in range(6):
            x, y = data(seed)
            subset = path_of(x, y, [k], groups=self.GROUPS)[0]
            every = [np.concatenate(c) for c in combinations(self.GROUPS, k)]
            best = min(loss_of(x, y, columns) for columns in every)
            assert any(set(columns_of(subset)) == set(c.tolist()) for c in every)
            assert subset.loss >= best - 1e-12
            equal += subset.loss <= best + 1e-12
        assert equal >= 5

    def test_groups_of_one_are_columns(self) -> None:
        x, y = data(16, n=60, p=40)
        one = path_of(x, y, range(8))
        other = path_of(x, y, range(8), groups=tuple(np.array([j]) for j in range(40)))
        assert one.loss == pytest.approx(other.loss, rel=1e-9)

    def test_all_the_levels_of_a_factor_may_be_given(self) -> None:
        rng = np.random.default_rng(0)
        level = rng.integers(0, 4, 80)
        x = np.column_stack([rng.normal(size=(80, 3)), np.eye(4)[level]])
        y = np.array([0.0, 2.0, -1.0, 4.0])[level] + 0.1 * rng.normal(size=80)
        groups = (np.array([0]), np.array([1]), np.array([2]), np.array([3, 4, 5, 6]))
        subset = path_of(x, y, [1], groups=groups)[0]
        assert columns_of(subset) == [3, 4, 5, 6]
        assert subset.loss == pytest.approx(loss_of(x, y, [4, 5, 6]))
        assert path_of(x, y, [4], groups=groups)[0].support.all()

    def test_exchanges_are_differences_of_losses(self) -> None:
        x, y = data(17)
        problem = SquaresProblem(Design(x), y[:, None], groups=self.GROUPS)
        gains = problem.exchanges([0, 3])
        before = loss_of(x, y, [0, 4, 6])
        assert gains[0, 2] / 2 == pytest.approx(before - loss_of(x, y, [2, 3, 5, 6]))
        assert gains[1, 4] / 2 == pytest.approx(before - loss_of(x, y, [0, 4, 7, 8]))
        assert problem.add_gains([0, 3])[2] / 2 == pytest.approx(before - loss_of(x, y, [0, 4, 6, 2, 3, 5]))


def test_a_start_is_improved_and_never_made_worse() -> None:
    x, y = data(18, n=40, p=80)
    problem = SquaresProblem(Design(x), y[:, None])
    start = [70, 71, 72]
    found = SubsetSearch(problem, [3], {3: start}).run()[3]
    assert found.loss / 2 <= loss_of(x, y, start)


def test_growth_begins_from_nothing_after_a_start_too() -> None:
    x, y = data(3, n=60, p=40)
    problem = SquaresProblem(Design(x), y[:, None])
    search = SubsetSearch(problem, [6], {6: range(30, 36)})
    grown: list[int] = []
    grow = search._grow

    def watched() -> None:
        grown.append(len(search.tableau.items))
        grow()

    search._grow = watched  # type: ignore[method-assign]
    search.run()
    assert grown[:6] == [0, 1, 2, 3, 4, 5]
    assert max(grown) < search.top


def test_a_price_takes_the_size_of_least_loss_and_price() -> None:
    x, y = data(19)
    path = path_of(x, y, range(10))
    for price in (0.0, 0.01, 0.1, 10.0):
        assert smallest(with_price(path, price).criterion) == np.argmin(path.loss + price * np.arange(10))


def test_ebic_is_bic_with_few_columns_and_strict_with_many() -> None:
    assert ebic_gamma(10_000, 5) == 0
    assert 0.55 < ebic_gamma(500, 1000) < ebic_gamma(500, 100_000) < 1


class TestRic:
    @pytest.mark.parametrize("seed", range(5))
    def test_the_sizes_proposed_minimise_the_criterion_for_some_price(self, seed: int) -> None:
        x, y = data(seed, n=60, p=200)
        path, task = path_of(x, y, range(12)), Task("squared")
        places = ric_places(path, task, 60.0)
        rss = 2 * path.loss
        risk = {int(np.argmin(60 * np.log(rss) + c * path.k * np.log(200))) for c in np.linspace(1.5, 2.5, 41)}
        assert places.tolist() == sorted(risk)

    def test_with_few_columns_the_price_is_that_of_bic(self) -> None:
        x, y = data(1, n=2000, p=6)
        path = path_of(x, y, range(7))
        bic = 2000 * np.log(2 * path.loss) + path.k * np.log(2000)
        assert ric_places(path, Task("squared"), 2000.0).tolist() == [int(np.argmin(bic))]

    def test_further_columns_of_a_group_cost_two_each(self) -> None:
        x, y = data(2, n=80, p=60)
        groups = tuple(np.arange(3 * g, 3 * g + 3) for g in range(20))
        path = path_of(x, y, range(5), groups=groups)
        places = ric_places(path, Task("squared", groups=groups), 80.0)
        value = 80 * np.log(2 * path.loss) + path.k * (2 * np.log(20) + 2 * 2)
        assert int(np.argmin(value)) in places

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


@pytest.mark.parametrize(
    ("weight", "message"),
    [(np.ones(3), "one weight for each row"), (-np.ones(4), "not negative"), (np.zeros(4), "not all zero")],
)
def test_weights_that_are_none(weight: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        Design(np.eye(4), weight)


def test_a_design_is_a_matrix() -> None:
    with pytest.raises(InvalidValueError, match="must be a matrix"):
        Design(np.ones(3))
