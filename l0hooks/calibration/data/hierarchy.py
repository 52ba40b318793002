"""Targets that are sums of other targets: read by name and checked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from l0hooks.calibration.data.frames import few
from l0hooks.calibration.data.names import Axis
from l0hooks.calibration.data.targets import CalibrationWarning
from l0hooks.calibration.numerics.columns import Floats
from l0hooks.errors import InvalidValueError, explain

Conditions = tuple[tuple[int, tuple[int, ...]], ...]
_ROUNDING_SHARE = 1e-9  # relative difference of a parent and its children that floating point explains


def read_hierarchy(given: Mapping[Any, Any] | None, axis: Axis, lower: Floats, upper: Floats) -> Conditions:
    """Which targets are to be the sums of which others, as numbers.

    Parameters
    ----------
    given : mapping, optional
        Parent → its children, or child → its parent.

    Raises
    ------
    InvalidValueError
        If a name is unknown, a child is named twice under one parent, or a target is an ancestor of itself.

    Warns
    -----
    CalibrationWarning
        If a parent's target is not the sum of its children's.
    """
    if not given:
        return ()
    if not isinstance(given, Mapping):
        raise InvalidValueError(
            explain("hierarchy", "it must be a mapping.", expected="parent: [children]", got=repr(given))
        )
    conditions = []
    for parent, children in _by_parent(given, axis).items():
        if not len(children):
            raise InvalidValueError(explain("hierarchy", "a parent needs children.", got=f"none for {parent!r}"))
        (number,) = axis.places([parent], "hierarchy (parents)")
        places = axis.places(list(children), f"hierarchy (children of {parent!r})")
        conditions.append((int(number), tuple(int(place) for place in places)))
    _refuse_cycles(dict(conditions), axis)
    _compare_sums(conditions, axis, lower, upper)
    return tuple(conditions)


def _by_parent(given: Mapping[Any, Any], axis: Axis) -> Mapping[Any, Sequence[Any]]:
    """``given`` as parent → children; a value that is a target's name is a parent."""
    single = [
        isinstance(value, str) or (isinstance(value, Hashable) and value in axis.index) for value in given.values()
    ]
    if not any(single):
        for parent, children in given.items():
            if not isinstance(children, (Sequence, np.ndarray, set, frozenset)):
                raise InvalidValueError(
                    explain("hierarchy", "a parent's children must be listed.", got=f"{parent!r}: {children!r}")
                )
        return {parent: list(children) for parent, children in given.items()}
    if not all(single):
        raise InvalidValueError(
            explain("hierarchy", "it must say parent: [children], or child: parent, not both.", got=few(list(given)))
        )
    turned: dict[Any, list[Any]] = {}
    for child, parent in given.items():
        turned.setdefault(parent, []).append(child)
    return turned


def _refuse_cycles(children: Mapping[int, tuple[int, ...]], axis: Axis) -> None:
    """Depth first, without recursion: hierarchies may be deep."""
    finished: set[int] = set()
    for root in children:
        path: list[int] = []
        waiting = [(root, False)]
        while waiting:
            node, left = waiting.pop()
            if left:
                finished.add(path.pop())
                continue
            if node in path:
                circle = [*path[path.index(node) :], node]
                got = " → ".join(repr(axis.labels[one]) for one in circle)
                raise InvalidValueError(explain("hierarchy", "no target may be its own ancestor.", got=got))
            if node in finished:
                continue
            path.append(node)
            waiting.append((node, True))
            waiting += [(child, False) for child in children.get(node, ())]


def _compare_sums(conditions: Sequence[tuple[int, tuple[int, ...]]], axis: Axis, lower: Floats, upper: Floats) -> None:
    apart = []
    for parent, children in conditions:
        places = list(children)
        low, high = float(lower[places].sum()), float(upper[places].sum())
        slack = _ROUNDING_SHARE * max(1.0, float(np.abs(lower[places]).sum()) if math.isfinite(low) else 1.0)
        if low > upper[parent] + slack or high < lower[parent] - slack:
            nearest = low if low > upper[parent] else high
            own = upper[parent] if low > upper[parent] else lower[parent]
            apart.append(f"{axis.labels[parent]!r} is {own:,.6g}, its children add up to {nearest:,.6g}")
    if apart:
        more = f", and {len(apart) - 3} more" if len(apart) > 3 else ""
        message = explain(
            "hierarchy",
            "a parent's target should be the sum of its children's: no weights can meet both.",
            got="; ".join(apart[:3]) + more,
        )
        warnings.warn(message, CalibrationWarning, stacklevel=6)
