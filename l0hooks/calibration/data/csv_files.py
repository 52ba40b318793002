"""CSV files, line by line, so that a large one is never held as text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from l0hooks.calibration.data.frames import few
from l0hooks.calibration.numerics.columns import Floats
from l0hooks.errors import InvalidValueError, explain

_CELLS_AT_ONCE = 200_000


def csv_rows(path: Path) -> Iterator[list[str]]:
    """The header of a CSV file, then its rows; columns are split at the commonest of comma, semicolon and tab.

    Raises
    ------
    InvalidValueError
        If it is not CSV in UTF-8, has no rows, or a row has other columns than the header.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            header = file.readline()
            delimiter = max(",;\t", key=header.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            names: list[str] | None = None
            count = 0
            for row in reader:
                if not row:
                    continue
                if names is None:
                    names = _distinct([name.strip() for name in row], path)
                    yield names
                    continue
                if len(row) != len(names):
                    must = "every line must have all columns."
                    where = f"{path}, line {reader.line_num}"
                    raise InvalidValueError(explain(where, must, expected=len(names), got=len(row)))
                count += 1
                yield row
        except (UnicodeDecodeError, csv.Error) as error:
            raise InvalidValueError(explain(str(path), "it must be CSV in UTF-8.", got=str(error))) from error
    if not count:
        got = "an empty file" if names is None else "a header alone"
        raise InvalidValueError(explain(str(path), "it must have a header and rows.", got=got))


def csv_matrix(path: Path, keys: tuple[str, ...]) -> tuple[Any, list[str], list[str] | None, str | None]:
    """A CSV file of numbers as a sparse matrix.

    Parameters
    ----------
    path : Path
    keys : tuple of str
        The first of these that is a column names the rows.

    Returns
    -------
    matrix : sparse.csr_array, float64
    columns : list of str
    rows : list of str, optional
    key : str, optional
        The column that names the rows.

    Raises
    ------
    InvalidValueError
        If a cell is not a number.
    """
    lines = csv_rows(path)
    header = next(lines)
    key = next((name for name in keys if name in header), None)
    place = None if key is None else header.index(key)
    columns = [name for name in header if name != key]
    if not columns:
        raise InvalidValueError(explain(str(path), "a matrix needs columns of numbers.", got=few([key])))
    rows: list[str] = []
    block: list[Floats] = []
    parts = []
    for number, line in enumerate(lines, 1):
        if place is not None:
            rows.append(line.pop(place).strip())
        try:
            block.append(np.fromiter(map(float, line), np.float64, len(line)))
        except ValueError:
            raise _no_number(path, number, columns, line) from None
        if len(block) * len(columns) >= _CELLS_AT_ONCE:
            parts.append(sparse.csr_array(np.array(block)))
            block = []
    if block:
        parts.append(sparse.csr_array(np.array(block)))
    return sparse.vstack(parts, format="csr"), columns, None if place is None else rows, key


def _no_number(path: Path, number: int, columns: list[str], line: list[str]) -> InvalidValueError:
    name, cell = next((name, cell) for name, cell in zip(columns, line, strict=True) if not _is_number(cell))
    where = f"{path}, row {number} of column {name!r}"
    return InvalidValueError(explain(where, "it must be a number.", got=repr(cell) if cell.strip() else "nothing"))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _distinct(names: list[str], path: Path) -> list[str]:
    if len(set(names)) < len(names):
        raise InvalidValueError(explain(str(path), "columns must have distinct names.", got=few(names)))
    return names
