"""Errors by group of targets, as numbers and as lines of the summary."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from l0hooks.calibration.fit.progress import percent
from l0hooks.calibration.numerics.columns import Floats

_GROUPS_SHOWN = 8  # in the summary


def group_means(errors: Floats, groups: Sequence[Hashable]) -> dict[Hashable, float]:
    r"""The mean \|relative error\| of each group.

    Examples
    --------
    >>> group_means(np.array([0.1, -0.3, 0.0]), ["a", "a", "b"])
    {'a': 0.2, 'b': 0.0}
    """
    place = {label: number for number, label in enumerate(dict.fromkeys(groups))}
    numbers = np.array([place[label] for label in groups])
    means = np.bincount(numbers, np.abs(errors)) / np.bincount(numbers)
    return dict(zip(place, means.tolist(), strict=True))


def group_lines(errors: Floats, groups: Sequence[Hashable] | None) -> list[str]:
    """One line for each group, the largest mean first; at most eight groups."""
    if groups is None:
        return []
    means = group_means(errors, groups)
    ranked = sorted(means, key=lambda label: -means[label])
    lines = [f"  {'by group' if not n else '':<15} {percent(means[g])} {g!r}" for n, g in enumerate(ranked)]
    more = len(lines) - _GROUPS_SHOWN
    return lines if more <= 1 else [*lines[:_GROUPS_SHOWN], f"  {'':<15} and {more} groups with less"]
