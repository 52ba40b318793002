"""Whole weights: floor or ceiling of each, near the targets by brute force, in the bounds and clusters of the fit."""

import itertools

import numpy as np
import pytest

from l0hooks.calibration import Calibrator, integer_weights
from l0hooks.errors import InvalidValueError


def loss(matrix, y, weights):
    return float((((matrix @ weights - y) / (np.abs(y) + 1)) ** 2).sum())


@pytest.mark.parametrize("seed", range(6))
def test_near_the_best_of_all_roundings(seed):
    rng = np.random.default_rng(seed)
    matrix, weights = rng.integers(0, 5, (4, 12)).astype(float), rng.uniform(0, 6, 12)
    y = matrix @ weights
    found = integer_weights(weights, matrix, y)
    assert set(found - np.floor(weights)) <= {0, 1}
    losses = sorted(loss(matrix, y, np.floor(weights) + up) for up in itertools.product([0, 1], repeat=12))
    assert loss(matrix, y, found) <= losses[40]  # of 4,096


def test_far_better_than_rounding_and_the_sum_is_kept():
    rng = np.random.default_rng(0)
    matrix = np.vstack([np.ones(2000), (rng.random((40, 2000)) < 0.3) * rng.integers(1, 6, (40, 2000))])
    result = Calibrator(progress=False).fit(matrix, matrix @ rng.uniform(0.3, 4, 2000))
    found = integer_weights(result)
    y = result.inputs.lower
    assert found.dtype == np.int64
    assert loss(matrix, y, found) < loss(matrix, y, np.rint(result.weights)) / 100
    assert abs(found.sum() - y[0]) < 1e-3 * y[0]
    np.testing.assert_array_equal(found, integer_weights(result))


def test_bounds_clusters_and_zeros_hold():
    rng = np.random.default_rng(1)
    matrix = rng.integers(0, 4, (5, 60)).astype(float)
    clusters = np.arange(60) // 2
    fit = Calibrator(20, bounds=(1, 4), bounds_on="weight", progress=False, max_epochs=20)
    result = fit.fit(matrix, matrix.sum(axis=1) * 1.5, clusters=clusters)
    found = integer_weights(result)
    assert (found[::2] == found[1::2]).all()
    assert not found[result.weights == 0].any()
    assert set(found[result.weights > 0]) <= {1, 2, 3, 4}


def test_whole_weights_stay():
    matrix, weights = np.eye(3), np.array([1.0, 0.0, 7.0 + 1e-12])
    np.testing.assert_array_equal(integer_weights(weights, matrix, [1, 0, 9]), [1, 0, 7])


def test_what_cannot_be_rounded_is_told():
    with pytest.raises(InvalidValueError, match="need M and y"):
        integer_weights([1.5])
    with pytest.raises(InvalidValueError, match=r"(?s)finite and not negative.*-1 for 0"):
        integer_weights([-1.0, 2.0], np.eye(2), [1, 1])
    tight = Calibrator(bounds=(1.2, 1.8), bounds_on="weight", progress=False).fit(np.eye(2), [1.5, 1.6])
    with pytest.raises(InvalidValueError, match=r"(?s)leave a whole number.*1.2 to 1.8"):
        integer_weights(tight)
