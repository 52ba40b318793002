r"""The weights nearest to the design weights that meet the targets within bounds, by the dual.

With r = g/c, c the common factor of the chosen units, A = c·B and strengths q,

    minimise Σ qᵢ φ(rᵢ)  subject to  A r = b,  l ≤ r ≤ h,

φ(r) = (r − 1)²/2 (chi-square) or r log r − r + 1 (raking). Its solution is r(u) = clip(F(Aᵀu/q), l, h), F(t) = 1 + t or
eᵗ, and u minimises a smooth convex function of as many numbers as there are targets. The proximal method of multipliers
solves a sequence of such problems with the term ‖u − u_k‖²/2τ added, by semismooth Newton steps with preconditioned
conjugate gradients. At u_k = 0 such a problem is the soft one, Σ qᵢ φ(rᵢ) + τ/2 ‖A r − b‖². τ rises tenfold from one to
the next; while the misses fall with it they can be met, and u_k follows u. Where the targets cannot all be met the
misses stop falling, and the soft problem's weights are the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l0hooks.calibration.numerics.columns import Floats, Sparse
from l0hooks.calibration.numerics.dual import NearestOptions, ProximalDual
from l0hooks.calibration.numerics.margins import fit_margins

_INTERVAL_GAP = 1e-5  # relative duality gap at which weights within intervals count as nearest
_FIRST_TAU, _LAST_TAU = 1e-2, 1e6  # per unit of strength
_TAU_FACTOR = 10.0  # from one problem to the next
_MOST_PROBLEMS = 40  # values of τ, at the most
_MOST_FAILURES = 6  # problems whose minimum was not found
_FALLING_SHARE = 0.3  # of the misses left by a tenfold τ, below which the targets can be met
_STALLED_SHARE = 0.97  # of the misses left by a tenfold τ, above which they cannot be met


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
    options: NearestOptions | None = None,
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
        The factor of each unit's distance.
    factor : float, > 0
        c.
    options : NearestOptions, optional

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
    return _Search(block, lower, upper, low, high, strength, factor, options or NearestOptions()).solve()


class _Search(ProximalDual):
    """The sequence of problems."""

    def solve(self) -> Nearest:
        return self.by_margins() or self.by_newton()

    def by_margins(self) -> Nearest | None:
        """The weights if targets are margins and no bound is active; None if a check says otherwise."""
        if not self.raking or self.interval.any():
            return None
        u = fit_margins(self.block, self.lower, self.q, self.factor, self.tolerance)
        if u is None:
            return None
        t = self.factor * (self.block @ u) / self.q
        r, _ = self.ratios(t)
        misses = self.misses(self.factor * (self.block.T @ r))
        if float(np.abs(misses).max()) > self.tolerance:  # a bound is active, or the targets only looked like margins
            return None
        self.u, self.products = u, 2
        return self.result(r, misses, True, t)

    def by_newton(self) -> Nearest:
        self.tau = _FIRST_TAU * float(self.q.sum())
        before, growth, failures, strengths = np.inf, _TAU_FACTOR, 0, float(self.q.sum())
        for _ in range(_MOST_PROBLEMS):
            r, found = self.minimise()
            estimates = self.factor * (self.block.T @ r)
            misses = self.misses(estimates)
            feasible = float(np.max(np.abs(misses), initial=0.0)) <= self.tolerance
            norm = float(np.linalg.norm(self.unbalanced(estimates)))
            if (feasible and self.optimal(r, misses)) or failures == _MOST_FAILURES:
                break
            if not found:  # go on from here with a smaller τ, which is easier
                self.dual, before, growth, failures = self.u, np.inf, _TAU_FACTOR**0.5, failures + 1
                self.tau /= _TAU_FACTOR
                continue
            last = self.tau >= _LAST_TAU * strengths
            # after a smaller τ the misses fall little at first
            stalled = norm > before if failures else norm > _STALLED_SHARE * before
            if not feasible and stalled and (last or (self.tau >= strengths and not failures)):
                break
            if feasible or last or (norm < _FALLING_SHARE * before and np.isfinite(before)):
                self.dual = self.u
            before, self.tau = norm, min(self.tau * growth, _LAST_TAU * strengths)
        return self.result(r, misses, feasible)

    def optimal(self, r: Floats, misses: Floats) -> bool:
        """Whether feasible weights are the nearest ones: always for points; within intervals others may be nearer."""
        return not self.interval.any() or abs(self.result(r, misses, True).gap) <= _INTERVAL_GAP

    def misses(self, estimates: Floats) -> Floats:
        outside: Floats = estimates - np.clip(estimates, self.lower, self.upper)
        return outside

    def unbalanced(self, estimates: Floats) -> Floats:
        """How far estimates are from the ends that u stands for; from their intervals where u is zero."""
        far: Floats = np.where(self.u == 0, self.misses(estimates), estimates - self.ends(self.u))
        return far

    def result(self, r: Floats, misses: Floats, feasible: bool, t: Floats | None = None) -> Nearest:
        """The duality gap, computed from the weights and u alone; with t = Aᵀu/q, r is r(u)."""
        u, best = self.u, r
        if t is None:
            t = self.factor * (self.block @ u) / self.q
            best, _ = self.ratios(t)
            cost = float(self.q @ self.distances(r))
        else:  # φ(r) = t·r − φ*(t)
            cost = float(self.q @ (t * r)) - self.conjugate(t, r)
        if feasible:
            primal = cost
            dual = float(u @ self.ends(u)) - self.conjugate(t, best)
        else:
            estimates = self.factor * (self.block.T @ r)
            missed = estimates - np.clip(estimates - self.dual / self.tau, self.lower, self.upper)
            primal = cost - float(self.dual @ missed) + self.tau / 2 * float(missed @ missed)
            dual = -self.at(u).value
        gap = (primal - dual) / (1 + abs(primal))
        return Nearest(r * self.factor, self.u, misses, gap, feasible, self.tau, self.steps, self.products)
