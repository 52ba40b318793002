"""A swept Gram matrix: the least-squares fit on any support, and what one change of the support would gain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from l0hooks.subset.design import Floats, Ints

DEPENDENT = 1e-9  # a column with less than this part of its variance left is a combination of the others
STALE = 400  # pivots after which the tableau is formed again, against the growth of rounding



def quotient(numerator: Floats, left: Floats, whole: Floats) -> Floats:
    """``numerator/left``, or 0 where nothing of ``whole`` is left."""
    free = left > DEPENDENT * whole
    return np.asarray(np.where(free, numerator / np.where(free, left, 1.0), 0.0))


def swap_gains(h: Floats, left: Floats, whole: Floats, r: Floats, a: Floats, b: Floats) -> Floats:
    r"""The fall of yᵀy − bᵀX_Sᵀy for every column j that leaves S and every i that enters.

    (rᵢ + Hⱼᵢbⱼ/Aⱼⱼ)² / (dᵢ + Hⱼᵢ²/Aⱼⱼ) − bⱼ²/Aⱼⱼ with A = G_SS⁻¹, H = A G_S:, dᵢ = Gᵢᵢ − HᵢᵀGᵢ, r = Xᵀy − Gb.

    Parameters
    ----------
    h : float64 array, shape (s, m)
    left, whole : float64 array, shape (m,)
        dᵢ and Gᵢᵢ.
    r : float64 array, shape (m, c)
        One column for each response; squares are summed over responses.
    a : float64 array, shape (s,)
        The diagonal of A; at a column that is not in the fit, infinity.
    b : float64 array, shape (s, c)

    Returns
    -------
    float64 array, shape (s, m)
    """
    ratio = h / a[:, None]
    if r.shape[1] == 1:
        numerator = ratio * b
        numerator += r[:, 0]
        numerator *= numerator
    else:
        numerator = (r * r).sum(1) + ratio * (2 * (b @ r.T) + ratio * (b * b).sum(1)[:, None])
    ratio *= h
    ratio += left
    tight = ratio <= DEPENDENT * whole
    if tight.any():
        numerator[tight] = 0
        ratio[tight] = 1
    numerator /= ratio
    numerator -= ((b * b).sum(1) / a)[:, None]
    return numerator


class Tableau:
    """The Gram matrix of m items and c responses, swept on the items of a support.

    Parameters
    ----------
    gram : float64 array, shape (m, m)
        With the ridge on its diagonal.
    cross : float64 array, shape (m, c)
        X̃ᵀy of each response.
    square : float
        yᵀy, summed over responses.

    Examples
    --------
    >>> tableau = Tableau(np.eye(2), np.array([[3.0], [1.0]]), 11.0)
    >>> tableau.enter(0)
    >>> tableau.loss, tableau.add_gains().tolist(), tableau.coefficients().tolist()
    (2.0, [0.0, 1.0], [[3.0]])
    """

    def __init__(self, gram: Floats, cross: Floats, square: float) -> None:
        self.m, self.c = cross.shape
        self._start = np.empty((self.m + self.c,) * 2)
        self._start[: self.m, : self.m] = gram
        self._start[: self.m, self.m :] = cross
        self._start[self.m :, : self.m] = cross.T
        self._start[self.m :, self.m :] = 0
        self.square = square
        self.whole = np.diag(gram).copy()
        self.items: list[int] = []
        self.swept = np.zeros(self.m, dtype=bool)
        self._t = self._start.copy()
        self._pivots = 0

    @property
    def loss(self) -> float:
        """The residual square of the support's fit, summed over responses."""
        return self.square + float(np.trace(self._t[self.m :, self.m :]))

    def load(self, items: list[int]) -> None:
        """Make ``items`` the support."""
        gone, new = set(self.items) - set(items), set(items) - set(self.items)
        if len(gone) + len(new) < len(items) and self._pivots <= STALE:
            for item in gone:
                self.leave(item)
            for item in new:
                self.enter(item)
            self.items = list(items)
        else:
            self._form(items)

    def _form(self, items: list[int]) -> None:
        self._t = self._start.copy()
        self.items, self._pivots = [], 0
        self.swept[:] = False
        for item in items:
            self.enter(item)

    def enter(self, item: int) -> None:
        """Add an item to the support; one that depends on those inside is counted and not fitted."""
        self.items.append(item)
        self._add_column(item)

    def leave(self, item: int) -> None:
        """Take an item out of the support."""
        self.items.remove(item)
        if self.swept[item]:
            self._pivot(item)
            for other in self.items:  # one that depended on it may be of use now
                if not self.swept[other]:
                    self._add_column(other)
        self._refresh()

    def _refresh(self) -> None:
        if self._pivots > STALE:
            self._form(list(self.items))

    def swap(self, out: int, item: int) -> None:
        self.leave(out)
        self.enter(item)

    def _add_column(self, column: int) -> None:
        if self._t[column, column] > DEPENDENT * self.whole[column]:
            self._pivot(column)

    def _pivot(self, column: int) -> None:
        t, pivot = self._t, self._t[column, column]
        row = t[column].copy()
        blas.dger(-1 / pivot, row, row, a=t.T, overwrite_a=True)
        row /= pivot if not self.swept[column] else -pivot
        t[column] = row
        t[:, column] = row
        t[column, column] = -1 / pivot
        self.swept[column] = not self.swept[column]
        self._pivots += 1

    def coefficients(self) -> Floats:
        """b on the support, in its order, shape (s, c)."""
        items = np.array(self.items, dtype=np.int64)
        return np.where(self.swept[items, None], self._t[items, self.m :], 0.0)

    def inverse(self, columns: Ints) -> Floats:
        """(X̃ᵀX̃)⁻¹ over the fitted columns."""
        return -self._t[np.ix_(columns, columns)]

    def add_gains(self) -> Floats:
        """The fall of the loss for each item that would enter; 0 inside the support, shape (m,)."""
        r = self._t[: self.m, self.m :]
        gains = quotient((r * r).sum(1), np.diagonal(self._t)[: self.m], self.whole)
        gains[self.items] = 0
        return gains

    def drop_costs(self) -> Floats:
        """The rise of the loss for each item of the support that would leave, shape (s,)."""
        items = np.array(self.items, dtype=np.int64)
        b = self._t[items, self.m :]
        return np.where(self.swept[items], (b * b).sum(1) / -self._t[items, items], 0.0)

    def best_swap(self, most: int) -> tuple[float, int, int]:
        """The best gain, the item that leaves and the one that enters, among the ``most`` that add the most.

        No exchange gains more than what enters would gain by being added, so that is the order to look in.
        """
        add = self.add_gains()
        add[self.items] = -1.0
        enter = np.flatnonzero(add > 0)
        if len(enter) > most:
            enter = enter[np.argpartition(-add[enter], most)[:most]]
        if len(enter) == 0:
            return 0.0, -1, -1
        gains = self.swap_gains(enter)
        out, item = divmod(int(gains.argmax()), len(enter))
        return float(gains[out, item]), self.items[out], int(enter[item])

    def swap_gains(self, enter: Ints) -> Floats:
        """The fall of the loss for every pair, leaving by row and entering by column, shape (s, len(enter))."""
        items = np.array(self.items, dtype=np.int64)
        t, m = self._t, self.m
        a, b = -t[items, items], t[items, m:]
        swept = self.swept[items]
        if not swept.all():
            a, b = np.where(swept, a, np.inf), np.where(swept[:, None], b, 0.0)
        return swap_gains(t[items[:, None], enter], t[enter, enter], self.whole[enter], t[enter, m:], a, b)
