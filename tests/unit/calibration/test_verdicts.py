"""What a fit says of its targets and weights is true: nearest to the design weights; met, impossible, or unknown."""

import warnings

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linprog, root

from l0hooks.calibration import CalibrationWarning, Calibrator


def fit(matrix, y=None, *, design_weights=None, lower=None, upper=None, **options):
    calibrator = Calibrator(**{"dtype": "float64", "progress": False, **options})
    return calibrator.fit(matrix, y, lower=lower, upper=upper, design_weights=design_weights)


def nearest(matrix, y, design, distance):
    """The dual equations of Deville & Särndal (1992), solved by SciPy; no bound is active."""
    how = {"chi_square": lambda t: 1 + t, "raking": np.exp}[distance]
    solved = root(lambda u: matrix @ (design * how(matrix.T @ u)) - y, np.zeros(len(y)), tol=1e-13)
    assert solved.success
    return design * how(matrix.T @ solved.x)


def survey(seed=0, targets=3, households=25):
    rng = np.random.default_rng(seed)
    matrix, design = rng.random((targets, households)), rng.uniform(1, 3, households)
    return matrix, matrix @ (design * rng.uniform(1.1, 1.6, households)), design


# nearest to the design weights


def test_weights_are_nearest_to_the_design_weights_and_not_to_a_multiple_of_them():
    # R: calibrate(svydesign(~1, weights = ~rep(1, 4)), ~x - 1, population = c(x = 20), calfun = "linear")
    found = fit([[1.0, 2, 3, 4]], [20.0], tolerance=1e-10)
    assert found.weights == pytest.approx([4 / 3, 5 / 3, 2, 7 / 3], abs=1e-9)
    assert fit([[1.0, 2, 3, 4]], [20.0], rescale_design=True).weights == pytest.approx([2, 2, 2, 2], abs=1e-9)


@pytest.mark.parametrize("distance", ["chi_square", "raking"])
def test_the_nearest_weights_are_those_of_the_dual_equations(distance):
    matrix, y, design = survey()
    found = fit(matrix, y, design_weights=design, distance=distance, tolerance=1e-10)
    np.testing.assert_allclose(found.weights, nearest(matrix, y, design, distance), rtol=1e-7)


@pytest.mark.parametrize("distance", ["chi_square", "raking"])
def test_chosen_households_have_the_weights_nearest_to_their_design_weights(distance):
    matrix, y, design = survey(households=60)
    found = fit(matrix, y, design_weights=design, distance=distance, tolerance=1e-10, k=30, method="greedy")
    some = found.chosen
    np.testing.assert_allclose(found.weights[some], nearest(matrix[:, some], y, design[some], distance), rtol=1e-6)


@pytest.mark.parametrize("distance", ["chi_square", "raking"])
def test_design_weights_that_meet_all_intervals_stay(distance):
    matrix, _, design = survey()
    estimates = matrix @ design
    found = fit(matrix, lower=0.99 * estimates, upper=1.3 * estimates, design_weights=design, distance=distance)
    np.testing.assert_allclose(found.weights, design, rtol=1e-6)


# met, impossible, unknown

CONTRADICTIONS = {
    "two totals of the same households": (np.ones((2, 50)), [1e5, 1.3e5], {}),
    "margins of different sums": (np.kron(np.eye(2), np.ones((1, 25))).repeat(2, axis=0), [30.0, 40, 30, 41], {}),
    "a total beyond the bounds": (np.ones((1, 50)), [5000.0], {"bounds": (0.5, 2.0)}),
    "parts and their sum": (np.vstack([np.eye(2).repeat(20, axis=1), np.ones((1, 40))]), [10.0, 20, 31], {}),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
@pytest.mark.parametrize("objective", ["auto", "least_squares", "distance"])
@pytest.mark.filterwarnings("ignore:y. targets should lie within")
def test_targets_that_contradict_each_other_are_told(name, objective):
    matrix, y, options = CONTRADICTIONS[name]
    with pytest.warns(CalibrationWarning, match=r"(?s)every target should be met.*not all targets can be met"):
        found = fit(matrix, y, objective=objective, **options)
    assert not found.converged
    assert found.verdict == "impossible"
    assert found.reason.startswith("not all targets can be met within the bounds")


def test_an_ill_conditioned_square_problem_is_met():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((60, 60)))[0] for _ in range(2))
    matrix = left @ np.diag(np.geomspace(639, 1, 60)) @ right + 30
    weights = rng.uniform(0.5, 2, 60)
    found = fit(matrix, matrix @ weights)
    assert found.verdict == "met"
    assert float(np.abs(found.relative_errors).max()) <= 1e-6


def test_a_stricter_tolerance_is_a_better_fit():
    rng = np.random.default_rng(1)
    matrix = rng.random((30, 30)) ** 4
    for tolerance in (1e-6, 1e-9):
        found = fit(matrix, matrix @ rng.uniform(0.5, 2, 30), tolerance=tolerance)
        assert found.converged
        assert float(np.abs(found.relative_errors).max()) <= tolerance


def test_targets_are_judged_by_the_numbers_as_given():
    """Incomes less a constant: what is left of their sum is far below the rounding of float32."""
    rng = np.random.default_rng(2)
    income = rng.normal(5e7, 1e3, 300)
    matrix = np.vstack([np.ones(300), income - 5e7 + 0.1, income])
    y = matrix @ rng.uniform(0.8, 1.2, 300)
    y[1] = 40.0
    found = Calibrator(progress=False).fit(matrix, y)  # float32 is the default
    assert found.verdict == "met"
    assert float(np.abs(found.relative_errors).max()) <= 1e-6


def test_a_target_of_little_importance_is_met_too_or_told():
    matrix, y, design = survey()
    found = fit(matrix, y, design_weights=design, importance=[1.0, 1.0, 1e-6])
    assert found.converged
    assert float(np.abs(found.relative_errors).max()) <= 1e-6


def counts_and(row, value, *, bounds=(0.3, 3.0)):
    """Twelve counts that can be met, and another target."""
    rng = np.random.default_rng(0)
    matrix, design = (rng.random((12, 500)) < 0.3).astype(float), np.full(500, 50.0)
    y = matrix @ (design * rng.uniform(0.9, 1.1, 500))
    return fit(np.vstack([matrix, row(matrix, rng)]), np.r_[y, value(y)], design_weights=design, bounds=bounds)


@pytest.mark.filterwarnings("ignore:y. targets should lie within")
def test_a_target_in_thousands_is_named_and_leaves_the_others_alone():
    with pytest.warns(CalibrationWarning) as caught:
        found = counts_and(lambda matrix, rng: (rng.random(500) < 0.3).astype(float), lambda y: y[0] / 1000)
    said = " ".join(str(one.message) for one in caught)
    assert "should have the units of their rows" in said
    assert "an order of magnitude off: 12" in said
    assert 12 in found.conflict
    assert "in conflict" in str(found)
    assert float(np.abs(found.relative_errors[:12]).max()) < 0.02
    estimates = found.columns("targets")["design_estimate"]
    assert estimates[12] == pytest.approx(estimates[0], rel=0.2)


@pytest.mark.filterwarnings("ignore:Calibrator.fit. every target should", "ignore:y. targets should lie within")
def test_a_zero_in_large_units_is_met_or_leaves_the_others_near():
    incomes = {"met": 0.0, "impossible": 20_000.0}
    for verdict, mean in incomes.items():
        found = counts_and(lambda matrix, rng, mean=mean: rng.normal(mean, 5000, 500), lambda y: 0.0)
        assert found.verdict == verdict
        assert float(np.abs(found.relative_errors[:12]).max()) < (1e-6 if verdict == "met" else 0.35)


def test_the_smallest_conflict_is_named():
    matrix = np.vstack([np.eye(6), np.ones((1, 6)), np.ones((1, 6))])
    y = {**{f"part {n}": 1.0 for n in range(6)}, "sum": 6.0, "other sum": 9.0}
    with pytest.warns(CalibrationWarning, match=r"(?s)in conflict: .*'other sum'"):
        found = fit(np.asarray(matrix), y)
    assert "other sum" in found.conflict
    used = [place for place, name in enumerate(y) if name in found.conflict]
    values = np.array(list(y.values()))
    alone = linprog(np.zeros(6), A_eq=matrix[used], b_eq=values[used], bounds=(0, None), method="highs")
    assert alone.status == 2  # infeasible already without the other targets


# against a linear programme


def random_problem(seed):
    """Points and intervals, bounds, dependent rows, mixed magnitudes; many of them cannot be met."""
    rng = np.random.default_rng(seed)
    rows, households = int(rng.integers(1, 9)), int(rng.integers(2, 40))
    matrix = rng.random((rows, households)) * (rng.random((rows, households)) < rng.choice([0.3, 1.0]))
    if rng.random() < 0.3:
        matrix -= 0.3 * rng.random((rows, 1))
    matrix *= 10.0 ** rng.integers(-1, 5, (rows, 1))
    if rng.random() < 0.4:
        matrix = np.vstack([matrix, matrix[[0]] + matrix[[-1]]])
    bounds = (0.0, np.inf) if rng.random() < 0.5 else (0.3, 3.0)
    y = matrix @ rng.uniform(0.4, 2.5, households)
    if rng.random() < 0.8:
        y *= rng.uniform(0.3, 2.5, len(y))
    wide = np.abs(y) * rng.choice([0.0, 0.02, 0.2], len(y))
    return matrix, y - wide, y + wide, bounds


def least_miss(matrix, lower, upper, bounds):
    """The smallest largest relative miss, by HiGHS."""
    scale = np.maximum(np.abs(lower), np.abs(upper)) + 1
    scaled, slack = matrix / scale[:, None], np.ones((len(lower), 1))
    households = matrix.shape[1]
    solved = linprog(
        np.r_[np.zeros(households), 1.0],
        A_ub=np.vstack([np.hstack([scaled, -slack]), np.hstack([-scaled, -slack])]),
        b_ub=np.r_[upper / scale, -lower / scale],
        bounds=[*([bounds] * households), (0, None)],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert solved.success
    return solved.fun


@pytest.mark.filterwarnings("ignore:y. targets should", "ignore:M. every target should have a household")
@pytest.mark.parametrize(("first", "count"), [(0, 60), pytest.param(60, 440, marks=pytest.mark.slow)])
def test_verdicts_agree_with_a_linear_programme(first, count):
    verdicts = []
    for seed in range(first, first + count):
        matrix, lower, upper, bounds = random_problem(seed)
        miss = least_miss(matrix, lower, upper, bounds)
        for objective in ("auto", "distance") if seed % 2 else ("auto", "least_squares"):
            dtype = "float32" if seed % 3 else "float64"
            found = fit(matrix, lower=lower, upper=upper, bounds=bounds, objective=objective, dtype=dtype)
            verdicts.append(found.verdict)
            worst = float(np.abs(found.relative_errors).max())
            assert (found.verdict == "met") == (worst <= 1e-6), (seed, objective, found.reason, worst)
            if found.verdict == "impossible":
                assert miss > 1e-7, (seed, objective, found.reason)
            if found.verdict == "met":
                assert miss < 1e-5, (seed, objective, found.reason)
    assert verdicts.count("unknown") <= 0.05 * len(verdicts)
    assert min(verdicts.count("met"), verdicts.count("impossible")) > 0.2 * len(verdicts)


def test_a_fit_that_meets_all_says_nothing():
    matrix, y, design = survey()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Calibrator(progress=False).fit(sparse.csr_array(matrix), y, design_weights=design)
    assert found.converged
    assert found.reason.startswith("all targets met")
