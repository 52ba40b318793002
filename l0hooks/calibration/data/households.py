"""What the user says about households, checked: design weights, bounds, clusters, and which must be in or out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from l0hooks.calibration.data.names import Axis
from l0hooks.calibration.numerics.columns import Flags, Floats, Integers
from l0hooks.calibration.numerics.problem import BoundsOn
from l0hooks.errors import InvalidValueError, explain


@dataclass(frozen=True, eq=False)
class GivenHouseholds:
    """What a user gives about households.

    Attributes
    ----------
    design_weights : array_like, Series, mapping or data frame, >= 0, shape (N,), optional
    bounds : (lo, hi)
        Numbers, or one for each household, of its ratio to the design weight or of its weight.
    bounds_on : "ratio" or "weight"
    keep, leave_out : names, numbers or flags, optional
    clusters : array_like, Series or mapping of labels, optional
    """

    design_weights: object = None
    bounds: object = (0.0, math.inf)
    bounds_on: BoundsOn = "ratio"
    keep: object = None
    leave_out: object = None
    clusters: object = None


@dataclass(frozen=True, eq=False)
class Households:
    """Which households can be chosen, and with what weights.

    Attributes
    ----------
    design : float64, >= 0, shape (N,)
        Households with zero are left out.
    low, high : float64, shape (N,)
        Bounds of a chosen household's ratio or weight.
    keep, leave_out : int64
        Numbers, sorted.
    clusters : int64, shape (N,), or None
        Households of one number share one weight.
    """

    design: Floats
    low: Floats
    high: Floats
    keep: Integers
    leave_out: Integers
    clusters: Integers | None

    @property
    def units(self) -> int:
        """How many can be chosen: households or clusters that are not left out."""
        out = len(self.leave_out)
        if self.clusters is None:
            return len(self.design) - out
        return len(np.unique(self.clusters)) - len(np.unique(self.clusters[self.leave_out]))

    @property
    def kept(self) -> int:
        """How many units must be chosen."""
        return len(self.keep if self.clusters is None else np.unique(self.clusters[self.keep]))


def read_households(axis: Axis, given: GivenHouseholds) -> Households:
    """Everything about households, checked.

    Raises
    ------
    InvalidValueError
        If design weights are negative or not finite, bounds negative, reversed or empty, a household both in and out,
        or all out.

    Examples
    --------
    >>> read_households(Axis("household", 3), GivenHouseholds(bounds=(0.5, [2, 2, 4]), leave_out=[1])).high
    array([2., 2., 4.])
    """
    design = _design(given.design_weights, axis)
    low, high = _bounds(given.bounds, given.bounds_on, axis)
    none = np.zeros(0, np.int64)
    kept = none if given.keep is None else axis.places(given.keep, "keep")
    out = none if given.leave_out is None else axis.places(given.leave_out, "leave_out")
    zero = np.flatnonzero(design == 0)  # replicate weights have them: such households stay at zero
    if len(torn := np.intersect1d(kept, zero)):
        must = "a household with design weight zero stays at zero."
        raise InvalidValueError(explain("keep", must, got=f"to be kept: {axis.shown(torn)}"))
    both = np.intersect1d(kept, out)
    out = np.union1d(out, zero)
    if len(both):
        raise InvalidValueError(
            explain("keep and leave_out", "a household is either in or out.", got=f"both: {axis.shown(both)}")
        )
    if len(out) == axis.count:
        raise InvalidValueError(explain("leave_out", "some household must be left to choose.", got="all left out"))
    numbers = None if given.clusters is None else _clusters(given.clusters, axis)
    if numbers is not None:
        low, high = _in_common(low, high, numbers, axis)
        if len(mixed := np.intersect1d(numbers[zero], np.delete(numbers, zero))):
            places = zero[np.isin(numbers[zero], mixed)]
            must = "design weights within a cluster are all zero, or none is."
            raise InvalidValueError(explain("clusters", must, got=f"zero, unlike others: {axis.shown(places)}"))
        torn = np.flatnonzero(np.isin(numbers, numbers[kept]) & np.isin(numbers, numbers[out]))
        if len(kept) and len(out) and len(torn):
            raise InvalidValueError(
                explain("clusters", "a cluster is in or out as a whole.", got=f"one holds both: {axis.shown(torn)}")
            )
        if len(np.unique(numbers[out])) == len(np.unique(numbers)):
            raise InvalidValueError(explain("leave_out", "some cluster must be left to choose.", got="all left out"))
    return Households(design, low, high, kept, out, numbers)


def check_count(k: object, households: Households) -> int:
    """``k``, if that many units can be chosen.

    Raises
    ------
    InvalidValueError
        If it is not an integer between 1 and the number that can be chosen, or below the number that must be.
    """
    unit = "households" if households.clusters is None else "clusters"
    most = households.units
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise InvalidValueError(explain("k", "it must be an integer.", expected=f"1 to {most:,}", got=repr(k)))
    k = int(k)
    if not 1 <= k <= most:
        raise InvalidValueError(
            explain("k", f"it must lie between 1 and the number of {unit}.", expected=f"1 to {most:,}", got=f"{k:,}")
        )
    if k < households.kept:
        raise InvalidValueError(
            explain(
                "k",
                f"all {unit} that must be kept count too.",
                expected=f">= {households.kept:,}",
                got=f"{k:,}",
            )
        )
    return k


def _design(given: object, axis: Axis) -> Floats:
    if given is None:
        return np.ones(axis.count)
    design = axis.values(given, "design_weights")
    bad = np.flatnonzero(~np.isfinite(design) | (design < 0))
    if len(bad):
        must = "they must be finite and not negative."
        raise InvalidValueError(explain("design_weights", must, got=f"{design[bad[0]]:g} for {axis.shown(bad)}"))
    if not design.any():
        raise InvalidValueError(explain("design_weights", "some must be positive.", got="zero for all"))
    return design


def _bounds(given: object, bounds_on: object, axis: Axis) -> tuple[Floats, Floats]:
    if bounds_on not in ("ratio", "weight"):
        raise InvalidValueError(
            explain("bounds_on", "it must be known.", expected="'ratio' or 'weight'", got=repr(bounds_on))
        )
    if isinstance(given, np.ndarray) and given.shape == (2,):
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise InvalidValueError(explain("bounds", "they must be a pair.", expected="(lo, hi)", got=repr(given)))
    low, high = (_one_bound(one, name, axis) for one, name in zip(given, ("lo", "hi"), strict=True))
    _refuse(~(low >= 0) | np.isinf(low), low, axis, "the lower bound must be finite and not negative.")
    _refuse(~(high > 0), high, axis, "the upper bound must be positive.")
    crossed = np.flatnonzero(low > high)
    if len(crossed):
        first = crossed[0]
        raise InvalidValueError(
            explain("bounds", "lo must not be above hi.", got=f"({low[first]:g}, {high[first]:g})", hint="reverse them")
        )
    return low, high


def _one_bound(given: object, name: str, axis: Axis) -> Floats:
    if given is None:
        given = 0.0 if name == "lo" else math.inf
    if isinstance(given, Real) and not isinstance(given, bool):
        return np.broadcast_to(np.float64(given), axis.count)
    return axis.values(given, f"bounds ({name})", column=name)


def _refuse(bad: Flags, values: Floats, axis: Axis, must: str) -> None:
    places = np.flatnonzero(bad)
    if len(places):
        whose = "" if len(places) == axis.count else f" for {axis.shown(places)}"
        raise InvalidValueError(explain("bounds", must, got=f"{values[places[0]]:g}{whose}"))


def _clusters(given: object, axis: Axis) -> Integers:
    """Numbers of clusters; a household without a label (None, NaN) is a cluster of its own."""
    labels = axis.objects(given, "clusters", fill=math.nan, column="cluster").tolist()
    numbers: dict[Any, int] = {}
    found = np.empty(axis.count, np.int64)
    for place, label in enumerate(labels):
        alone = label is None or label != label
        found[place] = numbers.setdefault(("alone", place) if alone else ("cluster", label), len(numbers))
    return found


def _in_common(low: Floats, high: Floats, clusters: Integers, axis: Axis) -> tuple[Floats, Floats]:
    """The bounds that all households of a cluster can hold, at each of them."""
    count = int(clusters.max()) + 1
    most, least = np.zeros(count), np.full(count, np.inf)
    np.maximum.at(most, clusters, low)
    np.minimum.at(least, clusters, high)
    crossed = np.flatnonzero((most > least)[clusters])
    if len(crossed):
        got = f"none for the cluster of {axis.shown(crossed[:1])}"
        raise InvalidValueError(explain("bounds", "households of one cluster need bounds in common.", got=got))
    return most[clusters], least[clusters]
