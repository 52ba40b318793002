r"""The weights nearest to the design weights that meet the targets within bounds, by the dual.

With r = g/c, c the common factor of the chosen units, A = c·B and strengths q,

    minimise Σ qᵢ φ(rᵢ)  subject to  A r = b,  l ≤ r ≤ h,

φ(r) = (r − 1)²/2 (chi-square) or r log r − r + 1 (raking). Its solution is r(u) = clip(F(Aᵀu/q), l, h), F(t) = 1 + t or
eᵗ, and u minimises a smooth convex function of as many numbers as there are targets. The proximal method of multipliers
solves a sequence of such problems with the term ‖u − u_k‖²/2τ added, by semismooth Newton steps with preconditioned
conjugate gradients. At u_k = 0 such a problem is the soft one, Σ qᵢ φ(rᵢ) + τ/2 ‖A r − b‖². τ rises tenfold from one to
the next; while the misses fall with it they can be met, and u_k follows u. Where the targets cannot all be met the
misses stop falling, and the soft problem's weights are the answer. An interval is a point at zero for the estimate
less a number within the interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from l0hooks.calibration.factor import Factor, factorised
from l0hooks.calibration.problem import Floats, Sparse

Distance = Literal["chi_square", "raking"]
_GAP = 1e-5  # relative, where targets are intervals
_FIRST, _FACTOR, _LAST = 1e-2, 10.0, 1e3  # τ per unit of strength: first, from one to the next, last
_OUTER, _NEWTON = 30, 60  # steps at the most
_FALLING, _STALLED = 0.3, 0.97  # share of the misses that a tenfold τ leaves: they can be met; they cannot
_CHEAP, _INNER = 60, 500  # conjugate gradients: before a preconditioner is built; at the most
_DENSE = 6000  # targets up to which one is built
_LARGEST = 30.0  # exponent of a raking weight: F(t) is linear beyond


@dataclass(frozen=True)
class Nearest:
    """The result of :func:`nearest_weights`.

    Attributes
    ----------
    g : float64, shape (n,)
    dual : float64, shape (Q,)
        u.
    misses : float64, shape (Q,)
        B g − b, for intervals how far outside.
    gap : float
        (primal − dual value) / (1 + primal value): zero at the optimum; of the soft problem if not ``feasible``.
    feasible : bool
        Whether all misses are within the tolerance.
    tau : float
        What a squared miss counts in the soft problem, against 2 Σ qᵢ φ(rᵢ).
    steps : int
        Newton steps.
    products : int
        Products with A and Aᵀ.
    """

    g: Floats
    dual: Floats
    misses: Floats
    gap: float
    feasible: bool
    tau: float
    steps: int
    products: int


def nearest_weights(
    block: Sparse,
    lower: Floats,
    upper: Floats,
    low: Floats,
    high: Floats,
    strength: Floats,
    factor: float = 1.0,
    *,
    distance: Distance = "chi_square",
    tolerance: float = 1e-7,
) -> Nearest:
    """The g nearest to ``factor`` that meet the targets.

    Parameters
    ----------
    block : sparse.csr_array, float64, shape (n, Q)
        Bᵀ.
    lower, upper : float64, shape (Q,)
        Targets; equal for points.
    low, high : float64, shape (n,)
        Bounds of g.
    strength : float64, > 0, shape (n,)
        What each unit's distance counts.
    factor : float, > 0
        c.
    distance : "chi_square" or "raking"
    tolerance : float, > 0
        Of every miss, in the units of the scaled targets.

    Returns
    -------
    Nearest

    Examples
    --------
    >>> from scipy import sparse
    >>> block, target, ones = sparse.csr_array(np.ones((2, 1))), np.array([3.0]), np.ones(2)
    >>> nearest_weights(block, target, target, 0 * ones, 9 * ones, np.array([1.0, 3.0])).g.round(6)
    array([1.75, 1.25])

    References
    ----------
    Deville & Särndal (1992), Calibration estimators in survey sampling, section 2; Rockafellar (1976), Augmented
    Lagrangians and applications of the proximal point algorithm in convex programming.
    """
    return _Dual(block, lower, upper, low, high, strength, factor, distance, tolerance).solve()


class _Dual:
    def __init__(
        self,
        block: Sparse,
        lower: Floats,
        upper: Floats,
        low: Floats,
        high: Floats,
        strength: Floats,
        factor: float,
        distance: Distance,
        tolerance: float,
    ) -> None:
        self.block, self.lower, self.upper, self.tolerance = block, lower, upper, tolerance
        self.rows, self.q, self.factor = len(lower), strength, factor
        self.low, self.high = low / factor, high / factor
        self.raking = distance == "raking"
        self.interval: NDArray[np.bool_] = lower < upper
        self.target = np.where(self.interval, 0.0, lower)
        # of the numbers within intervals: at first what the design weights give
        estimates = factor * np.asarray(block.T @ np.clip(1.0, self.low, self.high), np.float64)
        self.centre = np.where(self.interval, np.clip(estimates, lower, upper), 0.0)
        self.dual, self.u = np.zeros(self.rows), np.zeros(self.rows)
        self.tau = _FIRST * float(strength.sum())
        self.steps = self.products = 0
        self.preconditioner: Factor | None = None

    # --- the parts of the dual function -----------------------------------------------------------------------------

    def ratios(self, t: Floats) -> tuple[Floats, Floats]:
        """r and dr/dt for t = Aᵀu/q."""
        if self.raking:
            bent = np.exp(np.minimum(t, _LARGEST))
            raw = bent * (1 + np.maximum(t - _LARGEST, 0))
            slope = bent
        else:
            raw, slope = 1 + t, np.ones_like(t)
        inside = (raw > self.low) & (raw < self.high)
        return np.clip(raw, self.low, self.high), np.where(inside, slope, 0.0)

    def distances(self, r: Floats) -> Floats:
        """φ(r)."""
        if not self.raking:
            return (r - 1) ** 2 / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            values: Floats = np.where(r > 0, r * np.log(r), 0.0) - r + 1
        return values

    def at(self, u: Floats) -> tuple[float, Floats, Floats, Floats, Floats]:
        """Value and gradient of the proximal dual function, r, dr/dt / q, and the slope of the numbers in intervals."""
        self.products += 2
        t = self.factor * (self.block @ u) / self.q
        r, slope = self.ratios(t)
        raw = self.centre - self.tau * u
        number = np.where(self.interval, np.clip(raw, self.lower, self.upper), 0.0)
        moves = self.interval & (raw > self.lower) & (raw < self.upper)
        moved = u - self.dual
        value = (
            float(self.q @ (t * r - self.distances(r))) - float(self.target @ u) + float(moved @ moved) / 2 / self.tau
        )
        value += float(np.sum(-u * number - (number - self.centre) ** 2 / 2 / self.tau))
        gradient = self.factor * (self.block.T @ r) - number - self.target + moved / self.tau
        return value, gradient, r, slope / self.q, np.where(moves, self.tau, 0.0)

    # --- the iteration ----------------------------------------------------------------------------------------------

    def solve(self) -> Nearest:
        before, whole = np.inf, float(self.q.sum())
        for _ in range(_OUTER):
            r = self.minimise()
            misses = self.misses(r)
            feasible = float(np.max(np.abs(misses), initial=0.0)) <= self.tolerance
            norm = float(np.linalg.norm(misses))
            if feasible and self.optimal(r, misses):
                break
            if not feasible and norm > _STALLED * before and self.tau >= whole:
                break
            if feasible or (norm < _FALLING * before and np.isfinite(before)):
                raw = self.centre - self.tau * self.u
                self.centre = np.where(self.interval, np.clip(raw, self.lower, self.upper), 0.0)
                self.dual = self.u
            before, self.tau = norm, min(self.tau * _FACTOR, _LAST * whole)
        return self.result(r, misses, feasible)

    def optimal(self, r: Floats, misses: Floats) -> bool:
        """Whether feasible weights are the nearest ones: always for points; within intervals others may be nearer."""
        return not self.interval.any() or abs(self.result(r, misses, True).gap) <= _GAP

    def misses(self, r: Floats) -> Floats:
        estimates = self.factor * (self.block.T @ r)
        outside: Floats = estimates - np.clip(estimates, self.lower, self.upper)
        return outside

    def minimise(self) -> Floats:
        """Semismooth Newton on the proximal dual function; r at its minimum."""
        value, gradient, r, curvature, numbers = self.at(self.u)
        for _ in range(_NEWTON):
            norm = float(np.linalg.norm(gradient))
            if norm <= max(0.1 * self.tolerance, 1e-2 * float(np.linalg.norm(self.u - self.dual)) / self.tau):
                break
            direction = self.newton(gradient, self.factor**2 * curvature, numbers + 1 / self.tau, min(0.1, norm**0.5))
            slope, length = float(gradient @ direction), 1.0
            while True:
                tried = self.at(self.u + length * direction)
                if tried[0] <= value + 1e-4 * length * slope + 1e-13 * abs(value):
                    break
                length /= 2
                if length < 1e-10:
                    return r
            self.u = self.u + length * direction
            value, gradient, r, curvature, numbers = tried
            self.steps += 1
        return r

    def newton(self, gradient: Floats, curvature: Floats, ridge: Floats, accuracy: float) -> Floats:
        """−H⁻¹·gradient, H = B diag(curvature) Bᵀ + diag(ridge), by conjugate gradients."""
        squares = self.block.data**2
        squares *= np.repeat(curvature, np.diff(self.block.indptr))
        diagonal = np.bincount(self.block.indices, squares, minlength=self.rows) + ridge
        del squares  # their memory is wanted
        goal = accuracy * float(np.linalg.norm(gradient))
        x, residual = np.zeros(self.rows), -gradient
        cheap = self.preconditioner or (lambda v: v / diagonal)
        limit = _CHEAP if self.preconditioner is None else self.preconditioner.stale
        x, residual = self.conjugate(x, residual, curvature, ridge, cheap, goal, limit)
        if float(np.linalg.norm(residual)) > goal:
            if self.rows <= _DENSE:
                self.preconditioner = None  # its memory is wanted
                self.preconditioner = factorised(self.block, curvature, ridge, diagonal)
            x, _ = self.conjugate(x, residual, curvature, ridge, self.preconditioner or cheap, goal, _INNER)
        return x

    def conjugate(
        self,
        x: Floats,
        residual: Floats,
        curvature: Floats,
        ridge: Floats,
        precondition: Callable[[Floats], Floats],
        goal: float,
        limit: int,
    ) -> tuple[Floats, Floats]:
        """Preconditioned conjugate gradients from x; x and the residual."""
        z = precondition(residual)
        p, rz = z, float(residual @ z)
        for _ in range(limit):
            if float(np.linalg.norm(residual)) <= goal:
                break
            self.products += 2
            image = self.block.T @ (curvature * (self.block @ p)) + ridge * p
            length = rz / float(p @ image)
            x = x + length * p
            residual = residual - length * image
            z = precondition(residual)
            following = float(residual @ z)
            p, rz = z + (following / rz) * p, following
        return x, residual

    def result(self, r: Floats, misses: Floats, feasible: bool) -> Nearest:
        """The duality gap, computed from the weights and u alone."""
        # no multiplier pulls towards an end that is not there
        u = self.u
        if feasible:
            u = np.where(self.interval & np.isinf(self.lower), np.minimum(u, 0), u)
            u = np.where(self.interval & np.isinf(self.upper), np.maximum(u, 0), u)
        t = self.factor * (self.block @ u) / self.q
        best, _ = self.ratios(t)
        cost = float(self.q @ self.distances(r))
        conjugate = float(self.q @ (t * best - self.distances(best)))
        if feasible:
            ends = np.where(u > 0, self.lower, self.upper)
            pulling = u != 0
            primal, dual = cost, float(u[pulling] @ ends[pulling]) - conjugate
        else:
            estimates = self.factor * (self.block.T @ r)
            number = np.where(self.interval, np.clip(self.centre - self.tau * self.u, self.lower, self.upper), 0.0)
            missed = estimates - number - self.target
            primal = cost - float(self.dual @ missed) + self.tau / 2 * float(missed @ missed)
            primal += float(np.sum((number - self.centre) ** 2)) / 2 / self.tau
            dual = -self.at(self.u)[0]
        gap = (primal - dual) / (1 + abs(primal))
        return Nearest(r * self.factor, self.u, misses, gap, feasible, self.tau, self.steps, self.products)
