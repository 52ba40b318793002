"""Tables of a result as frames and files; a file is written as a whole or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from l0hooks._files import replacing
from l0hooks.calibration.data.names import Axis
from l0hooks.errors import import_extra

if TYPE_CHECKING:
    import pandas as pd

EXTRA = "calibration"


def to_frame(columns: Mapping[str, Any], axis: Axis | None) -> pd.DataFrame:
    """Columns as a frame, the names of ``axis`` its index.

    Raises
    ------
    MissingExtraError
        If pandas is not installed.
    """
    pandas = import_extra("pandas", extra=EXTRA, where="tables of a calibration")
    index = None
    if axis is not None:
        labels = axis.labels
        if isinstance(labels, tuple) and all(isinstance(label, tuple) for label in labels):
            index = pandas.MultiIndex.from_tuples(labels)
        else:
            index = pandas.Index(labels, name=axis.kind)
    frame: pd.DataFrame = pandas.DataFrame(dict(columns), index=index)
    return frame


def write_csv(path: str | os.PathLike[str], columns: Mapping[str, Any]) -> None:
    """Columns as CSV; numbers with all their digits.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_csv(Path(folder) / "w.csv", {"household": ["a", "b"], "weight": np.array([0.1, 2.0])})
    ...     (Path(folder) / "w.csv").read_text().splitlines()
    ['household,weight', 'a,0.1', 'b,2.0']
    """
    lists = [values.tolist() if isinstance(values, np.ndarray) else values for values in columns.values()]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*lists, strict=True))


def write_parquet(path: str | os.PathLike[str], columns: Mapping[str, Any]) -> None:
    """Columns as Parquet; names of mixed types or tuples become strings.

    Raises
    ------
    MissingExtraError
        If pyarrow is not installed.
    """
    arrow = import_extra("pyarrow", extra=EXTRA, where="Parquet files")
    parquet = import_extra("pyarrow.parquet", extra=EXTRA, where="Parquet files")
    plain = {name: values if isinstance(values, np.ndarray) else _alike(values) for name, values in columns.items()}
    with replacing(path) as temporary:
        parquet.write_table(arrow.table(plain), temporary)


def _alike(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values}
    return values if len(kinds) <= 1 and kinds <= {str, int, float, bool} else [str(value) for value in values]
