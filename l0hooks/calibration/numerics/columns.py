"""The matrix stored unit by unit: how it is made, copied and read with little extra memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Sparse = Any  # scipy's stubs disagree from version to version about what an array times an array is
_TRANSPOSED_AT_ONCE = 2**20  # entries up to which the matrix is transposed in one step
_PIECE_ENTRIES = 10_000  # entries that are worked on at a time, at least
_LEAST_PIECES, _MOST_PIECES = 4, 32


def stored_by_unit(
    rows: Sparse,
    scale: Floats,
    members: Integers,
    units: int,
    dtype: np.dtype[Any],
    *,
    entries_per_piece: int = _PIECE_ENTRIES,
) -> Sparse:
    """diag(scale)·M, stored unit by unit; a few rows of M are worked on at a time.

    Parameters
    ----------
    rows : sparse.csr_array, shape (T, n_households)
        M.
    scale : float64, shape (T,)
    members : int64, shape (n_households,)
        Unit of each household, −1 for one left out; the columns of a unit's households are added up.
    units : int
        How many there are.
    dtype : numpy.dtype
        Of the result.
    entries_per_piece : int, > 0
        How many are worked on at a time, at least.

    Returns
    -------
    sparse.csr_array, shape (units, T)

    Examples
    --------
    >>> matrix = sparse.csr_array([[1.0, 2.0, 0.0], [0.0, 3.0, 4.0]])
    >>> stored_by_unit(matrix, np.array([1.0, 10.0]), np.array([0, 0, 1]), 2, np.dtype("float32")).toarray()
    array([[ 3., 30.],
           [ 0., 40.]], dtype=float32)
    """
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    (targets, households), entries = rows.shape, rows.nnz
    index: type[np.signedinteger[Any]] = np.int32 if max(entries, targets, households) < 2**31 else np.int64
    columns = (_at_once if entries <= _TRANSPOSED_AT_ONCE else _by_pieces)(rows, scale, dtype, index, entries_per_piece)
    if units == households:
        return columns
    inside = np.flatnonzero(members >= 0)
    ones = np.ones(len(inside), dtype)
    merged = sparse.csr_array((ones, (members[inside], inside)), shape=(units, households)) @ columns
    merged.sort_indices()
    return merged


def _at_once(
    rows: Sparse, scale: Floats, dtype: np.dtype[Any], index: type[np.signedinteger[Any]], piece: int
) -> Sparse:
    """In one step: faster, with a copy of the matrix."""
    data = np.empty(rows.nnz, dtype)
    for part, some in pieces(rows, entries=piece):
        data[part] = rows.data[part] * np.repeat(scale[some], np.diff(rows.indptr[some.start : some.stop + 1]))
    entries = (data, rows.indices.astype(index, copy=False), rows.indptr.astype(index, copy=False))
    turned = sparse.csr_array(entries, shape=rows.shape).tocsc()
    return sparse.csr_array((turned.data, turned.indices, turned.indptr), shape=rows.shape[::-1])


def _by_pieces(
    rows: Sparse, scale: Floats, dtype: np.dtype[Any], index: type[np.signedinteger[Any]], piece: int
) -> Sparse:
    """With little memory beside the matrix, some rows at a time."""
    (targets, households), entries = rows.shape, rows.nnz
    ends = np.zeros(households + 1, index)
    np.cumsum(np.bincount(rows.indices, minlength=households), out=ends[1:])
    free, data, indices = ends[:-1].copy(), np.empty(entries, dtype), np.empty(entries, index)
    for _, some in pieces(rows, entries // households, entries=piece):  # each passes over all households
        part = sparse.csc_array(rows[some])
        counts = np.diff(part.indptr)
        places = np.arange(part.nnz, dtype=index) + np.repeat(free - part.indptr[:-1].astype(index), counts)
        data[places] = part.data * scale[some.start + part.indices]
        indices[places] = some.start + part.indices
        free += counts.astype(index)
    return sparse.csr_array((data, indices, ends), shape=(households, targets))


def row_norms(block: Sparse, *, entries_per_piece: int = _PIECE_ENTRIES) -> Floats:
    """The Euclidean norm of every row, in float64 sums.

    Examples
    --------
    >>> row_norms(sparse.csr_array([[3.0, 4.0], [0.0, 0.0]]))
    array([5., 0.])
    """
    sums = np.zeros(block.shape[0])
    for part, some in pieces(block, entries=entries_per_piece):
        starts = block.indptr[some.start : some.stop + 1]
        filled = np.diff(starts) > 0
        if filled.any():
            squares = np.square(block.data[part], dtype=np.float64)
            sums[some][filled] = np.add.reduceat(squares, (starts[:-1] - starts[0])[filled])
    norms: Floats = np.sqrt(sums)
    return norms


def rows_of(columns: Sparse, units: Integers, *, rough: bool = False) -> Sparse:
    """The rows of some units, in float64; if ``rough``, as they are stored.

    Examples
    --------
    >>> rows_of(sparse.csr_array(np.eye(3, dtype=np.float32)), np.array([0, 2])).dtype
    dtype('float64')
    """
    part = columns[units]
    if rough or part.dtype == np.float64:
        return part
    part.data = part.data.astype(np.float64)  # part.astype() would copy the indices as well
    return part


def compacted(block: Sparse, stay: Integers) -> Sparse:
    """Some rows of ``block``, moved together in its own memory: ``block`` must not be used again.

    Parameters
    ----------
    block : sparse.csr_array, shape (n, Q)
    stay : int64, ascending, shape (k,)

    Returns
    -------
    sparse.csr_array, shape (k, Q)

    Examples
    --------
    >>> compacted(sparse.csr_array([[1.0, 2.0], [3.0, 0.0], [0.0, 4.0]]), np.array([1, 2])).toarray()
    array([[3., 0.],
           [0., 4.]])
    """
    ends = np.zeros(len(stay) + 1, block.indptr.dtype)
    np.cumsum(np.diff(block.indptr)[stay], out=ends[1:])
    first, step = 0, max(1, len(stay) // _MOST_PIECES)
    while first < len(stay):  # from the front: rows only move forward, over those that are done
        last = min(first + step, len(stay))
        part, place = block[stay[first:last]], slice(ends[first], ends[last])
        block.data[place], block.indices[place] = part.data, part.indices
        first = last
    return sparse.csr_array(
        (block.data[: ends[-1]], block.indices[: ends[-1]], ends), shape=(len(stay), block.shape[1])
    )


def scale_rows(block: Sparse, factors: Floats) -> None:
    """Multiply every row by a number, in place.

    Examples
    --------
    >>> block = sparse.csr_array([[1.0, 2.0], [3.0, 0.0]])
    >>> scale_rows(block, np.array([10.0, 2.0]))
    >>> block.toarray()
    array([[10., 20.],
           [ 6.,  0.]])
    """
    for part, some in pieces(block):
        block.data[part] *= np.repeat(factors[some], np.diff(block.indptr[some.start : some.stop + 1]))


def weighted_squares(block: Sparse, curvature: Floats, *, entries_per_piece: int = _PIECE_ENTRIES) -> Floats:
    """Σᵢ curvatureᵢ·Bᵢ², the diagonal of a normal matrix: float64, shape (Q,).

    Examples
    --------
    >>> weighted_squares(sparse.csr_array([[1.0, 2.0], [3.0, 0.0]]), np.array([1.0, 2.0]))
    array([19.,  4.])
    """
    sums = np.zeros(block.shape[1])
    for part, some in pieces(block, entries=entries_per_piece):
        squares = np.square(block.data[part], dtype=np.float64)
        squares *= np.repeat(curvature[some], np.diff(block.indptr[some.start : some.stop + 1]))
        sums += np.bincount(block.indices[part], squares, minlength=len(sums))
    return sums


def shared(values: Floats) -> Floats:
    """``values``, or, if all are equal, a read-only view of one number.

    Examples
    --------
    >>> shared(np.ones(3)).strides, shared(np.arange(3.0)).strides
    ((0,), (8,))
    """
    return np.broadcast_to(values[0], values.shape) if len(values) and (values == values[0]).all() else values


def pieces(block: Sparse, most: int = _MOST_PIECES, *, entries: int = _PIECE_ENTRIES) -> Iterator[tuple[slice, slice]]:
    """Slices of the entries and of the rows of a matrix, piece by piece: at most ``most``, of at least ``entries``.

    Examples
    --------
    >>> list(pieces(sparse.csr_array(np.eye(3))))
    [(slice(0, 3, None), slice(0, 3, None))]
    """
    count, rows = max(entries, block.nnz // min(_MOST_PIECES, max(_LEAST_PIECES, most))), block.shape[0]
    first = 0
    while first < rows:
        last = int(np.searchsorted(block.indptr, block.indptr[first] + count, side="right")) - 1
        last = min(max(first + 1, last), rows)
        yield slice(int(block.indptr[first]), int(block.indptr[last])), slice(first, last)
        first = last
