"""Swaps where units have a price: their number may change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from l0hooks.calibration.fit.saved import Fields
from l0hooks.calibration.fit.stage import Progress, Selection, State, contributions, largest, refit
from l0hooks.calibration.numerics.problem import Problem

_MOST_ROUNDS, _REFIT_ITERATIONS = 30, 60
_ADDED_SHARE = 0.25  # of the units, added by the first round that adds any
_PRUNED_SIZES = (1.0, 0.93, 0.86, 0.8, 0.7, 0.6, 0.5)  # shares of a selection that are left, step by step
_LEAST_GAIN = 1e-3  # share of the cost by which a round must lower it


def cheapest(problem: Problem, price: float, selections: Sequence[Selection]) -> Selection:
    """The one with the smallest ½ Σ dist² + price/2·K after a refit; of equal ones the first.

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> problem = prepare(sparse.csr_array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), [4.0, 4.0])
    >>> both, third = Selection(np.array([0, 1]), np.ones(2)), Selection(np.array([2]), np.ones(1))
    >>> cheapest(problem, 0.1, [both, third]).units
    array([2])
    """
    costs = [PricedSwapStage(problem, one, price).cost for one in selections]
    return selections[int(np.argmin(costs))]


class PricedSwapStage:
    r"""Adds and drops units while that lowers the loss plus the price of all: \(\tfrac12\sum\mathrm{dist}^2 + p/2\,K\).

    Each round adds the J units that promise most, prunes to half in small steps with refits, and takes the cheapest of
    these selections. The cost never rises. J is at first zero, then a quarter of the units, and is halved after a round
    that gains next to nothing.

    Parameters
    ----------
    problem : Problem
    selection : Selection
    price : float, > 0
        Of a unit, in Σ dist².
    rounds, iterations : int, > 0
        Rounds at the most, and iterations of each refit.

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> problem = prepare(sparse.csr_array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), [4.0, 4.0])
    >>> stage = PricedSwapStage(problem, Selection(np.arange(3), np.ones(3)), 0.1)
    >>> while not stage.done:
    ...     _ = stage.advance()
    >>> stage.selection().units
    array([2])

    References
    ----------
    Dai & Milenkovic (2009), Subspace pursuit for compressive sensing signal reconstruction, algorithm 1, for the swaps.
    """

    def __init__(
        self,
        problem: Problem,
        selection: Selection,
        price: float,
        *,
        rounds: int = _MOST_ROUNDS,
        iterations: int = _REFIT_ITERATIONS,
    ) -> None:
        self.problem, self.price, self.rounds, self.iterations = problem, price, rounds, iterations
        self._round, self._count = 0, 0
        self._now, self._misses = selection, problem.misses(np.zeros(problem.rows))
        self._cost = float(self._misses @ self._misses) / 2  # of the empty selection
        if not len(selection.units):
            self._round = rounds
            return
        self._empty_cost = np.inf if problem.kept.any() else self._cost
        fitted = refit(problem, selection.units, selection.g, iterations=2 * iterations, relaxed=True)
        self._now, self._misses = Selection(selection.units, fitted.g), fitted.misses
        self._cost = fitted.loss + price / 2 * len(selection.units)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to gain, or the rounds are over."""
        return self._round >= self.rounds or (self._round > 0 and self._count < 1)

    @property
    def resumable(self) -> bool:
        """True: the state may be saved after every step."""
        return True

    @property
    def cost(self) -> float:
        """½ Σ dist² plus half the price of all units."""
        return self._cost

    def advance(self) -> Progress:
        """Take one round."""
        self._round += 1
        before = self._cost
        self._prune(self._widened())
        if not len(self._now.units):
            self._count = 0
        elif self._count == 0:
            self._count = max(1, int(_ADDED_SHARE * len(self._now.units)))
        elif self._cost >= before * (1 - _LEAST_GAIN):
            self._count //= 2
        return Progress("swaps", self._round, self.rounds, self.problem.error(self._misses), len(self._now.units))

    def _widened(self) -> Selection:
        """The current units and J more."""
        units, g = self._now.units, self._now.g
        scores = self.problem.promise(self._misses)
        scores[units] = -np.inf
        more = min(self._count, self.problem.size - len(units))
        new = largest(scores, more) if more else units[:0]
        usual = np.median(g[g > 0]) if (g > 0).any() else 1.0
        many = np.concatenate([units, new])
        order = np.argsort(many)
        return Selection(many[order], np.concatenate([g, np.full(len(new), 0.05 * usual)])[order])

    def _prune(self, wide: Selection) -> None:
        """Drop the smallest contributions step by step; keep the cheapest selection on the way."""
        problem, now, most = self.problem, wide, len(wide.units)
        for share in _PRUNED_SIZES:
            stay = largest(contributions(problem, now.units, now.g), max(1, int(share * most)))
            fitted = refit(problem, now.units[stay], now.g[stay], iterations=self.iterations, relaxed=True)
            used = np.flatnonzero((fitted.g > 0) | problem.kept[now.units[stay]])
            now = Selection(now.units[stay][used], fitted.g[used])
            cost = fitted.loss + self.price / 2 * len(used)
            if cost < self._cost:
                self._now, self._misses, self._cost = now, fitted.misses, cost
            if len(used) <= max(1, int(problem.kept.sum())):
                break
        if self._empty_cost < self._cost:
            self._now = Selection(now.units[:0], now.g[:0])
            self._misses, self._cost, self._round = (
                problem.misses(np.zeros(problem.rows)),
                self._empty_cost,
                self.rounds,
            )

    def selection(self) -> Selection:
        """The current units."""
        return self._now

    def state(self) -> State:
        """What :meth:`resume` needs."""
        now = {"units": self._now.units.copy(), "g": self._now.g.copy(), "misses": self._misses.copy()}
        return {**now, "round": self._round, "count": self._count, "cost": self._cost}

    def resume(self, state: State) -> None:
        """Go on from ``state``."""
        saved = Fields(state, "swaps", "units", "g", "misses", "round", "count", "cost")
        now, misses = saved.selection(self.problem.size), saved.array("misses", (self.problem.rows,))
        self._round, self._count, self._cost = saved.whole("round"), saved.whole("count"), saved.number("cost")
        self._now, self._misses = now, misses
