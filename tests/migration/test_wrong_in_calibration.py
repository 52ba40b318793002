"""What is wrong in l0-python 0.6.2's ``SparseCalibrationWeights``, seen there, and right in ``Calibrator``.

Every test stands in the table of docs/calibration_migration.md; test_tables.py sees to it.
"""

import l0
import numpy as np
import paper
import pytest
import torch
from scipy import sparse

from l0hooks import Gate
from l0hooks.calibration import Calibrator
from l0hooks.errors import InvalidValueError

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch, of their tensors


def survey(targets=6, households=80, seed=0):
    rng = np.random.default_rng(seed)
    matrix = sparse.csr_matrix(sparse.random_array((targets, households), density=0.5, rng=rng))
    return matrix, matrix @ rng.lognormal(2, 0.5, households)


def fitted(k=20, **options):
    return Calibrator(k, max_epochs=20, progress=False, **options)


def test_a_second_survey_gets_the_first_ones_predictions():
    matrix, y = survey()
    theirs, ours = l0.SparseCalibrationWeights(80, seed=0), fitted()
    first = theirs.predict(matrix)
    ours.fit(matrix, y)
    torch.testing.assert_close(theirs.predict(2 * matrix), first)
    np.testing.assert_allclose(ours.predict(2 * matrix), 2 * ours.predict(matrix))


def test_a_second_fit_sees_the_first_ones_matrix():
    """Of equal shape and number of entries: the new targets are fitted to the old households."""
    matrix, y = survey()
    other, theirs = 5 * matrix, l0.SparseCalibrationWeights(80, seed=0)
    theirs.fit(matrix, y, epochs=1)
    assert theirs.forward(other, deterministic=True).tolist() == theirs.forward(matrix, deterministic=True).tolist()
    ours = fitted()
    ours.fit(matrix, y)
    assert ours.fit(other, y).error < 1e-4


def test_a_target_of_minus_one_divides_by_zero():
    """The relative error there divides by y + 1."""
    rng = np.random.default_rng(0)
    matrix = sparse.csr_matrix(rng.random((6, 80)) - 0.2)
    y = matrix @ np.full(80, 2.0)
    y[0] = -1.0
    theirs = l0.SparseCalibrationWeights(80, seed=0).fit(matrix, y, epochs=2, loss_type="relative")
    assert bool(torch.isnan(theirs.get_weights(deterministic=True)).all())
    ours = fitted().fit(matrix, y)
    assert ours.relative_errors[0] == pytest.approx((ours.estimates[0] + 1) / 2)
    assert ours.error < 1e-3


@pytest.mark.parametrize("where", ["M", "y"])
def test_a_missing_value_gives_missing_weights(where):
    matrix, y = survey()
    {"M": matrix.data, "y": y}[where][3] = np.nan
    theirs = l0.SparseCalibrationWeights(80, seed=0).fit(matrix, y, epochs=2)
    assert bool(torch.isnan(theirs.get_weights(deterministic=True)).any())
    with pytest.raises(InvalidValueError, match=rf"{where}: .* must be finite"):
        fitted().fit(matrix, y)


def test_an_unknown_loss_is_the_squared_one():
    matrix, y = survey()
    weights = []
    for loss in ("mse", "relativ"):
        torch.manual_seed(0)
        weights.append(l0.SparseCalibrationWeights(80, seed=0).fit(matrix, y, epochs=3, loss_type=loss).log_weight)
    assert torch.equal(*weights)
    with pytest.raises(InvalidValueError, match=r"loss: it must be known(.|\n)*'relativ'"):
        Calibrator(20, loss="relativ")


def test_a_seed_does_not_seed_the_fit():
    matrix, y = survey()
    theirs = [l0.SparseCalibrationWeights(80, seed=0).fit(matrix, y, epochs=3).log_weight for _ in range(2)]
    assert not torch.equal(*theirs)
    ours = [fitted(random_state=3).fit(matrix, y).weights for _ in range(2)]
    np.testing.assert_array_equal(*ours)


def test_the_keep_probability_at_the_start_is_not_the_one_asked_for():
    theirs = l0.SparseCalibrationWeights(1, init_keep_prob=0.5, log_alpha_jitter_sd=0.0)
    assert paper.keep_prob(theirs.log_alpha.detach().double().numpy())[0] == pytest.approx(0.832, abs=1e-3)
    ours = Gate(1, init_keep_prob=0.5).log_alpha.detach().double().numpy()
    assert paper.keep_prob(ours)[0] == pytest.approx(0.5, abs=1e-6)


def test_a_certain_household_has_infinite_log_odds():
    theirs = l0.SparseCalibrationWeights(3, init_keep_prob=1.0)
    assert bool(torch.isinf(theirs.log_alpha).all())
    matrix, y = survey()
    assert fitted().fit(matrix, y, keep=[0, 7]).weights[[0, 7]].min() > 0


def test_the_number_of_households_cannot_be_asked_for():
    """It comes out of λ and of chance."""
    matrix, y = survey(households=300)
    counts = set()
    for price in (0.01, 0.1):
        for seed in range(2):
            torch.manual_seed(seed)
            theirs = l0.SparseCalibrationWeights(300, seed=seed, log_alpha_jitter_sd=1.0)
            theirs.fit(matrix, y, lambda_l0=price, lr=0.1, epochs=60, loss_type="relative")
            counts.add(theirs.get_active_weights()["count"])
    assert len(counts) > 1
    assert {fitted(k).fit(matrix, y).active for k in (7, 40, 299)} == {7, 40, 299}


def test_many_households_are_summed_in_float32():
    """16,777,216 households and one more are not one more, if each counts 1."""
    matrix = sparse.csr_matrix(np.array([[2.0**24, 1.0, 1.0, 1.0]]))
    theirs = l0.SparseCalibrationWeights(4, use_gates=False)
    with torch.no_grad():
        theirs.log_weight.zero_()
    assert theirs.predict(matrix).item() == 2**24
    ours = Calibrator(dtype="float64", progress=False)
    ours.fit(matrix, [2.0**24 + 3])
    assert ours.predict(matrix)[0] == pytest.approx(2**24 + 3, abs=1e-6)
