"""Weighted rows of a dense or sparse table, standardised in batches and drawn in proportion to their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

MAX_DEVIATION = 3.0  # standard deviations to which outliers are clipped
_MAX_BATCH_ENTRIES = 1 << 20  # entries of a batch of rows that is made dense
_CONSTANT_COLUMN = 1e-12  # a column is constant if its deviation is at most this share of its mean


class Rows:
    """Rows with weights: a weight of 2 is the same as the row twice, a weight of 0 leaves the row out.

    A sparse table is never made dense as a whole; its zeros are ordinary values.

    Parameters
    ----------
    x : ndarray or scipy.sparse CSR array or matrix, float, shape (n_samples, n_features)
    order : ndarray of float64, shape (n_samples,)
        The target. Drawn rows are spread evenly over its order.
    weights : ndarray of float64, shape (n_samples,), >= 0

    Examples
    --------
    >>> rows = Rows(np.array([[0.0, 5.0], [2.0, 5.0]]), np.array([0.0, 1.0]), np.ones(2))
    >>> rows.standardised(np.array([0, 1]))
    array([[-1.,  0.],
           [ 1.,  0.]])
    """

    def __init__(self, x: Any, order: Floats, weights: Floats) -> None:
        kept = np.flatnonzero(weights > 0)
        self.index: Indices = kept
        self.x = x if len(kept) == x.shape[0] else x[kept]
        self.weights: Floats = weights[kept]
        self.total = float(self.weights.sum())
        self.center: Floats = np.zeros(x.shape[1])
        self.scale: Floats = np.ones(x.shape[1])
        self.center = self._mean(lambda z: z)
        variance = self._mean(np.square)
        constant = variance <= (_CONSTANT_COLUMN * self.center) ** 2
        self.scale = np.where(constant, 1.0, np.sqrt(variance))
        self._clipped_mean = self._mean(lambda z: z.clip(-MAX_DEVIATION, MAX_DEVIATION))
        # sorted, so that the order of the rows does not change what is drawn
        direction = np.random.default_rng(0).standard_normal(x.shape[1])
        key = np.concatenate([z @ direction for _, z in self._parts()])
        self._sorted_rows: Indices = np.lexsort((key, order[kept]))
        self._cumulative_share: Floats = np.cumsum(self.weights[self._sorted_rows]) / self.total

    @property
    def n_features(self) -> int:
        """Number of columns."""
        return int(self.x.shape[1])

    def standardised(self, index: Indices | slice, columns: Indices | None = None) -> Floats:
        """Some rows as a dense array, with mean 0 and variance 1 over the whole table; constant columns are 0."""
        part, center, scale = self.x[index], self.center, self.scale
        if columns is not None:
            part, center, scale = part[:, columns], center[columns], scale[columns]
        dense: Floats = np.asarray(part if isinstance(part, np.ndarray) else part.toarray(), dtype=np.float64)
        dense = (dense - center) / scale
        return dense

    def clipped(self, index: Indices | slice, columns: Indices | None = None) -> Floats:
        """As :meth:`standardised`, clipped to three standard deviations and centred again."""
        mean = self._clipped_mean if columns is None else self._clipped_mean[columns]
        limited: Floats = self.standardised(index, columns).clip(-MAX_DEVIATION, MAX_DEVIATION) - mean
        return limited

    def slices(self) -> Iterator[slice]:
        """Slices of all rows that are small enough to be made dense."""
        length = max(1, _MAX_BATCH_ENTRIES // self.n_features)
        for start in range(0, self.x.shape[0], length):
            yield slice(start, start + length)

    def _parts(self) -> Iterator[tuple[Floats, Floats]]:
        for part in self.slices():
            yield self.weights[part], self.standardised(part)

    def _mean(self, of: Callable[[Floats], Floats]) -> Floats:
        total: Floats = np.zeros(self.n_features)
        for w, z in self._parts():
            total += w @ of(z)
        return total / self.total

    def draw(self, uniform: Floats) -> Indices:
        """One row for each number in [0, 1): in proportion to the weights, stratified by the target."""
        levels = (np.arange(len(uniform)) + uniform) / len(uniform)
        drawn: Indices = self._sorted_rows[
            np.searchsorted(self._cumulative_share, levels, side="right").clip(max=len(self._cumulative_share) - 1)
        ]
        return drawn
