"""Matrices and tables from files: NumPy, Matrix Market, CSV and Parquet, with messages that say where."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l0hooks.calibration.data.csv_files import csv_matrix, csv_rows
from l0hooks.calibration.data.frames import NAME_COLUMNS, VALUE_COLUMNS, array_of, columns_of_numbers, few, opened
from l0hooks.calibration.data.indices import load_sparse
from l0hooks.calibration.data.matrix import NamedMatrix
from l0hooks.errors import InvalidValueError, explain, import_extra, near_names

_MATRIX_SUFFIXES = (".npz", ".mtx", ".mtx.gz", ".parquet", ".csv")


@dataclass(frozen=True, eq=False)
class TextTable:
    """A CSV or Parquet file: columns of text or numbers.

    Attributes
    ----------
    path : Path
    columns : dict from name to list
    """

    path: Path
    columns: dict[str, list[Any]]

    def need(self, *names: str) -> str:
        """The first of ``names`` that is a column."""
        for name in names:
            if name in self.columns:
                return name
        raise InvalidValueError(
            explain(
                str(self.path),
                f"it needs a column {' or '.join(repr(name) for name in names)}.",
                got=few(list(self.columns)),
            )
        )

    def names(self, column: str) -> list[Hashable]:
        """A column of names: integers if all are."""
        values = self.columns[column]
        empty = [place for place, value in enumerate(values) if value is None or value == ""]
        if empty:
            raise InvalidValueError(self._at(column, empty[0], "a name must be given.", "nothing"))
        return as_names(values)

    def numbers(self, column: str, *, empty: float | None = None) -> list[float]:
        """A column of numbers; ``empty`` for cells without one, which are refused otherwise."""
        found = []
        for place, value in enumerate(self.columns[column]):
            if empty is not None and (value is None or value == ""):
                found.append(empty)
                continue
            try:
                found.append(float(value))
            except (TypeError, ValueError) as error:
                got = "nothing" if value in (None, "") else repr(value)
                raise InvalidValueError(self._at(column, place, "it must be a number.", got)) from error
        return found

    def by_name(self, key: str, values: Sequence[Any]) -> Any:
        """``values`` under the names in column ``key``, or in their order if there is none."""
        if key not in self.columns:
            others = [name for name in self.columns if name not in VALUE_COLUMNS]
            if others and len(self.columns) > 1:  # one of them may hold the names: the order is not guessed
                must = f"it needs a column {key!r}, or no column but those that are read."
                raise InvalidValueError(explain(str(self.path), must, got=few(others)))
            return list(values)
        names = self.names(key)
        if len(set(names)) < len(names):
            twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
            raise InvalidValueError(
                explain(str(self.path), "names must be distinct.", got=f"more than once: {few(twice)}")
            )
        return dict(zip(names, values, strict=True))

    def _at(self, column: str, place: int, must: str, got: str) -> str:
        return explain(f"{self.path}, row {place + 1} of column {column!r}", must, got=got)


def as_names(values: Sequence[Any]) -> list[Hashable]:
    """Names from a file: integers if all are written like integers.

    Examples
    --------
    >>> as_names(["3", "1"]), as_names(["3", "b"]), as_names(["03", "1"])
    ([3, 1], ['3', 'b'], ['03', '1'])
    """
    texts = [str(value) for value in values]
    if all(text.isdecimal() and (text == "0" or not text.startswith("0")) for text in texts):
        return [int(text) for text in texts]
    return list(texts)


def read_table(path: Path) -> TextTable:
    """A table from a ``.csv`` or ``.parquet`` file.

    Raises
    ------
    InvalidValueError
        If there is no such file, or it is not a table.
    MissingExtraError
        If pyarrow is needed and not installed.
    """
    _check_file(path)
    if path.suffix == ".parquet":
        return TextTable(path, read_parquet(path).to_pydict())
    names, *rows = csv_rows(path)
    return TextTable(path, {name: [row[place].strip() for row in rows] for place, name in enumerate(names)})


def read_matrix_file(path: Path, *, transpose: bool = False) -> NamedMatrix:
    """A matrix from a file.

    Parameters
    ----------
    path : Path
        ``.npz`` of ``scipy.sparse.save_npz``, Matrix Market (``.mtx``, ``.mtx.gz``), or a table (``.parquet``,
        ``.csv``) whose column ``target`` or ``household`` names the rows.
    transpose : bool
        Whether the file has one row for each household; one whose rows are named by a column ``household`` has.

    Returns
    -------
    NamedMatrix

    Raises
    ------
    InvalidValueError
        If there is no such file, or it cannot be read as a matrix.
    """
    _check_file(path)
    if not path.name.endswith(_MATRIX_SUFFIXES):
        raise InvalidValueError(explain(str(path), "its kind must be known.", expected=", ".join(_MATRIX_SUFFIXES)))
    if path.suffix not in (".parquet", ".csv"):
        matrix = _sparse(path)
        return NamedMatrix(matrix.T if transpose else matrix)
    matrix, columns, rows, key = _from_parquet(path) if path.suffix == ".parquet" else csv_matrix(path, NAME_COLUMNS)
    if key == "target" and transpose:
        must = "a file with a column 'target' has one row for each target."
        raise InvalidValueError(explain("--transpose", must, got=str(path), hint="leave --transpose out"))
    names = None if rows is None else as_names(rows)
    if transpose or key == "household":
        return NamedMatrix(matrix.T, as_names(columns), names)
    return NamedMatrix(matrix, names, as_names(columns))


def _sparse(path: Path) -> Any:
    if path.suffix == ".npz":
        return load_sparse(path)
    from scipy.io import mmread

    try:
        return mmread(path)
    except MemoryError:
        raise
    except Exception as error:  # SciPy, gzip and zlib raise several kinds for damaged files
        got = f"{type(error).__name__}: {error}"
        raise InvalidValueError(explain(str(path), "it must be Matrix Market.", got=got)) from error


def _from_parquet(path: Path) -> tuple[Any, list[Any], list[Any] | None, str | None]:
    """As :func:`csv_matrix`."""
    frame = opened(read_parquet(path))
    key = next((name for name in NAME_COLUMNS if name in frame.columns), None)
    columns = [name for name in frame.columns if name != key]
    if not columns:
        raise InvalidValueError(explain(str(path), "a matrix needs columns of numbers.", got=few([key])))
    rows = None if key is None else array_of(frame[key], str(path)).tolist()
    return columns_of_numbers(frame, columns, str(path)), columns, rows, key


def read_parquet(path: Path) -> Any:
    """A Parquet file as an Arrow table; the nameless index of pandas is called ``target``, or ``household``.

    Raises
    ------
    InvalidValueError
        If it is another file.
    MissingExtraError
        If pyarrow is not installed.
    """
    arrow = import_extra("pyarrow", extra="calibration", where=str(path))
    parquet = import_extra("pyarrow.parquet", extra="calibration", where=str(path))
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise InvalidValueError(explain(str(path), "it must be Parquet.", got=str(error))) from error
    names = table.column_names
    if "__index_level_0__" in names:  # pandas' nameless index
        index = "household" if "target" in names else "target"
        table = table.rename_columns([index if name == "__index_level_0__" else name for name in names])
    return table


def _check_file(path: Path) -> None:
    if not path.is_file():
        present = [other.name for other in path.absolute().parent.glob(f"*{path.suffix}")] if path.suffix else []
        hint = near_names(path.name, sorted(present)) if present else None
        raise InvalidValueError(explain(str(path), "the file must exist.", hint=hint))
