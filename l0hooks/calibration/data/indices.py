"""Whether the indices of sparse matrices are in range: SciPy's compiled code does not look, and may crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from l0hooks.errors import InvalidValueError, explain

_INDEX_ARRAYS = ("indices", "indptr", "row", "col", "offsets", "coords")
_LARGEST = 2**31 - 1  # SciPy may cut larger indices to 32 bits


def check_indices(matrix: Any, where: str) -> None:
    """Refuse a sparse matrix whose indices are not those of its shape.

    Raises
    ------
    InvalidValueError

    Examples
    --------
    >>> matrix = sparse.csr_array(np.eye(3))
    >>> matrix.indices[1] = 7
    >>> check_indices(matrix, "M")
    Traceback (most recent call last):
    l0hooks.errors.InvalidValueError: M: the indices of a sparse matrix must lie within its shape.
      expected: indices from 0 to 2
      got: 0 to 7
    """
    if matrix.format in ("csr", "csc", "bsr"):
        block = matrix.blocksize if matrix.format == "bsr" else (1, 1)
        rows, columns = (size // part for size, part in zip(matrix.shape, block, strict=True))
        major, minor = (columns, rows) if matrix.format == "csc" else (rows, columns)
        used = _check_pointers(matrix.indptr, major, len(matrix.indices), where)
        _check_range(matrix.indices[:used], minor, min(used, len(matrix.data)), where)
    elif matrix.format == "coo":
        for index, size in zip(matrix.coords, matrix.shape, strict=True):
            _check_range(index, size, len(matrix.data), where)


def load_sparse(path: Path) -> Any:
    """The matrix of a file that ``scipy.sparse.save_npz`` wrote.

    Raises
    ------
    InvalidValueError
        If it is another file, damaged, or its indices are out of range.
    """
    where, must = str(path), "it must be a file of scipy.sparse.save_npz."
    try:
        with np.load(path, allow_pickle=False) as file:
            _check_raw({name: file[name] for name in _INDEX_ARRAYS if name in file}, file["shape"], where)
        matrix: Any = sparse.load_npz(path)
    except (InvalidValueError, MemoryError):
        raise
    except Exception as error:  # zip, zlib, NumPy and SciPy raise some ten kinds for damaged files
        raise InvalidValueError(explain(where, must, got=f"{type(error).__name__}: {error}")) from error
    if not sparse.issparse(matrix):
        raise InvalidValueError(explain(where, must, got=type(matrix).__name__))
    check_indices(matrix, where)
    return matrix


def _check_raw(indices: dict[str, Any], shape: Any, where: str) -> None:
    """Refuse what SciPy would change in silence: fractions, and numbers that it cuts to 32 bits."""
    most = max(_LARGEST, int(np.max(shape)))
    for name, index in indices.items():
        if index.dtype.kind not in "iu":
            raise InvalidValueError(explain(where, f"{name} must be whole numbers.", got=f"{index.dtype} numbers"))
        limit = len(indices["indices"]) if name == "indptr" and "indices" in indices else most
        largest = 0 if index.size == 0 else max(abs(int(index.min())), abs(int(index.max())))
        if largest > limit:
            raise InvalidValueError(explain(where, f"{name} must be at most {limit:,}.", got=f"{largest:,}"))


def _check_pointers(pointers: Any, count: int, entries: int, where: str) -> int:
    """How many entries the pointers speak of."""
    whole = pointers.shape == (count + 1,)
    if not whole or pointers[0] != 0 or pointers[-1] > entries or bool((pointers[1:] < pointers[:-1]).any()):
        raise InvalidValueError(
            explain(
                where,
                "the pointers of a sparse matrix must rise from 0 to the number of its entries.",
                expected=f"{count + 1:,} pointers up to {entries:,}",
                got=f"{pointers[0]} to {pointers[-1]}, not in order" if whole else f"shape {pointers.shape}",
            )
        )
    return int(pointers[-1])


def _check_range(index: Any, size: int, entries: int, where: str) -> None:
    must = "the indices of a sparse matrix must lie within its shape."
    if index.shape != (entries,):
        raise InvalidValueError(explain(where, must, expected=f"{entries:,} indices", got=f"shape {index.shape}"))
    if entries and not (index.min() >= 0 and index.max() < size):
        got = f"{index.min()} to {index.max()}"
        raise InvalidValueError(explain(where, must, expected=f"indices from 0 to {size - 1}", got=got))
