"""Dense Cholesky factors of normal matrices, as preconditioners where conjugate gradients alone take too long."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg

from l0hooks.calibration.problem import Floats, Sparse

Solve = Callable[[Floats], Floats]
_RAISED = 1e-5  # what is added to a unit diagonal, so that float32 can factorise it
_SPARSE_SPEED, _DENSE_SPEED, _CHUNK = 3e8, 4e10, 2000  # products a second of either kind; rows made dense at a time
_SLAB = 256  # rows of a sparse product made at a time


def factorised(block: Sparse, curvature: Floats, ridge: Floats, diagonal: Floats) -> Solve:
    r"""v → H⁻¹ v for H = Bᵀ diag(curvature) B + diag(ridge), B the block, by a Cholesky factor of H nearly.

    H is scaled to a unit diagonal and raised a little, and factorised in float32: a preconditioner, no solver.

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
    weighted = block[used].astype(np.float32)
    weighted.data *= np.repeat(np.sqrt(curvature[used]), np.diff(weighted.indptr)).astype(np.float32)
    weighted.data *= root.astype(np.float32)[weighted.indices]
    entries = np.diff(weighted.indptr).astype(np.float64)
    dense_cost = float(block.shape[1]) ** 2 * len(used) / _DENSE_SPEED
    matrix = np.zeros((block.shape[1],) * 2, np.float32)
    if float(entries @ entries) / _SPARSE_SPEED < dense_cost:
        rows = weighted.T.tocsr()
        for start in range(0, block.shape[1], _SLAB):  # the sparse product as a whole takes several times its memory
            matrix[start : start + _SLAB] = (rows[start : start + _SLAB] @ weighted).toarray()
    else:
        for start in range(0, len(used), _CHUNK):
            part = weighted[start : start + _CHUNK].toarray()
            matrix += part.T @ part
    matrix[np.diag_indices_from(matrix)] += (ridge * root**2 + _RAISED).astype(np.float32)
    factor = linalg.cho_factor(matrix.T, lower=True, overwrite_a=True, check_finite=False)

    def solve(v: Floats) -> Floats:
        inner = linalg.cho_solve(factor, (root * v).astype(np.float32), check_finite=False)
        return root * np.asarray(inner, np.float64)

    return solve
