"""The rows of one margin: what each row of the microdata adds to each cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from l0hooks.calibration.data.frames import few
from l0hooks.calibration.data.margin_terms import Cell, Term
from l0hooks.calibration.data.microdata import Categories, Microdata
from l0hooks.calibration.numerics.columns import Floats, Integers
from l0hooks.errors import InvalidValueError, explain, near_names

Empty = Literal["refuse", "drop"]
_SHARES_APART = 1e-6  # by which shares may miss a sum of one


@dataclass(frozen=True)
class RowOptions:
    """How rows are made.

    Attributes
    ----------
    partial : bool
    empty : "refuse" or "drop"
    design : float64, shape (rows of the data,)
    size : float
        What design weights are multiplied with to add up to the population; NaN if that is not known.
    """

    partial: bool
    empty: Empty
    design: Floats
    size: float


def rows_of(data: Microdata, term: Term, options: RowOptions) -> tuple[Any, dict[str, float], list[str]]:
    """The rows of one margin, its targets by name, and the names of the cells that were dropped."""
    where = f"margin {term.name!r}"
    columns = [data.categories(name) for name in term.columns]
    for name, column in zip(term.columns, columns, strict=True):
        if not options.partial:
            refuse_missing(column, name, where)
    cells = {_codes(cell, number, term, columns, options.empty): cell for number, cell in enumerate(term.cells)}
    place, present = _places(columns, list(cells), data.count)
    _refuse_unasked(columns, place, options, where)
    stay, dropped = [], []
    for number, cell in enumerate(cells.values()):
        if present[number] or (term.measure == "share" and term.cells[cell] == 0):
            stay.append(number)
            continue
        name = _label(term, cell)
        if options.empty == "refuse" and (term.measure == "mean" or term.cells[cell] != 0):
            must = "a cell with a total needs a household that is in it."
            hint = "empty='drop', on the command line --drop-empty, or merge cells"
            raise InvalidValueError(explain(where, must, got=f"none is in {name!r}", hint=hint))
        dropped.append(name)
    if term.measure == "share":
        matrix = _shares(term, columns, cells, place, options)
        return matrix[stay], {_label(term, list(cells.values())[number]): 0.0 for number in stay}, dropped
    order = np.full(len(cells) + 1, -1)
    order[stay] = np.arange(len(stay))
    values, asked = _values(data, term, order[place], [list(cells.values())[number] for number in stay], options)
    return _matrix(values, order[place], len(stay)), asked, dropped


def _values(
    data: Microdata, term: Term, place: Integers, cells: list[Cell], options: RowOptions
) -> tuple[Floats, dict[str, float]]:
    """What each row of the data adds to its cell, and the targets."""
    asked = {_label(term, cell): term.cells[cell] for cell in cells}
    if term.number is None:
        return np.ones(data.count), asked
    values = data.numbers(term.number)
    bad = np.flatnonzero(~np.isfinite(values) & (place >= 0))
    if len(bad):
        got = f"{values[bad[0]]} in row {bad[0] + 1:,}" + (f", and {len(bad) - 1:,} more" if len(bad) > 1 else "")
        raise InvalidValueError(explain(f"margin {term.name!r}", f"{term.number!r} must hold numbers.", got=got))
    if term.measure == "sum":
        return values, asked
    inside = place >= 0
    means = np.array(list(asked.values()))
    weight = np.bincount(place[inside], options.design[inside], minlength=len(cells))
    spread = np.bincount(place[inside], (options.design * np.abs(values))[inside], minlength=len(cells))
    scale = _expected(weight, options) * np.where(means == 0, _or_one(spread / _or_one(weight)), np.abs(means))
    shifted = np.zeros(data.count)
    shifted[inside] = (values[inside] - means[place[inside]]) / scale[place[inside]]
    return shifted, dict.fromkeys(asked, 0.0)


def _shares(
    term: Term, columns: list[Categories], cells: dict[tuple[int, ...], Cell], place: Integers, options: RowOptions
) -> Any:
    """Conditions of shares: within a domain, every household counts in each of its rows."""
    first = len(term.columns) - len(term.domain)
    domains: dict[tuple[int, ...], list[int]] = {}
    for number, codes in enumerate(cells):
        domains.setdefault(codes[first:], []).append(number)
    shares = np.array([term.cells[cell] for cell in cells.values()])
    for codes, numbers in domains.items():
        total = float(shares[numbers].sum())
        if (
            total > 1 + _SHARES_APART
            or (not options.partial and total < 1 - _SHARES_APART)
            or shares[numbers].min() < 0
        ):
            whose = "" if not codes else f" within {list(cells.values())[numbers[0]][first:]}"
            must = "shares must not be negative, and add up to one."
            hint = "divide percentages by 100" if abs(total - 100) < 1 else None
            raise InvalidValueError(explain(f"margin {term.name!r}", must, got=f"{total:g}{whose}", hint=hint))
    inside, _ = _places(columns[first:], list(domains), len(place))
    entries = []
    for number, numbers in enumerate(domains.values()):
        members = np.flatnonzero(inside == number)
        weight = float(_expected(np.array([options.design[members].sum()]), options)[0])
        entries += [(row, members, ((place[members] == row) - shares[row]) / weight) for row in numbers]
    rows = np.concatenate([np.full(len(members), row) for row, members, _ in entries])
    data, people = (np.concatenate([entry[part] for entry in entries]) for part in (2, 1))
    return sparse.csr_array((data, (rows, people)), shape=(len(cells), len(place)))


def _expected(weight: NDArray[Any], options: RowOptions) -> Floats:
    """The weight that a cell will have, by the design weights and the population."""
    return _or_one(weight * (options.size if np.isfinite(options.size) and options.size > 0 else 1.0))


def _or_one(values: NDArray[Any]) -> Floats:
    found: Floats = np.where(values > 0, values, 1.0)
    return found


def _matrix(values: Floats, place: Integers, rows: int) -> Any:
    inside = np.flatnonzero(place >= 0)
    matrix = sparse.csr_array((values[inside], (place[inside], inside)), shape=(rows, len(place)))
    matrix.eliminate_zeros()
    return matrix


def _codes(cell: Cell, place: int, term: Term, columns: list[Categories], empty: Empty) -> tuple[int, ...]:
    """A cell as numbers of categories, negative for one that does not occur.

    Categories are compared as they are, then as text: files have text where totals may have numbers, or the reverse.
    """
    found = []
    for part, name, column in zip(cell, term.columns, columns, strict=True):
        code = column.index.get(part, column.by_text.get(str(part)))
        if code is None and empty == "refuse" and (term.measure == "mean" or term.cells[cell] != 0):
            must = f"categories must be those of {name!r}, or have a total of zero."
            hint = near_names(str(part), column.by_text)
            raise InvalidValueError(explain(f"margin {term.name!r}", must, got=repr(part), hint=hint))
        found.append(-1 - place if code is None else code)
    return tuple(found)


def _places(columns: list[Categories], cells: list[tuple[int, ...]], count: int) -> tuple[Integers, Any]:
    """Which of the cells each row is in, −1 for none; and whether a cell has rows."""
    if not columns:
        return np.zeros(count, np.int64), np.ones(1, np.bool_)
    code, known = np.zeros(count, np.int64), [0] * len(cells)
    missing = np.zeros(count, np.bool_)
    for number, column in enumerate(columns):
        missing |= column.codes < 0
        code, labels = code * (len(column.labels) + 1) + column.codes, len(column.labels)
        known = [
            so_far * (labels + 1) + cell[number] if so_far >= 0 and cell[number] >= 0 else -1
            for so_far, cell in zip(known, cells, strict=True)
        ]
    of_code = {code: number for number, code in enumerate(known) if code >= 0}
    distinct, inverse = np.unique(np.where(missing, -1, code), return_inverse=True)
    place = np.array([of_code.get(one, -1) for one in distinct.tolist()], np.int64)[inverse]
    return place, np.bincount(place[place >= 0], minlength=len(cells)) > 0


def _refuse_unasked(columns: list[Categories], place: Integers, options: RowOptions, where: str) -> None:
    free = np.flatnonzero(place < 0)
    if options.partial or not len(free):
        return
    cells = dict.fromkeys(":".join(str(column.labels[column.codes[row]]) for column in columns) for row in free[:5000])
    got = f"none for {few(list(cells))}, {len(free):,} rows"
    raise InvalidValueError(explain(where, "every category needs a total.", got=got, hint="add it, or partial=True"))


def _label(term: Term, cell: Cell) -> str:
    return term.name if not cell else f"{term.name}={':'.join(map(str, cell))}"


def refuse_missing(column: Categories, name: str, where: str) -> None:
    """Refuse a column in which a category is missing.

    Raises
    ------
    InvalidValueError
    """
    missing = np.flatnonzero(column.codes < 0)
    if len(missing):
        got = f"none in {len(missing):,} rows, the first is row {missing[0] + 1:,}"
        hint = "give them a category of their own, or partial=True" if where.startswith("margin") else None
        raise InvalidValueError(explain(where, f"every row needs a value of {name!r}.", got=got, hint=hint))
