"""The last stage: the best weights on a fixed selection, with a certificate that is computed anew."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from l0hooks.calibration.fit.polished import Objective, Polished, PolishLimits
from l0hooks.calibration.fit.stage import Refit, Selection, refit
from l0hooks.calibration.numerics.certificate import Answer, can_be_met
from l0hooks.calibration.numerics.columns import Floats, Sparse
from l0hooks.calibration.numerics.distance import nearest_weights
from l0hooks.calibration.numerics.dual import Distance, NearestOptions
from l0hooks.calibration.numerics.problem import Problem, median_factor

_PROMISING_MISS = 1e-3  # largest scaled miss of a least-squares fit after which the targets may be met
_MOST_PRECISE = 1e-3  # of the tolerance: the least that is asked of the search, where some targets count little
_MET = "all targets met"
_IMPOSSIBLE = "not all targets can be met within the bounds"
_UNKNOWN = "whether all targets can be met within the bounds is not known"
_OF_CHOSEN = " by the households chosen"


def polish(
    problem: Problem,
    selection: Selection,
    *,
    objective: Objective = "auto",
    distance: Distance = "chi_square",
    tolerance: float = 1e-6,
    rescale_design: bool = False,
    limits: PolishLimits | None = None,
) -> Polished:
    """The best weights of the chosen units.

    Where targets can be met, these are the weights nearest to the design weights that meet them; with at most as many
    units as targets those of bounded least squares, if they meet them. If the targets cannot be met, they are those of
    least squares, or, with more than four times as many units as targets, the soft compromise of
    ``numerics/distance``. If the search for the nearest weights does not converge, they are those of least squares; if
    these meet all targets, the nearest weights with the same estimates.

    Parameters
    ----------
    problem : Problem
    selection : Selection
    objective : "auto", "least_squares" or "distance"
    distance : "chi_square" or "raking"
    tolerance : float, > 0
        A target is met if its relative error is not larger.
    rescale_design : bool
        Nearest to the design weights times the one number with which the chosen units meet the targets in the median.
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
    return _Polish(problem, selection, distance, tolerance, limits or PolishLimits(), rescale_design).run(objective)


class _Polish:
    """One polish: the problem, the selection and its rows of the matrix."""

    def __init__(
        self,
        problem: Problem,
        selection: Selection,
        distance: Distance,
        tolerance: float,
        limits: PolishLimits,
        rescale: bool,
    ) -> None:
        self.problem, self.selection, self.units = problem, selection, selection.units
        self.distance, self.limits = distance, limits
        self.allowed = problem.allowed(tolerance)
        least = float((self.allowed * problem.damping).min()) / tolerance
        self.tolerance = tolerance * float(np.clip(least, _MOST_PRECISE, 1.0))
        self.violation = min(limits.violation, tolerance)
        self.block = problem.exactly(self.units)
        self.factor = _common_factor(problem, self.block) if rescale else 1 / problem.factor

    def run(self, objective: Objective) -> Polished:
        problem, limits = self.problem, self.limits
        if not len(self.units):  # there is no weight to find
            feasible = self.meets(problem.misses(np.zeros(problem.rows)))
            return self.result(self.selection.g, feasible=feasible, reason="no household is worth its price")
        per_target = len(self.units) / problem.rows
        nearest: Polished | None = None
        if objective == "distance" or (objective == "auto" and per_target > limits.distance_from):
            nearest = self.nearest()
            if not nearest.feasible and (problem.damping > 1).any():
                nearest = self.nearest(damped=True)
            if objective == "distance" or nearest.converged:
                return nearest
        fitted = self.least_squares()
        promising = float(np.abs(fitted.misses).max(initial=0.0)) <= max(_PROMISING_MISS, self.tolerance)
        if objective == "auto" and promising and (per_target > 1 or not self.meets(fitted.misses)):
            nearest = nearest or self.nearest()
            if not nearest.converged and (problem.lower < problem.upper).any():  # points are far easier than intervals
                nearest = self.nearest(self.clipped(fitted.g))
            if nearest.converged and nearest.feasible:
                return nearest
        return self.fitted(fitted)

    def fitted(self, fitted: Refit) -> Polished:
        """The weights of least squares; those of a programme, if they alone meet all targets."""
        certificate, feasible = fitted.fit.violation, self.meets(fitted.misses)
        if feasible:
            return self.result(fitted.g, feasible=True, certificate=certificate, reason=_MET)
        answer = self.answer(fitted.misses)
        if answer.g is not None:
            return self.from_point(answer.g)
        converged = certificate <= self.violation
        how = "least squares, optimality conditions met"
        if not converged:
            how = f"not converged: projected gradient {certificate:.1e} after {fitted.fit.iterations} iterations"
        return self.result(
            fitted.g,
            feasible=False,
            conflict=answer.conflict,
            converged=converged,
            certificate=certificate,
            reason=f"{self.known(answer)}: {how}",
        )

    def answer(self, misses: Floats) -> Answer:
        """Whether these units can meet all targets."""
        problem, units = self.problem, self.units
        return can_be_met(
            self.block,
            problem.lower,
            problem.upper,
            problem.low[units],
            problem.high[units],
            misses,
            self.allowed,
            most_entries=self.limits.programme_entries,
        )

    def known(self, answer: Answer) -> str:
        said = _IMPOSSIBLE if answer.impossible else _UNKNOWN
        return said if len(self.units) == self.problem.size else said.replace("met", "met" + _OF_CHOSEN)

    def least_squares(self) -> Refit:
        return refit(
            self.problem,
            self.units,
            self.selection.g,
            iterations=self.limits.iterations,
            tolerance=self.violation / 2,
            finish=True,
            block=self.block,
        )

    def meets(self, misses: Floats) -> bool:
        return bool((np.abs(misses) <= self.allowed).all())

    def clipped(self, g: Floats) -> Floats:
        """The estimates of ``g``, moved into their intervals."""
        estimates = np.asarray(self.block.T @ g, np.float64)
        return np.clip(estimates, self.problem.lower, self.problem.upper)

    def nearest(self, estimates: Floats | None = None, *, damped: bool = False) -> Polished:
        """The nearest weights that meet the targets; with ``estimates``, those that give these.

        ``damped`` says how rows are scaled, which matters for the compromise where targets cannot all be met.
        """
        problem, units = self.problem, self.units
        scale = np.ones(problem.rows) if damped else problem.damping
        found = nearest_weights(
            self.block if (scale == 1).all() else _scaled(self.block, scale),
            scale * (problem.lower if estimates is None else estimates),
            scale * (problem.upper if estimates is None else estimates),
            problem.low[units],
            problem.high[units],
            problem.strength(units),
            self.factor,
            NearestOptions(distance=self.distance, tolerance=self.tolerance),
        )
        converged, conflict = abs(found.gap) <= self.limits.gap, None
        misses = problem.misses(np.asarray(self.block.T @ found.g, np.float64))
        feasible = self.meets(misses)
        reason = f"{_MET}, nearest to the design weights"
        if estimates is not None:
            reason += " of those with the same estimates"
        if not feasible:
            answer = self.answer(misses)
            if answer.g is not None and estimates is None:
                return self.from_point(answer.g)
            worst, conflict = float(np.max(np.abs(misses), initial=0.0)), answer.conflict
            reason = f"{self.known(answer)}: soft compromise, largest scaled miss {worst:.2e}"
        if not converged:
            known = _MET if feasible else self.known(answer)
            reason = f"{known}; not converged: duality gap {found.gap:.1e} after {found.steps} Newton steps"
        return self.result(
            found.g,
            "distance",
            feasible=feasible,
            conflict=conflict,
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
        conflict: Floats | None = None,
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
            conflict=conflict,
            converged=converged,
            certificate=certificate,
            reason=reason,
        )


def _scaled(block: Sparse, scale: Floats) -> Sparse:
    """``block`` with its columns multiplied by numbers."""
    return sparse.csr_array((block.data * scale[block.indices], block.indices, block.indptr), shape=block.shape)


def _common_factor(problem: Problem, block: Sparse) -> float:
    """The one g for all units of a selection that meets the targets in the median."""
    estimates = np.asarray(block.T @ np.ones(block.shape[0]), np.float64)
    factor = median_factor(estimates, problem.lower, problem.upper)
    return problem.size / max(1, block.shape[0]) if factor is None else factor
