r"""The function whose minimum gives the nearest weights, with a proximal term, and its minimum.

    f(u) = Σ qᵢ φ*(tᵢ) + Σⱼ σⱼ(uⱼ) + ‖u − u_k‖²/2τ,  t = Aᵀu/q,

φ*(t) = maxᵣ t·r − φ(r) within bounds, by r(u). σ(u) = −u·target for a point. For an interval it is −min(u·lower,
u·upper): a kink at zero. A semismooth Newton step changes the numbers that are not at their kink or want to leave it,
and ends at zero where it would change a sign (Gafni & Bertsekas, 1984, Two-metric projection methods for constrained
optimization, section 2). Steps that turn out too long for the pieces of the function are damped (Marquardt, 1963, An
algorithm for least-squares estimation of nonlinear parameters).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from l0hooks.calibration.numerics.columns import Floats, Sparse, weighted_squares
from l0hooks.calibration.numerics.factor import Factor, conjugate_gradients, factorised

Distance = Literal["chi_square", "raking"]
_MOST_NEWTON_STEPS = 60  # for one τ
_MOST_CG_STEPS = 500  # for one Newton step, with a preconditioner
_LARGEST_EXPONENT = 30.0  # of a raking weight: F(t) is linear beyond
_SHORTEST_STEP = 1e-10  # share of a Newton step that is tried
_SHORT_STEP = 0.2  # share of a Newton step below which the next is damped
_LEAST_DAMPING = 1e-6  # as a share of the diagonal
_NEAR_KINK = 1e-3  # \|u\| up to which a number may count as being at its kink
_FIXED_DIAGONAL = 1e8  # of fixed numbers in a preconditioner, so that they do not affect the others


@dataclass(frozen=True)
class NearestOptions:
    """How the nearest weights are searched for.

    Attributes
    ----------
    distance : "chi_square" or "raking"
    tolerance : float, > 0
        Of every miss, in the units of the scaled targets.
    plain_steps : int, >= 0
        Conjugate gradient steps that are tried before a preconditioner is made.
    preconditioned_targets : int, >= 0
        Targets up to which a preconditioner is made.
    """

    distance: Distance = "chi_square"
    tolerance: float = 1e-7
    plain_steps: int = 60
    preconditioned_targets: int = 6000


@dataclass(frozen=True)
class Point:
    """f at u.

    Attributes
    ----------
    u : float64, shape (Q,)
    value : float
        f(u).
    pull : float64, shape (Q,)
        The gradient; at a kink the slope nearest to zero.
    r : float64, shape (n,)
        r(u).
    curvature : float64, >= 0, shape (n,)
        The second derivative of Σ qᵢ φ*(tᵢ) is Σ curvatureᵢ Bᵢ Bᵢᵀ.
    """

    u: Floats
    value: float
    pull: Floats
    r: Floats
    curvature: Floats


class ProximalDual:
    """f and its minimum; the arguments are those of :func:`l0hooks.calibration.numerics.distance.nearest_weights`.

    ``u`` is the current point, ``dual`` is u_k, ``tau`` is τ.

    Examples
    --------
    >>> from scipy import sparse
    >>> block, ends, ones = sparse.csr_array(np.ones((2, 1))), (np.array([3.0]), np.array([4.0])), np.ones(2)
    >>> function = ProximalDual(block, *ends, 0 * ones, 9 * ones, ones, 1.0, NearestOptions(tolerance=1e-9))
    >>> function.tau = 1e9
    >>> r, found = function.minimise()
    >>> r.round(6), function.u.round(6), found
    (array([1.5, 1.5]), array([0.5]), True)
    """

    def __init__(
        self,
        block: Sparse,
        lower: Floats,
        upper: Floats,
        low: Floats,
        high: Floats,
        strength: Floats,
        factor: float,
        options: NearestOptions,
    ) -> None:
        self.block, self.lower, self.upper = block, lower, upper
        self.options, self.tolerance = options, options.tolerance
        self.rows, self.q, self.factor = len(lower), strength, factor
        self.low, self.high = low / factor, high / factor
        self.raking = options.distance == "raking"
        self.interval: NDArray[np.bool_] = lower < upper
        self.dual, self.u = np.zeros(self.rows), np.zeros(self.rows)
        self.tau = float(strength.sum())
        self.steps = self.products = 0
        self.damping = 0.0
        self.preconditioner: Factor | None = None

    def ratios(self, t: Floats) -> tuple[Floats, Floats]:
        """r and dr/dt for t = Aᵀu/q."""
        if self.raking:
            bent = np.exp(np.minimum(t, _LARGEST_EXPONENT))
            raw = bent if t.max(initial=0.0) <= _LARGEST_EXPONENT else bent * (1 + np.maximum(t - _LARGEST_EXPONENT, 0))
            slope = bent
        else:
            raw, slope = 1 + t, np.ones_like(t)
        inside = (raw > self.low) & (raw < self.high)
        if inside.all():
            return raw, slope
        return np.clip(raw, self.low, self.high), np.where(inside, slope, 0.0)

    def distances(self, r: Floats) -> Floats:
        """φ(r)."""
        if not self.raking:
            return (r - 1) ** 2 / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            values: Floats = np.where(r > 0, r * np.log(r), 0.0) - r + 1
        return values

    def conjugate(self, t: Floats, r: Floats) -> float:
        """Σ qᵢ φ*(tᵢ), r = r(t): without a logarithm where r is within its bounds."""
        if not self.raking:
            return float(self.q @ (t * r - self.distances(r)))
        values, bent = r - 1, (r <= self.low) | (r >= self.high) | (t > _LARGEST_EXPONENT)
        if bent.any():
            values[bent] = t[bent] * r[bent] - self.distances(r[bent])
        return float(self.q @ values)

    def ends(self, u: Floats) -> Floats:
        """The end that each u stands for: the lower one if u is positive, the upper one if negative, else zero."""
        towards: Floats = np.where(u > 0, self.lower, np.where(u < 0, self.upper, 0.0))
        return towards

    def at(self, u: Floats) -> Point:
        """f at ``u``."""
        self.products += 2
        r, slope = self.ratios(t := self.factor * (self.block @ u) / self.q)
        moved = u - self.dual
        value = self.conjugate(t, r) - float(self.ends(u) @ u)
        value += float(moved @ moved) / 2 / self.tau
        estimates = self.factor * (self.block.T @ r)
        above = estimates + moved / self.tau - self.lower  # the slopes to both sides
        below = above if not self.interval.any() else estimates + moved / self.tau - self.upper
        at_kink = np.clip(0.0, below, above)
        pull = np.where(self.interval & (u == 0), at_kink, np.where(u < 0, below, above))
        return Point(u, value, pull, r, self.factor**2 * slope / self.q)

    def minimise(self) -> tuple[Floats, bool]:
        """Semismooth Newton on the proximal dual function; r at its minimum, and whether it was found."""
        point, self.damping = self.at(self.u), 0.0
        for _ in range(_MOST_NEWTON_STEPS):
            norm = float(np.linalg.norm(point.pull))
            if norm <= max(0.1 * self.tolerance, 1e-2 * float(np.linalg.norm(self.u - self.dual)) / self.tau):
                return point.r, True
            following = self.step(point, min(0.1, norm**0.5))
            if following is None:
                break
            point, self.u = following, following.u
            self.steps += 1
        return point.r, False

    def step(self, point: Point, accuracy: float) -> Point | None:
        """The next point; None where the function falls no further."""
        free = ~self.interval | (point.u != 0) | (point.pull != 0)
        diagonal = weighted_squares(self.block, point.curvature) + 1 / self.tau
        steepest = -point.pull / diagonal
        # numbers that are about to change their sign take a step along the gradient
        nearly = (
            self.interval & (point.u * steepest < 0) & (np.abs(point.u) <= np.minimum(np.abs(steepest), _NEAR_KINK))
        )
        direction = self.newton(point, free & ~nearly, diagonal, accuracy)
        direction = np.where(nearly, steepest, direction)
        arriving = self.interval & (point.u == 0)
        direction = np.where(arriving & (direction * point.pull > 0), 0.0, direction)
        return self.search(point, direction) or (self.search(point, steepest) if self.interval.any() else None)

    def search(self, point: Point, direction: Floats) -> Point | None:
        """A point along the direction at which the function has fallen; no number of an interval changes its sign."""
        length = 1.0
        while length >= _SHORTEST_STEP:
            u = point.u + length * direction
            u = np.where(self.interval & (u * point.u < 0), 0.0, u)
            slope = float(point.pull @ (u - point.u))
            if slope < 0:
                tried = self.at(u)
                if tried.value <= point.value + 1e-4 * slope + 1e-13 * abs(point.value):
                    # longer steps than the function's pieces allow are damped
                    longer, shorter = self.damping / 10, max(10 * self.damping, _LEAST_DAMPING)
                    self.damping = shorter if length < _SHORT_STEP else longer if length == 1.0 else self.damping
                    self.damping = min(self.damping, 1.0) if self.damping >= _LEAST_DAMPING else 0.0
                    return tried
            length /= 2
        return None

    def newton(self, point: Point, free: NDArray[np.bool_], diagonal: Floats, accuracy: float) -> Floats:
        """−H⁻¹·pull for those that are free, H = B diag(curvature) Bᵀ + 1/τ, by conjugate gradients."""
        curvature, ridge = point.curvature, 1 / self.tau + self.damping * diagonal
        diagonal = diagonal * (1 + self.damping)
        start = np.where(free, -point.pull, 0.0)
        goal = accuracy * float(np.linalg.norm(start))

        def product(p: Floats) -> Floats:
            self.products += 2
            return np.where(free, self.block.T @ (curvature * (self.block @ p)) + ridge * p, 0.0)

        def cheap(v: Floats) -> Floats:
            return v / diagonal

        kept = self.preconditioner
        x, residual = np.zeros(self.rows), start
        limit = self.options.plain_steps if kept is None else kept.stale
        x, residual = conjugate_gradients(product, x, residual, self.masked(kept or cheap, free), goal, limit)
        if float(np.linalg.norm(residual)) > goal:
            if self.rows <= self.options.preconditioned_targets:
                kept = self.preconditioner = None  # frees its memory before the next is made
                apart = np.where(
                    free, ridge, _FIXED_DIAGONAL * diagonal
                )  # so that fixed numbers do not slow down the others
                kept = factorised(self.block, curvature, apart, diagonal - ridge + apart)
                self.preconditioner = kept
            x, _ = conjugate_gradients(product, x, residual, self.masked(kept or cheap, free), goal, _MOST_CG_STEPS)
        return x

    def masked(self, precondition: Callable[[Floats], Floats], free: NDArray[np.bool_]) -> Callable[[Floats], Floats]:
        return precondition if free.all() else lambda v: np.where(free, precondition(v), 0.0)
