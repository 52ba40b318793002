"""A design matrix with centred, scaled columns, which are never formed as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from l0hooks.errors import InvalidValueError, explain

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CONSTANT_COLUMN = 1e-12  # a column is constant if its deviation is below this share of its mean
LARGE_MEAN = 1e3  # mean² over variance; above it the variance is computed again from deviations, against cancellation


class Design:
    """Standardised columns x̃ⱼ = (xⱼ − μⱼ)/σⱼ of a dense or sparse X, with weighted means and standard deviations.

    X itself is never changed.

    Parameters
    ----------
    x : array or scipy.sparse array or matrix of any format, shape (n, p), float32 or float64, finite
        A sparse X is never made dense; of a dense X single columns are copied.
    sample_weight : array, shape (n,), >= 0, optional
        A weight counts as that many copies of the row. Rows of weight zero are left out.
    center : bool
        Subtract the means, which is the same as an intercept without penalty.

    Raises
    ------
    InvalidValueError
        If a shape does not fit, or weights are not finite, negative or all zero.

    Examples
    --------
    >>> design = Design(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> design.mean.tolist(), design.scale.tolist(), design.usable.tolist()
    ([2.0, 5.0], [1.0, 1.0], [True, False])
    """

    def __init__(self, x: Any, sample_weight: Floats | None = None, *, center: bool = True) -> None:
        if len(x.shape) != 2:
            raise InvalidValueError(explain("Design", "X must be a matrix.", expected="(n, p)", got=tuple(x.shape)))
        self.rows = np.arange(x.shape[0])  # the rows of weight above zero
        weight = None if sample_weight is None else _checked_weights(sample_weight, x.shape[0])
        if weight is not None:
            self.rows = np.flatnonzero(weight)
            weight = weight[self.rows]
            if np.ptp(weight) == 0:  # equal weights: only their sum matters
                self.total, weight = float(weight.sum()), None
            else:
                self.total = float(weight.sum())
        else:
            self.total = float(x.shape[0])
        all_rows = len(self.rows) == x.shape[0]
        self.sparse = sparse.issparse(x)
        self.center, self.weight, self.p, self.n = center, weight, x.shape[1], len(self.rows)
        self._csc: Any = None
        if self.sparse:
            csr = sparse.csr_array(x, dtype=np.float64)
            self.x: Any = csr if all_rows else csr[self.rows]
            self._csc = self.x.tocsc()
        else:
            self.x = np.asarray(x, dtype=np.float64) if all_rows else np.asarray(x, dtype=np.float64)[self.rows]
        self._moments()

    def reweighted(self, factor: Floats) -> Design:
        """The same rows with weights multiplied by ``factor``; means and scales follow.

        Parameters
        ----------
        factor : float64 array, shape (n,), >= 0
        """
        other = Design.__new__(Design)
        other.x, other._csc, other.sparse, other.rows = self.x, self._csc, self.sparse, self.rows
        other.center, other.p, other.n = self.center, self.p, self.n
        other.weight = factor if self.weight is None else factor * self.weight
        if self.weight is None:
            other.weight = factor * (self.total / self.n)
        other.total = float(other.weight.sum())
        other._moments()
        return other

    def _moments(self) -> None:
        ones = np.ones(self.n) if self.weight is None else self.weight
        mass = ones.sum()
        self.column_mean = self._transposed_times(ones) / mass
        square = self._squares(ones) / mass
        self.mean = self.column_mean if self.center else np.zeros(self.p)
        variance = square - self.mean**2
        for j in np.flatnonzero(self.mean**2 > LARGE_MEAN * np.maximum(variance, 0)):
            value = self._columns(np.array([j])) - self.mean[j]
            variance[j] = float((value[:, 0] ** 2) @ ones) / mass
        deviation = np.sqrt(np.maximum(variance, 0))
        self.usable = deviation > CONSTANT_COLUMN * np.abs(self.column_mean)
        self.scale = np.where(self.usable, deviation, 1.0)

    def _squares(self, weight: Floats) -> Floats:
        if self.sparse:
            return np.asarray(self.x.power(2).T @ weight)
        if self.weight is None:
            return np.asarray(np.einsum("ij,ij->j", self.x, self.x))
        return np.asarray(np.einsum("ij,ij,i->j", self.x, self.x, weight))

    def _transposed_times(self, v: Floats) -> Floats:
        return np.asarray(self.x.T @ v)

    def _columns(self, columns: Ints) -> Floats:
        return np.asarray(self._csc[:, columns].toarray() if self.sparse else self.x[:, columns])

    def weighted(self, v: Floats) -> Floats:
        """``v`` with its rows scaled so that sums over rows are weighted means."""
        if self.weight is None:
            return v / self.n
        return v * (self.weight / self.total if v.ndim == 1 else (self.weight / self.total)[:, None])

    def average(self, v: Floats) -> Floats:
        """The weighted mean of each column of ``v``."""
        return np.asarray(self.weighted(v).sum(0))

    def cross(self, v: Floats, columns: Ints | None = None) -> Floats:
        """``x̃ᵀWv`` over the sum of weights, shape (p or len(columns), c), for ``v`` of shape (n, c)."""
        small = self.weighted(v)
        where: Ints | slice = slice(None) if columns is None else columns
        result = self._transposed_times(small) if columns is None else np.asarray(self._part(columns).T @ small)
        if self.center:
            result = result - self.mean[where, None] * small.sum(0)
        result = result / self.scale[where, None]
        result[~self.usable[where]] = 0
        return np.asarray(result)

    def standardized(self, columns: Ints) -> Floats:
        """The columns x̃ themselves, dense, shape (n, len(columns))."""
        result = (self._columns(columns) - self.mean[columns]) / self.scale[columns]
        result[:, ~self.usable[columns]] = 0
        return np.asarray(result)

    def _part(self, columns: Ints) -> Any:
        return self._csc[:, columns] if self.sparse else self.x[:, columns]

    def gram(self, columns: Ints, others: Ints | None = None) -> Floats:
        """Rows ``columns`` of ``x̃ᵀWx̃`` over the sum of weights, shape (len(columns), p or len(others)).

        Parameters
        ----------
        columns, others : int64 array
        """
        where = slice(None) if others is None else others
        mean, scale = self.mean[where], self.scale[where]
        if self.sparse:
            result = self._sparse_gram(columns, others) - np.outer(self.mean[columns], mean)
        else:
            # centring one side is enough; the outer product below removes the rounding of the mean
            left = self.weighted(self.x.take(columns, 1) - self.mean[columns])
            result = left.T @ (self.x if others is None else self.x.take(others, 1))
            if self.center:
                result -= np.outer(left.sum(0), mean)
        result /= np.outer(self.scale[columns], scale)
        if not self.usable.all():
            result[~self.usable[columns]] = 0
            result[:, ~self.usable[where]] = 0
        return result

    def _sparse_gram(self, columns: Ints, others: Ints | None) -> Floats:
        left = self._csc[:, columns].T.tocsr()
        ones = np.full(self.n, 1 / self.n) if self.weight is None else self.weight / self.total
        left.data = left.data * ones[left.indices]
        right = self.x if others is None else self._csc[:, others].tocsr()
        return np.asarray((left @ right).toarray())

    def times(self, columns: Ints, b: Floats) -> Floats:
        """``x̃[:, columns] @ b``, shape (n, c), for ``b`` of shape (len(columns), c)."""
        scaled = b / self.scale[columns][:, None]
        scaled[~self.usable[columns]] = 0
        part = self._part(columns)
        if self.center and not self.sparse:
            return np.asarray((part - self.mean[columns]) @ scaled)
        return np.asarray(part @ scaled) - self.mean[columns] @ scaled


def _checked_weights(sample_weight: Floats, n: int) -> Floats:
    weight = np.asarray(sample_weight, dtype=np.float64)
    if weight.shape != (n,):
        must = "sample_weight must have one weight for each row."
        raise InvalidValueError(explain("Design", must, expected=(n,), got=weight.shape))
    if not (np.isfinite(weight).all() and (weight >= 0).all() and weight.any()):
        must = "weights must be finite, not negative and not all zero."
        raise InvalidValueError(explain("Design", must, got=f"from {weight.min()} to {weight.max()}"))
    return weight
