"""Whole copies of households: weights rounded so that the targets stay as near as can be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from l0hooks.calibration.data.inputs import Inputs, read_inputs
from l0hooks.calibration.data.reach import weight_limits
from l0hooks.calibration.data.targets import GivenTargets
from l0hooks.calibration.numerics.columns import Floats, Integers, Sparse
from l0hooks.calibration.numerics.problem import larger_ends
from l0hooks.calibration.output.result import CalibrationResult
from l0hooks.errors import InvalidValueError, explain

_PARTNERS = 200  # units with the best single moves, among which pairs are tried
_NEAR_WHOLE = 1e-9  # of a weight, up to which it counts as whole
_LEAST_GAIN = 1e-12  # share of the loss below which a move is rounding error


def integer_weights(
    weights: CalibrationResult | object,
    M: object = None,  # noqa: N803
    y: object = None,
    *,
    random_state: int = 0,
) -> NDArray[np.int64]:
    r"""Whole weights \(n_i \in \{\lfloor w_i \rfloor, \lceil w_i \rceil\}\) with small \(\sum_q ((Mn - y)_q / s_q)^2\).

    Systematic rounding of the fractions, which keeps their sum, comes first. Then single units change between their two
    whole numbers, and pairs of units change together, as long as the loss falls.

    Parameters
    ----------
    weights : CalibrationResult, or array_like of float >= 0, shape (N,)
        With a result, its matrix, targets, importance, bounds and clusters are those of the fit.
    M, y : as for :meth:`~l0hooks.calibration.Calibrator.fit`, optional
        Where ``weights`` is an array.
    random_state : int, >= 0
        Of the starting point of the systematic rounding.

    Returns
    -------
    int64 array, shape (N,)
        A household with a weight below one may get none.

    Raises
    ------
    InvalidValueError
        If weights are negative or not finite, M and y are missing or do not fit, or bounds leave no whole number.

    Examples
    --------
    >>> integer_weights([1.5, 2.5, 0.5, 3.5], [[1, 1, 1, 1], [1, 0, 0, 1]], [8, 5])
    array([1, 3, 0, 4])

    References
    ----------
    Lovelace & Ballas (2013), 'Truncate, replicate, sample': a method for creating integer weights for spatial
    microsimulation, for the problem. Madow (1949), On the theory of systematic sampling II, for the rounding.
    """
    if isinstance(weights, CalibrationResult):
        inputs, given, offset = weights.inputs, weights.weights, weights.offset
    else:
        if M is None or y is None:
            raise InvalidValueError(explain("integer_weights", "weights in an array need M and y.", got="not both"))
        inputs, offset = read_inputs(M, GivenTargets(y), selects=True, dtype="float64"), 1.0
        given = inputs.households.values(weights, "weights")
    bad = np.flatnonzero(~np.isfinite(given) | (given < 0))
    if len(bad):
        got = f"{given[bad[0]]:g} for {inputs.households.shown(bad)}"
        raise InvalidValueError(explain("weights", "they must be finite and not negative.", got=got))
    columns, lower, upper = _scaled(inputs, offset)
    clusters = inputs.people.clusters
    unit = np.arange(len(given)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    spread = sparse.csr_array((np.ones(len(unit)), (unit, np.arange(len(unit)))))
    of_unit = np.zeros(spread.shape[0])
    of_unit[unit] = given
    low, high = _whole_ends(of_unit, inputs, unit)
    start = np.random.default_rng(random_state).random()
    rounded = _systematic(of_unit, low, high, start)
    found: NDArray[np.int64] = _exchanged(sparse.csr_array(spread @ columns), lower, upper, rounded, low, high)[unit]
    return found


def _scaled(inputs: Inputs, offset: float) -> tuple[Sparse, Floats, Floats]:
    """A row for each household, errors divided and weighted as in the fit."""
    scale = np.sqrt(inputs.importance) / (larger_ends(inputs.lower, inputs.upper) + offset)
    columns = sparse.csr_array(inputs.matrix.astype(np.float64).T.tocsr() * scale)
    with np.errstate(invalid="ignore"):  # of infinite ends and no importance
        ends = [np.where(scale > 0, scale * one, 0.0) for one in (inputs.lower, inputs.upper)]
    return columns, ends[0], ends[1]


def _whole_ends(weights: Floats, inputs: Inputs, unit: Integers) -> tuple[Integers, Integers]:
    """The whole numbers below and above each weight, within the bounds."""
    near = np.abs(weights - np.rint(weights)) <= _NEAR_WHOLE * np.maximum(1.0, weights)
    low, high = (np.where(near, np.rint(weights), f(weights)) for f in (np.floor, np.ceil))
    least, largest = np.zeros(len(weights)), np.full(len(weights), np.inf)
    limits = weight_limits(inputs.people, on_weight=inputs.bounds_on == "weight")
    least[unit], largest[unit] = limits
    chosen = weights > 0
    slack = _NEAR_WHOLE * np.maximum(1.0, weights)
    low = np.where(chosen & (low < least - slack), np.ceil(least - slack), low)
    high = np.where(chosen & (high > largest + slack), np.floor(largest + slack), high)
    none = np.flatnonzero(low > high)
    if len(none):
        places = np.flatnonzero(np.isin(unit, none))
        got = f"{least[none[0]]:g} to {largest[none[0]]:g} for {inputs.households.shown(places)}"
        raise InvalidValueError(explain("bounds", "they must leave a whole number near each weight.", got=got))
    return low.astype(np.int64), high.astype(np.int64)


def _systematic(weights: Floats, low: Integers, high: Integers, start: float) -> Integers:
    """Each weight's lower or upper whole number, in proportion to its fraction, so that the sum is kept within one."""
    order = np.argsort(-weights, kind="stable")
    share = np.clip(weights - low, 0.0, 1.0)[order] * (high > low)[order]
    ends = np.floor(np.cumsum(share) + start)
    rounded = low.copy()
    rounded[order] += np.diff(ends, prepend=0.0).astype(np.int64)
    return np.minimum(rounded, high)


def _exchanged(
    columns: Sparse, lower: Floats, upper: Floats, whole: Integers, low: Integers, high: Integers
) -> Integers:
    """``whole`` after all single and paired moves between ``low`` and ``high`` that lower the loss."""
    free = np.flatnonzero(high > low)
    block = columns[free]
    step = np.where(whole[free] == low[free], 1, -1) * (high - low)[free]
    norms = np.asarray(block.multiply(block).sum(axis=1)).ravel() * step**2
    estimates = np.asarray(columns.T @ whole, np.float64)
    loss = _loss(estimates, lower, upper)
    while len(free) and loss > 0:
        misses = estimates - np.clip(estimates, lower, upper)
        change = 2 * step * np.asarray(block @ misses) + norms
        moves = _best_moves(block, step, change)
        moved = estimates + np.asarray(block[moves].T @ step[moves])
        after = _loss(moved, lower, upper)
        if after >= loss * (1 - _LEAST_GAIN):
            break
        estimates, loss = moved, after
        whole[free[moves]] += step[moves]
        step[moves] *= -1
    return whole


def _best_moves(block: Sparse, step: Integers, change: Floats) -> list[int]:
    """The single unit, or the pair of two, whose change of the loss is the most negative."""
    best = np.argsort(change, kind="stable")[:_PARTNERS]
    part = block[best] * step[best][:, None]
    together = change[best][:, None] + change[best] + 2 * (part @ part.T).toarray()
    np.fill_diagonal(together, change[best])  # a unit with itself: alone
    first, second = np.unravel_index(int(together.argmin()), together.shape)
    return [int(best[first])] if first == second else [int(best[first]), int(best[second])]


def _loss(estimates: Floats, lower: Floats, upper: Floats) -> float:
    misses = estimates - np.clip(estimates, lower, upper)
    return float(misses @ misses)
