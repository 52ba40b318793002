"""Items that are groups of columns: they enter and leave together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from einops import rearrange

from l0hooks.sklearn.subset.design import Floats, Ints
from l0hooks.sklearn.subset.sweep import DEPENDENCE_TOLERANCE, Tableau


def pad(groups: list[Ints]) -> tuple[Ints, Floats]:
    """The column indices as one (groups, width) array, and an array with 1 for a column and 0 for padding."""
    width = max(len(g) for g in groups)
    index = np.zeros((len(groups), width), dtype=np.int64)
    real = np.zeros((len(groups), width))
    for i, g in enumerate(groups):
        index[i, : len(g)] = g
        real[i, : len(g)] = 1
    return index, real


def block_gains(blocks: Floats, r: Floats, whole: Floats) -> Floats:
    """trace(rᵀ D⁺ r) for each block D; directions without remaining variance count as 0.

    Parameters
    ----------
    blocks : float64 array, shape (g, q, q)
    r : float64 array, shape (g, q, c)
    whole : float64 array, shape (g,)
        The largest diagonal entry before any fit; the remaining variance is compared with it.
    """
    if blocks.shape[1] == 1:
        values, along = blocks[:, :, 0], r
    else:
        values, vectors = np.linalg.eigh(blocks)
        along = rearrange(vectors, "group row direction -> group direction row") @ r
    free = values > DEPENDENCE_TOLERANCE * whole[:, None]
    return np.asarray(((along**2).sum(2) * free / np.where(free, values, 1.0)).sum(1))


def group_swap_gains(
    h: Floats, a: Floats, b: Floats, inside: list[Ints], blocks: Floats, r: Floats, whole: Floats
) -> Floats:
    """The fall of the loss when one group leaves (rows) and another enters (columns).

    Parameters
    ----------
    h : float64 array, shape (s, g, q)
        A·G_S: for the s fitted columns, arranged by group.
    a : float64 array, shape (s, s)
        A = G_SS⁻¹.
    b : float64 array, shape (s, c)
    inside : list of int64 array
        For each group of the support, its rows of ``h``, ``a`` and ``b``.
    blocks, r, whole
        As in :func:`block_gains`, after the fit.
    """
    gains = np.empty((len(inside), blocks.shape[0]))
    for row, of in enumerate(inside):
        if len(of) == 0:
            gains[row] = block_gains(blocks, r, whole)
            continue
        hj, inner, bj = h[of], a[np.ix_(of, of)], b[of]
        back = np.linalg.solve(inner, rearrange(hj, "leaving group column -> leaving (group column)"))
        hj = rearrange(hj, "leaving group column -> group column leaving")
        back = rearrange(back, "leaving (group column) -> group leaving column", group=len(blocks))
        freed = np.linalg.solve(inner, bj)
        gains[row] = block_gains(blocks + hj @ back, r + hj @ freed, whole) - float((bj * freed).sum())
    return gains


class GroupTableau(Tableau):
    """A :class:`Tableau` whose items are groups of its columns.

    Parameters
    ----------
    gram, cross, square
        As for :class:`Tableau`, over columns.
    groups : list of int64 array
        The columns of each item.
    """

    def __init__(self, gram: Floats, cross: Floats, square: float, groups: list[Ints]) -> None:
        super().__init__(gram, cross, square)
        self.groups = groups
        self.index, self.real = pad(groups)
        self._group_scale = (self.whole[self.index] * self.real).max(1)

    def enter(self, item: int) -> None:
        self.items.append(item)
        for column in self.groups[item]:
            self._add_column(int(column))

    def leave(self, item: int) -> None:
        self.items.remove(item)
        for column in self.groups[item]:
            if self.swept[column]:
                self._pivot(int(column))
        for other in self.items:
            for column in self.groups[other]:
                if not self.swept[column]:
                    self._add_column(int(column))
        self._refresh()

    def _columns(self, items: list[int]) -> Ints:
        return np.concatenate([self.groups[i] for i in items])

    def _blocks(self, items: Ints | slice) -> tuple[Floats, Floats]:
        i, real = self.index[items], self.real[items]
        blocks = self._t[i[:, :, None], i[:, None, :]] * (real[:, :, None] * real[:, None, :])
        r = self._t[i, self.m :] * real[:, :, None]
        return blocks, r

    def add_gains(self) -> Floats:
        gains = block_gains(*self._blocks(slice(None)), self._group_scale)
        gains[self.items] = 0
        return gains

    def _fitted(self) -> tuple[Ints, list[Ints]]:
        """The fitted columns of the support, and the positions of each group's columns among them."""
        fitted = [g[self.swept[g]] for g in (self.groups[i] for i in self.items)]
        ends = np.cumsum([0] + [len(f) for f in fitted])
        return np.concatenate([np.zeros(0, np.int64), *fitted]), [
            np.arange(start, stop) for start, stop in pairwise(ends)
        ]

    def drop_costs(self) -> Floats:
        columns, inside = self._fitted()
        a, b = -self._t[np.ix_(columns, columns)], self._t[columns, self.m :]
        costs = [float((b[of] * np.linalg.solve(a[np.ix_(of, of)], b[of])).sum()) if len(of) else 0.0 for of in inside]
        return np.array(costs)

    def swap_gains(self, enter: Ints) -> Floats:
        columns, inside = self._fitted()
        a, b = -self._t[np.ix_(columns, columns)], self._t[columns, self.m :]
        h = self._t[columns][:, self.index[enter]] * self.real[enter]
        blocks, r = self._blocks(enter)
        return group_swap_gains(h, a, b, inside, blocks, r, self._group_scale[enter])
