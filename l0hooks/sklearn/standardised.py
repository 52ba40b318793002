"""Weighted rows of a table, dense or sparse: standardised a batch at a time, drawn in proportion to their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_ENTRIES = 1 << 20  # of one dense batch
_FARTHEST = 3.0  # standard deviations that one value counts for


class Rows:
    """Rows with weights; a row of weight 2 is the same as the row twice, and one of weight 0 is none.

    Sparse tables are never made dense as a whole, and their zeros are values like any other.

    Parameters
    ----------
    x : ndarray or scipy.sparse CSR array or matrix, float, shape (n_samples, n_features)
    order : ndarray of float64, shape (n_samples,)
        Drawn rows are spread evenly over this order: the target.
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
        constant = variance <= (1e-12 * self.center) ** 2
        self.scale = np.where(constant, 1.0, np.sqrt(variance))
        self._clipped_mean = self._mean(lambda z: z.clip(-_FARTHEST, _FARTHEST))
        # where a row stands must not change how often it is drawn: equal rows get neighbouring places
        direction = np.random.default_rng(0).standard_normal(x.shape[1])
        key = np.concatenate([z @ direction for _, z in self._parts()])
        self._places: Indices = np.lexsort((key, order[kept]))
        self._share: Floats = np.cumsum(self.weights[self._places]) / self.total

    @property
    def n_features(self) -> int:
        """Number of columns."""
        return int(self.x.shape[1])

    def standardised(self, index: Indices | slice, columns: Indices | None = None) -> Floats:
        """Some rows with mean 0 and variance 1 in the whole table; dense. Constant columns are 0."""
        part, center, scale = self.x[index], self.center, self.scale
        if columns is not None:
            part, center, scale = part[:, columns], center[columns], scale[columns]
        dense: Floats = np.asarray(part if isinstance(part, np.ndarray) else part.toarray(), dtype=np.float64)
        dense = (dense - center) / scale
        return dense

    def clipped(self, index: Indices | slice, columns: Indices | None = None) -> Floats:
        """The same without outliers: limited to three standard deviations, then centred again."""
        mean = self._clipped_mean if columns is None else self._clipped_mean[columns]
        limited: Floats = self.standardised(index, columns).clip(-_FARTHEST, _FARTHEST) - mean
        return limited

    def slices(self) -> Iterator[slice]:
        """All rows in parts that are small when dense."""
        length = max(1, _ENTRIES // self.n_features)
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
        """One row for each number in [0, 1), spread over the target: stratified, in proportion to the weights."""
        levels = (np.arange(len(uniform)) + uniform) / len(uniform)
        drawn: Indices = self._places[np.searchsorted(self._share, levels, side="right").clip(max=len(self._share) - 1)]
        return drawn
