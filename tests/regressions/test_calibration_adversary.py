"""What attacks on the calibration fitter found: each failed once."""

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import lsq_linear

from l0hooks.calibration import Calibrator
from l0hooks.calibration.cli import main
from l0hooks.errors import InvalidValueError


def survey(targets=5, households=40, seed=0):
    rng = np.random.default_rng(seed)
    matrix, design = rng.random((targets, households)), rng.uniform(1, 3, households)
    return matrix, matrix @ design, design


def quick(k=None, **options):
    return Calibrator(k, max_epochs=20, progress=False, **options)


def test_the_floor_does_not_narrow_positive_bounds():
    rng = np.random.default_rng(3)
    matrix, design = rng.random((6, 2_000)), np.ones(2_000)
    design[0] = 1e5
    y = matrix[:, :2].sum(axis=1) * 0.3
    result = quick(2, bounds=(0.2, 5), bounds_on="weight", dtype="float64").fit(
        matrix, y, design_weights=design, keep=[0, 1]
    )
    np.testing.assert_allclose(result.weights[:2], 0.3, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"l0": 1e-3}, {"l0": 1e3}])
def test_who_must_be_kept_has_a_weight_without_k_too(options):
    matrix = np.array([[1.0, 1.0, 0.0], [0.0, 5.0, 1.0]])
    result = quick(objective="least_squares", **options).fit(matrix, [1.0, 0.0], keep=[1])
    assert result.weights[1] > 0


@pytest.mark.parametrize("objective", ["auto", "least_squares", "distance"])
@pytest.mark.parametrize("distance", ["chi_square", "raking"])
def test_a_price_that_nobody_is_worth(objective, distance):
    matrix, y, design = survey()
    result = Calibrator(l0=1e6, objective=objective, distance=distance, progress=False).fit(
        matrix, y, design_weights=design
    )
    assert result.active == 0
    assert result.reason == "no household is worth its price"


def test_a_price_where_there_is_one_household_or_none_is_free():
    assert quick(l0=1e-6).fit([[1.0]], [2.0]).active == 1
    matrix, y, design = survey()
    assert quick(l0=1.0).fit(matrix, y, design_weights=design, keep=range(40)).active == 40


def test_least_squares_within_intervals_alone_is_certified():
    rng = np.random.default_rng(0)
    matrix = rng.random((12, 6))
    y = rng.random(12) * 100
    result = quick(3, dtype="float64").fit(matrix, lower=0.99 * y, upper=1.01 * y)
    assert result.error > 0.01  # they cannot be met
    assert not result.converged
    assert result.verdict == "impossible"
    assert result.reason.endswith(
        "by the households chosen within the bounds: least squares, optimality conditions met"
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_small_integers_that_stand_twice_add_up(dtype):
    columns, rows = np.repeat(np.arange(4), 2), np.zeros(8, int)
    matrix = sparse.coo_array((np.full(8, 100, dtype), (rows, columns)), shape=(1, 4))
    matrix.data[:2] = 127
    result = quick(4).fit(matrix, [4_000.0])
    np.testing.assert_allclose(matrix @ result.weights, 4_000.0, rtol=1e-5)
    np.testing.assert_allclose(result.estimates, 4_000.0, rtol=1e-5)


def test_half_precision_is_read():
    matrix, y, _ = survey()
    assert quick(10).fit(matrix.astype(np.float16), y).error < 1e-4


@pytest.fixture
def files(tmp_path):
    matrix, y, _ = survey()
    sparse.save_npz(tmp_path / "M.npz", sparse.csr_array(matrix))
    (tmp_path / "t.csv").write_text("value\n" + "\n".join(map(str, y)))
    return tmp_path


def test_a_column_that_may_name_rows_is_not_passed_over(files, capsys):
    weights = files / "w.csv"
    weights.write_text("id,weight\n" + "\n".join(f"{n},{n + 1}" for n in reversed(range(40))))
    arguments = ["calibrate", str(files / "M.npz"), str(files / "t.csv"), "--design-weights", str(weights), "--quiet"]
    assert main(arguments) == 2
    assert "it needs a column 'household'" in capsys.readouterr().err
    weights.write_text("id\n" + "\n".join(["2"] * 40))
    assert main(arguments) == 0


@pytest.mark.parametrize("other", ["t.csv", "o.csv", "M.npz"])
def test_no_file_is_written_over_another(files, other, capsys):
    before = (files / "t.csv").read_bytes(), (files / "M.npz").read_bytes()
    option = "--checkpoint" if other == "M.npz" else "--out"
    arguments = ["calibrate", str(files / "M.npz"), str(files / "t.csv"), "--target-report", str(files / "o.csv")]
    assert main([*arguments, option, str(files / other), "--quiet"]) == 2
    assert "files must be distinct" in capsys.readouterr().err
    assert before == ((files / "t.csv").read_bytes(), (files / "M.npz").read_bytes())


@pytest.mark.parametrize("option", [{"checkpoint_interval": "5"}, {"checkpoint_interval": np.nan}, {"checkpoint": 5}])
def test_options_of_a_checkpoint_are_checked_when_given(option):
    with pytest.raises(InvalidValueError, match="checkpoint"):
        Calibrator(5, **option)


@pytest.mark.parametrize("households", [1, 2, 20])
def test_gates_of_equal_households_do_not_all_close_at_a_low_price(households):
    result = quick(l0=1e-6).fit(np.ones((1, households)), [2.0])
    assert result.active == 1
    assert result.error < 1e-5


def test_nobody_is_chosen_only_where_nobody_is_worth_the_price():
    matrix, y, design = survey()
    scaled, target = matrix / (y + 1)[:, None], y / (y + 1)
    gains = (scaled.T @ target) ** 2 / (scaled**2).sum(axis=0)  # of the squared error, by the best weight of each alone
    for price in (0.5 * gains.max(), 0.99 * gains.max(), 1.01 * gains.max()):
        result = Calibrator(l0=price, progress=False, dtype="float64").fit(matrix, y, design_weights=design)
        assert (result.active > 0) == (price < gains.max())


@pytest.mark.filterwarnings("ignore:y. targets should lie within")
def test_least_squares_for_targets_of_zero_is_certified():
    rng = np.random.default_rng(0)
    matrix = rng.random((12, 10)) - 0.5
    result = quick(bounds=(0.5, 50), objective="least_squares", loss="squared", dtype="float64").fit(
        matrix, np.zeros(12)
    )
    best = lsq_linear(matrix, np.zeros(12), (0.5, 50), tol=1e-12)
    assert result.verdict == "impossible"
    assert result.reason.endswith("least squares, optimality conditions met")
    np.testing.assert_allclose(float(result.relative_errors @ result.relative_errors) / 2, best.cost, rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_no_search_begins_again_when_the_polish_has_given_up_columns(seed):
    """Two swaps that agree spare the gates; once one of them was polished they no longer agreed, and gates ran."""
    rng = np.random.default_rng(seed)
    north, size, income = rng.random(500) < 0.5, rng.integers(1, 6, 500), rng.lognormal(10, 0.6, 500).round()
    matrix = np.stack([value * where for value in (size, income) for where in (north | ~north, north, ~north)])
    y = np.array([160_000, 90_000, 70_000, 1.4e9, 8e8, 6e8])
    design = rng.uniform(80, 120, 500)
    fitter = Calibrator(60).fit(matrix, lower=0.98 * y, upper=1.02 * y, design_weights=design, keep=[7])
    estimates = matrix @ np.asarray(fitter.weights)
    assert np.abs(estimates / y - 1).max() < 0.02 + 1e-4
    assert fitter.error < 1e-4
