"""Known defects of the earlier calibration fitter, each right here; beside it."""

import numpy as np
import pytest
import torch
from l0.calibration import SparseCalibrationWeights
from scipy import sparse

from l0hooks import Gate, iter_gates, set_temperature
from l0hooks.calibration import Calibrator
from l0hooks.calibration.fit.gates import GateStage
from l0hooks.calibration.numerics.preparation import prepare
from l0hooks.errors import InvalidValueError


def survey(targets=40, households=2_000, seed=0):
    rng = np.random.default_rng(seed)
    matrix = sparse.csr_matrix(sparse.random_array((targets, households), density=0.3, rng=rng))
    return matrix, matrix @ rng.lognormal(2, 0.5, households)


def fitted(k=100, **options):
    matrix, y = survey()
    calibrator = Calibrator(k, max_epochs=30, progress=False, **options)
    calibrator.fit(matrix, y)
    return calibrator, matrix, y


def test_a_second_matrix_with_equal_shape_and_nnz_gets_its_own_predictions():
    calibrator, matrix, _ = fitted()
    other = matrix.copy()
    other.data = np.random.default_rng(1).random(other.nnz)
    np.testing.assert_allclose(calibrator.predict(other), other @ calibrator.result_.weights)
    again = Calibrator(100, max_epochs=30, progress=False)
    y = other @ np.full(2_000, 3.0)
    assert again.fit(other, y).error < 1e-4
    np.testing.assert_allclose(again.predict(other), y, rtol=1e-3)


@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_array, sparse.coo_array, sparse.bsr_array])
def test_sparse_arrays_are_accepted(kind):
    calibrator, matrix, y = fitted()
    given = kind(matrix)
    weights = Calibrator(100, max_epochs=30, progress=False).fit(given, y).weights
    np.testing.assert_array_equal(weights, calibrator.result_.weights)
    np.testing.assert_allclose(calibrator.predict(given), calibrator.predict(matrix))


@pytest.mark.parametrize("target", [0.0, -1.0, -50.0])
@pytest.mark.filterwarnings("ignore:y. targets should have the units")  # -1 is far from what the design weights give
def test_targets_of_zero_minus_one_and_less_are_met(target):
    rng = np.random.default_rng(0)
    matrix = rng.random((6, 300))
    matrix[2] = rng.normal(size=300)  # incomes less losses
    y = matrix @ np.full(300, 2.0)
    y[2] = target
    result = Calibrator(40, max_epochs=30, progress=False).fit(matrix, y)
    assert abs(result.estimates[2] - target) < 1e-3 * (abs(target) + 1)
    assert np.isfinite(result.weights).all()
    assert result.error < 1e-4


@pytest.mark.parametrize("where", ["M", "y"])
def test_nan_is_an_error_and_not_a_result(where):
    matrix, y = survey()
    {"M": matrix.data, "y": y}[where][3] = np.nan
    with pytest.raises(InvalidValueError, match=rf"{where}: .* must be finite"):
        Calibrator(100).fit(matrix, y)


def test_the_temperature_reaches_the_gates_of_the_fitter():
    matrix, y = survey()
    stage = GateStage(prepare(matrix, y), 100, epochs=20)
    holder = torch.nn.ModuleList([stage.gate])
    set_temperature(holder, 0.3)
    assert [gate.temperature for _, gate in iter_gates(holder)] == [0.3]
    assert isinstance(stage.gate, Gate)


def test_the_number_asked_for_is_the_number_got_in_evaluation():
    for k in (1, 10, 1_000, 1_999, 2_000):
        matrix, y = survey()
        assert Calibrator(k, method="gates", max_epochs=10, progress=False).fit(matrix, y).active == k


ONCE = "ignore:Sparse invariant checks:UserWarning"  # torch says so once a process


@pytest.mark.slow
@pytest.mark.filterwarnings(ONCE)
def test_beside_the_earlier_library():
    """At as many households as it leaves, our error is a small part of its."""
    matrix, y = survey(seed=3)
    torch.manual_seed(0)
    theirs = SparseCalibrationWeights(
        matrix.shape[1], init_keep_prob=0.5, init_weights=float(y.sum() / matrix.sum()), seed=0
    )
    theirs.fit(matrix, y, lambda_l0=1e-3, lr=0.1, epochs=400, loss_type="relative")
    weights = theirs.get_weights(deterministic=True).detach().double().numpy()
    k = int((weights > 0).sum())
    assert 0 < k < matrix.shape[1]
    error = np.abs((matrix @ weights - y) / (np.abs(y) + 1)).mean()
    ours = Calibrator(k, progress=False).fit(matrix, y)
    assert ours.active == k
    assert ours.error < error / 10


@pytest.mark.filterwarnings(ONCE)
def test_the_defects_are_theirs():
    """What the tests above are about, seen in the earlier library."""
    matrix, _ = survey()
    theirs = SparseCalibrationWeights(matrix.shape[1], seed=0)
    first = theirs.predict(matrix)
    other = matrix.copy()
    other.data = other.data * 2
    torch.testing.assert_close(theirs.predict(other), first)  # the first one's
