r"""Bounded least squares, \(\min \tfrac12\|Bg - b\|^2\) with \(l \le g \le h\), by conjugate gradients on free faces.

Conjugate gradients run on the coordinates strictly between their bounds. A step that would leave the box is projected
onto it if the loss still falls, and else cut short; where the bound coordinates' share of the gradient outweighs the
free ones', those that want to leave their bounds are let go. (Dostál, 2009, Optimal quadratic programming algorithms,
chapter 5, with Kružík, Horák & Čermák's projected step.) Everything happens in coordinates in which all columns of B
have norm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from l0hooks.calibration.numerics.columns import Floats, Sparse, row_norms

_FACE_PROPORTION = 1.0  # bound over free gradient, above which coordinates are released from their bounds
_STEPS_TO_REFRESH = 50  # steps after which the residual is computed anew: float32 products drift


@dataclass(frozen=True)
class Fit:
    """A bounded least-squares fit.

    Attributes
    ----------
    g : float64, shape (n,)
    residual : float64, shape (Q,)
        B g − b.
    violation : float
        ‖projected gradient‖ in unit columns, over ‖b‖: zero at the optimum.
    converged : bool
        Whether ``violation`` is within the tolerance.
    iterations : int
    """

    g: Floats
    residual: Floats
    violation: float
    converged: bool
    iterations: int


def column_norms(block: Sparse) -> Floats:
    """‖Bᵢ‖ of every row of ``block``, 1 for a row of zeros."""
    norms = row_norms(block)
    return np.where(norms > 0, norms, 1.0)


def bounded_fit(
    block: Sparse,
    target: Floats,
    low: Floats,
    high: Floats,
    start: Floats,
    *,
    iterations: int,
    tolerance: float = 1e-8,
    scale: float | None = None,
) -> Fit:
    r"""\(\min_g \tfrac12\|Bg - b\|^2\) within bounds, from ``start``; the best point after at most ``iterations``.

    Parameters
    ----------
    block : sparse.csr_array, float32 or float64, shape (n, Q)
        Bᵀ.
    target : float64, shape (Q,)
        b.
    low, high : float64, shape (n,)
        Bounds, finite or not, low <= high.
    start : float64, shape (n,)
        Projected onto the bounds first.
    iterations : int, > 0
        Each takes one or two products with B and with Bᵀ.
    tolerance : float, > 0
        Of the projected gradient, relative to ``scale``.
    scale : float, > 0, optional
        ‖b‖ if not given.

    Returns
    -------
    Fit

    Examples
    --------
    >>> from scipy import sparse
    >>> block = sparse.csr_array(np.array([[1.0, 0.0], [1.0, 1.0]]))
    >>> fit = bounded_fit(block, np.array([1.0, 2.0]), np.zeros(2), np.full(2, np.inf), np.ones(2), iterations=20)
    >>> fit.g.round(6), fit.converged
    (array([0. , 1.5]), True)
    """
    unit = column_norms(block)
    fit = _Face(block, target, low * unit, high * unit, unit, tolerance, scale).run(start * unit, iterations)
    return replace(fit, g=np.clip(fit.g, low, high))  # g·‖Bᵢ‖ was within, g may have been rounded out


class _Face:
    """The iteration, in coordinates x = g·‖Bᵢ‖."""

    def __init__(
        self,
        block: Sparse,
        target: Floats,
        low: Floats,
        high: Floats,
        norms: Floats,
        tolerance: float,
        scale: float | None,
    ) -> None:
        self.block, self.target, self.low, self.high, self.norms = block, target, low, high, norms
        self.scale = max(float(np.linalg.norm(target)) if scale is None else scale, 1e-300)
        self.goal = tolerance * self.scale

    def product(self, x: Floats) -> Floats:
        return np.asarray(self.block.T @ (x / self.norms).astype(self.block.dtype), np.float64)

    def transposed(self, residual: Floats) -> Floats:
        return np.asarray(self.block @ residual.astype(self.block.dtype), np.float64) / self.norms

    def place(self, x: Floats) -> None:
        """Stand at ``x``."""
        self.x = x
        self.residual = self.product(x) - self.target
        self.gradient = self.transposed(self.residual)
        self.split()

    def split(self) -> None:
        """Split the gradient into its free part and that of the coordinates which want to leave their bounds."""
        at_low, at_high = self.x <= self.low, self.x >= self.high
        self.free = np.where(at_low | at_high, 0.0, self.gradient)
        self.bound = np.where(at_low & ~at_high, np.minimum(self.gradient, 0), 0.0)  # of fixed ones nothing
        self.bound = np.where(at_high & ~at_low, np.maximum(self.gradient, 0), self.bound)

    def violation(self) -> float:
        return float(np.sqrt(self.free @ self.free + self.bound @ self.bound))

    def reach(self, direction: Floats) -> Floats:
        """The a for which each coordinate of x − a·direction reaches its bound."""
        with np.errstate(divide="ignore", invalid="ignore"):
            down = np.where(direction > 0, (self.x - self.low) / direction, np.inf)
            up = np.where(direction < 0, (self.x - self.high) / direction, np.inf)
        smaller: Floats = np.minimum(down, up)
        return smaller

    def run(self, start: Floats, iterations: int) -> Fit:
        self.place(np.clip(start, self.low, self.high))
        direction, step = self.free, 0
        for step in range(1, iterations + 1):
            if self.violation() <= self.goal:
                break
            leaves = float(self.bound @ self.bound) > _FACE_PROPORTION * float(self.free @ self.free)
            direction = self.walk(self.bound if leaves else direction, leaves)
            if not direction.any() or step % _STEPS_TO_REFRESH == 0:
                self.place(self.x)
                direction = self.free
        self.place(self.x)  # what is reported is computed anew
        violation = self.violation()
        return Fit(self.x / self.norms, self.residual, violation / self.scale, violation <= 2 * self.goal, step)

    def walk(self, direction: Floats, leaves: bool) -> Floats:
        """One step along −direction; the next direction."""
        image = self.product(direction)
        curvature = float(image @ image)
        if curvature <= 0:
            return np.zeros_like(direction)
        length = float(direction @ self.gradient) / curvature
        reach = self.reach(direction)
        least = float(reach.min(initial=np.inf))
        if length <= least:
            self.x = np.clip(self.x - length * direction, self.low, self.high)
            self.residual = self.residual - length * image
            change = self.transposed(image)
            self.gradient = self.gradient - length * change
            self.split()
            if leaves:
                return self.free
            # conjugate to the last direction on this face
            return self.free - float(self.free @ change) / curvature * direction
        projected = np.clip(self.x - length * direction, self.low, self.high)
        residual = self.product(projected) - self.target
        if float(residual @ residual) < float(self.residual @ self.residual):
            self.x, self.residual = projected, residual
        else:
            ends = np.where(direction > 0, self.low, self.high)
            self.x = np.where(reach <= least, ends, np.clip(self.x - least * direction, self.low, self.high))
            self.residual = self.residual - least * image
        self.gradient = self.transposed(self.residual)
        self.split()
        return self.free
