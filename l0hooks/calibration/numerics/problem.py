"""The prepared problem that every stage works on, in units that all stages share.

Unit i (a household, or a cluster that shares one weight) gets the weight wᵢ = gᵢ·dᵢ, dᵢ its scaled design weight. With
s the row scale (1/(\\|y\\| + offset) for the relative loss, times the square root of the target's importance, over the
damping)

    B = diag(s)·M·diag(d),  l = s·lower,  u = s·upper,  loss(g) = ½ Σ dist(B g, [l, u])²

B is stored once, unit by unit: Bg then scatters into Q numbers that stay in the cache, Bᵀr gathers from them, and the
rows of a few units are one slice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import sparse

from l0hooks.calibration.numerics.columns import Flags, Floats, Integers, Sparse, rows_of
from l0hooks.calibration.numerics.given import GivenMatrix

Loss = Literal["relative", "squared"]
BoundsOn = Literal["ratio", "weight"]
ClusterDistance = Literal["once", "members"]
Precision = Literal["float32", "float64"]


@dataclass(frozen=True)
class Problem:
    """Targets and units, scaled; :func:`~l0hooks.calibration.numerics.preparation.prepare` makes it.

    Attributes
    ----------
    columns : sparse.csr_array, float32 or float64, shape (n, Q)
        Row i is B's column i.
    lower, upper : float64, shape (Q,)
        Scaled targets; equal for points.
    scale : float64, shape (Q,)
        s.
    denominators : float64, shape (T,)
        \\|y\\| + offset of the T <= Q targets that were given; the other rows are consistency conditions.
    damping : float64, >= 1, shape (Q,)
        What s is smaller by for targets far below their design-weighted estimates.
    counted : bool, shape (T,)
        Targets that are to be met; the others are there for the sums of their hierarchy.
    low, high : float64, shape (n,)
        Bounds of g for a unit that is chosen.
    design : float64, shape (n,)
        d, so that w = g·d.
    factor : float, > 0
        d over the design weights that were given.
    norms : float64, shape (n,)
        ‖Bᵢ‖.
    kept : bool, shape (n,)
        Units that must be chosen.
    members : int64, shape (n_households,)
        Unit of each household, −1 for one left out.
    given : GivenMatrix
        Where the last fit reads its rows from: those of ``columns`` may be rounded.
    counts : float64, shape (n,), optional
        How often each unit counts in the distance to the design weights; once if not given.
    """

    columns: Sparse
    lower: Floats
    upper: Floats
    scale: Floats
    denominators: Floats
    damping: Floats
    counted: Flags
    low: Floats
    high: Floats
    design: Floats
    factor: float
    norms: Floats
    kept: Flags
    members: Integers
    given: GivenMatrix
    counts: Floats | None = None

    @property
    def size(self) -> int:
        """The number of units, n."""
        return len(self.design)

    @property
    def rows(self) -> int:
        """The number of rows, Q."""
        return len(self.lower)

    def estimates(self, g: Floats, units: Integers | None = None) -> Floats:
        """B g in float64, of all units or of those given."""
        block = self.columns if units is None else self.columns[units]
        return np.asarray(block.T @ g.astype(block.dtype), np.float64)

    def exactly(self, units: Integers) -> Sparse:
        """The rows of some units in float64, without rounding."""
        if self.columns.dtype == np.float64:
            return self.columns if len(units) == self.size else rows_of(self.columns, units)
        return self.given.block(units)

    def allowed(self, tolerance: float) -> Floats:
        """The scaled miss up to which each row counts as met; of a target, a relative error of ``tolerance``."""
        count = len(self.denominators)
        shares = np.where(self.counted, self.scale[:count] * self.denominators, np.inf)
        return tolerance * np.concatenate([shares, np.ones(self.rows - count)])

    def misses(self, estimates: Floats) -> Floats:
        """How far scaled estimates lie outside their targets, with sign."""
        missed: Floats = estimates - np.clip(estimates, self.lower, self.upper)
        return missed

    def gradient(self, misses: Floats) -> Floats:
        """Bᵀ r for all units."""
        return np.asarray(self.columns @ misses.astype(self.columns.dtype), np.float64)

    def promise(self, misses: Floats) -> Floats:
        """−Bᵢᵀr/‖Bᵢ‖: how fast each unit's column, by itself, lowers the loss; zero for an empty one."""
        promised = self.gradient(misses)
        np.divide(promised, self.norms, out=promised, where=self.norms > 0)
        return np.negative(promised, out=promised)

    def strength(self, units: Integers) -> Floats:
        """The factor of each unit's distance to its design weight; its mean over all units is 1."""
        weighted: Floats = self.design if self.counts is None else self.design * self.counts
        strength: Floats = weighted[units] / weighted.mean()
        return strength

    def error(self, misses: Floats) -> float:
        """Mean \\|relative error\\| over the targets, for scaled misses."""
        count = len(self.denominators)
        return float(np.mean(np.abs(misses[:count]) / self.scale[:count] / self.denominators))

    def only(self, units: Integers) -> Problem:
        """The same problem with the columns of ``units`` alone, all others empty; for most of them, itself."""
        if len(units) > self.size // 2:
            return self
        part, ends = self.columns[units], np.zeros(self.size + 1, self.columns.indptr.dtype)
        ends[units + 1] = np.diff(part.indptr)
        columns = sparse.csr_array((part.data, part.indices, np.cumsum(ends, out=ends)), shape=self.columns.shape)
        return replace(self, columns=columns)

    def weights(self, g: Floats, units: Integers) -> Floats:
        """One weight for each household: float64, shape (n_households,), zero for all that are not in ``units``."""
        of_unit = np.zeros(self.size + 1)  # the last entry is for households left out, whose unit is −1
        of_unit[units] = g * self.design[units]
        spread: Floats = of_unit[self.members]
        return spread


def larger_ends(lower: Floats, upper: Floats) -> Floats:
    """\\|y\\| of each target: that of the larger finite end of an interval."""
    ends = np.abs(np.stack([lower, upper]))
    largest: Floats = np.where(np.isfinite(ends), ends, 0.0).max(axis=0)
    return largest


def median_factor(estimates: Floats, lower: Floats, upper: Floats) -> float | None:
    """The factor with which estimates meet the targets in the median; None if no target has its estimate's sign."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (lower + upper) / 2 / estimates  # of an infinite end infinite or NaN
    usable = np.isfinite(ratios) & (ratios > 0)
    return float(np.median(ratios[usable])) if usable.any() else None
