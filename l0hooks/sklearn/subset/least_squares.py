"""Best subsets for (ridge) least squares: forward and backward passes with every exchange in closed form.

The search runs on a small working set of columns. Its result is then compared with all columns of the design. Columns
that would lower the loss join the working set, until there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from l0hooks.sklearn.subset.support_gains import TINY, SquaresProblem

MIN_GAIN = 1e-9  # share of yᵀy that an exchange must gain
WORKING_PER_ITEM = 2  # columns of the first working set for each item of the largest support
MIN_WORKING = 48  # least size of the first working set
MAX_WORKING_BY_COLUMNS = 100  # its size is 1/25 of all columns, if that is more, up to this
ITEMS_BETWEEN_JOINS = 8  # while a support grows, columns join the working set after this many items
COLUMNS_PER_JOIN = 32
SIZES_BEYOND = 3  # passes go this far beyond the requested sizes
FIRST_ENTERING = 24  # entering columns that are tried before all of the working set are
MAX_PASSES = 3  # up and down through the sizes
MAX_ROUNDS = 12  # comparisons with all columns
EXTRA_ENTERING = 8  # for one size this many columns more than items join the working set
MAX_ENUMERATED = 1000  # if a size has no more supports than this, all are tried
RELATIVE_RIDGE = 1e-9  # share of the diagonal that makes the systems of dependent columns solvable


@dataclass(frozen=True)
class Found:
    """A support and the residual sum of squares of its fit, as the search computed it."""

    items: tuple[int, ...]
    loss: float


class SubsetSearch:
    """The best supports found so far for the sizes of one problem, and the ways to improve them.

    Parameters
    ----------
    problem : SquaresProblem
    sizes : iterable of int, each from 0 to ``problem.n_items``
    start : mapping size -> items, optional
        Supports to start from.
    max_enumerated : int, >= 0
        If a size has no more supports than this, all are tried.
    """

    def __init__(
        self,
        problem: SquaresProblem,
        sizes: Iterable[int],
        start: dict[int, Sequence[int]] | None = None,
        *,
        max_enumerated: int = MAX_ENUMERATED,
    ) -> None:
        self.problem = problem
        self.max_enumerated = max_enumerated
        self.sizes = sorted(set(sizes))
        first, last = self.sizes[0], self.sizes[-1]
        self.top = min(problem.n_items, last + SIZES_BEYOND)
        self._low = max(0, first - SIZES_BEYOND)
        gains = problem.first_gains()
        order = np.argsort(-gains, kind="stable")
        count = min(
            problem.n_items,
            max(MIN_WORKING, WORKING_PER_ITEM * self.top, min(problem.n_items // 25, MAX_WORKING_BY_COLUMNS)),
        )
        self.working = [int(i) for i in order[:count]]
        known = set(self.working)
        self.working += sorted({int(i) for items in (start or {}).values() for i in items} - known)
        self.tableau = problem.tableau(self.working)
        self.best: dict[int, tuple[float, tuple[int, ...]]] = {}  # size -> loss, items by working number
        self._certified: dict[int, tuple[int, ...]] = {}  # supports that no exchange with any column improves
        self._settled: set[frozenset[int]] = set()  # supports that no exchange within the working set improves
        self.exchanges = 0
        self._least = MIN_GAIN * problem.square
        number = {item: i for i, item in enumerate(self.working)}
        for items in (start or {}).values():
            self.tableau.load([number[int(i)] for i in items])
            self._descend()
            self._record()

    def run(self) -> dict[int, Found]:
        """Pass through the working set and compare with all columns until nothing lowers the loss."""
        self.tableau.load([])  # growing from no items may find a better support than the given start
        for size in range(self.sizes[-1] + 1):
            if size in self.sizes:
                self._visit()
            if size and size % ITEMS_BETWEEN_JOINS == 0 and size + ITEMS_BETWEEN_JOINS // 2 < self.sizes[-1]:
                self.join_by_correlation()
            if size < self.sizes[-1]:
                self._grow()
        self._enumerate_small_sizes()
        for _ in range(MAX_ROUNDS):
            if self._compare_with_all():
                continue
            before = sum(self.best[k][0] for k in self.sizes)
            self._passes()
            if sum(self.best[k][0] for k in self.sizes) >= before:
                break
        return {k: Found(tuple(sorted(self.working[i] for i in self.best[k][1])), self.best[k][0]) for k in self.sizes}

    def join_by_correlation(self) -> None:
        """Let the columns that correlate most with the residual join the working set; no Gram rows are needed."""
        columns, b = self.tableau.fitted()
        gains = self.problem.gains_alone(self.problem.columns(self.working)[columns], b)
        gains[self.working] = 0
        top = np.argsort(-gains, kind="stable")[:COLUMNS_PER_JOIN]
        self._extend([int(i) for i in top if gains[i] > self._least], self.tableau.items)

    def _extend(self, new: list[int], items: Sequence[int]) -> None:
        """Let columns join the working set and load ``items``, given by their positions in it."""
        if new:
            self.working += new
            self.tableau = self.problem.tableau(self.working, self.tableau)
            self._settled.clear()
            self.tableau.load(list(items))

    def _enumerate_small_sizes(self) -> None:
        """Start sizes with few supports from the best of all, which exchanges of single items can miss."""
        n = self.problem.n_items
        enumerable = [k for k in self.sizes if 1 < k < n and comb(n, k) <= self.max_enumerated]
        if self.problem.groups is not None or not enumerable:
            return
        number = {item: i for i, item in enumerate(self.working)}
        if len(number) < n:
            return
        gram, cross = self.problem.gram(np.arange(n)), self.problem.cross
        gram[np.diag_indices(n)] += RELATIVE_RIDGE * (np.diag(gram) + max(np.diag(gram).max(), TINY))
        for size in enumerable:
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

    def _descend(self, most: int = FIRST_ENTERING) -> None:
        """Make the exchange of largest gain until none gains."""
        while 0 < len(self.tableau.items) < len(self.working):
            support = frozenset(self.tableau.items)
            if support in self._settled:
                return
            gain, out, item = self.tableau.best_swap(FIRST_ENTERING)
            if gain <= self._least and most > FIRST_ENTERING:
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
        """Improve the loaded support; continue from the better of it and the best known of this size."""
        self._descend()
        better = self._record()
        loss, items = self.best[len(self.tableau.items)]
        if loss < self.tableau.loss - self._least:
            self.tableau.load(list(items))
        return better

    def _passes(self) -> None:
        """Go up through the sizes and down again while one of the requested sizes improves."""
        wanted = set(self.sizes)
        for _ in range(MAX_PASSES):
            improved = False
            while len(self.tableau.items) < self.top:
                self._grow()
                improved |= self._visit() and len(self.tableau.items) in wanted
            while len(self.tableau.items) > self._low:
                self._shrink()
                improved |= self._visit() and len(self.tableau.items) in wanted
            if not improved:
                return

    def _compare_with_all(self) -> bool:
        """Compare the supports of the requested sizes with all columns; return whether any could be improved."""
        gaining: dict[int, float] = {}
        improvable = []
        for size in self.sizes:
            items = self.best[size][1]
            if not 0 < size < self.problem.n_items or self._certified.get(size) == items:
                continue
            found, gains = self.problem.entering([self.working[i] for i in items], EXTRA_ENTERING + size, self._least)
            if not len(found):
                self._certified[size] = items
                continue
            improvable.append(size)
            for item, gain in zip(found.tolist(), gains.tolist(), strict=True):
                gaining[item] = max(gaining.get(item, 0.0), gain)
        self._improve_with(improvable, gaining)
        return bool(improvable)

    def _improve_with(self, sizes: list[int], gaining: dict[int, float]) -> None:
        """Let the columns that gain most join the working set, and improve the supports of ``sizes`` with them."""
        for item in set(gaining) & set(self.working):
            del gaining[item]
        new = sorted(gaining, key=lambda item: -gaining[item])[: max(MIN_WORKING, 2 * self.top)]
        for size in sizes:
            self._extend(new, self.best[size][1])
            new = []
            self.tableau.load(list(self.best[size][1]))
            self._descend(len(self.working))
            self._visit()


def best_subsets(
    problem: SquaresProblem,
    sizes: Iterable[int],
    start: dict[int, Sequence[int]] | None = None,
    *,
    max_enumerated: int = MAX_ENUMERATED,
) -> dict[int, Found]:
    """For each size the best support found: no single exchange with any column improves it.

    If a size has at most ``max_enumerated`` supports of single columns, the support is the best of all.

    Parameters
    ----------
    problem : SquaresProblem
    sizes : iterable of int, each from 0 to ``problem.n_items``
    start : mapping size -> items, optional
    max_enumerated : int, >= 0

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
    return SubsetSearch(problem, sizes, start, max_enumerated=max_enumerated).run()
