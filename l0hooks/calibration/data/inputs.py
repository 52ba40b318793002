"""Everything that a user passes to a calibration, checked before any work and put into one frozen record."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from l0hooks.calibration.data.frames import Named, few, read_values
from l0hooks.calibration.data.hierarchy import Conditions, read_hierarchy
from l0hooks.calibration.data.households import GivenHouseholds, Households, check_count, read_households
from l0hooks.calibration.data.matrix import read_matrix
from l0hooks.calibration.data.names import Axis
from l0hooks.calibration.data.reach import reachable_range, weight_limits, within
from l0hooks.calibration.data.targets import (
    CalibrationWarning,
    GivenTargets,
    read_ends,
    read_groups,
    read_importance,
    take_apart,
)
from l0hooks.calibration.numerics.columns import Flags, Floats, Sparse, pieces
from l0hooks.calibration.numerics.problem import BoundsOn, Precision
from l0hooks.errors import InvalidValueError, explain

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Valid data; :func:`read_inputs` makes it.

    Attributes
    ----------
    matrix : sparse.csr_array, shape (T, N)
        M as given, without duplicates.
    targets, households : Axis
        Their names.
    lower, upper : float64, shape (T,)
        Equal for points.
    groups : tuple, length T, or None
    importance : float64, shape (T,)
        What each squared error counts, groups and multipliers included.
    hierarchy : tuple of (parent, children)
        Numbers of targets.
    people : Households
        Design weights, bounds, clusters, and which must be in or out.
    bounds_on : "ratio" or "weight"
    reachable : bool, shape (T,)
        False for targets that no allowed weights can meet.
    dtype : "float32" or "float64"
        In which the fit holds the matrix.
    """

    matrix: Sparse
    targets: Axis
    households: Axis
    lower: Floats
    upper: Floats
    groups: tuple[Hashable, ...] | None
    importance: Floats
    hierarchy: Conditions
    people: Households
    bounds_on: BoundsOn
    reachable: Flags
    dtype: Precision

    def fingerprint(self) -> str:
        """A hash of all of it, values included: data that differ in one number have another."""
        digest = hashlib.blake2b(digest_size=20)
        people = self.people
        clusters = np.zeros(0) if people.clusters is None else people.clusters
        arrays = [self.matrix.data, self.matrix.indices.astype(np.int64), self.matrix.indptr.astype(np.int64)]
        arrays += [self.lower, self.upper, self.importance, people.design, people.low, people.high]
        for array in [*arrays, people.keep, people.leave_out, clusters]:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        words = (self.matrix.shape, self.hierarchy, self.bounds_on, self.dtype)
        digest.update(repr(words).encode())
        return digest.hexdigest()


def read_inputs(
    matrix: object,
    given_targets: GivenTargets,
    given_households: GivenHouseholds | None = None,
    *,
    k: int | None = None,
    selects: bool | None = None,
    dtype: Precision = "float32",
) -> Inputs:
    """Check matrix, targets and households, then whether they fit together.

    Parameters
    ----------
    matrix : scipy.sparse array or matrix, array_like, DataFrame or NamedMatrix; shape (T, N)
        What one household adds to each target.
    given_targets : GivenTargets
    given_households : GivenHouseholds, optional
        Design weights of one and no bounds if not given.
    k : int, optional
        How many households (clusters, where there are any) will be chosen.
    selects : bool, optional
        Whether households may stay without weight; if not given, whether ``k`` is.
    dtype : "float32" or "float64"

    Returns
    -------
    Inputs

    Raises
    ------
    InvalidValueError
        With a message that says what is wrong, where, and what to try.

    Warns
    -----
    CalibrationWarning
        For targets that cannot be met, and for parents that differ from their children.

    Examples
    --------
    >>> inputs = read_inputs([[1, 1, 0], [0, 20, 30]], GivenTargets({"people": 8, "income": 100}))
    >>> inputs.targets.names, inputs.reachable
    (('people', 'income'), array([ True,  True]))
    """
    _check_precision(dtype)
    given, about = take_apart(given_targets), given_households or GivenHouseholds()
    if about.design_weights is not None:
        weights = read_values(about.design_weights, "household", "weight", "design_weights")
        about = replace(about, design_weights=weights)
    values, targets, households = read_matrix(matrix)
    _refuse_transposed(given.first, about.design_weights, targets, households)
    targets, households = targets.adopt(given.first), households.adopt(about.design_weights)
    low, high = read_ends(given, targets)
    labels = read_groups(given.groups, targets)
    counts = read_importance(given, labels, targets)
    conditions = read_hierarchy(given.hierarchy, targets, low, high)
    people, bounds_on = read_households(households, about), about.bounds_on
    chosen = None if k is None else check_count(k, people)
    if dtype == "float32":
        _refuse_overflow(values, low, high, people, targets)
    least, largest = weight_limits(people, on_weight=bounds_on == "weight")
    if (chosen is not None) if selects is None else selects:
        least = _zero_unless_kept(least, people)
    reach = reachable_range(values, least, largest, chosen if people.clusters is None else None)
    _warn_unreachable(values, reachable := within(*reach, low, high), reach, (low, high), targets)
    return Inputs(
        values, targets, households, low, high, labels, counts, conditions, people, bounds_on, reachable, dtype
    )


def _check_precision(dtype: object) -> None:
    if dtype not in ("float32", "float64"):
        raise InvalidValueError(
            explain("dtype", "it must be known.", expected="'float32' or 'float64'", got=repr(dtype))
        )


def _zero_unless_kept(least: Floats, people: Households) -> Floats:
    """The least weights where a household that need not be kept may stay without weight."""
    lowered = np.zeros(len(least))
    lowered[people.keep] = least[people.keep]
    return lowered


def _length(given: Any) -> int | None:
    if isinstance(given, Named):
        return len(given.names)
    return given.shape[0] if given.ndim else None


def _refuse_transposed(y: Any, design_weights: Any, targets: Axis, households: Axis) -> None:
    """Refuse lengths, or names, that fit the other axis of the matrix only."""
    signs = []
    if isinstance(y, Named):
        names = y.names
        if names and households.names and not set(names) & set(targets.labels) and set(names) <= set(households.names):
            signs.append(f"y names {few(names)}, which are columns of M")
    size = _length(y)
    if size == households.count != targets.count:
        signs.append(f"{size:,} targets, and M has {households.count:,} columns but {targets.count:,} rows")
    size = None if design_weights is None else _length(design_weights)
    if size == targets.count != households.count:
        signs.append(f"{size:,} design weights, and M has {targets.count:,} rows but {households.count:,} columns")
    if signs:
        shape = f"({targets.count:,}, {households.count:,})"
        raise InvalidValueError(
            explain(
                "M",
                "it must have one row for each target and one column for each household: it looks transposed.",
                got=f"shape {shape}; " + "; ".join(signs),
                hint="M.T, on the command line --transpose",
            )
        )


def _refuse_overflow(matrix: Sparse, lower: Floats, upper: Floats, people: Households, targets: Axis) -> None:
    """Refuse values, or their products with design weights, beyond the largest float32, 3.4e38."""
    ends = [np.where(np.isfinite(one), np.abs(one), 0.0) for one in (lower, upper)]
    big = np.flatnonzero(np.maximum(*ends) > _LARGEST_FLOAT32)
    got = f"a target of {max(ends[0][big[0]], ends[1][big[0]]):.3g}, {targets.shown(big[:1])}" if len(big) else None
    if got is None and matrix.nnz:
        largest = max(abs(float(matrix.data.max())), abs(float(matrix.data.min())))
        with np.errstate(over="ignore"):
            # sums over a row are taken in float32 too
            product = largest * max(1.0, float(people.design.max())) * max(1, int(np.diff(matrix.indptr).max()))
        if product > _LARGEST_FLOAT32:
            got = f"values up to {largest:.3g}, which with design weights up to {people.design.max():.3g} overflow"
    if got is not None:
        raise InvalidValueError(
            explain("dtype", "float32 holds numbers up to 3.4e38.", got=got, hint="dtype='float64', or other units")
        )


def _warn_unreachable(
    matrix: Sparse, reachable: Flags, reach: tuple[Floats, Floats], ends: tuple[Floats, Floats], targets: Axis
) -> None:
    support = np.diff(matrix.indptr) - _stored_zeros(matrix)
    empty = np.flatnonzero(support == 0)
    if len(empty):
        message = explain(
            "M",
            "every target should have a household that adds to it.",
            got=f"{len(empty):,} with an empty row: {targets.shown(empty)}",
            hint="leave such targets out, or give them importance 0",
        )
        warnings.warn(message, CalibrationWarning, stacklevel=5)
    beyond = np.flatnonzero(~reachable & (support > 0))
    if len(beyond):
        first = int(beyond[0])
        asked = f"{ends[0][first]:,.6g}" + ("" if ends[0][first] == ends[1][first] else f" to {ends[1][first]:,.6g}")
        message = explain(
            "y",
            "targets should lie within what weights can reach by sign, bounds and k.",
            expected=f"{reach[0][first]:,.6g} to {reach[1][first]:,.6g} for {targets.labels[first]!r}",
            got=f"{asked}; out of reach: {targets.shown(beyond)}",
            hint="wider bounds, a larger k, or other targets",
        )
        warnings.warn(message, CalibrationWarning, stacklevel=5)


def _stored_zeros(matrix: Sparse) -> Any:
    """How many stored entries of each row are zero."""
    parts = (part for part, _ in pieces(matrix))
    zeros = np.concatenate([part.start + np.flatnonzero(matrix.data[part] == 0) for part in parts])
    rows = np.searchsorted(matrix.indptr, zeros, side="right") - 1
    return np.bincount(rows, minlength=matrix.shape[0])
