r"""Raking to margins: iterative proportional fitting, as the start of the search for the nearest weights.

Where every unit lies in one category of every margin, and r is free, coordinate ascent on the dual is the iteration of
Deming & Stephan. Margins are taken together as long as their cross table is far smaller than the sample: its cells are
summed and scaled once for all of them, and in between the iteration runs on the table alone.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from l0hooks.calibration.numerics.columns import Floats, Sparse

_MOST_SAMPLE_SWEEPS, _MOST_TABLE_SWEEPS = 60, 60
_UNITS_PER_CELL = 8  # of a cross table, at least
_FLOAT32_DIFFERENCE = 1e-6  # relative, of numbers that are equal but for their storage in float32
_LEAST_CHECKED = 1000  # units whose entries are compared first
_TABLE_ACCURACY = 1e-2  # share of its misses to which a table is fitted
_TABLE_ROUNDING = 1e-15  # per cell: misses below it are rounding
_SAFETY_FACTOR = 5.0  # by which the next sweep may leave more than the last one
_SLOW_SHARE = 0.5  # of the misses left by a sweep, above which Newton's method is faster


def fit_margins(block: Sparse, target: Floats, strength: Floats, factor: float, tolerance: float) -> Floats | None:
    r"""u with r(u) = exp(factor·Bᵀu/q) that meets the targets, if they are margins and few sweeps suffice.

    Parameters
    ----------
    block : sparse.csr_array, shape (n, Q)
        Bᵀ. Its rows must each have one entry in every margin, margins following each other, and factor·B/q be the same
        for all units of a category.
    target : float64, shape (Q,)
    strength : float64, > 0, shape (n,)
        q.
    factor : float, > 0
    tolerance : float, > 0
        Of every miss.

    Returns
    -------
    float64 array, shape (Q,), or None
        None if the targets are not margins, contradict each other, or would take many sweeps.

    Examples
    --------
    >>> from scipy import sparse
    >>> block = sparse.csr_array([[1.0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]])
    >>> u = fit_margins(block, np.array([3.0, 1.0, 2.0, 2.0]), np.ones(4), 1.0, 1e-9)
    >>> np.exp(block @ u).round(6)
    array([1.5, 1.5, 0.5, 0.5])

    References
    ----------
    Deming & Stephan (1940), On a least squares adjustment of a sampled frequency table when the expected marginal
    totals are known.
    """
    found = _labels(block)
    if found is None or not (target > 0).all():
        return None
    labels, edges = found
    rates = _rates(block, strength, factor)
    if rates is None:
        return None
    wanted = [(target / rates)[a:b] for a, b in itertools.pairwise(edges)]
    totals = [float(one.sum()) for one in wanted]
    if max(totals) - min(totals) > _FLOAT32_DIFFERENCE * max(totals):
        return None
    logs = _sweeps(_tables(labels, edges, wanted), strength.copy(), tolerance / float(target.max()))
    if logs is None:
        return None
    dual: Floats = np.concatenate([logs[number] for number in range(len(wanted))]) / rates
    return dual


def _labels(block: Sparse) -> tuple[NDArray[Any], list[int]] | None:
    """Each unit's target in each margin, and where margins begin and end; None if there are none."""
    (n, rows), entries = block.shape, block.nnz
    if not n or not entries or entries % n or (np.diff(block.indptr) != entries // n).any():
        return None
    labels = np.ascontiguousarray(rearrange(block.indices, "(unit margin) -> margin unit", unit=n))
    first, last = labels.min(axis=1), labels.max(axis=1)
    return None if (last[:-1] >= first[1:]).any() else (labels, [0, *first[1:].tolist(), rows])


def _rates(block: Sparse, strength: Floats, factor: float) -> Floats | None:
    """factor·B/q of each category, from a sample; None if it differs among the units of one, or a category has none."""
    n = len(strength)
    indices, data = (rearrange(part, "(unit margin) -> unit margin", unit=n) for part in (block.indices, block.data))
    for step in (max(1, n // max(_LEAST_CHECKED, 20 * block.shape[1])), 1):
        some = slice(None, None, step)
        places = indices[some].ravel()
        each = (data[some] * (factor / strength[some])[:, None]).ravel()
        rates = np.full(block.shape[1], np.nan)
        rates[places] = each
        if not np.isnan(rates).any():
            alike = (rates > 0).all() and (np.abs(each - rates[places]) <= _FLOAT32_DIFFERENCE * rates[places]).all()
            return rates if alike else None
    return None


class _Table:
    """Some margins, the cell of their cross table for each unit, and the target of each margin."""

    def __init__(self, numbers: list[int], wanted: list[Floats]) -> None:
        self.numbers, self.wanted = numbers, wanted
        self.shape = tuple(len(one) for one in wanted)
        self.cells: NDArray[np.intp] = np.zeros(0, np.intp)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def sums(self, table: Floats, axis: int) -> Floats:
        total: Floats = table.sum(axis=tuple(other for other in range(table.ndim) if other != axis))
        return total

    def fit(self, x: Floats) -> tuple[float, list[Floats]] | None:
        """Scale x to the margins; the largest relative miss before, and the logarithms of the factors by margin."""
        table: Floats = np.bincount(self.cells, x, minlength=self.size).astype(np.float64).reshape(self.shape)
        worst = max(float(np.abs(w / self.sums(table, a) - 1).max()) for a, w in enumerate(self.wanted))
        scales = [np.ones(size) for size in self.shape]
        for _ in range(_MOST_TABLE_SWEEPS):
            missed = 0.0
            for axis, wanted in enumerate(self.wanted):
                ratio = wanted / self.sums(table, axis)
                missed = max(missed, float(np.abs(ratio - 1).max()))
                scales[axis] *= ratio
                table *= np.expand_dims(ratio, [other for other in range(table.ndim) if other != axis])
            if table.ndim == 1 or not missed > max(_TABLE_ACCURACY * worst, _TABLE_ROUNDING * table.size):
                break
        if not np.isfinite(table).all():
            return None
        ratios = scales[0]
        for scale in scales[1:]:
            ratios = np.multiply.outer(ratios, scale)
        x *= ratios.ravel()[self.cells]
        return worst, [np.log(scale) for scale in scales]


def _tables(labels: NDArray[Any], edges: list[int], wanted: list[Floats]) -> list[_Table]:
    """Margins grouped into as few tables as possible, none with too many cells."""
    most, groups = labels.shape[1] // _UNITS_PER_CELL, list[list[int]]()
    sizes = [len(one) for one in wanted]
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        fitting = [group for group in groups if math.prod(sizes[one] for one in group) * sizes[number] <= most]
        if fitting:
            min(fitting, key=lambda group: math.prod(sizes[one] for one in group)).append(number)
        else:
            groups.append([number])
    tables = []
    for group in groups:
        table = _Table(group, [wanted[number] for number in group])
        for number in group:
            own = labels[number].astype(np.intp) - edges[number]
            table.cells = table.cells * sizes[number] + own if len(table.cells) else own
        tables.append(table)
    return tables


def _sweeps(tables: list[_Table], x: Floats, enough: float) -> dict[int, Floats] | None:
    """Fit the tables in turn until all are met; the logarithms of the factors, by margin."""
    logs = {
        number: np.zeros(len(one)) for table in tables for number, one in zip(table.numbers, table.wanted, strict=True)
    }
    before = math.inf
    for sweep in range(_MOST_SAMPLE_SWEEPS):
        missed = 0.0
        for table in tables:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                done = table.fit(x)
            if done is None:
                return None
            missed = max(missed, done[0])
            for number, log in zip(table.numbers, done[1], strict=True):
                logs[number] += log
        # of the misses, that the next sweep may leave
        share = min(1.0, _SAFETY_FACTOR * missed / before) if sweep > 1 else 1.0
        if missed * share <= enough:
            return logs
        if sweep and missed > _SLOW_SHARE * before:
            return logs if missed <= 1e-9 else None  # rounding allows no more
        before = missed
    return None
