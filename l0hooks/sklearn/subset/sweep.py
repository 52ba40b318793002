"""A swept Gram matrix: the least-squares fit on a support, and the gain of each change of that support."""

from __future__ import annotations

import numpy as np
from scipy.linalg import blas, lapack

from l0hooks.sklearn.subset.design import Floats, Ints

DEPENDENCE_TOLERANCE = 1e-9  # a column depends on others that leave less than this share of its variance
MAX_PIVOTS = 400  # then the tableau is formed again, because rounding errors grow with each pivot


def quotient(numerator: Floats, left: Floats, whole: Floats) -> Floats:
    """``numerator/left``, or 0 where ``left`` is a negligible share of ``whole``."""
    free = left > DEPENDENCE_TOLERANCE * whole
    return np.divide(numerator, left, out=np.zeros(free.shape), where=free)


def inverse(gram: Floats) -> Floats | None:
    """The inverse of a Gram matrix, or None if columns depend on each other."""
    if len(gram) == 0:
        return gram
    factor, failed = lapack.dpotrf(gram, lower=1)
    if failed or (np.diag(factor) ** 2 <= DEPENDENCE_TOLERANCE * np.diag(gram)).any():
        return None
    lower = np.tril(lapack.dpotri(factor, lower=1)[0])
    return np.asarray(lower + np.tril(lower, -1).T)


def swap_gains(h: Floats, left: Floats, whole: Floats, r: Floats, a: Floats, b: Floats) -> Floats:
    r"""The fall of the loss yᵀy − bᵀX_Sᵀy for every column j that leaves S and every column i that enters.

    (rᵢ + Hⱼᵢbⱼ/Aⱼⱼ)² / (dᵢ + Hⱼᵢ²/Aⱼⱼ) − bⱼ²/Aⱼⱼ with A = G_SS⁻¹, H = A G_S:, dᵢ = Gᵢᵢ − HᵢᵀGᵢ, r = Xᵀy − Gb.

    Parameters
    ----------
    h : float64 array, shape (s, m)
    left, whole : float64 array, shape (m,)
        dᵢ and Gᵢᵢ.
    r : float64 array, shape (m, c)
        One column for each response; squares are summed over responses.
    a : float64 array, shape (s,)
        The diagonal of A; infinity for a column that is not fitted.
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
        numerator = squares(r) + ratio * (2 * (b @ r.T) + ratio * squares(b)[:, None])
    ratio *= h
    ratio += left
    tight = ratio <= DEPENDENCE_TOLERANCE * whole
    if tight.any():
        numerator[tight] = 0
        ratio[tight] = 1
    numerator /= ratio
    numerator -= (squares(b) / a)[:, None]
    return numerator


def squares(v: Floats) -> Floats:
    """The sum of squares of each row."""
    return np.asarray(v[:, 0] * v[:, 0] if v.shape[1] == 1 else (v * v).sum(1))


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
    def gram(self) -> Floats:
        """The Gram matrix as it was given, shape (m, m)."""
        return self._start[: self.m, : self.m]

    @property
    def loss(self) -> float:
        """The residual sum of squares of the support's fit, over all responses."""
        return self.square + float(np.trace(self._t[self.m :, self.m :]))

    def load(self, items: list[int]) -> None:
        """Make ``items`` the support."""
        removed, new = set(self.items) - set(items), set(items) - set(self.items)
        if len(removed) + len(new) < len(items) and self._pivots <= MAX_PIVOTS:
            for item in removed:
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
        if items and self._sweep(self._columns(items)):
            self.items = list(items)
            return
        for item in items:
            self.enter(item)

    def _columns(self, items: list[int]) -> Ints:
        return np.array(items, dtype=np.int64)

    def _sweep(self, columns: Ints) -> bool:
        """Pivot on all columns at once; return False and do nothing if columns depend on each other."""
        a = inverse(self._start[columns[:, None], columns])
        if a is None:
            return False
        side = self._start[columns]
        h = a @ side
        self._t -= side.T @ h
        self._t[columns] = h
        self._t[:, columns] = h.T
        self._t[columns[:, None], columns] = -a
        self.swept[columns] = True
        return True

    def enter(self, item: int) -> None:
        """Add an item to the support; an item that depends on the others belongs to it, but is not fitted."""
        self.items.append(item)
        self._add_column(item)

    def leave(self, item: int) -> None:
        """Remove an item from the support."""
        self.items.remove(item)
        if self.swept[item]:
            self._pivot(item)
            for other in self._unfitted():  # items that depended on it may be fitted now
                self._add_column(other)
        self._refresh()

    def _unfitted(self) -> list[int]:
        return [] if self.swept.sum() == len(self.items) else [i for i in self.items if not self.swept[i]]

    def _refresh(self) -> None:
        if self._pivots > MAX_PIVOTS:
            self._form(list(self.items))

    def swap(self, out: int, item: int) -> None:
        """Exchange the item ``out`` of the support for ``item``."""
        self.leave(out)
        self.enter(item)

    def _add_column(self, column: int) -> None:
        if self._t[column, column] > DEPENDENCE_TOLERANCE * self.whole[column]:
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
        """b of the support's items in their order, shape (s, c); 0 for those that are not fitted."""
        items = np.array(self.items, dtype=np.int64)
        return np.where(self.swept[items, None], self._t[items, self.m :], 0.0)

    def fitted(self) -> tuple[Ints, Floats]:
        """The fitted columns, ascending, and their b, shape (s, c)."""
        columns = np.flatnonzero(self.swept)
        return columns, self._t[columns, self.m :]

    def inverse(self, columns: Ints) -> Floats:
        """(X̃ᵀX̃)⁻¹ over the fitted columns."""
        return -self._t[np.ix_(columns, columns)]

    def add_gains(self) -> Floats:
        """The fall of the loss if an item enters, shape (m,); 0 for items of the support."""
        gains = quotient(squares(self._t[: self.m, self.m :]), np.diagonal(self._t)[: self.m], self.whole)
        gains[self.items] = 0
        return gains

    def drop_costs(self) -> Floats:
        """The rise of the loss if an item of the support leaves, shape (s,)."""
        items = np.array(self.items, dtype=np.int64)
        b, swept = self._t[items, self.m :], self.swept[items]
        return np.where(swept, squares(b) / np.where(swept, -self._t[items, items], 1.0), 0.0)

    def best_swap(self, most: int) -> tuple[float, int, int]:
        """The best gain, the leaving and the entering item, among the ``most`` items that gain most by being added.

        An exchange never gains more than adding the entering item would.
        """
        add = self.add_gains()
        enter = np.argpartition(add, -most)[-most:] if most < len(add) else np.arange(len(add))
        enter = enter[add[enter] > 0]
        if len(enter) == 0:
            return 0.0, -1, -1
        gains = self.swap_gains(enter)
        out, item = divmod(int(gains.argmax()), len(enter))
        return float(gains[out, item]), self.items[out], int(enter[item])

    def swap_gains(self, enter: Ints) -> Floats:
        """The fall of the loss for every exchange, leaving by row and entering by column, shape (s, len(enter))."""
        items = np.array(self.items, dtype=np.int64)
        t, m = self._t, self.m
        a, b = -t[items, items], t[items, m:]
        swept = self.swept[items]
        if not swept.all():
            a, b = np.where(swept, a, np.inf), np.where(swept[:, None], b, 0.0)
        return swap_gains(t[items].take(enter, 1), np.diagonal(t)[enter], self.whole[enter], t[enter, m:], a, b)
