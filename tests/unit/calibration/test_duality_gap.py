"""The duality gap of nearest weights: zero where they are the nearest, positive where others are nearer."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from l0hooks.calibration.numerics.distance import _Search
from l0hooks.calibration.numerics.dual import NearestOptions


@pytest.mark.parametrize("distance", ["chi_square", "raking"])
def test_weights_that_meet_the_targets_but_are_not_the_nearest_have_a_gap(distance: str) -> None:
    target, strength = np.array([3.0]), np.array([1.0, 3.0])
    options = NearestOptions(distance=distance)  # type: ignore[arg-type]
    search = _Search(
        sparse.csr_array(np.ones((2, 1))), target, target, np.zeros(2), np.full(2, 9.0), strength, 1.0, options
    )
    assert abs(search.by_newton().gap) < 1e-6
    equal = search.result(np.array([1.5, 1.5]), np.zeros(1), True)  # the nearest are about 1.75 and 1.25
    assert equal.gap > 0.01
