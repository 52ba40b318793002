"""The matrix of a survey as the user has it, checked, as one CSR array with names."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from l0hooks.calibration.names import Axis, check_distinct, few, is_frame
from l0hooks.calibration.problem import Sparse
from l0hooks.errors import InvalidValueError, explain

_WHERE = "M"


def read_matrix(given: object) -> tuple[Sparse, Axis, Axis]:
    """``given`` as a CSR array, its targets and its households.

    Parameters
    ----------
    given : scipy.sparse array or matrix of any format, array_like, or DataFrame; shape (n_targets, n_households)
        What one household adds to each target. The index of a frame names the targets, its columns the households.

    Returns
    -------
    matrix : sparse.csr_array, shape (n_targets, n_households)
        Of a real dtype, without duplicates; shares memory with ``given`` where it can, which is not changed.
    targets, households : Axis

    Raises
    ------
    InvalidValueError
        If it is not two-dimensional or is empty, or holds NaN, infinity or what is no number; if names are not
        distinct.

    Examples
    --------
    >>> matrix, targets, households = read_matrix([[1, 0, 2], [0, 3, 0]])
    >>> matrix.nnz, targets.count, households.count
    (3, 2, 3)
    """
    rows: tuple[Hashable, ...] | None = None
    columns: tuple[Hashable, ...] | None = None
    if is_frame(given):
        rows, columns, given = _from_frame(given)
    matrix: Any = given if sparse.issparse(given) else _dense(given)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InvalidValueError(
            explain(_WHERE, "it must have two axes, targets and households.", got=f"shape {matrix.shape}")
        )
    if matrix.dtype.kind not in "biuf":
        raise InvalidValueError(explain(_WHERE, "values must be real numbers.", got=f"{matrix.dtype} values"))
    csr = sparse.csr_array(matrix)
    if csr.dtype.kind == "b":
        csr = csr.astype(np.float64)
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    targets = Axis("target", csr.shape[0], rows)
    households = Axis("household", csr.shape[1], columns)
    _check_finite(csr, targets, households)
    return csr, targets, households


def _dense(given: object) -> NDArray[Any]:
    try:
        return np.asarray(given)
    except ValueError as error:
        raise InvalidValueError(explain(_WHERE, "it must be a matrix.", got=str(error))) from error


def _from_frame(frame: Any) -> tuple[tuple[Hashable, ...], tuple[Hashable, ...], Any]:
    pandas = sys.modules["pandas"]
    rows = check_distinct(frame.index.tolist(), "M's rows (targets)")
    columns = check_distinct(frame.columns.tolist(), "M's columns (households)")
    strange = [name for name, kind in zip(columns, frame.dtypes, strict=True) if not _real(kind)]
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
        return rows, columns, frame.sparse.to_coo()
    return rows, columns, frame.to_numpy(dtype=np.float64, na_value=np.nan)


def _real(kind: Any) -> bool:
    pandas = sys.modules["pandas"]
    inner = kind.subtype if isinstance(kind, pandas.SparseDtype) else kind
    types = pandas.api.types
    return bool(types.is_bool_dtype(inner) or types.is_integer_dtype(inner) or types.is_float_dtype(inner))


def _check_finite(matrix: Sparse, targets: Axis, households: Axis) -> None:
    bad = np.flatnonzero(~np.isfinite(matrix.data))
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
