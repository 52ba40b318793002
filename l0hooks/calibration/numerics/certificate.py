r"""Whether targets can be met within bounds: a point that meets them, a proof that none does, or neither.

The proof is Farkas's: with v = Bᵀu, all estimates B g within bounds have u·Bg ≤ Σᵢ max(vᵢ·lᵢ, vᵢ·hᵢ), and all y within
their intervals u·y ≥ Σⱼ (uⱼ·lowerⱼ or uⱼ·upperⱼ). Where the first number is below the second for some u, no estimate is
within all intervals. The sums are computed anew, with an allowance for rounding: where u came from does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from l0hooks.calibration.numerics.columns import Floats, Sparse, pieces, row_norms

_ROUNDING_SHARE = 1e-12  # of the sum of all sizes, for rounding
PROGRAMME_ENTRIES = 60_000  # of the matrix, up to which a linear programme is solved
_PROGRAMME_SECONDS = 20.0  # that it may take


@dataclass(frozen=True)
class Answer:
    """What is known about whether targets can be met.

    Attributes
    ----------
    g : float64, shape (n,), or None
        A point within bounds that meets all targets.
    conflict : float64, shape (Q,), or None
        u that proves that there is none; zero for targets that the proof does not need.
    """

    g: Floats | None
    conflict: Floats | None

    @property
    def impossible(self) -> bool:
        """Whether it is proved that no weights meet all targets."""
        return self.conflict is not None


def proves_impossible(
    block: Sparse, u: Floats, lower: Floats, upper: Floats, low: Floats, high: Floats, tolerance: float | Floats = 0.0
) -> bool:
    """Whether ``u`` separates all estimates from all intervals.

    Parameters
    ----------
    block : sparse.csr_array, float64, shape (n, Q)
        Bᵀ.
    u : float64, shape (Q,)
    lower, upper : float64, shape (Q,)
        Intervals of the estimates; one end may be infinite.
    low, high : float64, shape (n,)
        Bounds of g; ``high`` may be infinite.
    tolerance : float or float64 of shape (Q,), >= 0
        An estimate that is outside its interval by no more still counts as within; by infinity, any.

    Returns
    -------
    bool
        False proves nothing.

    Examples
    --------
    >>> block, low, high = sparse.csr_array([[1.0], [2.0]]), np.zeros(2), np.ones(2)
    >>> [proves_impossible(block, np.ones(1), np.full(1, y), np.full(1, y), low, high) for y in (2.9, 3.1)]
    [False, True]

    References
    ----------
    Farkas (1902), Theorie der einfachen Ungleichungen.
    """
    tolerance = np.broadcast_to(np.asarray(tolerance, np.float64), len(u))
    u = np.where(np.isinf(tolerance), 0.0, u)
    # an infinite end bounds nothing: its multiplier is set to zero
    u = np.where((u > 0) & np.isneginf(lower), 0.0, np.where((u < 0) & np.isposinf(upper), 0.0, u))
    u = _lowered(block, u, upper, high)
    ends = np.where(u > 0, lower, np.where(u < 0, upper, 0.0))
    if not u.any() or not np.isfinite(u).all():
        return False
    slack = np.where(np.isinf(tolerance), 0.0, tolerance)
    pull = np.asarray(block @ u, np.float64)
    limit = np.where(pull > 0, high, low)
    if (np.isinf(limit) & (pull != 0)).any():
        return False
    most = np.where(pull == 0, 0.0, pull * np.where(pull == 0, 0.0, limit))
    # ‖Bᵢ‖·‖u‖ is no less than Σⱼ |Bᵢⱼ uⱼ|
    sizes = np.where(np.isinf(limit), 0.0, row_norms(block) * float(np.linalg.norm(u)) * np.abs(limit))
    rounding = _ROUNDING_SHARE * (float(sizes.sum()) + float(np.abs(ends * u).sum()))
    return float(most.sum()) + rounding < float(ends @ u) - float(slack @ np.abs(u))


def _lowered(block: Sparse, u: Floats, upper: Floats, high: Floats) -> Floats:
    """u, lowered a little where rounding has left a positive v on units without an upper bound."""
    free = np.isinf(high)
    if not free.any() or not np.isfinite(u).all():
        return u
    # rows without negative entries, that may have a negative multiplier
    least = np.zeros(len(u))
    for part, _ in pieces(block):
        np.minimum.at(least, block.indices[part], block.data[part])
    useful = (np.isfinite(upper) & (least >= 0)).astype(np.float64)
    weight = np.asarray(block @ useful, np.float64)
    rounding = 1e-2 * _ROUNDING_SHARE * row_norms(block) * float(np.linalg.norm(u))
    for _ in range(3):
        pull = np.asarray(block @ u, np.float64)
        up = free & (pull > 0)
        if not up.any() or not (weight[up] > 0).all():
            break
        u = u - float(((2 * pull[up] + rounding[up]) / weight[up]).max()) * useful
    return u


def can_be_met(
    block: Sparse,
    lower: Floats,
    upper: Floats,
    low: Floats,
    high: Floats,
    misses: Floats,
    tolerance: float | Floats,
    *,
    most_entries: int = PROGRAMME_ENTRIES,
) -> Answer:
    """Whether targets can be met: by a linear programme, if small; else the misses of a fit may prove that they cannot.

    Parameters
    ----------
    block, lower, upper, low, high, tolerance
        As for :func:`proves_impossible`.
    misses : float64, shape (Q,)
        Of a fit that does not meet all targets.
    most_entries : int, >= 0
        Entries of ``block`` up to which a linear programme is solved.

    Examples
    --------
    >>> block, low, high, end = sparse.csr_array(np.eye(2)), np.zeros(2), np.ones(2), np.array([1.0, 2.0])
    >>> can_be_met(block, end, end, low, high, np.array([0.0, -1.0]), 1e-9).impossible
    True
    >>> can_be_met(block, end / 2, end / 2, low, high, np.array([0.3, 0.2]), 1e-9).g.round(6)
    array([0.5, 1. ])
    """
    ends = (lower, upper, low, high, tolerance)
    if block.nnz <= most_entries:
        answer = _by_programme(block, *ends)  # its multipliers name fewer targets than the misses of a fit
        if answer.g is not None or answer.impossible:
            return answer
    if proves_impossible(block, -misses, *ends):
        return Answer(None, _smallest(block, -misses, misses, *ends))
    return Answer(None, None)


def _smallest(
    block: Sparse,
    u: Floats,
    misses: Floats,
    lower: Floats,
    upper: Floats,
    low: Floats,
    high: Floats,
    tolerance: float | Floats,
) -> Floats:
    """The proof with as many multipliers as it needs: of the 1, 2, 4 and so on targets that are missed most, or all."""
    order, count = np.argsort(-np.abs(u * misses), kind="stable"), 1
    while count < np.count_nonzero(u):
        part = np.zeros_like(u)
        part[order[:count]] = u[order[:count]]
        if proves_impossible(block, part, lower, upper, low, high, tolerance):
            return part
        count *= 2
    return u


def _by_programme(
    block: Sparse, lower: Floats, upper: Floats, low: Floats, high: Floats, tolerance: float | Floats
) -> Answer:
    """Minimise the sum of misses; the multipliers of that programme are the u to check."""
    from scipy.optimize import linprog  # its import takes longer than a small fit

    solve: Any = linprog  # its stubs do not know sparse matrices
    over, under = np.flatnonzero(np.isfinite(upper)), np.flatnonzero(np.isfinite(lower))
    estimates, (n, rows) = block.T.tocsr(), block.shape
    slack = sparse.eye_array(rows, format="csr")
    sides = [sparse.hstack([estimates[over], -slack[over]]), sparse.hstack([-estimates[under], -slack[under]])]
    solved = solve(
        np.concatenate([np.zeros(n), np.where(np.isinf(tolerance), 0.0, np.ones(rows))]),
        A_ub=sparse.csr_array(sparse.vstack(sides)),
        b_ub=np.concatenate([upper[over], -lower[under]]),
        bounds=np.column_stack([np.concatenate([low, np.zeros(rows)]), np.concatenate([high, np.full(rows, np.inf)])]),
        method="highs",
        options={"time_limit": _PROGRAMME_SECONDS},
    )
    if solved.x is None:
        return Answer(None, None)
    g = np.clip(solved.x[:n], low, high)
    reached = np.asarray(block.T @ g, np.float64)
    missed = reached - np.clip(reached, lower, upper)
    if bool((np.abs(missed) <= tolerance).all()):
        return Answer(g, None)
    u = np.zeros(rows)
    np.add.at(u, over, solved.ineqlin.marginals[: len(over)])
    np.subtract.at(u, under, solved.ineqlin.marginals[len(over) :])
    ends = (lower, upper, low, high, tolerance)
    return Answer(None, _smallest(block, u, missed, *ends) if proves_impossible(block, u, *ends) else None)
