"""The gain of each change of a support in least squares, computed for all columns of a design."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from einops import rearrange

from l0hooks.sklearn.subset.design import Design, Floats, Ints
from l0hooks.sklearn.subset.grouped import GroupTableau, block_gains, group_swap_gains, pad
from l0hooks.sklearn.subset.sweep import Tableau, inverse, quotient, squares, swap_gains

TINY = 1e-300  # in place of a scale of zero
FIRST_ENTERING_FACTOR = 4  # this many times the requested items are tried before all are


class SquaresProblem:
    """minimise mean (y − x̃b)² + alpha Σ (bⱼ/σⱼ)² over supports of a given size.

    Parameters
    ----------
    design : Design
    y : float64 array, shape (n, c)
        Rows as in ``design.rows``; squares are summed over the c responses.
    alpha : float, >= 0
        Ridge on the coefficients of the unscaled columns.
    groups : sequence of int64 array, optional
        The columns of each item; by default every column is an item.
    """

    def __init__(self, design: Design, y: Floats, *, alpha: float = 0.0, groups: Sequence[Ints] | None = None) -> None:
        self.design, self.alpha = design, alpha
        self.groups = None if groups is None else list(groups)
        self.n_items = design.p if self.groups is None else len(self.groups)
        centred = y - design.average(y) if design.center else y
        self._y = centred
        self.cross = design.cross(centred)
        self.square = float(design.average(centred * centred).sum())
        self.ridge = alpha / design.scale**2
        self.whole = design.usable + self.ridge
        self._row_of = np.full(design.p, -1)
        self._rows = np.empty((0, design.p))
        self._count = 0
        if self.groups is not None:
            self._prepare_groups(self.groups)

    def _prepare_groups(self, groups: list[Ints]) -> None:
        self._index, self._real = pad(groups)
        width = self._index.shape[1]
        self._blocks = np.zeros((len(groups), width, width))
        for g, columns in enumerate(groups):
            self._blocks[g, : len(columns), : len(columns)] = self.gram(columns)
        self._group_scale = (self.whole[self._index] * self._real).max(1)

    def columns(self, items: Iterable[int]) -> Ints:
        """The columns of ``items``, in their order."""
        if self.groups is None:
            return np.fromiter(items, dtype=np.int64)
        return np.concatenate([np.zeros(0, np.int64), *(self.groups[i] for i in items)])

    def gram(self, columns: Ints, known: Floats | None = None) -> Floats:
        """The Gram matrix of some columns with the ridge; ``known`` is its first block if it is known."""
        old = 0 if known is None else len(known)
        if (self._row_of[columns] >= 0).all():
            gram = np.asarray(self._rows[np.ix_(self._row_of[columns], columns)])
        elif old:
            gram = np.empty((len(columns),) * 2)
            gram[old:] = self.design.gram(columns[old:], columns)
            gram[:old, old:] = gram[old:, :old].T
            gram[:old, :old] = known
        else:
            gram = self.design.gram(columns, columns)
        gram[np.arange(len(columns)), np.arange(len(columns))] = self.whole[columns]
        return gram

    def rows(self, columns: Ints) -> Floats:
        """Rows of the Gram matrix against all columns, each computed once."""
        new = columns[self._row_of[columns] < 0]
        if len(new):
            need = self._count + len(new)
            if need > len(self._rows):
                self._rows = np.concatenate([self._rows[: self._count], np.empty((need, self.design.p))])
            self._rows[self._count : need] = self.design.gram(new)
            self._row_of[new] = np.arange(self._count, need)
            self._count = need
        return self._rows[self._row_of[columns]]

    def tableau(self, items: list[int], known: Tableau | None = None) -> Tableau:
        """The tableau over some items, numbered in their order.

        Parameters
        ----------
        items : list of int
        known : Tableau, optional
            The one over the first of these items: its part of the Gram matrix is not formed again.
        """
        columns = self.columns(items)
        gram, cross = self.gram(columns, None if known is None else known.gram), self.cross[columns]
        if self.groups is None:
            return Tableau(gram, cross, self.square)
        ends = np.cumsum([0] + [len(self.groups[i]) for i in items])
        local = [np.arange(start, stop) for start, stop in pairwise(ends)]
        return GroupTableau(gram, cross, self.square, local)

    def first_gains(self) -> Floats:
        """The gain of each item as the only one of the support, shape (n_items,)."""
        return self._alone(self.cross)

    def gains_alone(self, columns: Ints, b: Floats) -> Floats:
        """The gain of each item as the only one, with the residual of ``b`` on ``columns`` in place of y.

        This needs no Gram rows; correlation with those columns is ignored.
        """
        return self._alone(self.design.cross(self._y - self.design.times(columns, b)))

    def _alone(self, r: Floats) -> Floats:
        if self.groups is None:
            return quotient(squares(r), self.whole, np.maximum(self.whole, 1.0))
        return block_gains(self._blocks, r[self._index] * self._real[:, :, None], self._group_scale)

    def entering(self, items: Sequence[int], most: int, least: float) -> tuple[Ints, Floats]:
        """The ``most`` items that gain most in exchange for one of ``items``, and their gains.

        Empty if none gains ``least``. An exchange never gains more than adding the entering item would. So the items
        that gain most by being added are tried first, and all others only if none of those gains. Some of the items
        returned may gain nothing now, but something after the first exchanges.
        """
        if self.groups is not None:
            return _best_entering(np.arange(self.n_items), self.exchanges(items).max(0), most, least)
        fitted, a, b, rows, h, r = self._outside(items)
        left, whole, diagonal = self.whole - np.einsum("ij,ij->j", h, rows), np.maximum(self.whole, TINY), np.diag(a)
        add = quotient(squares(r), left, whole)
        add[list(items)] = -np.inf
        outside = self.n_items - len(items)
        first = min(FIRST_ENTERING_FACTOR * most, outside)
        order = np.argpartition(-add, sorted({first - 1, outside - 1}))[:outside]
        for part in (order[:first], order[first:]):
            gains = swap_gains(h.take(part, 1), left[part], whole[part], r[part], diagonal, b).max(0, initial=-np.inf)
            if len(fitted) < len(items):  # an item that depends on the others leaves at no cost
                gains = np.maximum(gains, add[part])
            if (gains > least).any():
                break
        return _best_entering(part, gains, most, least)

    def exchanges(self, items: Sequence[int]) -> Floats:
        """The gain of each exchange: leaving items by row, entering ones by column; −inf for items of the support.

        Items that depend on the others are not fitted and have no row of their own; one last row represents them all.
        """
        fitted, a, b, rows, h, r = self._outside(items)
        if self.groups is None:
            left = self.whole - np.einsum("ij,ij->j", h, rows)
            gains = swap_gains(h, left, np.maximum(self.whole, TINY), r, np.diag(a), b)
            if len(fitted) < len(items):
                gains = np.vstack([gains, quotient(squares(r), left, np.maximum(self.whole, TINY))])
        else:
            gains = self._group_exchange(items, fitted, a, b, h, rows, r)
        gains[:, list(items)] = -np.inf
        return gains

    def add_gains(self, items: Sequence[int]) -> Floats:
        """The gain of each item by joining ``items``, shape (n_items,); −inf for those that are in it."""
        _, _, _, rows, h, r = self._outside(items)
        if self.groups is None:
            whole = np.maximum(self.whole, TINY)
            gains = quotient(squares(r), self.whole - np.einsum("ij,ij->j", h, rows), whole)
        else:
            gains = block_gains(*self._opened(h, rows, r), self._group_scale)
        gains[list(items)] = -np.inf
        return gains

    def _outside(self, items: Sequence[int]) -> tuple[Ints, Floats, Floats, Floats, Floats, Floats]:
        """The fitted columns of ``items``, A, b, their Gram rows, H = A·rows, and r = X̃ᵀ times the residual."""
        fitted = self.columns(items)
        rows = self.rows(fitted)
        a = inverse(self.gram(fitted))
        if a is None:  # dependent columns: find an independent part of them
            tableau = self.tableau(list(items))
            tableau.load(list(range(len(items))))
            keep = np.flatnonzero(tableau.swept)
            fitted, a, rows = fitted[keep], tableau.inverse(keep), rows[keep]
        b = a @ self.cross[fitted]
        return fitted, a, b, rows, a @ rows, self.cross - rows.T @ b

    def _opened(self, h: Floats, rows: Floats, r: Floats) -> tuple[Floats, Floats]:
        """Each group's Gram block and cross products after the fit."""
        hg, rg = h[:, self._index] * self._real, rows[:, self._index] * self._real
        fitted = rearrange(hg, "row group column -> group column row") @ rearrange(
            rg, "row group column -> group row column"
        )
        return self._blocks - fitted, r[self._index] * self._real[:, :, None]

    def _group_exchange(
        self, items: Sequence[int], fitted: Ints, a: Floats, b: Floats, h: Floats, rows: Floats, r: Floats
    ) -> Floats:
        inside, start = [], 0
        known = set(fitted.tolist())
        for item in items:
            size = len(known & set(self.columns([item]).tolist()))
            inside.append(np.arange(start, start + size))
            start += size
        hg = h[:, self._index] * self._real
        return group_swap_gains(hg, a, b, inside, *self._opened(h, rows, r), self._group_scale)


def _best_entering(items: Ints, gains: Floats, most: int, least: float) -> tuple[Ints, Floats]:
    """The ``most`` items of largest gain, or none if none gains more than ``least``."""
    top = np.argpartition(gains, -most)[-most:] if most < len(gains) else np.arange(len(gains))
    if not (gains[top] > least).any():
        top = top[:0]
    return items[top], gains[top]
