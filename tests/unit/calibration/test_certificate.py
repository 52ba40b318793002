"""Whether targets can be met: every claim against an independent linear programme."""

import numpy as np
import pytest
from scipy import optimize, sparse

from l0hooks.calibration.fit.polish import polish
from l0hooks.calibration.fit.polished import PolishLimits
from l0hooks.calibration.fit.stage import Selection
from l0hooks.calibration.numerics.certificate import can_be_met, proves_impossible
from l0hooks.calibration.numerics.preparation import UnitOptions, prepare

TOLERANCE = 1e-6


def harsh(seed, noise=(0.0, 0.0, 1e-6, 1e-4, 1e-2)):
    """Narrow intervals about what weights give that mostly lie at their bounds; some a little beyond."""
    rng = np.random.default_rng(seed)
    n, rows = int(rng.integers(20, 120)), int(rng.integers(3, 14))
    matrix = rng.random((rows, n)) * (rng.random((rows, n)) < rng.choice([0.3, 0.7, 1.0]))
    matrix += 3 * rng.random((1, n)) if seed % 2 else 0
    low, high = rng.choice([0, 0.3, 0.8]), rng.choice([1.5, 3, np.inf])
    top = min(high, 4.0)
    weights = rng.choice([low, top, 1.0], n, p=[0.45, 0.45, 0.1]) if seed % 3 else rng.uniform(low, top, n)
    y = (matrix @ weights) * (1 + rng.choice(noise) * rng.normal(size=rows))
    width = rng.choice([1e-6, 1e-4, 1e-2]) * np.abs(y) * rng.random(rows) * (rng.random(rows) < 0.7)
    lower, upper = y - width * rng.random(rows), y + width * rng.random(rows)
    open_end = (rng.random(rows) < 0.2) & (width > 0)
    return matrix, np.where(open_end, -np.inf, lower), upper, low, high


def oracle(block, lower, upper, low, high, slack):
    """Whether a linear programme of intervals wider by ``slack`` has a point."""
    known, other = np.isfinite(upper), np.isfinite(lower)
    solved = optimize.linprog(
        np.zeros(len(block)),
        A_ub=np.vstack([block.T[known], -block.T[other]]),
        b_ub=np.concatenate([upper[known] + slack, slack - lower[other]]),
        bounds=np.column_stack([low, high]),
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-9},
    )
    assert solved.status in (0, 2)
    return solved.status == 0


@pytest.mark.parametrize("objective", ["auto", "distance"])
@pytest.mark.parametrize("block_of_seeds", range(5))
def test_words_about_what_can_be_met_are_true(block_of_seeds, objective) -> None:
    said = []
    for seed in range(20 * block_of_seeds, 20 * block_of_seeds + 20):
        matrix, lower, upper, low, high = harsh(seed, noise=(0.0, 1e-3, 0.1, 0.5))
        problem = prepare(
            sparse.csr_array(matrix), lower, upper, units=UnitOptions(bounds=(low, high)), dtype="float64"
        )
        done = polish(problem, Selection(np.arange(problem.size), np.ones(problem.size)), objective=objective)
        dense, bounds = problem.columns.toarray(), (problem.low, problem.high)
        met = done.feasible
        assert met == ("all targets met" in done.reason)
        if met:
            estimates = dense.T @ done.selection.g
            assert np.all(
                (estimates >= problem.lower - 1.1 * TOLERANCE) & (estimates <= problem.upper + 1.1 * TOLERANCE)
            )
            assert np.all((done.selection.g >= problem.low) & (done.selection.g <= problem.high))
        impossible = "not all targets can be met" in done.reason
        if impossible:
            assert not oracle(dense, problem.lower, problem.upper, *bounds, 0.0)
        said.append("met" if met else "impossible" if impossible else "other")
    assert "met" in said


@pytest.mark.parametrize("seed", range(60))
def test_answers_are_those_of_a_linear_programme(seed) -> None:
    matrix, lower, upper, low, high = harsh(seed, noise=(0.0, 0.1, 0.5))
    problem = prepare(sparse.csr_array(matrix), lower, upper, units=UnitOptions(bounds=(low, high)), dtype="float64")
    ends = (problem.lower, problem.upper, problem.low, problem.high)
    answer = can_be_met(problem.columns, *ends, np.zeros(problem.rows), TOLERANCE)
    dense = problem.columns.toarray()
    if answer.impossible:
        assert answer.g is None
        assert not oracle(dense, *ends, 0.9 * TOLERANCE)
    elif answer.g is not None:
        assert oracle(dense, *ends, 1.1 * TOLERANCE)
    assert (answer.g is not None) or answer.impossible  # small ones are always settled


@pytest.mark.parametrize("seed", range(40))
def test_no_multipliers_prove_what_is_false(seed) -> None:
    matrix, lower, upper, low, high = harsh(seed, noise=(0.0,))
    n = matrix.shape[1]
    rng = np.random.default_rng(seed)
    dense = sparse.csr_array(matrix.T)
    for scale in (1.0, 1e-12, 1e12):
        for u in (rng.normal(size=len(lower)), np.ones(len(lower)), -np.ones(len(lower)), np.eye(len(lower))[0]):
            assert not proves_impossible(dense, scale * u, lower, upper, np.full(n, low), np.full(n, high))
    assert not proves_impossible(dense, np.full(len(lower), np.nan), lower, upper, np.full(n, low), np.full(n, high))


def test_large_problems_are_left_open() -> None:
    block, ends, low, high = sparse.csr_array(np.eye(2)), np.array([1.0, 2.0]), np.zeros(2), np.ones(2)
    answer = can_be_met(block, ends, ends, low, high, np.array([-1.0, 0.0]), 1e-9, most_entries=0)
    assert (answer.g, answer.impossible) == (None, False)
    by_misses = can_be_met(block, ends, ends, low, high, np.array([0.0, -1.0]), 1e-9, most_entries=0)
    assert by_misses.impossible  # the misses say it


def test_a_fit_says_when_it_does_not_know(monkeypatch) -> None:
    monkeypatch.setattr("l0hooks.calibration.numerics.certificate.proves_impossible", lambda *_: False)
    units = UnitOptions(bounds=(0.5, 0.6), bounds_on="weight")
    problem = prepare(sparse.csr_array(np.ones((1, 4))), [100.0], units=units, dtype="float64")
    done = polish(
        problem, Selection(np.arange(4), np.ones(4)), objective="distance", limits=PolishLimits(programme_entries=0)
    )
    assert not done.feasible
    assert "whether all targets can be met within the bounds is not known" in done.reason
