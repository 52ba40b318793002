"""Microdata, one row for each household or person: columns as categories or as numbers, from frames and CSV files."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from l0hooks.calibration.data.csv_files import csv_rows
from l0hooks.calibration.data.frames import array_of, is_frame, is_pandas, opened
from l0hooks.calibration.numerics.columns import Floats, Integers
from l0hooks.errors import InvalidValueError, explain, near_names


@dataclass(frozen=True, eq=False)
class Categories:
    """A column of categories.

    Attributes
    ----------
    codes : int64, shape (rows,)
        Where each row's category stands in ``labels``; −1 where it is missing.
    labels : list of hashable
        In the order in which they occur.
    """

    codes: Integers
    labels: list[Hashable]

    @cached_property
    def index(self) -> dict[Hashable, int]:
        """The code of each label."""
        return {label: code for code, label in enumerate(self.labels)}

    @cached_property
    def by_text(self) -> dict[str, int]:
        """The code of each label by its text."""
        return {str(label): code for code, label in enumerate(self.labels)}


class Microdata(Protocol):
    """Columns by name."""

    where: str
    count: int
    columns: Sequence[str]

    def categories(self, name: str) -> Categories:
        """A column as categories."""

    def numbers(self, name: str) -> Floats:
        """A column as numbers, NaN where there is none."""

    def row_names(self) -> list[Hashable] | None:
        """Names of the rows that are no column, if there are any."""


def need_column(data: Microdata, name: str, where: str) -> str:
    """``name``, if it is a column.

    Raises
    ------
    InvalidValueError
        With near names, if it is not.
    """
    if name not in data.columns:
        hint = near_names(name, map(str, data.columns))
        raise InvalidValueError(explain(where, f"{data.where} must have this column.", got=repr(name), hint=hint))
    return name


class FrameMicrodata:
    """A data frame of any kind.

    Examples
    --------
    >>> import pandas as pd
    >>> data = FrameMicrodata(pd.DataFrame({"tenure": ["own", "rent", "own", None]}))
    >>> data.categories("tenure").codes, data.categories("tenure").labels
    (array([ 0,  1,  0, -1]), ['own', 'rent'])
    """

    where = "the frame of households"

    def __init__(self, given: object) -> None:
        frame = opened(given)
        if not is_frame(frame):
            got = f"{type(given).__name__}: {str(given)[:60]}"
            raise InvalidValueError(explain("margins", "households must be a data frame.", got=got))
        self._frame: Any = frame
        self.count: int = len(frame)
        self.columns: Sequence[str] = list(frame.columns)

    def categories(self, name: str) -> Categories:
        """A column as categories."""
        known: dict[Hashable, int] = {}
        values = array_of(self._frame[name], name).tolist()
        codes = (-1 if v is None or v != v else known.setdefault(v, len(known)) for v in values)
        return Categories(np.fromiter(codes, np.int64, self.count), list(known))

    def numbers(self, name: str) -> Floats:
        """A column as numbers, NaN where there is none."""
        return _floats(array_of(self._frame[name], name), name)

    def row_names(self) -> list[Hashable] | None:
        """The index of pandas."""
        return self._frame.index.tolist() if is_pandas(self._frame, "DataFrame") else None


class CsvMicrodata:
    """A CSV file, held as numbers of categories; empty cells are missing.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        lines = csv_rows(path)
        self.columns: Sequence[str] = next(lines)
        known: list[dict[str, int]] = [{} for _ in self.columns]
        codes = [array("i") for _ in self.columns]
        for line in lines:
            for cell, labels, column in zip(line, known, codes, strict=True):
                text = cell.strip()
                column.append(labels.setdefault(text, len(labels)) if text else -1)
        self.count = len(codes[0])
        self._columns = {
            name: Categories(np.array(column, np.int64), list(labels))
            for name, column, labels in zip(self.columns, codes, known, strict=True)
        }

    def categories(self, name: str) -> Categories:
        """A column as categories."""
        return self._columns[name]

    def numbers(self, name: str) -> Floats:
        """A column as numbers, NaN where there is none."""
        column = self._columns[name]
        return np.append(_floats(np.array(column.labels, object), name), np.nan)[column.codes]

    def row_names(self) -> list[Hashable] | None:
        """None: a file has columns only."""
        return None


def _floats(values: Any, name: str) -> Floats:
    try:
        found: Floats = values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(explain(f"column {name!r}", "it must hold numbers.", got=str(error))) from error
    return found
