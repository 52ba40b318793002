"""A model's size as a polynomial in the numbers of gates that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cubes:
    """Terms Σ_b k[layer_b]·k[arrays_b]·square_b·k[arrays_b]: what coupled groups cost together within a block.

    Attributes
    ----------
    layers : int64, shape (blocks,)
        The number of the gate that opens or closes each block.
    arrays : int64, shape (blocks, most)
        The numbers of the groups within it, filled up with any others.
    square : float64, shape (blocks, most, most)
        Symmetric; zero for what is filled up.

    Examples
    --------
    >>> cubes = Cubes.of_blocks({2: np.array([[0.0, 3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])})
    >>> cubes.of(np.array([2.0, 5.0, 1.0])), cubes.of(np.array([2.0, 5.0, 0.0]))
    (60.0, 0.0)
    """

    layers: Ints
    arrays: Ints
    square: Floats

    @classmethod
    def of_blocks(cls, squares: Mapping[int, Floats]) -> Cubes:
        """From a matrix over all arrays for each block's gate."""
        used = {layer: np.flatnonzero(square.any(0)) for layer, square in squares.items() if square.any()}
        most = max(map(len, used.values()), default=0)
        arrays = np.zeros((len(used), most), np.int64)
        compact = np.zeros((len(used), most, most))
        for row, (layer, numbers) in enumerate(used.items()):
            arrays[row, : len(numbers)] = numbers
            compact[row, : len(numbers), : len(numbers)] = squares[layer][np.ix_(numbers, numbers)]
        return cls(np.array(list(used), np.int64), arrays, compact)

    def dense(self, count: int) -> dict[int, Floats]:
        """The matrix over ``count`` arrays for each block's gate."""
        found = {}
        for layer, numbers, square in zip(self.layers.tolist(), self.arrays, self.square, strict=True):
            found[layer] = np.zeros((count, count))
            np.add.at(found[layer], (numbers[:, None], numbers[None, :]), square)
        return found

    def and_those(self, others: Cubes, count: int) -> Cubes:
        """The terms of both, over ``count`` arrays."""
        return Cubes.of_blocks({**self.dense(count), **others.dense(count)})

    def of(self, kept: Floats, variance: Floats | None = None) -> float:
        """Their sum; with expected numbers and variances, its expectation: all gates are independent."""
        return float(kept[self.layers] @ self._within(kept, variance))

    def add_gradient(self, gradient: Floats, kept: Floats, variance: Floats | None = None) -> None:
        """Add the derivative by every number of gates to ``gradient``, **in place**."""
        np.add.at(gradient, self.layers, self._within(kept, variance))
        inner = 2 * np.einsum("bij,bj->bi", self.square, kept[self.arrays])
        np.add.at(gradient, self.arrays, kept[self.layers][:, None] * inner)

    def add_spread(self, spread: Floats, kept: Floats) -> None:
        """Add what the variance of every array costs to ``spread``, **in place**."""
        np.add.at(spread, self.arrays, kept[self.layers][:, None] * np.einsum("bii->bi", self.square))

    def expected(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The expectation, differentiable, from the expected numbers and variances of all arrays, float32."""
        layers, arrays = (torch.from_numpy(part).to(mean.device) for part in (self.layers, self.arrays))
        square = torch.from_numpy(self.square).to(mean)
        kept = mean[arrays]
        # no matrix products: autocast would run them in half precision
        within = (kept[:, :, None] * square * kept[:, None, :]).sum((1, 2))
        within = within + (square.diagonal(dim1=1, dim2=2) * variance[arrays]).sum(1)
        total: Tensor = (mean[layers] * within).sum()
        return total

    def _within(self, kept: Floats, variance: Floats | None) -> Floats:
        """What each block costs while it is open."""
        inner = kept[self.arrays]
        found: Floats = np.einsum("bi,bij,bj->b", inner, self.square, inner)
        if variance is not None:
            found += np.einsum("bii,bi->b", self.square, variance[self.arrays])
        return found


NONE = Cubes.of_blocks({})


@dataclass(frozen=True, eq=False)
class CostForm:
    """constant + linear·k + k·square·k + cubes, for the numbers k of gates that stay."""

    constant: float
    linear: Floats
    square: Floats
    cubes: Cubes = NONE
