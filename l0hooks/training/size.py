"""``Size``: what a model costs by the numbers of gates that stay, and which gates fit into a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from l0hooks.structure.cost_form import NONE, Cubes
from l0hooks.training.block_lists import BlockList

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """constant + linear·k + k·square·k + cubes for k gates that stay in each array of gates; ``square`` is symmetric.

    Attributes
    ----------
    counts : int64, shape (arrays,)
        How many gates each array has.
    constant : float
        What no gate can remove.
    linear : float64, shape (arrays,)
    square : float64, shape (arrays, arrays)
    floor : int64, shape (arrays,)
        How many gates of each array always stay: one of a coupled group, which cannot be cut to nothing.
    sets : tuple of tuples of int, or None
        Arrays that keep equally many gates, by their numbers; each array is in one set.
    multiple : int64, shape (arrays,)
        What the number of gates that stay in each array is a multiple of, where it has as many.
    cubes : Cubes
        Products of three: a block's gate, and the gates on both sides of a weight within it.
    lists : tuple of BlockList
        Which arrays are the gates of blocks, one each, list by list. ``floor`` does not hold for them.

    Examples
    --------
    >>> size = Size(np.array([4, 2]), constant=3.0, linear=np.array([1.0, 10.0]), square=np.zeros((2, 2)))
    >>> size.whole, size.of(np.array([2.0, 1.0]))
    (27.0, 15.0)
    """

    counts: npt.NDArray[np.int64]
    constant: float
    linear: Floats
    square: Floats
    floor: npt.NDArray[np.int64] | int = 0
    sets: tuple[tuple[int, ...], ...] | None = None
    multiple: npt.NDArray[np.int64] | int = 1
    cubes: Cubes = NONE
    lists: tuple[BlockList, ...] = ()

    @property
    def whole(self) -> float:
        """The size with every gate open."""
        return self.of(self.counts.astype(np.float64))

    def least(self, min_keep: int, log_odds: Sequence[Floats] | None = None) -> Floats:
        """How many gates of each array stay at the least.

        Of the blocks of a list these are the ones with the largest ``log_odds``; without these, the most expensive.
        """
        wanted = np.minimum(np.maximum(min_keep, self.floor), self.counts)
        widths = self.widths
        least: Floats = np.minimum(-(-wanted // widths), self.counts // widths).astype(np.float64) * widths
        for blocks in self.lists:
            least[list(blocks.arrays)] = 0
        if self.lists:
            costs = self.gradient(least)
            for blocks in self.lists:
                rank = costs[list(blocks.arrays)] if log_odds is None else [log_odds[n].max() for n in blocks.arrays]
                order = np.argsort(-np.asarray(rank, np.float64), kind="stable")
                least[np.array(blocks.arrays)[order[: blocks.least(min_keep)]]] = 1
        return least

    @property
    def widths(self) -> npt.NDArray[np.int64]:
        """How many gates of each array stay or go together."""
        return np.minimum(self.multiple, self.counts)

    def of(self, kept: Floats, variance: Floats | None = None) -> float:
        """The size when ``kept`` gates stay; with expected numbers and their variances, the expected size."""
        spread = 0.0 if variance is None else float(np.diagonal(self.square) @ variance)
        cubes = self.cubes.of(kept, variance)
        return float(self.constant + self.linear @ kept + kept @ self.square @ kept) + spread + cubes

    def gradient(self, kept: Floats, variance: Floats | None = None) -> Floats:
        """What one gate more or less of each array changes; in expectation, with the variances of their numbers."""
        gradient: Floats = self.linear + 2 * self.square @ kept
        self.cubes.add_gradient(gradient, kept, variance)
        return gradient

    def spread(self, kept: Floats) -> Floats:
        """What the variance of each array's number adds to the expected size."""
        spread = np.array(np.diagonal(self.square))
        self.cubes.add_spread(spread, kept)
        return spread

    @property
    def bent(self) -> npt.NDArray[np.bool_]:
        """Whether the size is a quadratic function of each array's number."""
        bent: npt.NDArray[np.bool_] = self.spread(np.ones(len(self.counts))) != 0
        return bent


def fitting(size: Size, array_of: Ints, allowed: float) -> npt.NDArray[np.bool_]:
    """Which gates fit into a size: the longest run from the front, then whatever still fits, in order.

    Parameters
    ----------
    size : Size
    array_of : int64, shape (gates,)
        The array that each gate belongs to, the gates in order of preference.
    allowed : float

    Returns
    -------
    bool, shape (gates,)
    """
    arrays = len(size.counts)

    def counts(length: int) -> Floats:
        return np.bincount(array_of[:length], minlength=arrays).astype(np.float64)

    low, high = 0, len(array_of)
    while low < high:  # the size grows with every gate
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size.of(counts(middle)) <= allowed else (low, middle - 1)
    fits = np.arange(len(array_of)) < low
    kept = counts(low)
    rest = [low + np.flatnonzero(array_of[low:] == array) for array in range(arrays)]
    place, bent = np.zeros(arrays, np.int64), size.bent
    while True:
        more = size.gradient(kept) + size.spread(kept)
        left = allowed - size.of(kept)
        next_ = [r[n] if n < len(r) and c <= left else len(fits) for r, n, c in zip(rest, place, more, strict=True)]
        best = int(np.argmin(next_))
        if next_[best] == len(fits):
            return fits
        others = min([*next_[:best], *next_[best + 1 :], len(fits)])
        run = rest[best][place[best] : place[best] + np.searchsorted(rest[best][place[best] :], others)]
        if bent[best]:
            run = run[:1]
        elif more[best]:
            run = run[: int(left / more[best] * (1 + 1e-12))]
        fits[run] = True
        kept[best] += len(run)
        place[best] += len(run)
