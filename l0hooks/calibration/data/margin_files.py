"""Margins from two files: microdata, and a long table of totals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l0hooks.calibration.data.files import TextTable, read_parquet
from l0hooks.calibration.data.margin_rows import Empty
from l0hooks.calibration.data.margin_terms import read_term
from l0hooks.calibration.data.margins import Margins, margins_of
from l0hooks.calibration.data.microdata import CsvMicrodata, FrameMicrodata, Microdata
from l0hooks.errors import InvalidValueError, explain


def read_microdata(path: Path) -> Microdata:
    """The columns of a ``.csv`` or ``.parquet`` file.

    Raises
    ------
    InvalidValueError
        If it is another file, or there is none.
    """
    if path.suffix not in (".csv", ".parquet") or not path.is_file():
        must = "households must be a .csv or .parquet file where targets have a column 'margin'."
        raise InvalidValueError(explain(str(path), must, got="no such file" if not path.is_file() else path.suffix))
    return FrameMicrodata(read_parquet(path)) if path.suffix == ".parquet" else CsvMicrodata(path)


def read_margins(
    data: Microdata, table: TextTable, *, design_weights: str | None, unit: str | None, partial: bool, drop_empty: bool
) -> Margins:
    """Margins of microdata.

    Parameters
    ----------
    data : Microdata
    table : TextTable
        Columns ``margin``, ``value``, and ``category``, which is empty for a margin of one number.
    design_weights, unit : str, optional
    partial, drop_empty : bool

    Raises
    ------
    InvalidValueError
        As :func:`~l0hooks.calibration.margins`.
    """
    taken = {"lower", "upper", "group", "importance"} & set(table.columns)
    if taken:
        must = "a file of margins has the columns margin, category and value."
        raise InvalidValueError(
            explain(str(table.path), must, got=", ".join(sorted(taken)), hint="a matrix file instead")
        )
    names, values = table.columns[table.need("margin")], table.numbers(table.need("value"))
    categories = table.columns.get("category", [""] * len(names))
    totals: dict[str, dict[str, float]] = {}
    for name, category, value in zip(names, categories, values, strict=True):
        cells = totals.setdefault(name, {})
        category = "" if category is None else category
        if category in cells:
            got = f"{name!r}, category {category!r}"
            raise InvalidValueError(explain(str(table.path), "each total must be given once.", got=f"twice: {got}"))
        cells[category] = value
    given: dict[str, Any] = {name: cells[""] if list(cells) == [""] else cells for name, cells in totals.items()}
    terms = [read_term(name, one, data) for name, one in given.items()]
    empty: Empty = "drop" if drop_empty else "refuse"
    return margins_of(data, terms, names=None, design_weights=design_weights, unit=unit, partial=partial, empty=empty)
