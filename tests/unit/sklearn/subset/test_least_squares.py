"""Best subsets for least squares: against every subset, dense algebra, and other forms of the same data."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import sparse
from subset_reference import columns_of, data, loss_of, path_of

from l0hooks.sklearn.subset.design import Design
from l0hooks.sklearn.subset.least_squares import SubsetSearch, best_subsets
from l0hooks.sklearn.subset.results import smallest
from l0hooks.sklearn.subset.size_choice import (
    Task,
    with_ebic,
)
from l0hooks.sklearn.subset.support_gains import SquaresProblem

FORMATS = ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_where_there_are_few_subsets_the_best_of_all_is_found(alpha: float) -> None:
    for seed in range(15):
        x, y = data(seed)
        path = path_of(x, y, range(1, 6), alpha=alpha)
        for subset in path:
            best = min(loss_of(x, y, s, alpha=alpha) for s in combinations(range(9), subset.k))
            assert subset.loss == pytest.approx(loss_of(x, y, columns_of(subset), alpha=alpha), rel=1e-9)
            assert subset.loss == pytest.approx(best, rel=1e-9)


@pytest.mark.slow
def test_the_best_of_all_is_found_with_fewer_rows_than_columns_and_with_dependent_ones() -> None:
    for seed in range(20):
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


def test_columns_hidden_behind_many_others_are_found_by_the_residual() -> None:
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


def test_columns_in_another_order_scale_and_position() -> None:
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
