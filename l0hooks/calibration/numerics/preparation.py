"""``prepare``: the problem that all stages work on, from a matrix, targets and options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from l0hooks.calibration.numerics.columns import (
    Flags,
    Floats,
    Integers,
    Sparse,
    row_norms,
    scale_rows,
    shared,
    stored_by_unit,
)
from l0hooks.calibration.numerics.given import GivenMatrix
from l0hooks.calibration.numerics.problem import BoundsOn, Loss, Precision, Problem, larger_ends, median_factor
from l0hooks.errors import InvalidValueError, explain

_DESIGN_SHARE = 0.5  # of a design-weighted estimate that an error is divided by, if the target is smaller
_UNCOUNTED = 1e-9  # of the largest importance: a target of no more is there for the sums of others


@dataclass(frozen=True, eq=False)
class ErrorOptions:
    r"""How errors are scaled, and what they count.

    Attributes
    ----------
    loss : "relative" or "squared"
        Relative: errors are divided by \|y\| + ``offset``, for an interval with the larger finite end; where targets
        cannot all be met, by no less than half of what the design weights give, up to one factor for all. Squared:
        they are divided by one number, the mean of \|y\| + ``offset``, which only makes figures comparable.
    offset : float, > 0
        In the units of the targets.
    importance : array_like, >= 0, shape (T,), optional
        What the squared error of each target counts.
    hierarchy : sequence of (parent, children)
        Row numbers; the estimates of the children are to add up to the parent's.
    consistency : float, >= 0
        What the squared error of such a condition counts, against 1 for a target.
    """

    loss: Loss = "relative"
    offset: float = 1.0
    importance: ArrayLike | None = None
    hierarchy: Sequence[tuple[int, Sequence[int]]] = ()
    consistency: float = 1.0


@dataclass(frozen=True, eq=False)
class UnitOptions:
    """Which units can be chosen, and with what weights.

    Attributes
    ----------
    design_weights : array_like, > 0, shape (n_households,), optional
        One for all if not given. A cluster has the mean of its households'.
    bounds : (float, float), 0 <= lo <= hi
        For households that are chosen.
    bounds_on : "ratio" or "weight"
        Whether they hold for weight / design weight, or for the weight.
    keep, leave_out : array_like of int
        Households that must, and must not, be chosen. A cluster that holds one of them follows.
    clusters : array_like of int, shape (n_households,), optional
        Households with one number share one weight, and count as one unit.
    """

    design_weights: ArrayLike | None = None
    bounds: tuple[float, float] = (0.0, np.inf)
    bounds_on: BoundsOn = "ratio"
    keep: ArrayLike = ()
    leave_out: ArrayLike = ()
    clusters: ArrayLike | None = None


def prepare(
    matrix: Sparse,
    lower: ArrayLike,
    upper: ArrayLike | None = None,
    *,
    errors: ErrorOptions | None = None,
    units: UnitOptions | None = None,
    dtype: Precision = "float32",
) -> Problem:
    r"""Scale a problem: \(B = \operatorname{diag}(s)\,M\operatorname{diag}(d)\), stored unit by unit.

    The arguments are taken as valid.

    Parameters
    ----------
    matrix : scipy.sparse array or matrix, any format and dtype, shape (T, n_households)
        What one household adds to each target.
    lower, upper : array_like, shape (T,)
        The targets; without ``upper`` points, else intervals, of which one end may be infinite.
    errors : ErrorOptions, optional
    units : UnitOptions, optional
    dtype : "float32" or "float64"
        Of B's values; sums over units for a result are always taken in float64.

    Returns
    -------
    Problem

    Examples
    --------
    >>> problem = prepare(sparse.csr_array([[1.0, 1.0], [0.0, 2.0]]), [9.0, 4.0], dtype="float64")
    >>> problem.columns.toarray().round(3)
    array([[0.325, 0.   ],
           [0.325, 1.3  ]])
    >>> problem.weights(np.ones(2), np.arange(2)).round(3)
    array([3.25, 3.25])

    References
    ----------
    Deville & Särndal (1992), Calibration estimators in survey sampling, section 1.
    """
    errors, units = errors or ErrorOptions(), units or UnitOptions()
    low_target = np.asarray(lower, np.float64)
    high_target = low_target if upper is None else np.asarray(upper, np.float64)
    rows = sparse.csr_array(matrix)
    denominators = larger_ends(low_target, high_target) + errors.offset
    damping = np.maximum(1.0, _design_sizes(rows, units, low_target, high_target) / denominators)
    if errors.loss == "squared":
        damping = np.ones(len(denominators))
    scale = _row_scale(denominators, errors) / damping
    if errors.hierarchy:
        rows, low_target, high_target, scale = _with_conditions(
            rows, low_target, high_target, scale, denominators, errors
        )
    households = rows.shape[1]
    members = _members(households, units.clusters, np.asarray(units.leave_out, np.int64))
    given = units.design_weights
    weights = np.ones(households) if given is None else np.asarray(given, np.float64)
    base = _design_of_units(weights, members)
    columns = stored_by_unit(rows, scale, members, len(base), np.dtype(dtype))
    factor = _common_factor(columns, base, scale * low_target, scale * high_target)
    design = base * factor
    scale_rows(columns, design)
    per_g = np.broadcast_to(factor, len(base)) if units.bounds_on == "ratio" else design
    with np.errstate(over="ignore"):
        return Problem(
            columns=columns,
            lower=scale * low_target,
            upper=scale * high_target,
            scale=scale,
            denominators=denominators,
            damping=np.concatenate([damping, np.ones(len(scale) - len(damping))]),
            counted=_counted(errors.importance, len(denominators)),
            low=shared(units.bounds[0] / per_g),
            high=shared(units.bounds[1] / per_g),
            design=design,
            factor=factor,
            norms=row_norms(columns),
            kept=_kept(members, units.keep, len(base)),
            members=members,
            given=GivenMatrix(rows, scale, members, design),
        )


def _row_scale(denominators: Floats, errors: ErrorOptions) -> Floats:
    scale = 1 / denominators if errors.loss == "relative" else np.full(len(denominators), 1 / denominators.mean())
    if errors.importance is None:
        return scale
    given = np.asarray(errors.importance, np.float64)
    weighted: Floats = scale * np.sqrt(given / given.mean())
    return weighted


def _design_sizes(rows: Sparse, units: UnitOptions, lower: Floats, upper: Floats) -> Floats:
    """A share of what the design weights give for each target: one far from it must not count above all others."""
    design = np.ones(rows.shape[1]) if units.design_weights is None else np.array(units.design_weights, np.float64)
    design[np.asarray(units.leave_out, np.int64)] = 0.0
    estimates = np.asarray(rows.astype(np.float64, copy=False) @ design, np.float64)
    factor = median_factor(estimates, lower, upper)
    sizes: Floats = _DESIGN_SHARE * np.abs(estimates) * (1.0 if factor is None else factor)
    return sizes


def _counted(importance: ArrayLike | None, count: int) -> Flags:
    if importance is None:
        return np.ones(count, np.bool_)
    given = np.asarray(importance, np.float64)
    counts: Flags = given > _UNCOUNTED * given.max()
    return counts


def _kept(members: Integers, keep: ArrayLike, units: int) -> Flags:
    """Units with a household that must be chosen."""
    kept = np.zeros(units + 1, np.bool_)  # the last entry stands for households left out, whose unit is −1
    kept[members[np.asarray(keep, np.int64)]] = True
    return kept[:-1]


def _with_conditions(
    rows: Sparse,
    lower: Floats,
    upper: Floats,
    scale: Floats,
    denominators: Floats,
    errors: ErrorOptions,
) -> tuple[Sparse, Floats, Floats, Floats]:
    """A row for each parent, its own less its children's, with the target 0."""
    hierarchy, count = errors.hierarchy, len(errors.hierarchy)
    difference = sparse.lil_array((count, rows.shape[0]))
    for number, (parent, children) in enumerate(hierarchy):
        difference[number, parent] = 1.0
        for child in children:
            difference[number, child] = -1.0
    parents = [parent for parent, _ in hierarchy]
    zeros = np.zeros(count)
    return (
        sparse.vstack([rows, sparse.csr_array(difference) @ rows], format="csr"),
        np.concatenate([lower, zeros]),
        np.concatenate([upper, zeros]),
        np.concatenate([scale, np.sqrt(errors.consistency) / denominators[parents]]),
    )


def _members(households: int, clusters: ArrayLike | None, leave_out: Integers) -> Integers:
    """The unit of each household, numbered in the order of their first households; −1 for those left out."""
    if clusters is None and not len(leave_out):
        return np.arange(households)
    labels = np.arange(households) if clusters is None else np.asarray(clusters)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    out = np.zeros(len(first), np.bool_)
    out[inverse[leave_out]] = True
    order = np.argsort(first, kind="stable")
    order = order[~out[order]]
    if not len(order):
        raise InvalidValueError(explain("calibration", "some households must be left to choose from.", got="none"))
    number = np.full(len(first), -1, np.int64)
    number[order] = np.arange(len(order))
    units: Integers = number[inverse]
    return units


def _design_of_units(weights: Floats, members: Integers) -> Floats:
    inside = members >= 0
    if inside.all() and members[-1] == len(members) - 1:  # every household is a unit of its own
        return weights
    count = np.bincount(members[inside])
    mean: Floats = np.bincount(members[inside], weights[inside]) / count
    return mean


def _common_factor(columns: Sparse, design: Floats, lower: Floats, upper: Floats) -> float:
    """The factor with which all design weights meet the targets in the median."""
    estimates = np.asarray(columns.T @ design.astype(columns.dtype), np.float64)
    factor = median_factor(estimates, lower, upper)
    return 1.0 if factor is None else factor
