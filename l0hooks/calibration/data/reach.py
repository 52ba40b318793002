"""Targets that no allowed weights can meet, found from signs and bounds alone."""

from __future__ import annotations

import numpy as np

from l0hooks.calibration.data.households import Households
from l0hooks.calibration.numerics.columns import Flags, Floats, Integers, Sparse, pieces

_ROUNDING_SHARE = 1e-9  # of the numbers compared; far below any error that matters


def weight_limits(households: Households, *, on_weight: bool) -> tuple[Floats, Floats]:
    """Least and largest weight of a household that is chosen: float64, shape (N,); zero for one left out."""
    scale = 1.0 if on_weight else households.design
    if households.clusters is not None and not on_weight:
        count = np.bincount(households.clusters)
        scale = (np.bincount(households.clusters, households.design) / count)[households.clusters]
    with np.errstate(over="ignore", invalid="ignore"):  # of infinite bounds and design weights of zero, left out below
        low, high = households.low * scale, households.high * scale
    low[households.leave_out] = high[households.leave_out] = 0.0
    return low, high


def reachable_range(matrix: Sparse, low: Floats, high: Floats, chosen: int | None = None) -> tuple[Floats, Floats]:
    r"""The range of each target's estimate, \(\min\) and \(\max\) of \(\sum_i M_{qi} w_i\) over allowed weights.

    Parameters
    ----------
    matrix : sparse.csr_array, shape (T, N)
    low, high : float64, shape (N,)
        Of the weight of a chosen household; ``high`` may be infinite.
    chosen : int, optional
        How many households have a weight; all others have zero. All of them if not given.

    Returns
    -------
    least, largest : float64, shape (T,)
        No estimate outside can be reached. One inside may be out of reach too, as each target is taken by itself.

    Examples
    --------
    >>> from scipy import sparse
    >>> matrix = sparse.csr_array([[1.0, 2.0, 3.0]])
    >>> reachable_range(matrix, np.zeros(3), np.full(3, 10.0), chosen=2)
    (array([0.]), array([50.]))
    """
    least, largest = np.zeros(matrix.shape[0]), np.zeros(matrix.shape[0])
    if chosen != 0 and not low.any() and np.isinf(high).all():
        return _unbounded(matrix, least, largest)
    for row in range(matrix.shape[0]):
        part = slice(matrix.indptr[row], matrix.indptr[row + 1])
        values, places = matrix.data[part], matrix.indices[part]
        if not values.all():
            places, values = places[values != 0], values[values != 0]
        if values.dtype != np.float64:
            values = values.astype(np.float64)
        others = matrix.shape[1] - len(places)  # with zeros: any number of them can be chosen freely
        with np.errstate(over="ignore"):
            largest[row] = _largest_sum(_ends(values, places, low, high), others, chosen)
            least[row] = 0.0 - _largest_sum(_ends(-values, places, low, high), others, chosen)
    return least, largest


def _unbounded(matrix: Sparse, least: Floats, largest: Floats) -> tuple[Floats, Floats]:
    """The range where every weight from zero to infinity is allowed: signs decide."""
    for part, some in pieces(matrix):
        starts = matrix.indptr[some.start : some.stop + 1] - part.start
        filled = np.diff(starts) > 0
        if filled.any():
            data, first = matrix.data[part], starts[:-1][filled]
            largest[some][filled] = np.where(np.maximum.reduceat(data, first) > 0, np.inf, 0.0)
            least[some][filled] = np.where(np.minimum.reduceat(data, first) < 0, -np.inf, 0.0)
    return least, largest


def _ends(values: Floats, places: Integers, low: Floats, high: Floats) -> Floats:
    """The largest contributions of the households at ``places``, which have these values."""
    positive = values > 0
    weights = high[places] if positive.all() else np.where(positive, high[places], low[places])
    weights *= values
    return weights


def _largest_sum(parts: Floats, zeros: int, chosen: int | None) -> float:
    """The largest sum of ``chosen`` numbers out of ``parts`` and that many ``zeros``."""
    if chosen is None or chosen >= len(parts) + zeros:
        return float(parts.sum())
    positive = parts[parts > 0]
    if len(positive) >= chosen:
        positive.partition(len(positive) - chosen)
        return float(positive[len(positive) - chosen :].sum())
    must = chosen - len(positive) - zeros  # numbers below zero that must be taken too
    negative = np.sort(parts[parts <= 0])[::-1]
    return float(positive.sum() + (negative[:must].sum() if must > 0 else 0.0))


def within(least: Floats, largest: Floats, lower: Floats, upper: Floats) -> Flags:
    """Whether an interval of targets meets the range that can be reached: bool, shape (T,)."""
    ends = [np.where(np.isfinite(one), np.abs(one), 0.0) for one in (lower, upper, least, largest)]
    slack = _ROUNDING_SHARE * np.maximum.reduce(ends)
    reached: Flags = (largest + slack >= lower) & (least - slack <= upper)
    return reached
