"""Best subsets for (ridge) least squares: forward and backward passes with every exchange in closed form.

The search runs on a working set of columns, where a step costs microseconds. Its result is then compared with every
column of the design; those that would gain join the working set, until none does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve

from l0hooks.subset.design import Design, Floats, Ints
from l0hooks.subset.grouped import GroupTableau, block_gains, group_swap_gains, pad
from l0hooks.subset.tableau import DEPENDENT, Tableau, quotient, swap_gains

GAIN = 1e-9  # an exchange counts if it gains this part of yᵀy
WIDTH = 2  # columns of the first working set for each item of the largest support
LEAST = 48  # and its least size
REACH, LEAST_REACH = 0.25, 3  # how far beyond the sizes of interest the passes go
TINY = 1e-300
LOOK = 24  # columns that are tried in exchanges before all are
PASSES = 3  # up and down through the sizes, while it helps
ROUNDS = 12  # comparisons with all columns


@dataclass(frozen=True)
class Found:
    """A support, and the residual square of its fit as the search saw it."""

    items: tuple[int, ...]
    loss: float


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
        The columns of each item; without it every column is an item.
    """

    def __init__(
        self, design: Design, y: Floats, *, alpha: float = 0.0, groups: Sequence[Ints] | None = None
    ) -> None:
        self.design, self.alpha = design, alpha
        self.groups = None if groups is None else list(groups)
        self.n_items = design.p if self.groups is None else len(self.groups)
        centred = y - design.average(y) if design.center else y
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
        self._most = (self.whole[self._index] * self._real).max(1)

    def columns(self, items: Iterable[int]) -> Ints:
        """The columns of some items, in their order."""
        if self.groups is None:
            return np.fromiter(items, dtype=np.int64)
        return np.concatenate([np.zeros(0, np.int64), *(self.groups[i] for i in items)])

    def gram(self, columns: Ints) -> Floats:
        """The Gram matrix of a few columns, with the ridge."""
        if (self._row_of[columns] >= 0).all():
            gram = self._rows[np.ix_(self._row_of[columns], columns)]
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

    def tableau(self, items: list[int]) -> Tableau:
        """The tableau over some items, which it numbers in their order."""
        columns = self.columns(items)
        gram, cross = self.gram(columns), self.cross[columns]
        if self.groups is None:
            return Tableau(gram, cross, self.square)
        ends = np.cumsum([0] + [len(self.groups[i]) for i in items])
        local = [np.arange(start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]
        return GroupTableau(gram, cross, self.square, local)

    def first_gains(self) -> Floats:
        """What each item would gain as the only one, shape (n_items,)."""
        if self.groups is None:
            return quotient((self.cross**2).sum(1), self.whole, np.maximum(self.whole, 1.0))
        return block_gains(self._blocks, self.cross[self._index] * self._real[:, :, None], self._most)

    def exchange_gains(self, items: Sequence[int]) -> Floats:
        """For each item of the whole problem, the best gain of its entering for one of ``items``, shape (n_items,)."""
        return np.asarray(self.exchanges(items).max(0))

    def exchanges(self, items: Sequence[int]) -> Floats:
        """The gain of each exchange, leaving by row, entering by column; −inf for what is inside, not empty.

        An item that is counted and not fitted has no row in its place; one row for all of them stands last.
        """
        fitted, a, b, rows, h, r = self._outside(items)
        if self.groups is None:
            left = self.whole - np.einsum("ij,ij->j", h, rows)
            gains = swap_gains(h, left, np.maximum(self.whole, TINY), r, np.diag(a), b)
            if len(fitted) < len(items):
                gains = np.vstack([gains, quotient((r * r).sum(1), left, np.maximum(self.whole, TINY))])
        else:
            gains = self._group_exchange(items, fitted, a, b, h, rows, r)
        gains[:, list(items)] = -np.inf
        return gains

    def add_gains(self, items: Sequence[int]) -> Floats:
        """What each item of the whole problem would gain by joining ``items``; −inf inside, shape (n_items,)."""
        _, _, _, rows, h, r = self._outside(items)
        if self.groups is None:
            whole = np.maximum(self.whole, TINY)
            gains = quotient((r * r).sum(1), self.whole - np.einsum("ij,ij->j", h, rows), whole)
        else:
            gains = block_gains(*self._opened(h, rows, r), self._most)
        gains[list(items)] = -np.inf
        return gains

    def _outside(self, items: Sequence[int]) -> tuple[Ints, Floats, Floats, Floats, Floats, Floats]:
        """The fitted columns of ``items``, A, b, their Gram rows, A times these, and what y keeps with every column."""
        fitted = self.columns(items)
        gram = self.gram(fitted)
        a = _inverse(gram)
        if a is None:  # dependent columns: find those that count
            tableau = self.tableau(list(items))
            tableau.load(list(range(len(items))))
            keep = np.flatnonzero(tableau.swept)
            fitted, a = fitted[keep], tableau.inverse(keep)
        b = a @ self.cross[fitted]
        rows = self.rows(fitted)
        return fitted, a, b, rows, a @ rows, self.cross - rows.T @ b

    def _opened(self, h: Floats, rows: Floats, r: Floats) -> tuple[Floats, Floats]:
        """What the fit leaves of each group's Gram block, and of y with each group."""
        hg, rg = h[:, self._index] * self._real, rows[:, self._index] * self._real
        return self._blocks - np.moveaxis(hg, 0, 2) @ np.moveaxis(rg, 0, 1), r[self._index] * self._real[:, :, None]

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
        return group_swap_gains(hg, a, b, inside, *self._opened(h, rows, r), self._most)


def _inverse(gram: Floats) -> Floats | None:
    """The inverse of a Gram matrix, or None where columns depend on each other."""
    try:
        factor = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return None
    if (np.diag(factor) ** 2 <= DEPENDENT * np.diag(gram)).any():
        return None
    return np.asarray(cho_solve((factor, True), np.eye(len(gram))))


class SubsetSearch:
    """The best supports found so far for sizes of one problem, and the ways to improve them.

    Parameters
    ----------
    problem : SquaresProblem
    sizes : iterable of int, each from 0 to ``problem.n_items``
    start : mapping size -> items, optional
        Supports to begin from.
    """

    def __init__(self, problem: SquaresProblem, sizes: Iterable[int], start: dict[int, Sequence[int]] | None = None):
        self.problem = problem
        self.sizes = sorted(set(sizes))
        first, last = self.sizes[0], self.sizes[-1]
        self.top = min(problem.n_items, last + LEAST_REACH + int(REACH * last))
        self._low = max(0, first - LEAST_REACH - int(REACH * first))
        gains = problem.first_gains()
        order = np.argsort(-gains, kind="stable")
        wide = min(problem.n_items, max(LEAST, WIDTH * self.top, problem.n_items // 25))
        self.working = [int(i) for i in order[:wide]]
        known = set(self.working)
        self.working += sorted({int(i) for items in (start or {}).values() for i in items} - known)
        self.tableau = problem.tableau(self.working)
        self.best: dict[int, tuple[float, tuple[int, ...]]] = {}  # size -> loss, items by working number
        self._certified: dict[int, tuple[int, ...]] = {}  # supports that no single exchange improves
        self.exchanges = 0
        self._least = GAIN * problem.square
        number = {item: i for i, item in enumerate(self.working)}
        for items in (start or {}).values():
            self.tableau.load([number[int(i)] for i in items])
            self._descend()
            self._record()

    def run(self) -> dict[int, Found]:
        """Passes on the working set, then comparison with every column, until nothing gains."""
        for size in range(self.sizes[-1] + 1):
            if size in self.sizes:
                self._visit()
            if size < self.sizes[-1]:
                self._grow()
        for _ in range(ROUNDS):
            if self._widen():
                continue
            before = sum(self.best[k][0] for k in self.sizes)
            self._passes()
            if sum(self.best[k][0] for k in self.sizes) >= before:
                break
        return {k: Found(tuple(sorted(self.working[i] for i in self.best[k][1])), self.best[k][0]) for k in self.sizes}

    def _record(self) -> bool:
        size, loss = len(self.tableau.items), self.tableau.loss
        if size in self.best and loss >= self.best[size][0] - self._least:
            return False
        self.best[size] = (loss, tuple(self.tableau.items))
        return True

    def _descend(self, most: int = LOOK) -> None:
        """Exchanges, the steepest first, until none gains."""
        while 0 < len(self.tableau.items) < len(self.working):
            gain, out, item = self.tableau.best_swap(most)
            if gain <= self._least:
                return
            self.tableau.swap(out, item)
            self.exchanges += 1

    def _grow(self) -> None:
        gains = self.tableau.add_gains()
        gains[self.tableau.items] = -1
        self.tableau.enter(int(gains.argmax()))

    def _shrink(self) -> None:
        self.tableau.leave(self.tableau.items[int(self.tableau.drop_costs().argmin())])

    def _visit(self) -> bool:
        """Improve what the tableau holds, and go on from the better of it and what was known at this size."""
        self._descend()
        better = self._record()
        loss, items = self.best[len(self.tableau.items)]
        if loss < self.tableau.loss - self._least:
            self.tableau.load(list(items))
        return better

    def _passes(self) -> None:
        """Up through the sizes and down again while some size of interest improves."""
        wanted = set(self.sizes)
        for _ in range(PASSES):
            improved = False
            while len(self.tableau.items) < self.top:
                self._grow()
                improved |= self._visit() and len(self.tableau.items) in wanted
            while len(self.tableau.items) > self._low:
                self._shrink()
                improved |= self._visit() and len(self.tableau.items) in wanted
            if not improved:
                return

    def _widen(self) -> bool:
        """Compare the supports of interest with all columns; whether any column joined the working set."""
        gaining: dict[int, float] = {}
        improvable = []
        for size in self.sizes:
            items = self.best[size][1]
            if not 0 < size < self.problem.n_items or self._certified.get(size) == items:
                continue
            gains = self.problem.exchange_gains([self.working[i] for i in items])
            most = min(8 + size, len(gains))
            top = np.argpartition(-gains, most - 1)[:most]
            top = top[gains[top] > self._least]
            if not len(top):
                self._certified[size] = items
                continue
            improvable.append(size)
            for item in top:
                gaining[int(item)] = max(gaining.get(int(item), 0.0), float(gains[item]))
        self._work_on(improvable, gaining)
        return bool(improvable)

    def _work_on(self, sizes: list[int], gaining: dict[int, float]) -> None:
        """Take the columns that gain most into the working set, and improve the supports of some sizes with them."""
        for item in set(gaining) & set(self.working):
            del gaining[item]
        if gaining:
            self.working += sorted(gaining, key=lambda item: -gaining[item])[: max(LEAST, 2 * self.top)]
            self.tableau = self.problem.tableau(self.working)
        for size in sizes:
            self.tableau.load(list(self.best[size][1]))
            self._descend(len(self.working))
            self._visit()


def best_subsets(
    problem: SquaresProblem, sizes: Iterable[int], start: dict[int, Sequence[int]] | None = None
) -> dict[int, Found]:
    """For each size the best support found: no single exchange with any column improves it.

    Parameters
    ----------
    problem : SquaresProblem
    sizes : iterable of int, each from 0 to ``problem.n_items``
    start : mapping size -> items, optional

    Returns
    -------
    dict, size -> Found

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> problem = SquaresProblem(Design(x), (x[:, [2]] - x[:, [5]]))
    >>> best_subsets(problem, [2])[2].items
    (2, 5)
    """
    return SubsetSearch(problem, sizes, start).run()
