"""The matrix of a survey as the user has it, checked, as one CSR array with names."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from l0hooks.calibration.data.frames import (
    NAME_COLUMNS,
    array_of,
    columns_of_numbers,
    few,
    is_frame,
    is_pandas,
    opened,
    sparse_of_tensor,
    tensor_values,
)
from l0hooks.calibration.data.indices import check_indices
from l0hooks.calibration.data.names import Axis, check_distinct
from l0hooks.calibration.numerics.columns import Sparse, pieces
from l0hooks.errors import InvalidValueError, explain

_WHERE = "M"
_CANONICAL_FORMATS = ("csr", "csc", "bsr", "coo")  # of SciPy, that tell whether entries are added up


@dataclass(frozen=True, eq=False)
class NamedMatrix:
    """A sparse matrix or an array with names, as a DataFrame has them.

    Parameters
    ----------
    matrix : scipy.sparse array or matrix, or array_like; shape (T, N)
    targets : sequence of hashable, length T, optional
    households : sequence of hashable, length N, optional

    Examples
    --------
    >>> named = NamedMatrix([[1, 1], [0, 2]], targets=["people", "cars"])
    >>> read_matrix(named)[1].names
    ('people', 'cars')
    """

    matrix: object
    targets: Sequence[Hashable] | None = None
    households: Sequence[Hashable] | None = None


def read_matrix(given: object) -> tuple[Sparse, Axis, Axis]:
    """``given`` as a CSR array, its targets and its households.

    Parameters
    ----------
    given : scipy.sparse array or matrix of any format, array_like, tensor, frame or NamedMatrix; shape (T, N)
        What one household adds to each target. A frame's columns are the households, and its column ``target``, else
        the index of pandas, names the targets. If that is called ``household``, rows and columns are exchanged.

    Returns
    -------
    matrix : sparse.csr_array, shape (T, N)
        Of a real dtype, without duplicates; shares memory with ``given`` where it can, which is not changed.
    targets, households : Axis

    Raises
    ------
    InvalidValueError
        If it is not two-dimensional or is empty, holds NaN, infinity or something that is not a number, or if names
        are not distinct.

    Examples
    --------
    >>> matrix, targets, households = read_matrix([[1, 0, 2], [0, 3, 0]])
    >>> matrix.nnz, targets.count, households.count
    (3, 2, 3)
    """
    rows: tuple[Hashable, ...] | None = None
    columns: tuple[Hashable, ...] | None = None
    if isinstance(given, NamedMatrix):
        rows, columns = _names(given.targets, "targets of M"), _names(given.households, "households of M")
        given = given.matrix
    given = opened(given)
    if is_frame(given):
        found = _from_frame(given)
        given = found.matrix
        rows = _names(found.targets, "M's rows (targets)") if rows is None else rows
        columns = _names(found.households, "M's columns (households)") if columns is None else columns
    if isinstance(given, torch.Tensor):
        strided = given.layout is torch.strided or given.ndim != 2
        given = tensor_values(given, _WHERE) if strided else sparse_of_tensor(given)
    matrix: Any = given if sparse.issparse(given) else _dense(given)
    if sparse.issparse(matrix):
        check_indices(matrix, _WHERE)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InvalidValueError(
            explain(_WHERE, "it must have two axes, targets and households.", got=f"shape {matrix.shape}")
        )
    if matrix.dtype.kind not in "biuf":
        raise InvalidValueError(explain(_WHERE, "values must be real numbers.", got=f"{matrix.dtype} values"))
    if matrix.dtype == np.float16:
        matrix = matrix.astype(np.float32)  # SciPy's sparse arrays cannot hold float16
    if matrix.dtype.kind in "iu" and not _distinct(matrix):
        matrix = matrix.astype(np.float64)  # sums of small integers would wrap around
    csr = sparse.csr_array(matrix)
    if csr.dtype.kind == "b":
        csr = csr.astype(np.float64)
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    for names, size, what in ((rows, csr.shape[0], "targets"), (columns, csr.shape[1], "households")):
        if names is not None and len(names) != size:
            raise InvalidValueError(
                explain(_WHERE, f"it must have as many {what} as names.", expected=len(names), got=size)
            )
    targets = Axis("target", csr.shape[0], rows)
    households = Axis("household", csr.shape[1], columns)
    _check_finite(csr, targets, households)
    return csr, targets, households


def _distinct(matrix: Any) -> bool:
    """Whether no position can have several entries, as far as the format tells."""
    stored: Any = matrix  # the stubs of issparse know neither attribute
    return not sparse.issparse(matrix) or bool(stored.format in _CANONICAL_FORMATS and stored.has_canonical_format)


def _names(given: Sequence[Hashable] | None, what: str) -> tuple[Hashable, ...] | None:
    return None if given is None else check_distinct(list(given), what)


def _dense(given: object) -> NDArray[Any]:
    if isinstance(given, np.ma.MaskedArray):
        given = np.ma.filled(given.astype(np.float64), np.nan)  # masked values are missing
    try:
        return np.asarray(given)
    except ValueError as error:
        raise InvalidValueError(explain(_WHERE, "it must be a matrix.", got=str(error))) from error


def _from_frame(frame: Any) -> NamedMatrix:
    """A frame with one row for each target, or for each household if that is what its names are called."""
    pandas = is_pandas(frame, "DataFrame")
    key = next((name for name in NAME_COLUMNS if name in frame.columns), None)
    if pandas and key is not None:
        frame = frame.set_index(key)
    elif pandas and frame.index.name in NAME_COLUMNS:
        key = frame.index.name
    names = [name for name in frame.columns if name != key]
    rows = frame.index.tolist() if pandas else None if key is None else array_of(frame[key], _WHERE).tolist()
    matrix = _from_pandas(frame) if pandas else columns_of_numbers(frame, names, _WHERE)
    return NamedMatrix(matrix.T, names, rows) if key == "household" else NamedMatrix(matrix, rows, names)


def _from_pandas(frame: Any) -> Any:
    pandas = sys.modules["pandas"]
    strange = [name for name, kind in zip(frame.columns, frame.dtypes, strict=True) if not _real(kind)]
    if strange:
        raise InvalidValueError(
            explain(
                _WHERE,
                "every column must hold numbers.",
                got=f"not so in {few(strange)}",
                hint="set_index() with the column that names the targets" if len(strange) == 1 else None,
            )
        )
    if all(isinstance(kind, pandas.SparseDtype) and kind.fill_value == 0 for kind in frame.dtypes):
        return frame.sparse.to_coo()
    return frame.to_numpy(dtype=np.float64, na_value=np.nan)


def _real(kind: Any) -> bool:
    pandas = sys.modules["pandas"]
    inner = kind.subtype if isinstance(kind, pandas.SparseDtype) else kind
    types = pandas.api.types
    return bool(types.is_bool_dtype(inner) or types.is_integer_dtype(inner) or types.is_float_dtype(inner))


def _check_finite(matrix: Sparse, targets: Axis, households: Axis) -> None:
    parts = (part for part, _ in pieces(matrix))  # no array of the matrix's size is made
    bad = np.concatenate([part.start + np.flatnonzero(~np.isfinite(matrix.data[part])) for part in parts])
    if not len(bad):
        return
    row = int(np.searchsorted(matrix.indptr, bad[0], side="right")) - 1
    place = f"target {targets.shown([row])}, household {households.shown([matrix.indices[bad[0]]])}"
    raise InvalidValueError(
        explain(
            _WHERE,
            "values must be finite.",
            got=f"{matrix.data[bad[0]]} at {place}" + (f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""),
        )
    )
