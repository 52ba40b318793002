"""Factors of normal matrices, as preconditioners where conjugate gradients alone take too long.

Targets of one place share no household with those of another, so the normal matrix of a survey and its factor are
mostly zeros. Where they are not, a dense factor is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.sparse.linalg import splu

from l0hooks.calibration.numerics.columns import Floats, Integers, Sparse, pieces, scale_rows

_ADDED_TO_DIAGONAL = 1e-5  # of the scaled matrix, so that float32 can factorise it
_SPARSE_SPEED, _DENSE_SPEED = 3e8, 4e10  # products per second of a sparse and of a dense matrix
_DENSE_ROWS = 1000  # of the block, made dense at a time
_SLAB_ROWS, _LEAST_SLABS = 256, 16  # rows of a sparse product made at a time, at most; slabs that share all entries
_DENSE_FROM = 0.1  # share of non-zero entries from which a matrix counts as dense
_STALE_SPARSE, _STALE_DENSE = 30, 20  # iterations with an old factor, after which a new one costs less


class Factor(Protocol):
    """What :func:`factorised` returns."""

    @property
    def stale(self) -> int:
        """Conjugate gradient steps to try with the factor of an earlier matrix, before a new one is made."""
        ...

    def __call__(self, v: Floats) -> Floats:
        """H⁻¹ v."""
        ...


def factorised(block: Sparse, curvature: Floats, ridge: Floats, diagonal: Floats) -> Factor:
    r"""v → H⁻¹ v for H = Bᵀ diag(curvature) B + diag(ridge), B the block, by an approximate factor of H.

    H is scaled to a unit diagonal, raised a little, and factorised in float32, by a sparse factor where at most a tenth
    of it is not zero: a preconditioner, not a solver.

    Parameters
    ----------
    block : sparse.csr_array, shape (n, Q)
    curvature : float64, >= 0, shape (n,)
    ridge : float64, >= 0, shape (Q,)
    diagonal : float64, > 0, shape (Q,)
        H's.

    Returns
    -------
    callable, float64 of shape (Q,) to float64 of shape (Q,)

    Examples
    --------
    >>> from scipy import sparse
    >>> solve = factorised(sparse.csr_array(np.diag([1.0, 2.0])), np.ones(2), np.zeros(2), np.array([1.0, 4.0]))
    >>> solve(np.array([1.0, 4.0])).round(3)
    array([1., 1.])
    """
    root = 1 / np.sqrt(diagonal)
    used = np.flatnonzero(curvature)
    entries = np.diff(block.indptr)[used].astype(np.float64)
    rows, raised = block.shape[1], ridge * root**2 + _ADDED_TO_DIAGONAL
    if float(entries @ entries) / _SPARSE_SPEED < float(rows) ** 2 * len(used) / _DENSE_SPEED:
        matrix = _sparse_product(block, curvature, root, raised)
        return _dense_factor(matrix, root) if isinstance(matrix, np.ndarray) else _sparse_factor(matrix, root)
    dense = _dense_product(block, used, curvature, root)
    dense[np.diag_indices_from(dense)] += raised.astype(np.float32)
    return _dense_factor(dense, root)


def conjugate_gradients(
    product: Callable[[Floats], Floats],
    x: Floats,
    residual: Floats,
    precondition: Callable[[Floats], Floats],
    goal: float,
    limit: int,
) -> tuple[Floats, Floats]:
    """Preconditioned conjugate gradients from x, until ‖residual‖ <= goal, or ``limit`` times; x and the residual.

    Examples
    --------
    >>> right = np.array([2.0, 6.0])
    >>> x, _ = conjugate_gradients(lambda p: 2 * p, np.zeros(2), right, lambda v: v, 1e-9, 9)
    >>> x
    array([1., 3.])

    References
    ----------
    Hestenes & Stiefel (1952), Methods of conjugate gradients for solving linear systems, section 3.
    """
    z = precondition(residual)
    p, rz = z, float(residual @ z)
    for _ in range(limit):
        if float(np.linalg.norm(residual)) <= goal:
            break
        image = product(p)
        length = rz / float(p @ image)
        x = x + length * p
        residual = residual - length * image
        z = precondition(residual)
        following = float(residual @ z)
        p, rz = z + (following / rz) * p, following
    return x, residual


def _sparse_product(block: Sparse, curvature: Floats, root: Floats, ridge: Floats) -> Any:
    """The scaled matrix, made some rows at a time, with less memory than one product of the whole matrices takes.

    A CSC array, or a NumPy array where more than a tenth is not zero.
    """
    count = block.shape[1]
    most = int(_DENSE_FROM * count**2)
    data, indices, ends = np.empty(most, np.float32), np.empty(most, np.int32), np.zeros(count + 1, np.int32)
    slabs = _slabs(block)
    for some in slabs:
        slab, filled = _slab(block, curvature, root, ridge, some), ends[some.start]
        if filled + slab.nnz > most:
            break
        part = slice(filled, filled + slab.nnz)
        data[part], indices[part] = slab.data, slab.indices
        ends[some.start + 1 : some.stop + 1] = filled + slab.indptr[1:]
    else:  # symmetric: rows are columns
        return sparse.csc_array((data[: ends[-1]], indices[: ends[-1]], ends), shape=(count, count))
    del data, indices
    dense = np.zeros((count, count), np.float32)
    for some in slabs:
        dense[some] = _slab(block, curvature, root, ridge, some).toarray()
    return dense


def _slabs(block: Sparse) -> list[slice]:
    """Slices of targets, each with a limited number of targets and of entries."""
    support = np.zeros(block.shape[1], np.int64)
    for part, _ in pieces(block):
        support += np.bincount(block.indices[part], minlength=len(support))
    found, start, entries = [], 0, np.concatenate([[0], np.cumsum(support)])
    while start < len(support):
        stop = int(np.searchsorted(entries, entries[start] + block.nnz // _LEAST_SLABS, side="right")) - 1
        stop = min(max(stop, start + 1), start + _SLAB_ROWS, len(support))
        found.append(slice(start, stop))
        start = stop
    return found


def _slab(block: Sparse, curvature: Floats, root: Floats, ridge: Floats, some: slice) -> Sparse:
    """Rows of the scaled matrix."""
    left = block[:, some]
    left = left.copy() if left is block else left  # a slice of everything is not a copy
    scale_rows(left, curvature)
    left.eliminate_zeros()  # of units at their bounds
    slab = left.T.tocsr() @ block
    scale_rows(slab, root[some])
    slab.data = np.multiply(slab.data, root[slab.indices], dtype=np.float32, casting="same_kind")
    diagonal = ridge[some].astype(np.float32)
    return slab + sparse.diags_array(diagonal, offsets=some.start, shape=slab.shape, format="csr")


def _dense_product(block: Sparse, used: Integers, curvature: Floats, root: Floats) -> NDArray[np.float32]:
    matrix = np.zeros((block.shape[1],) * 2, np.float32)
    for start in range(0, len(used), _DENSE_ROWS):
        some = used[start : start + _DENSE_ROWS]
        rows = block[some]
        scale_rows(rows, np.sqrt(curvature[some]))
        rows.data *= root[rows.indices]
        part = rows.astype(np.float32).toarray()
        matrix += part.T @ part
    return matrix


@dataclass(frozen=True)
class _Scaled:
    """A factor of the scaled matrix, and the scale."""

    inner: Any
    root: Floats
    stale: int

    def __call__(self, v: Floats) -> Floats:
        return self.root * np.asarray(self.inner((self.root * v).astype(np.float32)), np.float64)


def _sparse_factor(matrix: Sparse, root: Floats) -> Factor:
    # symmetric and positive definite: no pivots away from the diagonal are needed, and fill stays low
    options = {"SymmetricMode": True}
    factor = splu(matrix, permc_spec="COLAMD", diag_pivot_thresh=0.0, panel_size=4, options=options)
    return _Scaled(factor.solve, root, _STALE_SPARSE)


def _dense_factor(matrix: NDArray[np.float32], root: Floats) -> Factor:
    factor = linalg.cho_factor(matrix.T, lower=True, overwrite_a=True, check_finite=False)
    return _Scaled(lambda v: linalg.cho_solve(factor, v, check_finite=False), root, _STALE_DENSE)
