"""What the user says about targets, checked: values or intervals, groups and importance."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l0hooks.calibration.data.frames import Named, array_of, few, is_frame, opened, read_values, split_names
from l0hooks.calibration.data.names import Axis
from l0hooks.calibration.numerics.columns import Flags, Floats
from l0hooks.errors import InvalidValueError, explain, near_names

_TARGET_COLUMNS = ("target", "value", "lower", "upper", "group", "importance")


class CalibrationWarning(UserWarning):
    """A fit is possible, but the user should know something about its data or its result.

    Examples
    --------
    >>> import warnings
    >>> import numpy as np
    >>> from l0hooks.calibration import CalibrationWarning, Calibrator
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", CalibrationWarning)
    ...     try:
    ...         Calibrator(1, progress=False).fit(np.eye(2), [1.0, -1.0])
    ...     except CalibrationWarning:
    ...         print("no household has a negative value: the second target is out of reach")
    no household has a negative value: the second target is out of reach
    """


@dataclass(frozen=True)
class GivenTargets:
    """What a user gives about targets.

    Attributes
    ----------
    y, lower, upper : array_like, Series, mapping or DataFrame, optional
        Points, or ends of intervals; aligned by name where they have names.
    groups, importance : array_like, Series or mapping, shape (T,), optional
    group_multipliers : mapping from group to float >= 0, optional
    normalize_groups : bool
        Whether each group counts as much as any other, whatever its size.
    hierarchy : mapping, optional
        Parent → children, or child → parent, by the names of targets.
    """

    y: object = None
    lower: object = None
    upper: object = None
    groups: object = None
    importance: object = None
    group_multipliers: Mapping[Any, float] | None = None
    normalize_groups: bool = True
    hierarchy: Mapping[Any, Any] | None = None

    @property
    def first(self) -> object:
        """The first of ``y``, ``lower`` and ``upper`` that is given: it has the names of the targets."""
        return next((one for one in (self.y, self.lower, self.upper) if one is not None), None)


def take_apart(given: GivenTargets) -> GivenTargets:
    """``given``, the columns of a frame ``y`` put where they belong.

    Parameters
    ----------
    given : GivenTargets
        If ``y`` is a frame with one column, that holds the targets. A frame with more has some of the columns target,
        value, lower, upper, group and importance; others are not read. Where ``value`` is empty, lower and upper count.

    Raises
    ------
    InvalidValueError
        If something is given twice, or nothing.
    """
    if is_frame(frame := opened(given.y)):
        given = _from_frame(frame, given)
    if given.first is None:
        raise InvalidValueError(explain("y", "targets must be given.", hint="y=, or lower= and upper="))
    ends = {"y": "value", "lower": "lower", "upper": "upper"}
    read = {
        name: read_values(vars(given)[name], "target", column, name)
        for name, column in ends.items()
        if vars(given)[name] is not None
    }
    return replace(given, **read)


def _from_frame(frame: Any, given: GivenTargets) -> GivenTargets:
    names, present = split_names(frame, "target", _TARGET_COLUMNS, "y")
    known = [name for name in _TARGET_COLUMNS if name in present]
    if not {"value", "lower", "upper"} & set(known):
        if len(present) != 1:
            raise InvalidValueError(explain("y", "a frame of targets needs a column 'value'.", got=few(present)))
        return replace(given, y=_column(frame, names, present[0]))
    said = {"lower": given.lower, "upper": given.upper, "group": given.groups, "importance": given.importance}
    for name, other in said.items():
        if other is not None and (name in known or name in ("lower", "upper")):
            got = f"columns {few(known)} of y, and an argument for {name}"
            raise InvalidValueError(explain("y", "everything must be given once.", got=got))
    columns = {name: _column(frame, names, name) for name in known}
    points = columns.get("value")
    if points is not None and ("lower" in known or "upper" in known):
        for name, infinite in (("lower", -math.inf), ("upper", math.inf)):
            columns[name] = _or_ends(points, columns.get(name), infinite)
        points = None
    group, importance = columns.get("group", given.groups), columns.get("importance", given.importance)
    lower, upper = columns.get("lower"), columns.get("upper")
    return replace(given, y=points, lower=lower, upper=upper, groups=group, importance=importance)


def _column(frame: Any, names: list[Hashable] | None, name: Hashable) -> Any:
    values = array_of(frame[name], "y")
    return values if names is None else Named(names, values)


def _or_ends(points: Any, ends: Any, infinite: float) -> Any:
    """The points, and where they are empty the ends of intervals."""
    given, others = (one.values if isinstance(one, Named) else one for one in (points, ends))
    values = _numbers(given)
    filled = np.where(np.isnan(values), infinite if others is None else _numbers(others), values)
    return Named(points.names, filled) if isinstance(points, Named) else filled


def _numbers(values: NDArray[Any]) -> Floats:
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(explain("y", "values must be real numbers.", got=str(error))) from error


def read_ends(given: GivenTargets, axis: Axis) -> tuple[Floats, Floats]:
    """Lower and upper end of every target, equal for points.

    Raises
    ------
    InvalidValueError
        If a value is NaN, a point infinite, an interval reversed or without any end.
    """
    if given.y is not None and (given.lower is not None or given.upper is not None):
        raise InvalidValueError(
            explain(
                "y", "targets are points or intervals.", got="y= with lower= or upper=", hint="equal ends for points"
            )
        )
    if given.y is not None:
        points = axis.values(given.y, "y")
        _refuse(~np.isfinite(points), points, axis, "y", "targets must be finite.")
        return points, points
    lower = np.full(axis.count, -np.inf) if given.lower is None else axis.values(given.lower, "lower", column="lower")
    upper = np.full(axis.count, np.inf) if given.upper is None else axis.values(given.upper, "upper", column="upper")
    _refuse(np.isnan(lower) | (lower == np.inf), lower, axis, "lower", "it must be a number or -inf.")
    _refuse(np.isnan(upper) | (upper == -np.inf), upper, axis, "upper", "it must be a number or inf.")
    _refuse(lower > upper, lower, axis, "lower", "it must not be above upper.")
    neither = np.isinf(lower) & np.isinf(upper)
    _refuse(neither, lower, axis, "lower and upper", "a target needs at least one finite end.")
    return lower, upper


def read_groups(given: object, axis: Axis) -> tuple[Hashable, ...] | None:
    """The group of every target."""
    if given is None:
        return None
    labels = axis.objects(given, "groups", column="group")
    found = tuple(label.item() if isinstance(label, np.generic) else label for label in labels.tolist())
    missing = [place for place, label in enumerate(found) if label is None or label != label]
    if missing:
        raise InvalidValueError(explain("groups", "every target needs a group.", got=f"none for {axis.shown(missing)}"))
    return found


def read_importance(given: GivenTargets, groups: tuple[Hashable, ...] | None, axis: Axis) -> Floats:
    """What the squared error of each target counts: its importance, averaged over its group, times the multiplier.

    Raises
    ------
    InvalidValueError
        If something is negative or not finite, nothing counts, a group is unknown, or multipliers have no groups.
    """
    importance, multipliers = given.importance, given.group_multipliers
    counts = (
        np.ones(axis.count)
        if importance is None
        else axis.values(importance, "importance", fill=1.0, column="importance")
    )
    _refuse(~np.isfinite(counts) | (counts < 0), counts, axis, "importance", "it must be finite and not negative.")
    if groups is None:
        if multipliers:
            raise InvalidValueError(explain("group_multipliers", "targets must have groups.", hint="groups=..."))
    else:
        labels, number = _numbered(groups)
        if given.normalize_groups:
            counts = counts / np.bincount(number)[number]
        counts = counts * _multipliers(multipliers or {}, labels)[number]
    if not counts.any():
        raise InvalidValueError(explain("importance", "some target must count.", got="zero for all"))
    return counts


def _numbered(groups: tuple[Hashable, ...]) -> tuple[list[Hashable], NDArray[np.int64]]:
    labels = list(dict.fromkeys(groups))
    place = {label: number for number, label in enumerate(labels)}
    return labels, np.array([place[label] for label in groups])


def _multipliers(given: Mapping[Any, float], labels: list[Hashable]) -> Floats:
    unknown = [label for label in given if label not in labels]
    if unknown:
        raise InvalidValueError(
            explain(
                "group_multipliers",
                "keys must be groups of targets.",
                got=few(unknown),
                hint=near_names(str(unknown[0]), [str(label) for label in labels]),
            )
        )
    for label, factor in given.items():
        if not isinstance(factor, Real) or not 0 <= factor < math.inf:
            raise InvalidValueError(
                explain(
                    "group_multipliers", "a multiplier must be finite and not negative.", got=f"{label!r}: {factor!r}"
                )
            )
    return np.array([float(given.get(label, 1.0)) for label in labels])


def _refuse(bad: Flags, values: Floats, axis: Axis, where: str, must: str) -> None:
    places = np.flatnonzero(bad)
    if len(places):
        shown = [axis.labels[int(place)] for place in places]
        got = f"{values[places[0]]:g} for {few(shown)}"
        raise InvalidValueError(explain(where, must, got=got))
