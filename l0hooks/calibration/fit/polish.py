"""The last stage: the best weights on a fixed selection, with a certificate that is computed anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from l0hooks.calibration.fit.stage import Refit, Selection, refit
from l0hooks.calibration.numerics.certificate import PROGRAMME_ENTRIES, can_be_met
from l0hooks.calibration.numerics.columns import Floats, Sparse, rows_of
from l0hooks.calibration.numerics.distance import nearest_weights
from l0hooks.calibration.numerics.dual import Distance, NearestOptions
from l0hooks.calibration.numerics.problem import Problem, median_factor

Objective = Literal["auto", "least_squares", "distance"]
_PROMISING_MISS = 1e-3  # largest scaled miss of a least-squares fit after which the targets may be met
_UNKNOWN = "whether all targets can be met within the bounds is not known"


@dataclass(frozen=True)
class PolishLimits:
    """When the polish ends, and what it counts as converged.

    Attributes
    ----------
    iterations : int, > 0
        Conjugate gradient steps of a least-squares fit, before dense factors are made.
    distance_from : float, > 0
        Above this many units per target, the nearest weights are searched for without a least-squares fit first.
    violation : float
        The largest relative norm of the projected gradient that counts as converged.
    gap : float
        The largest relative duality gap that counts as converged. At 1e-3 three digits of the distance are right.
    programme_entries : int, >= 0
        Matrix entries up to which a linear programme may decide whether the targets can be met.
    """

    iterations: int = 400
    distance_from: float = 4.0
    violation: float = 1e-6
    gap: float = 1e-3
    programme_entries: int = PROGRAMME_ENTRIES


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
    limits: PolishLimits | None = None,
) -> Polished:
    """The best weights of the chosen units.

    With at most as many units as targets these are the weights of bounded least squares. With more units they are the
    weights nearest to the design weights that meet the targets. If the targets cannot be met, they are those of least
    squares, or, with more than four times as many units as targets, the soft compromise of ``numerics/distance``. If
    the search for the nearest weights does not converge, they are those of least squares; if these meet all targets,
    the nearest weights with the same estimates.

    Parameters
    ----------
    problem : Problem
    selection : Selection
    objective : "auto", "least_squares" or "distance"
    distance : "chi_square" or "raking"
    tolerance : float, > 0
        A target is met if its scaled miss, the relative error where nothing is weighted, is not larger.
    limits : PolishLimits, optional

    Returns
    -------
    Polished

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> problem = prepare(sparse.csr_array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]), [9.0, 2.0], dtype="float64")
    >>> done = polish(problem, Selection(np.arange(3), np.ones(3)))
    >>> done.objective, done.converged, problem.weights(done.selection.g, np.arange(3)).round(4)
    ('distance', True, array([3.5, 3.5, 2. ]))
    """
    return _Polish(problem, selection, distance, tolerance, limits or PolishLimits()).run(objective)


class _Polish:
    """One polish: the problem, the selection and its rows of the matrix."""

    def __init__(
        self, problem: Problem, selection: Selection, distance: Distance, tolerance: float, limits: PolishLimits
    ) -> None:
        self.problem, self.selection, self.units = problem, selection, selection.units
        self.distance, self.tolerance, self.limits = distance, tolerance, limits
        every = len(self.units) == problem.size and problem.columns.dtype == np.float64
        self.block = problem.columns if every else rows_of(problem.columns, self.units)

    def run(self, objective: Objective) -> Polished:
        problem, limits = self.problem, self.limits
        if not len(self.units):  # there is no weight to find
            feasible = self.meets(problem.misses(np.zeros(problem.rows)))
            return self.result(self.selection.g, feasible=feasible, reason="no household is worth its price")
        per_target = len(self.units) / problem.rows
        nearest: Polished | None = None
        if objective == "distance" or (objective == "auto" and per_target > limits.distance_from):
            nearest = self.nearest()
            if objective == "distance" or nearest.converged:
                return nearest
        fitted = self.least_squares()
        promising = max(_PROMISING_MISS, self.tolerance)
        if objective == "auto" and per_target > 1 and _within(fitted.misses, promising):
            nearest = nearest or self.nearest()
            if not nearest.converged and (problem.lower < problem.upper).any():  # points are far easier than intervals
                nearest = self.nearest(self.clipped(fitted.g))
            if nearest.converged and nearest.feasible:
                return nearest
        certificate, feasible = fitted.fit.violation, self.meets(fitted.misses)
        converged = certificate <= limits.violation or feasible
        reason = "all targets met" if feasible else "least squares, optimality conditions met"
        if not converged:
            reason = f"not converged: projected gradient {certificate:.1e} after {fitted.fit.iterations} iterations"
        return self.result(fitted.g, feasible=feasible, converged=converged, certificate=certificate, reason=reason)

    def least_squares(self) -> Refit:
        return refit(
            self.problem,
            self.units,
            self.selection.g,
            iterations=self.limits.iterations,
            tolerance=self.limits.violation / 2,
            finish=True,
            block=self.block,
        )

    def meets(self, misses: Floats) -> bool:
        return _within(misses, self.tolerance)

    def clipped(self, g: Floats) -> Floats:
        """The estimates of ``g``, moved into their intervals."""
        estimates = np.asarray(self.block.T @ g, np.float64)
        return np.clip(estimates, self.problem.lower, self.problem.upper)

    def nearest(self, estimates: Floats | None = None) -> Polished:
        """The nearest weights that meet the targets; with ``estimates``, those that give these."""
        problem, units = self.problem, self.units
        found = nearest_weights(
            self.block,
            problem.lower if estimates is None else estimates,
            problem.upper if estimates is None else estimates,
            problem.low[units],
            problem.high[units],
            problem.strength(units),
            _common_factor(problem, self.block),
            NearestOptions(distance=self.distance, tolerance=self.tolerance),
        )
        converged = abs(found.gap) <= self.limits.gap
        reason = "all targets met, nearest to the design weights"
        if estimates is not None:
            reason += " of those with the same estimates"
        if not found.feasible:
            ends = (problem.lower, problem.upper, problem.low[units], problem.high[units])
            most = self.limits.programme_entries
            answer = can_be_met(self.block, *ends, found.misses, self.tolerance, most_entries=most)
            if answer.g is not None and estimates is None:
                return self.from_point(answer.g)
            worst = float(np.max(np.abs(found.misses), initial=0.0))
            known = "not all targets can be met within the bounds" if answer.impossible else _UNKNOWN
            reason = f"{known}: soft compromise, largest scaled miss {worst:.2e}"
        if not converged:
            reason = f"not converged: duality gap {found.gap:.1e} after {found.steps} Newton steps"
        return self.result(
            found.g,
            "distance",
            feasible=found.feasible,
            converged=converged,
            certificate=found.gap,
            reason=reason,
        )

    def from_point(self, g: Floats) -> Polished:
        """The nearest weights with the estimates of ``g``, a point that meets all targets."""
        fitted = self.least_squares()
        g = fitted.g if self.meets(fitted.misses) else g  # a corner of the programme is farther away
        nearest = self.nearest(self.clipped(g))
        if nearest.converged and nearest.feasible:
            return nearest
        return self.result(
            g, feasible=True, reason="all targets met; the nearest weights that meet them were not found"
        )

    def result(
        self,
        g: Floats,
        objective: str = "least_squares",
        *,
        feasible: bool,
        converged: bool = True,
        certificate: float = 0.0,
        reason: str,
    ) -> Polished:
        misses = self.problem.misses(np.asarray(self.block.T @ g, np.float64))
        weights = g * self.problem.design[self.units]
        total = float(weights.sum())
        deff = len(weights) * float(weights @ weights) / total**2 if total > 0 else np.inf
        return Polished(
            selection=Selection(self.units, g),
            misses=misses,
            error=self.problem.error(misses),
            loss=float(misses @ misses) / 2,
            deff=deff,
            objective=objective,
            feasible=feasible,
            converged=converged,
            certificate=certificate,
            reason=reason,
        )


def _within(misses: Floats, tolerance: float) -> bool:
    return float(np.max(np.abs(misses), initial=0.0)) <= tolerance


def _common_factor(problem: Problem, block: Sparse) -> float:
    """The one g for all units of a selection that meets the targets in the median."""
    estimates = np.asarray(block.T @ np.ones(block.shape[0]), np.float64)
    factor = median_factor(estimates, problem.lower, problem.upper)
    return problem.size / max(1, block.shape[0]) if factor is None else factor
