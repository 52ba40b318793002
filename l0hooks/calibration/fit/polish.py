"""The last stage: the best weights on a fixed selection, with a certificate that is computed anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from l0hooks.calibration.fit.stage import Refit, Selection, refit
from l0hooks.calibration.numerics.certificate import can_be_met
from l0hooks.calibration.numerics.columns import Floats, Sparse, rows_of
from l0hooks.calibration.numerics.distance import nearest_weights
from l0hooks.calibration.numerics.dual import Distance
from l0hooks.calibration.numerics.problem import Problem, median_factor

Objective = Literal["auto", "least_squares", "distance"]
_ITERATIONS = 400  # of conjugate gradients, before dense factors are taken
_PLENTY = 4  # units a target, from which on the distance decides
_PROMISING = 1e-3  # largest scaled miss of a least-squares fit after which the targets may be met
_UNKNOWN = "whether all targets can be met within the bounds is not known"
_GAP = 1e-3  # of the duality gap, relative: the weights are then right to some three digits of their distance
_VIOLATION = 1e-6  # of the projected gradient, relative


@dataclass(frozen=True)
class Polished:
    """Weights on a selection, and what is known about them.

    Attributes
    ----------
    selection : Selection
    misses : float64, shape (Q,)
        Scaled, from the stored matrix in float64.
    error : float
        Mean \\|relative error\\| over the targets.
    loss : float
        ½ Σ dist².
    deff : float
        Kish's design effect of the units' weights, k Σw² / (Σw)².
    objective : "least_squares" or "distance"
        What was minimised.
    feasible : bool
        Whether every target is met, within the tolerance.
    converged : bool
        Whether the optimum is certified.
    certificate : float
        The relative norm of the projected gradient, or the relative duality gap.
    reason : str
    """

    selection: Selection
    misses: Floats
    error: float
    loss: float
    deff: float
    objective: str
    feasible: bool
    converged: bool
    certificate: float
    reason: str


def polish(
    problem: Problem,
    selection: Selection,
    *,
    objective: Objective = "auto",
    distance: Distance = "chi_square",
    tolerance: float = 1e-6,
) -> Polished:
    """The best weights of the chosen units.

    Up to as many units as there are targets: bounded least squares. Above, and where the targets can be met: the
    weights nearest to the design weights that meet them. Where they cannot: least squares, and with more than four
    times as many units as targets the soft compromise of ``numerics/distance``. Where the search for the nearest
    weights does not end: least squares, and, if that meets all targets, the nearest weights with its estimates.

    Parameters
    ----------
    problem : Problem
    selection : Selection
    objective : "auto", "least_squares" or "distance"
    distance : "chi_square" or "raking"
    tolerance : float, > 0
        A target is met if its scaled miss, the relative error where nothing is weighted, is not larger.

    Returns
    -------
    Polished

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.problem import prepare
    >>> problem = prepare(sparse.csr_array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]), [9.0, 2.0], dtype="float64")
    >>> done = polish(problem, Selection(np.arange(3), np.ones(3)))
    >>> done.objective, done.converged, problem.weights(done.selection.g, np.arange(3)).round(4)
    ('distance', True, array([3.5, 3.5, 2. ]))
    """
    every = len(selection.units) == problem.size and problem.columns.dtype == np.float64
    block = problem.columns if every else rows_of(problem.columns, selection.units)
    many = len(selection.units) / problem.rows
    if not len(selection.units):  # no weight to find, whatever the objective
        misses = problem.misses(np.zeros(problem.rows))
        reason = "no household is worth its price"
        feasible = _feasible(misses, tolerance)
        return _polished(problem, selection, selection.g, block, "least_squares", feasible, True, 0.0, reason)
    nearest: Polished | None = None
    if objective == "distance" or (objective == "auto" and many > _PLENTY):
        nearest = _nearest(problem, selection, block, distance, tolerance)
        if objective == "distance" or nearest.converged:
            return nearest
    fitted = _least_squares(problem, selection, block)
    if objective == "auto" and many > 1 and _feasible(fitted.misses, max(_PROMISING, tolerance)):
        nearest = nearest or _nearest(problem, selection, block, distance, tolerance)
        if not nearest.converged and (problem.lower < problem.upper).any():  # points are far easier than intervals
            estimates = np.clip(np.asarray(block.T @ fitted.g, np.float64), problem.lower, problem.upper)
            nearest = _nearest(problem, selection, block, distance, tolerance, estimates)
        if nearest.converged and nearest.feasible:
            return nearest
    certificate, feasible = fitted.fit.violation, _feasible(fitted.misses, tolerance)
    converged = certificate <= _VIOLATION or feasible
    reason = "all targets met" if feasible else "least squares, optimality conditions met"
    if not converged:
        reason = f"not converged: projected gradient {certificate:.1e} after {fitted.fit.iterations} iterations"
    return _polished(problem, selection, fitted.g, block, "least_squares", feasible, converged, certificate, reason)


def _least_squares(problem: Problem, selection: Selection, block: Sparse) -> Refit:
    units, tolerance = selection.units, _VIOLATION / 2
    return refit(problem, units, selection.g, iterations=_ITERATIONS, tolerance=tolerance, finish=True, block=block)


def _feasible(misses: Floats, tolerance: float) -> bool:
    return float(np.max(np.abs(misses), initial=0.0)) <= tolerance


def _nearest(
    problem: Problem,
    selection: Selection,
    block: Sparse,
    distance: Distance,
    tolerance: float,
    estimates: Floats | None = None,
) -> Polished:
    """The nearest weights that meet the targets, or that give ``estimates`` within them."""
    units = selection.units
    found = nearest_weights(
        block,
        problem.lower if estimates is None else estimates,
        problem.upper if estimates is None else estimates,
        problem.low[units],
        problem.high[units],
        problem.strength(units),
        _common_factor(problem, block),
        distance=distance,
        tolerance=tolerance,
    )
    converged = abs(found.gap) <= _GAP
    reason = "all targets met, nearest to the design weights"
    if estimates is not None:
        reason += " of those with the same estimates"
    if not found.feasible:
        ends = (problem.lower, problem.upper, problem.low[units], problem.high[units])
        answer = can_be_met(block, *ends, found.misses, tolerance)
        if answer.g is not None and estimates is None:
            return _from_point(problem, selection, block, distance, tolerance, answer.g)
        worst = float(np.max(np.abs(found.misses), initial=0.0))
        known = "not all targets can be met within the bounds" if answer.impossible else _UNKNOWN
        reason = f"{known}: soft compromise, largest scaled miss {worst:.2e}"
    if not converged:
        reason = f"not converged: duality gap {found.gap:.1e} after {found.steps} Newton steps"
    return _polished(problem, selection, found.g, block, "distance", found.feasible, converged, found.gap, reason)


def _from_point(
    problem: Problem, selection: Selection, block: Sparse, distance: Distance, tolerance: float, g: Floats
) -> Polished:
    """Targets can be met, as ``g`` shows: the nearest weights with the estimates of a point that meets them."""
    fitted = _least_squares(problem, selection, block)
    g = fitted.g if _feasible(fitted.misses, tolerance) else g  # that is nearer than a corner
    estimates = np.clip(np.asarray(block.T @ g, np.float64), problem.lower, problem.upper)
    nearest = _nearest(problem, selection, block, distance, tolerance, estimates)
    if nearest.converged and nearest.feasible:
        return nearest
    reason = "all targets met; the nearest weights that meet them were not found"
    return _polished(problem, selection, g, block, "least_squares", True, True, 0.0, reason)


def _common_factor(problem: Problem, block: Sparse) -> float:
    """What all g of a selection are near: they meet the targets in the median."""
    estimates = np.asarray(block.T @ np.ones(block.shape[0]), np.float64)
    factor = median_factor(estimates, problem.lower, problem.upper)
    return problem.size / max(1, block.shape[0]) if factor is None else factor


def _polished(
    problem: Problem,
    selection: Selection,
    g: Floats,
    block: Sparse,
    objective: str,
    feasible: bool,
    converged: bool,
    certificate: float,
    reason: str,
) -> Polished:
    misses = problem.misses(np.asarray(block.T @ g, np.float64))
    weights = g * problem.design[selection.units]
    total = float(weights.sum())
    deff = len(weights) * float(weights @ weights) / total**2 if total > 0 else np.inf
    return Polished(
        selection=Selection(selection.units, g),
        misses=misses,
        error=problem.error(misses),
        loss=float(misses @ misses) / 2,
        deff=deff,
        objective=objective,
        feasible=feasible,
        converged=converged,
        certificate=certificate,
        reason=reason,
    )
