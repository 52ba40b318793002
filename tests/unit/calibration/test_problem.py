"""The prepared problem against dense algebra."""

import numpy as np
import pytest
from scipy import sparse

from l0hooks.calibration.numerics.columns import (
    compacted,
    row_norms,
    rows_of,
    scale_rows,
    stored_by_unit,
    weighted_squares,
)
from l0hooks.calibration.numerics.preparation import ErrorOptions, UnitOptions, prepare

RNG = np.random.default_rng(0)
DENSE = RNG.random((5, 12)) * (RNG.random((5, 12)) < 0.6)
TARGETS = DENSE @ RNG.uniform(1, 3, 12)
DESIGN = RNG.uniform(1, 2, 12)


@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_matrix, sparse.coo_array, sparse.lil_matrix])
def test_columns_are_the_scaled_matrix(kind) -> None:
    problem = prepare(kind(DENSE), TARGETS, units=UnitOptions(DESIGN), dtype="float64")
    factor = problem.design[0] / DESIGN[0]
    wanted = np.diag(1 / (TARGETS + 1)) @ DENSE @ np.diag(DESIGN * factor)
    np.testing.assert_allclose(problem.columns.toarray(), wanted.T)
    np.testing.assert_allclose(problem.lower, TARGETS / (TARGETS + 1))
    np.testing.assert_allclose(problem.norms, np.linalg.norm(wanted, axis=0))
    assert np.median(TARGETS / (DENSE @ (DESIGN * factor))) == pytest.approx(1.0)
    g = RNG.random(12)
    weights = problem.weights(g, np.arange(12))
    errors = np.abs(DENSE @ weights - TARGETS) / (TARGETS + 1)
    assert problem.error(problem.misses(problem.estimates(g))) == pytest.approx(errors.mean())
    np.testing.assert_allclose(problem.gradient(wanted @ g - problem.lower), wanted.T @ (wanted @ g - problem.lower))


def test_bounds_hold_for_the_ratio_to_the_users_design_weights_or_for_the_weight() -> None:
    ratio = prepare(sparse.csr_array(DENSE), TARGETS, units=UnitOptions(DESIGN, (0.5, 2.0)))
    np.testing.assert_allclose(ratio.low * ratio.design, 0.5 * DESIGN)
    weight = prepare(sparse.csr_array(DENSE), TARGETS, units=UnitOptions(DESIGN, (0.5, 2.0), "weight"))
    np.testing.assert_allclose(weight.high * weight.design, 2.0)


def test_clusters_share_one_weight_and_left_out_households_have_none() -> None:
    labels = np.array([3, 3, 1, 1, 1, 0, 7, 7, 8, 9, 10, 11])
    problem = prepare(
        sparse.csr_array(DENSE), TARGETS, units=UnitOptions(clusters=labels, leave_out=[6], keep=[4]), dtype="float64"
    )
    assert problem.size == 7  # nine labels, one of them left out ... and its other household with it
    assert problem.kept.tolist() == [False, True, False, False, False, False, False]
    assert problem.members.tolist() == [0, 0, 1, 1, 1, 2, -1, -1, 3, 4, 5, 6]
    g = RNG.random(problem.size)
    weights = problem.weights(g, np.arange(problem.size))
    assert len(set(weights[2:5])) == 1
    assert weights[6] == weights[7] == 0
    np.testing.assert_allclose(problem.estimates(g) / problem.scale, DENSE @ weights)


def test_importance_is_what_a_squared_error_counts() -> None:
    importance = np.array([1.0, 4.0, 1.0, 1.0, 3.0])
    plain = prepare(sparse.csr_array(DENSE), TARGETS, dtype="float64")
    weighted = prepare(sparse.csr_array(DENSE), TARGETS, errors=ErrorOptions(importance=importance), dtype="float64")
    np.testing.assert_allclose((weighted.scale / plain.scale) ** 2, importance / 2)


def test_the_squared_loss_scales_all_targets_alike() -> None:
    problem = prepare(sparse.csr_array(DENSE), TARGETS, errors=ErrorOptions("squared"))
    assert len(set(problem.scale)) == 1


def test_hierarchy_adds_rows_for_what_does_not_add_up() -> None:
    problem = prepare(
        sparse.csr_array(DENSE), TARGETS, errors=ErrorOptions(hierarchy=[(0, [1, 2])], consistency=4.0), dtype="float64"
    )
    assert problem.rows == 6
    assert len(problem.denominators) == 5
    weights = problem.weights(np.ones(12), np.arange(12))
    estimates = DENSE @ weights
    missed = 2 * (estimates[0] - estimates[1] - estimates[2]) / (TARGETS[0] + 1)
    assert problem.misses(problem.estimates(np.ones(12)))[5] == pytest.approx(missed)


def test_intervals_count_only_what_lies_outside() -> None:
    problem = prepare(sparse.csr_array(DENSE), TARGETS - 1, TARGETS + 1, dtype="float64")
    estimates = np.array([TARGETS[0] - 3, *TARGETS[1:]]) * problem.scale
    assert problem.misses(estimates) == pytest.approx([-2 * problem.scale[0], 0, 0, 0, 0])


def test_one_sided_intervals_and_negative_targets() -> None:
    problem = prepare(sparse.csr_array(-DENSE), -TARGETS, np.full(5, np.inf))
    assert np.isfinite(problem.scale).all()
    np.testing.assert_allclose(problem.denominators, TARGETS + 1)


def test_float32_and_float64_differ_by_rounding_only() -> None:
    single, double = (prepare(sparse.csr_array(DENSE), TARGETS, dtype=d) for d in ("float32", "float64"))
    assert single.columns.dtype == np.float32
    np.testing.assert_allclose(single.columns.toarray(), double.columns.toarray(), rtol=1e-6)


def test_the_users_matrix_stays_as_it_is() -> None:
    matrix = sparse.csr_array(DENSE)
    before = matrix.toarray()
    prepare(matrix, TARGETS, units=UnitOptions(DESIGN), dtype="float64")
    np.testing.assert_array_equal(matrix.toarray(), before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("share", [0.1, 0.95, 1.0])
def test_rows_are_moved_together_in_their_own_memory(share, dtype) -> None:
    rng = np.random.default_rng(3)
    block = sparse.random_array((500, 40), density=0.2, rng=rng, format="csr", dtype=dtype)
    stay = np.flatnonzero(rng.random(500) < share)
    wanted, memory = block.toarray()[stay], block.data
    moved = compacted(block, stay)
    np.testing.assert_array_equal(moved.toarray(), wanted)
    assert share < 0.5 or np.shares_memory(moved.data, memory)


def test_sums_over_pieces_are_sums() -> None:
    rng = np.random.default_rng(4)
    dense = rng.normal(size=(60, 9)) * (rng.random((60, 9)) < 0.4)
    curvature = rng.random(60)
    block = sparse.csr_array(dense)
    np.testing.assert_allclose(row_norms(block, entries_per_piece=7), np.linalg.norm(dense, axis=1))
    np.testing.assert_allclose(weighted_squares(block, curvature, entries_per_piece=7), curvature @ dense**2)


def test_rows_in_float64_are_those_of_the_stored_matrix() -> None:
    stored = sparse.csr_array(np.random.default_rng(5).random((6, 4), np.float32))
    units = np.array([1, 4])
    exact, rough = rows_of(stored, units), rows_of(stored, units, rough=True)
    assert (exact.dtype, rough.dtype, stored.dtype) == (np.float64, np.float32, np.float32)
    np.testing.assert_array_equal(exact.toarray(), stored.toarray()[units])


def test_matrices_are_turned_around_piece_by_piece() -> None:
    rng = np.random.default_rng(0)
    dense = rng.random((40, 30)) * (rng.random((40, 30)) < 0.3)
    dense[[0, 7, 39]] = dense[:, [0, 3, 29]] = 0
    doubled = sparse.coo_array((np.ones(2), ([1, 1], [2, 2])), shape=(40, 30))
    dense[1, 2] = 2
    only = dense.copy()
    only[1, 2] = 0
    matrix = sparse.vstack([sparse.csr_array(only)]) + doubled
    problem = prepare(matrix, dense @ np.ones(30), dtype="float64")
    wanted = np.diag(problem.scale) @ dense @ np.diag(problem.design)
    np.testing.assert_allclose(problem.columns.toarray(), wanted.T)
    np.testing.assert_allclose(problem.norms, np.linalg.norm(wanted, axis=0))
    assert problem.columns.has_canonical_format
    households = np.arange(30)
    columns = stored_by_unit(matrix.tocsr(), problem.scale, households, 30, np.dtype("float64"), entries_per_piece=5)
    scale_rows(columns, problem.design)
    np.testing.assert_allclose(columns.toarray(), wanted.T)
    np.testing.assert_allclose(row_norms(columns, entries_per_piece=5), np.linalg.norm(wanted, axis=0))
    assert columns.has_canonical_format
