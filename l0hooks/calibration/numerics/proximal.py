r"""Bounded least squares to its optimum, where conjugate gradients on faces take too long: proximal points by the dual.

From x, in coordinates in which all columns of B have norm 1, the next point minimises

    ½‖B y − b‖² + δ/2 ‖y − x‖²  subject to  l ≤ y ≤ h.

It is y(u) = clip(x + Bᵀu/δ, l, h), and u = b − B y minimises a smooth convex function of as many numbers as there are
targets, found by semismooth Newton steps: one step may bring any number of units to their bounds or away from them. The
projected gradient at y is at most δ‖y − x‖, so a few such points suffice if δ is small.
"""

from __future__ import annotations

import numpy as np

from l0hooks.calibration.numerics.columns import Floats, Sparse, weighted_squares
from l0hooks.calibration.numerics.factor import Factor, conjugate_gradients, factorised
from l0hooks.calibration.numerics.least_squares import Fit, column_norms

_FIRST_DELTA = 5e-4  # δ of the first point, for columns of norm 1
_DELTA_FACTOR = 0.25  # of δ, from one point to the next
_MOST_NEWTON_STEPS = 40  # for one point
_QUICK_NEWTON_STEPS = 20  # δ falls only after a point that took no more
_POINT_ACCURACY = 0.1  # of a point, as a share of the tolerance or of the distance to the point before
_MOST_CG_STEPS = 300  # for one Newton step, with a new factor


def proximal_fit(
    block: Sparse,
    target: Floats,
    low: Floats,
    high: Floats,
    start: Floats,
    *,
    tolerance: float = 1e-8,
    scale: float | None = None,
    points: int = 25,
) -> Fit:
    r"""\(\min_g \tfrac12\|Bg - b\|^2\) within bounds, from ``start``, by the proximal point method.

    Parameters
    ----------
    block : sparse.csr_array, float64, shape (n, Q)
        Bᵀ. BᵀB, dense or sparse, is factorised a few times.
    target : float64, shape (Q,)
        b.
    low, high : float64, shape (n,)
        Bounds, finite or not, low <= high.
    start : float64, shape (n,)
        Near the optimum, the nearer the better.
    tolerance : float, > 0
        Of the projected gradient, relative to ``scale``. A point further
        from the optimum is reported as not converged.
    scale : float, > 0, optional
        ‖b‖ if not given.
    points : int, > 0
        Proximal points that are tried, at the most.

    Returns
    -------
    Fit
        Its iterations are Newton steps.

    Examples
    --------
    >>> from scipy import sparse
    >>> block = sparse.csr_array(np.array([[1.0, 0.0], [1.0, 1.0]]))
    >>> fit = proximal_fit(block, np.array([1.0, 2.0]), np.zeros(2), np.full(2, np.inf), np.ones(2))
    >>> fit.g.round(6), fit.converged
    (array([0. , 1.5]), True)

    References
    ----------
    Rockafellar (1976), Monotone operators and the proximal point algorithm, theorem 1; Li, Sun & Toh (2018), A highly
    efficient semismooth Newton augmented Lagrangian method for solving lasso problems, section 3.
    """
    norms = column_norms(block)
    search = _Points(block, norms, target, low * norms, high * norms, tolerance, scale)
    x = np.clip(start * norms, search.low, search.high)
    best, least = x, search.violation(x)
    for _ in range(points):
        if least <= search.goal:
            break
        before = search.steps
        x = search.following(best)
        violation = search.violation(x)
        if violation >= least:  # not found within the steps: a nearer one is easier
            search.delta /= _DELTA_FACTOR
            continue
        best, least = x, violation
        if search.steps - before <= _QUICK_NEWTON_STEPS:  # a point farther away can be found as well
            search.delta *= _DELTA_FACTOR
    g = np.clip(best / norms, low, high)
    residual = np.asarray(block.T @ g, np.float64) - target
    return Fit(g, residual, least / search.scale, least <= search.goal, search.steps)


class _Points:
    def __init__(
        self,
        block: Sparse,
        norms: Floats,
        target: Floats,
        low: Floats,
        high: Floats,
        tolerance: float,
        scale: float | None,
    ) -> None:
        self.block, self.norms, self.target, self.low, self.high = block, norms, target, low, high
        self.scale = max(float(np.linalg.norm(target)) if scale is None else scale, 1e-300)
        self.goal = tolerance * self.scale
        self.delta, self.steps = _FIRST_DELTA, 0
        self.solve: Factor | None = None

    def product(self, x: Floats) -> Floats:
        """B x."""
        return np.asarray(self.block.T @ (x / self.norms), np.float64)

    def transposed(self, u: Floats) -> Floats:
        """Bᵀ u."""
        return np.asarray(self.block @ u, np.float64) / self.norms

    def violation(self, x: Floats) -> float:
        """The norm of the projected gradient."""
        gradient = self.transposed(self.product(x) - self.target)
        gradient = np.where(x <= self.low, np.minimum(gradient, 0), gradient)
        gradient = np.where(x >= self.high, np.maximum(gradient, 0), gradient)
        return float(np.linalg.norm(np.where(self.low == self.high, 0.0, gradient)))

    def at(self, x: Floats, u: Floats) -> tuple[float, Floats, Floats, Floats]:
        """Value and gradient of the dual function, y, and 1/δ where it moves with u."""
        raw = x + self.transposed(u) / self.delta
        y = np.clip(raw, self.low, self.high)
        # with the largest uᵀB y − δ/2‖y − x‖² of all y, in the form that loses fewest digits
        value = (
            float(u @ u) / 2
            + float((self.product(x) - self.target) @ u)
            + self.delta / 2 * float((raw - x) @ (raw - x))
        )
        value -= self.delta / 2 * float((raw - y) @ (raw - y))
        gradient = u - self.target + self.product(y)
        return value, gradient, y, np.where((raw > self.low) & (raw < self.high), 1 / self.delta, 0.0)

    def following(self, x: Floats) -> Floats:
        """The next proximal point."""
        u = self.target - self.product(x)
        value, gradient, y, curvature = self.at(x, u)
        for _ in range(_MOST_NEWTON_STEPS):
            enough = max(_POINT_ACCURACY * self.goal, _POINT_ACCURACY * self.delta * float(np.linalg.norm(y - x)))
            if float(np.linalg.norm(gradient)) <= enough:
                break
            direction = self.newton(gradient, curvature)
            slope, length = float(gradient @ direction), 1.0
            while True:
                tried = self.at(x, u + length * direction)
                if tried[0] <= value + 1e-4 * length * slope + 1e-13 * abs(value):
                    break
                length /= 2
                if length < 1e-10:
                    return y
            u = u + length * direction
            value, gradient, y, curvature = tried
            self.steps += 1
        return y

    def newton(self, gradient: Floats, curvature: Floats) -> Floats:
        """−(I + B diag(curvature) Bᵀ)⁻¹·gradient, by conjugate gradients with a dense factor."""
        norm = float(np.linalg.norm(gradient))
        goal = min(0.1, norm / self.scale) * norm
        x, residual = np.zeros_like(gradient), -gradient
        if self.solve is not None:
            x, residual = self.conjugate(x, residual, curvature, goal, self.solve.stale)
        if float(np.linalg.norm(residual)) > goal:
            self.solve = None  # frees its memory before the next is made
            scaled = curvature / self.norms**2
            diagonal = 1 + weighted_squares(self.block, scaled)
            self.solve = factorised(self.block, scaled, np.ones(len(gradient)), diagonal)
            x, residual = self.conjugate(x, residual, curvature, goal, _MOST_CG_STEPS)
        return x

    def conjugate(
        self, x: Floats, residual: Floats, curvature: Floats, goal: float, limit: int
    ) -> tuple[Floats, Floats]:
        """Preconditioned conjugate gradients from x; x and the residual."""
        if self.solve is None:
            return x, residual

        def product(p: Floats) -> Floats:
            image: Floats = self.product(curvature * self.transposed(p)) + p
            return image

        return conjugate_gradients(product, x, residual, self.solve, goal, limit)
