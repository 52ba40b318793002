"""Best subsets for (ridge) least squares: forward and backward passes with every exchange in closed form.

The search runs on a working set of columns, where a step costs microseconds. Its result is then compared with every
column of the design; those that would gain join the working set, until none does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from l0hooks.sklearn.subset.support_gains import TINY, SquaresProblem

GAIN = 1e-9  # an exchange counts if it gains this part of yᵀy
WIDTH = 2  # columns of the first working set for each item of the largest support
LEAST, MOST = 48, 100  # its least size, and the most that the number of columns alone makes it
STEP, JOIN = 8, 32  # on the way up, after so many items so many columns join the working set
REACH = 3  # how far beyond the sizes of interest the passes go
LOOK = 24  # columns that are tried in exchanges before all are
PASSES = 3  # up and down through the sizes, while it helps
ROUNDS = 12  # comparisons with all columns
MANY = 8  # columns, beyond one for each item, that join the working set for one size
FEW = 1000  # supports of a size that are all looked at
_RAISED = 1e-9  # of the diagonal: dependent columns have a solution, too


@dataclass(frozen=True)
class Found:
    """A support, and the residual square of its fit as the search saw it."""

    items: tuple[int, ...]
    loss: float


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
        self.top = min(problem.n_items, last + REACH)
        self._low = max(0, first - REACH)
        gains = problem.first_gains()
        order = np.argsort(-gains, kind="stable")
        wide = min(problem.n_items, max(LEAST, WIDTH * self.top, min(problem.n_items // 25, MOST)))
        self.working = [int(i) for i in order[:wide]]
        known = set(self.working)
        self.working += sorted({int(i) for items in (start or {}).values() for i in items} - known)
        self.tableau = problem.tableau(self.working)
        self.best: dict[int, tuple[float, tuple[int, ...]]] = {}  # size -> loss, items by working number
        self._certified: dict[int, tuple[int, ...]] = {}  # supports that no single exchange improves
        self._settled: set[frozenset[int]] = set()  # those that none within the working set does
        self.exchanges = 0
        self._least = GAIN * problem.square
        number = {item: i for i, item in enumerate(self.working)}
        for items in (start or {}).values():
            self.tableau.load([number[int(i)] for i in items])
            self._descend()
            self._record()

    def run(self) -> dict[int, Found]:
        """Passes on the working set, then comparison with every column, until nothing gains."""
        self.tableau.load([])  # also after a start: growth may find a better support than it led to
        for size in range(self.sizes[-1] + 1):
            if size in self.sizes:
                self._visit()
            if size and size % STEP == 0 and size + STEP // 2 < self.sizes[-1]:
                self._look_around()
            if size < self.sizes[-1]:
                self._grow()
        self._look_at_few()
        for _ in range(ROUNDS):
            if self._widen():
                continue
            before = sum(self.best[k][0] for k in self.sizes)
            self._passes()
            if sum(self.best[k][0] for k in self.sizes) >= before:
                break
        return {k: Found(tuple(sorted(self.working[i] for i in self.best[k][1])), self.best[k][0]) for k in self.sizes}

    def _look_around(self) -> None:
        """Take the columns that say most about what is left of y into the working set: correlations, no Gram rows."""
        columns, b = self.tableau.fitted()
        gains = self.problem.gains_alone(self.problem.columns(self.working)[columns], b)
        gains[self.working] = 0
        top = np.argsort(-gains, kind="stable")[:JOIN]
        self._extend([int(i) for i in top if gains[i] > self._least], self.tableau.items)

    def _extend(self, new: list[int], items: Sequence[int]) -> None:
        """Let columns join the working set; the tableau then holds ``items``, by working number."""
        if new:
            self.working += new
            self.tableau = self.problem.tableau(self.working, self.tableau)
            self._settled.clear()
            self.tableau.load(list(items))

    def _look_at_few(self) -> None:
        """Begin with the best of all supports where these are few: exchanges of single items can miss it."""
        n = self.problem.n_items
        few = [k for k in self.sizes if 1 < k < n and comb(n, k) <= FEW]
        if self.problem.groups is not None or not few:
            return
        number = {item: i for i, item in enumerate(self.working)}
        if len(number) < n:
            return
        gram, cross = self.problem.gram(np.arange(n)), self.problem.cross
        gram[np.diag_indices(n)] += _RAISED * (np.diag(gram) + max(np.diag(gram).max(), TINY))
        for size in few:
            supports = np.array(list(combinations(range(n), size)))
            right = cross[supports]
            fitted = np.linalg.solve(gram[supports[:, :, None], supports[:, None, :]], right)
            best = supports[(fitted * right).sum((1, 2)).argmax()]
            self.tableau.load([number[int(i)] for i in best])
            self._visit()

    def _record(self) -> bool:
        size, loss = len(self.tableau.items), self.tableau.loss
        if size in self.best and loss >= self.best[size][0] - self._least:
            return False
        self.best[size] = (loss, tuple(self.tableau.items))
        return True

    def _descend(self, most: int = LOOK) -> None:
        """Exchanges, the steepest first, until none gains."""
        while 0 < len(self.tableau.items) < len(self.working):
            support = frozenset(self.tableau.items)
            if support in self._settled:
                return
            gain, out, item = self.tableau.best_swap(LOOK)
            if gain <= self._least and most > LOOK:
                gain, out, item = self.tableau.best_swap(most)
            if gain <= self._least:
                self._settled.add(support)
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
            found, gains = self.problem.entering([self.working[i] for i in items], MANY + size, self._least)
            if not len(found):
                self._certified[size] = items
                continue
            improvable.append(size)
            for item, gain in zip(found.tolist(), gains.tolist(), strict=True):
                gaining[item] = max(gaining.get(item, 0.0), gain)
        self._work_on(improvable, gaining)
        return bool(improvable)

    def _work_on(self, sizes: list[int], gaining: dict[int, float]) -> None:
        """Take the columns that gain most into the working set, and improve the supports of some sizes with them."""
        for item in set(gaining) & set(self.working):
            del gaining[item]
        new = sorted(gaining, key=lambda item: -gaining[item])[: max(LEAST, 2 * self.top)]
        for size in sizes:
            self._extend(new, self.best[size][1])
            new = []
            self.tableau.load(list(self.best[size][1]))
            self._descend(len(self.working))
            self._visit()


def best_subsets(
    problem: SquaresProblem, sizes: Iterable[int], start: dict[int, Sequence[int]] | None = None
) -> dict[int, Found]:
    """For each size the best support found: no single exchange with any column improves it.

    Where a size has at most ``FEW`` supports of single columns, it is the best of all.

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
    >>> from l0hooks.sklearn.subset.design import Design
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> problem = SquaresProblem(Design(x), (x[:, [2]] - x[:, [5]]))
    >>> best_subsets(problem, [2])[2].items
    (2, 5)
    """
    return SubsetSearch(problem, sizes, start).run()
