"""What a margin asks for: its name taken apart into columns, and its totals into cells."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from l0hooks.calibration.data.frames import array_of, few, is_frame, is_pandas, opened, plain_scalar
from l0hooks.calibration.data.microdata import Microdata, need_column
from l0hooks.errors import InvalidValueError, explain

Measure = Literal["count", "sum", "mean", "share"]
Cell = tuple[Hashable, ...]


@dataclass(frozen=True)
class Term:
    """One margin.

    Attributes
    ----------
    name : str
        As given.
    measure : "count", "sum", "mean" or "share"
    number : str, optional
        The column that is added up, or whose mean is meant.
    columns : tuple of str
        Whose categories make the cells: of a share first those that are shared, then the domain's.
    domain : tuple of str
        The last of ``columns``: shares add up to one within their cells.
    cells : dict from tuple of categories to float
        What is asked; the key is () where there are no columns.
    """

    name: str
    measure: Measure
    number: str | None
    columns: tuple[str, ...]
    domain: tuple[str, ...]
    cells: dict[Cell, float]


def read_term(name: str, totals: object, data: Microdata) -> Term:
    """A margin, its columns found in the data.

    Raises
    ------
    InvalidValueError
        If a column is not there, or the totals are not one number for each cell.
    """
    where = f"margin {name!r}"
    if not isinstance(name, str):
        raise InvalidValueError(explain(where, "its name must be a string.", got=type(name).__name__))
    totals = opened(totals)
    alone = isinstance(totals, Real) and not isinstance(totals, bool)
    left, domain = name, ""
    if name not in data.columns and " by " in name:
        left, domain = (part.strip() for part in name.rsplit(" by ", 1))
    by = _columns(domain, data, where) if domain else ()
    word, _, rest = left.partition(" ")
    if left not in data.columns and word in ("mean", "share") and rest:
        columns = _columns(rest, data, where)
        if word == "share":
            return Term(name, "share", None, columns + by, by, _cells(totals, columns + by, where))
        return Term(name, "mean", _single(columns, where), by, by, _cells(totals, by, where))
    if left == "count" and left not in data.columns:
        return Term(name, "count", None, by, by, _cells(totals, by, where))
    columns = _columns(left, data, where)
    if domain or (alone and len(columns) == 1):
        return Term(name, "sum", _single(columns, where), by, by, _cells(totals, by, where))
    return Term(name, "count", None, columns, (), _cells(totals, columns, where))


def _columns(text: str, data: Microdata, where: str) -> tuple[str, ...]:
    if text in data.columns:
        return (text,)
    return tuple(need_column(data, part.strip(), where) for part in text.split(":"))


def _single(columns: tuple[str, ...], where: str) -> str:
    if len(columns) != 1:
        must = "a sum or a mean is of one column."
        hint = "counts of crossed categories are 'a:b', sums within them 'x by a:b'"
        raise InvalidValueError(explain(where, must, got=few(columns), hint=hint))
    return columns[0]


def _cells(totals: Any, columns: tuple[str, ...], where: str) -> dict[Cell, float]:
    if not columns:
        if not isinstance(totals, Real) or isinstance(totals, bool):
            must = "a margin without categories needs one number."
            raise InvalidValueError(explain(where, must, got=f"{type(totals).__name__}: {str(totals)[:60]}"))
        return {(): _value(totals, where, ())}
    found: dict[Cell, float] = {}
    for given, value in _pairs(totals, columns, where):
        cell = _cell(given, len(columns), where)
        if cell in found:
            raise InvalidValueError(explain(where, "a cell must be given once.", got=repr(given)))
        found[cell] = _value(value, where, cell)
    if not found:
        raise InvalidValueError(explain(where, "it must have totals.", got="none"))
    return found


def _pairs(totals: Any, columns: tuple[str, ...], where: str) -> list[tuple[Any, Any]]:
    if isinstance(totals, Mapping):
        return list(totals.items())
    if is_frame(totals):
        others = [name for name in totals.columns if name not in columns]
        value = "value" if "value" in others else others[0] if len(others) == 1 else None
        if value is None or any(name not in totals.columns for name in columns):
            must = "a frame of totals needs the columns of the margin, and one of values."
            expected = f"{few(columns)} and 'value'"
            raise InvalidValueError(explain(where, must, expected=expected, got=few(list(totals.columns))))
        keys = zip(*(array_of(totals[name], where).tolist() for name in columns), strict=True)
        return list(zip(keys, array_of(totals[value], where).tolist(), strict=True))
    if is_pandas(totals, "Series"):
        return list(zip(totals.index.tolist(), array_of(totals, where).tolist(), strict=True))
    must = "totals by category must be a mapping, a Series with an index, or a frame."
    raise InvalidValueError(explain(where, must, got=f"{type(totals).__name__}: {str(totals)[:60]}"))


def _cell(given: Any, parts: int, where: str) -> Cell:
    cell = tuple(given) if isinstance(given, tuple) else (given,)
    if len(cell) == 1 and parts > 1 and isinstance(cell[0], str):
        cell = tuple(part.strip() for part in cell[0].split(":"))
    if len(cell) != parts:
        raise InvalidValueError(explain(where, "a cell needs one category of each column.", expected=parts, got=given))
    return tuple(plain_scalar(part) for part in cell)


def _value(value: Any, where: str, cell: Cell) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not -float("inf") < found < float("inf"):
        raise InvalidValueError(explain(where, "a total must be a finite number.", got=f"{value!r} for {cell}"))
    return found
