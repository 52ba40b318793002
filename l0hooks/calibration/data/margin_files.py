"""Microdata and a long table of totals from files, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l0hooks.calibration.data.files import TextTable, read_table
from l0hooks.calibration.data.margins import margins
from l0hooks.calibration.data.matrix import NamedMatrix
from l0hooks.errors import InvalidValueError, explain, near_names


def read_margins(
    households: Path, totals: Path, weights: str | None = None
) -> tuple[NamedMatrix, dict[str, Any], list[float] | None]:
    """Matrix, targets with their groups, and design weights from two files.

    Parameters
    ----------
    households : Path
        One row for each household: ``.csv`` or ``.parquet``.
    totals : Path
        Columns ``margin``, ``category`` (empty where a margin has one total) and ``value``.
    weights : str, optional
        The column of ``households`` that holds design weights.

    Raises
    ------
    InvalidValueError
        If a file is not such a table, or as :func:`~l0hooks.calibration.margins` does.
    """
    table = read_table(households)
    columns = {name: _values(values) for name, values in table.columns.items()}
    found = margins(columns, _totals(read_table(totals)))
    targets = {"y": found.targets, "lower": None, "upper": None, "groups": found.groups, "importance": None}
    if weights is not None and weights not in columns:
        must = f"{weights!r} must be a column."
        raise InvalidValueError(explain(str(households), must, hint=near_names(weights, columns)))
    return found.matrix, targets, None if weights is None else table.numbers(weights)


def _totals(table: TextTable) -> dict[str, Any]:
    names, values = table.columns[table.need("margin")], table.numbers(table.need("value"))
    categories = table.columns.get("category", [""] * len(values))
    found: dict[str, Any] = {}
    for name, category, value in zip(names, categories, values, strict=True):
        empty = category is None or category == ""
        before = found.get(name)
        if before is not None and (empty or not isinstance(before, dict) or category in before):
            must = "a category of a margin has one total."
            raise InvalidValueError(explain(f"{table.path}, margin {name!r}", must, got=f"a second for {category!r}"))
        if empty:
            found[name] = value
        else:
            found.setdefault(name, {})[category] = value
    return found


def _values(column: list[Any]) -> NDArray[Any]:
    """Numbers where all that is not empty is a number, empty cells NaN; else as they are."""
    empty = [value is None or value == "" for value in column]
    try:
        numbers = [np.nan if nothing else float(value) for value, nothing in zip(column, empty, strict=True)]
    except (TypeError, ValueError):
        return np.array(column, object)
    return np.array(column, object) if all(empty) else np.array(numbers)
