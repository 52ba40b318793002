"""What all stages share: selections, progress, patience, and refits of chosen units."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from l0hooks.calibration.numerics.columns import Floats, Integers, Sparse, rows_of
from l0hooks.calibration.numerics.least_squares import Fit, bounded_fit
from l0hooks.calibration.numerics.problem import Problem, larger_ends
from l0hooks.calibration.numerics.proximal import proximal_fit

_LEAST_IMPROVEMENT = 0.01  # share of the error by which it must fall to count as better
_MOST_FOR_DENSE_FACTORS = 6000  # targets up to which a fit may be finished with dense factors
State = dict[str, Any]  # numbers, strings, NumPy arrays, and dictionaries of them


@dataclass(frozen=True)
class Selection:
    """Chosen units, in ascending order, and their g.

    Attributes
    ----------
    units : int64, shape (k,)
    g : float64, shape (k,)
    """

    units: Integers
    g: Floats


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes
    ----------
    stage : str
    step, steps : int
        Steps taken, and how many there will be at the most.
    error : float
        Mean \\|relative error\\| over the targets as of this step.
    active : int
        Units with a positive weight.
    """

    stage: str
    step: int
    steps: int
    error: float
    active: int


class Patience:
    """Says when a stage no longer gets better.

    Parameters
    ----------
    steps : int, > 0
        A stage should end after this many in a row, none with an error 1 % below the least before it.

    Examples
    --------
    >>> patience = Patience(2)
    >>> [patience.is_over(Progress("swaps", t, 9, error, 5)) for t, error in enumerate((0.5, 0.4, 0.399, 0.398))]
    [False, False, False, True]
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.begin()

    def begin(self) -> None:
        """Begin to watch another stage."""
        self._least, self._waited = math.inf, 0

    def is_over(self, progress: Progress) -> bool:
        """Count a step; whether the stage should end."""
        if progress.error < (1 - _LEAST_IMPROVEMENT) * self._least:
            self._least, self._waited = progress.error, 0
        else:
            self._waited += 1
        return self._waited >= self.steps

    def state(self) -> State:
        """What :meth:`resume` needs."""
        return {"least": self._least, "waited": self._waited}

    def resume(self, state: State) -> None:
        """Go on from ``state``, of an instance with the same number of steps."""
        self._least, self._waited = float(state["least"]), int(state["waited"])


class Stage(Protocol):
    """A part of the fit that goes step by step and can be saved between steps.

    A stage that resumes from a state gives the same numbers, to the bit, as the one that the state was taken from.
    ``StageLaws`` in the tests checks what every stage promises.
    """

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether :meth:`state` may be called now."""
        ...

    def advance(self) -> Progress:
        """Take one step."""
        ...

    def selection(self) -> Selection:
        """The units chosen so far, with their g."""
        ...

    def state(self) -> State:
        """What :meth:`resume` needs; later steps do not change it."""
        ...

    def resume(self, state: State) -> None:
        """Go on from ``state``."""
        ...


@dataclass(frozen=True)
class Refit:
    """A least-squares fit of chosen units.

    Attributes
    ----------
    g : float64, shape (k,)
    misses : float64, shape (Q,)
        How far the scaled estimates lie outside their targets.
    fit : Fit
    """

    g: Floats
    misses: Floats
    fit: Fit

    @property
    def loss(self) -> float:
        """½ Σ dist²."""
        return float(self.misses @ self.misses) / 2


def refit(
    problem: Problem,
    units: Integers,
    start: Floats,
    *,
    iterations: int,
    tolerance: float = 1e-8,
    relaxed: bool = False,
    finish: bool = False,
    block: Sparse | None = None,
) -> Refit:
    """Bounded least squares over ``units``, from ``start``.

    Parameters
    ----------
    problem : Problem
    units : int64, shape (k,)
    start : float64, shape (k,)
    iterations : int, > 0
    tolerance : float, > 0
        As in :func:`bounded_fit`.
    relaxed : bool
        Whether units that need not be chosen may go down to zero.
    finish : bool
        Whether :func:`proximal_fit` goes on if the iterations do not suffice; with up to 6,000 targets.
    block : sparse.csr_array, shape (k, Q), optional
        The units' rows of ``problem.columns``, if they are already copied; in float32 for a rough fit.

    Returns
    -------
    Refit

    Examples
    --------
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> problem = prepare(sparse.csr_array([[1.0, 1.0], [0.0, 2.0]]), [9.0, 4.0])
    >>> fitted = refit(problem, np.array([0, 1]), np.ones(2), iterations=20)
    >>> problem.weights(fitted.g, np.array([0, 1])).round(3)
    array([7., 2.])
    """
    rows = rows_of(problem.columns, units) if block is None else block
    low, high = problem.low[units], problem.high[units]
    if relaxed:
        low = np.where(problem.kept[units], low, 0.0)
    fitted, target, scale = rows, problem.lower, _target_norm(problem)
    interval = np.flatnonzero(problem.lower < problem.upper)
    if len(interval):
        fitted, target, low, high, start = _with_slack(problem, interval, rows, (low, high, start))
    fit = bounded_fit(fitted, target, low, high, start, iterations=iterations, tolerance=tolerance, scale=scale)
    if finish and not fit.converged and len(target) <= _MOST_FOR_DENSE_FACTORS:
        better = proximal_fit(fitted, target, low, high, fit.g, tolerance=2 * tolerance, scale=scale)
        fit = replace(better, iterations=fit.iterations + better.iterations)
    if not len(interval):
        return Refit(fit.g, fit.residual, fit)
    g = fit.g[: len(units)]
    return Refit(g, problem.misses(np.asarray(rows.T @ g.astype(rows.dtype), np.float64)), fit)


def _with_slack(
    problem: Problem, interval: Integers, rows: Sparse, weights: tuple[Floats, Floats, Floats]
) -> tuple[Sparse, Floats, Floats, Floats, Floats]:
    """The same fit with points only: rows, targets, lower and upper bounds, and start.

    Each interval becomes a target of zero for the estimate less one more variable, which lies within the interval.
    """
    low, high, start = weights
    slack = sparse.csr_array(
        (np.full(len(interval), -1.0, rows.dtype), (np.arange(len(interval)), interval)),
        shape=(len(interval), problem.rows),
    )
    estimates = np.asarray(rows.T @ start.astype(rows.dtype), np.float64)[interval]
    return (
        sparse.vstack([rows, slack], format="csr"),
        np.where(problem.lower < problem.upper, 0.0, problem.lower),
        np.concatenate([low, problem.lower[interval]]),
        np.concatenate([high, problem.upper[interval]]),
        np.concatenate([start, estimates]),
    )


def _target_norm(problem: Problem) -> float:
    """‖y‖, y the larger finite end of each interval; 1, a relative error of one, where all are zero."""
    norm = float(np.linalg.norm(larger_ends(problem.lower, problem.upper)))
    return norm if norm > 0 else 1.0


def contributions(problem: Problem, units: Integers, g: Floats) -> Floats:
    """g·‖Bᵢ‖, what units are ranked by; infinite for those that must stay."""
    ranked: Floats = np.where(problem.kept[units], np.inf, g * problem.norms[units])
    return ranked


def largest(scores: Floats, count: int) -> Integers:
    """The positions of the ``count`` largest scores in ascending order; of equal ones the first."""
    if count >= len(scores):
        return np.arange(len(scores))
    edge = np.partition(scores, len(scores) - count)[len(scores) - count]
    chosen = scores > edge
    ties = np.flatnonzero(scores == edge)
    chosen[ties[: count - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)
