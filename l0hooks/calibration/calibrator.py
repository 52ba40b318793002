"""``Calibrator``: the fitter's front door."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from l0hooks.calibration.distance import Distance
from l0hooks.calibration.problem import BoundsOn, Floats, Loss, Precision, Problem, Sparse, prepare
from l0hooks.calibration.solver import Candidate, Method, Options, Solver
from l0hooks.calibration.stage import Progress
from l0hooks.errors import StateError, explain

Callback = Callable[["Solver", Progress], bool | None]


class Calibrator:
    r"""Chooses exactly K households and weights w >= 0 with \(M w \approx y\).

    Parameters
    ----------
    k : int, optional
        Households (clusters count as one) with a positive weight; all, if neither ``k`` nor ``l0`` is given.
    l0 : float, > 0, optional
        The price of a household in the loss, instead of ``k``.
    bounds : (float, float), 0 <= lo <= hi
        For the households that are chosen.
    bounds_on : "ratio" or "weight"
        Whether they bound weight / design weight, or the weight.
    distance : "chi_square" or "raking"
        To the design weights.
    loss : "relative" or "squared"
        Relative errors are divided by \|y\| + 1.
    method : "auto", "gates", "greedy" or "dense"
    groups : array_like, shape (Q,), optional
        Group of each target: groups count alike, whatever their size.
    group_multipliers : mapping, optional
        What each group counts.
    normalize_groups : bool
        Whether a group's targets share its weight.
    importance : array_like, >= 0, shape (Q,), optional
        What each target counts.
    hierarchy : sequence of (parent, children)
        Rows whose estimates are to add up.
    keep, leave_out : array_like of int
        Households that must, and must not, be chosen.
    clusters : array_like of int, shape (N,), optional
        Households that share one weight.
    tolerance : float, > 0
        A target is met if its relative error is not larger.
    max_epochs : int, > 0
        Of the gates.
    dtype : "float32" or "float64"
        Of the stored matrix.
    random_state : int, >= 0
    callbacks : sequence of callable
        Called with the solver and its progress after every step; one that returns True stops the fit where it is.

    Attributes
    ----------
    weights\_ : float64, shape (N,)
    winner\_ : str
        The stages that led to them.
    candidates\_ : list of Candidate
    converged\_, reason\_ : bool, str
    deff\_ : float
        Kish's design effect.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> matrix = rng.random((4, 50))
    >>> fitted = Calibrator(8, max_epochs=20).fit(matrix, matrix @ np.ones(50))
    >>> int((fitted.weights_ > 0).sum()), bool(np.allclose(fitted.predict(matrix), matrix.sum(axis=1), rtol=1e-4))
    (8, True)
    """

    def __init__(
        self,
        k: int | None = None,
        *,
        l0: float | None = None,
        bounds: tuple[float, float] = (0.0, np.inf),
        bounds_on: BoundsOn = "ratio",
        distance: Distance = "chi_square",
        loss: Loss = "relative",
        method: Method = "auto",
        groups: ArrayLike | None = None,
        group_multipliers: Mapping[Any, float] | None = None,
        normalize_groups: bool = True,
        importance: ArrayLike | None = None,
        hierarchy: Sequence[tuple[int, Sequence[int]]] = (),
        keep: ArrayLike = (),
        leave_out: ArrayLike = (),
        clusters: ArrayLike | None = None,
        tolerance: float = 1e-6,
        max_epochs: int = 200,
        dtype: Precision = "float32",
        random_state: int = 0,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.k, self.l0, self.method, self.callbacks = k, l0, method, tuple(callbacks)
        self.groups, self.group_multipliers, self.normalize_groups = groups, group_multipliers, normalize_groups
        self.importance = importance
        self._preparation = {
            "bounds": bounds,
            "bounds_on": bounds_on,
            "loss": loss,
            "hierarchy": hierarchy,
            "keep": keep,
            "leave_out": leave_out,
            "clusters": clusters,
            "dtype": dtype,
        }
        self._options = Options(
            keep=k,
            l0=l0,
            method=method,
            epochs=max_epochs,
            distance=distance,
            tolerance=tolerance,
            random_state=random_state,
        )
        self._weights: Floats | None = None

    def fit(
        self,
        matrix: Sparse,
        lower: ArrayLike,
        upper: ArrayLike | None = None,
        *,
        design_weights: ArrayLike | None = None,
    ) -> Calibrator:
        """Fit weights to the targets ``lower``, or to the intervals from ``lower`` to ``upper``."""
        importance = row_importance(
            np.asarray(lower).shape[0], self.importance, self.groups, self.group_multipliers, self.normalize_groups
        )
        problem: Problem = prepare(
            matrix,
            lower,
            upper,
            design_weights=design_weights,
            importance=importance,
            **self._preparation,  # type: ignore[arg-type]
        )
        solver = Solver(problem, self._options)
        stopped = False
        while not solver.done and not stopped:
            told = solver.advance()
            stopped = True in [call(solver, told) for call in self.callbacks]  # all are called
        self._take(solver)
        return self

    def _take(self, solver: Solver) -> None:
        best: Candidate = solver.best()
        polished = best.polished
        self.winner_, self.candidates_ = best.name, solver.candidates
        self.converged_, self.reason_, self.deff_ = polished.converged, polished.reason, polished.deff
        self._weights = solver.problem.weights(polished.selection.g, polished.selection.units)

    @property
    def weights_(self) -> Floats:
        """One weight for each household: float64, shape (N,)."""
        if self._weights is None:
            raise StateError(explain("Calibrator", "it must be fitted first.", hint="calibrator.fit(M, y)"))
        return self._weights

    def predict(self, matrix: Sparse) -> Floats:
        """M w: float64, shape (rows of ``matrix``,)."""
        return np.asarray(sparse.csr_array(matrix) @ self.weights_, np.float64)


def row_importance(
    count: int,
    importance: ArrayLike | None,
    groups: ArrayLike | None,
    multipliers: Mapping[Any, float] | None,
    normalize: bool,
) -> Floats | None:
    """What each target counts: its importance, times its group's multiplier, over its group's size.

    Examples
    --------
    >>> row_importance(3, None, ["a", "a", "b"], {"b": 2.0}, True)
    array([0.5, 0.5, 2. ])
    """
    if importance is None and groups is None:
        return None
    counts = np.ones(count) if importance is None else np.asarray(importance, np.float64).copy()
    if groups is not None:
        names, of_row, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
        factors = np.array([float((multipliers or {}).get(name, 1.0)) for name in names.tolist()])
        counts *= (factors / sizes if normalize else factors)[of_row]
    return counts
