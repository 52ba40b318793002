"""Stages that end with exactly K units: pruning of a larger selection, and swaps."""

from __future__ import annotations

import math

import numpy as np

from l0hooks.calibration.fit.saved import Fields
from l0hooks.calibration.fit.stage import Progress, Selection, State, contributions, largest, refit
from l0hooks.calibration.numerics.columns import compacted, rows_of
from l0hooks.calibration.numerics.problem import Problem

_PRUNING_ROUNDS, _PRUNING_ITERATIONS = 5, 40
_MOST_SWAPS = 30
_SWAPPED_SHARE = 0.1  # of the units, exchanged by the first swap
_FEW_UNITS_ITERATIONS, _MANY_UNITS_ITERATIONS = 80, 25  # with at most as many units as targets; with more
_FLOAT32_MISSES = 1e-4  # root mean square of the scaled misses, above which float32 is exact enough
_LEAST_GAIN = 2e-3  # share of the norm of the misses by which a swap must lower it


class PruneStage:
    """Goes down from many units to K in geometric steps, dropping the smallest contributions after each refit.

    Parameters
    ----------
    problem : Problem
    selection : Selection
        At least ``keep`` units, with those that must stay.
    keep : int
    rounds, iterations : int, > 0

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> problem = prepare(sparse.csr_array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), [4.0, 9.0])
    >>> stage = PruneStage(problem, Selection(np.arange(3), np.ones(3)), keep=2)
    >>> while not stage.done:
    ...     _ = stage.advance()
    >>> stage.selection().units
    array([1, 2])
    """

    def __init__(
        self,
        problem: Problem,
        selection: Selection,
        keep: int,
        *,
        rounds: int = _PRUNING_ROUNDS,
        iterations: int = _PRUNING_ITERATIONS,
    ) -> None:
        self.problem, self.keep, self.rounds, self.iterations = problem, keep, rounds, iterations
        self._many = max(keep, len(selection.units))
        self._now = selection
        self._round = 0 if len(selection.units) > keep else rounds

    @property
    def done(self) -> bool:
        """Whether K are left."""
        return self._round >= self.rounds

    @property
    def resumable(self) -> bool:
        """True: the state may be saved after every step."""
        return True

    def advance(self) -> Progress:
        """Refit, and drop the smallest contributions."""
        self._round += 1
        share = self._round / self.rounds
        count = self.keep if self.done else max(self.keep, round(self._many ** (1 - share) * self.keep**share))
        fitted = refit(self.problem, self._now.units, self._now.g, iterations=self.iterations, relaxed=True)
        stay = largest(contributions(self.problem, self._now.units, fitted.g), count)
        self._now = Selection(self._now.units[stay], fitted.g[stay])
        return Progress("prune", self._round, self.rounds, self.problem.error(fitted.misses), count)

    def selection(self) -> Selection:
        """The units that are left."""
        return self._now

    def state(self) -> State:
        """What :meth:`resume` needs."""
        return {"units": self._now.units.copy(), "g": self._now.g.copy(), "round": self._round}

    def resume(self, state: State) -> None:
        """Go on from ``state``."""
        saved = Fields(state, "prune", "units", "g", "round")
        self._now, self._round = saved.selection(self.problem.size), saved.whole("round", most=self.rounds)


class SwapStage:
    """Exchanges units while that lowers the loss: add the J that promise most, refit, drop the J smallest, refit.

    The loss never rises. J starts at a tenth of K, and is halved whenever a swap gains next to nothing.

    Parameters
    ----------
    problem : Problem
    selection : Selection
        The K units to begin with.
    rounds : int, > 0
    iterations : int, > 0, optional
        Of each refit; more by default where there are at most as many units as targets.

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> problem = prepare(sparse.csr_array([[1.0, 1.0, 1.0], [0.0, 0.5, 1.0]]), [4.0, 4.0])
    >>> stage = SwapStage(problem, Selection(np.array([0]), np.ones(1)))
    >>> while not stage.done:
    ...     _ = stage.advance()
    >>> stage.selection().units
    array([2])

    References
    ----------
    Dai & Milenkovic (2009), Subspace pursuit for compressive sensing signal reconstruction, algorithm 1.
    """

    def __init__(
        self, problem: Problem, selection: Selection, *, rounds: int = _MOST_SWAPS, iterations: int | None = None
    ) -> None:
        self.problem, self.rounds = problem, rounds
        many = len(selection.units) > problem.rows
        usual = _MANY_UNITS_ITERATIONS if many else _FEW_UNITS_ITERATIONS
        self.iterations = usual if iterations is None else iterations
        self._round = 0
        self._count = max(1, min(int(_SWAPPED_SHARE * len(selection.units)), problem.size - len(selection.units)))
        block = rows_of(problem.columns, selection.units, rough=many)
        fitted = refit(problem, selection.units, selection.g, iterations=2 * self.iterations, block=block)
        self._now, self._misses = Selection(selection.units, fitted.g), fitted.misses
        if len(selection.units) >= problem.size:
            self._count = 0

    @property
    def done(self) -> bool:
        """Whether there is nothing more to gain, or the rounds are over."""
        return self._round >= self.rounds or self._count < 1

    @property
    def resumable(self) -> bool:
        """True: the state may be saved after every step."""
        return True

    @property
    def _rough(self) -> bool:
        """Whether float32 will do: with more units than targets, while the misses are far above its rounding."""
        far = float(np.linalg.norm(self._misses)) > _FLOAT32_MISSES * math.sqrt(self.problem.rows)
        return far and len(self._now.units) > self.problem.rows

    def advance(self) -> Progress:
        """Try one swap."""
        problem, units, g = self.problem, self._now.units, self._now.g
        self._round += 1
        keep, before = len(units), float(np.linalg.norm(self._misses))
        scores = problem.promise(self._misses)
        scores[units] = -np.inf
        new = largest(scores, self._count)
        usual = np.median(g[g > 0]) if (g > 0).any() else 1.0
        many = np.concatenate([units, new])
        order = np.argsort(many)
        start = np.concatenate([g, np.full(len(new), 0.05 * usual)])[order]
        many = many[order]
        block = rows_of(problem.columns, many, rough=self._rough)
        wide = refit(problem, many, start, iterations=self.iterations, relaxed=True, block=block)
        stay = largest(contributions(problem, many, wide.g), keep)
        narrow = refit(problem, many[stay], wide.g[stay], iterations=self.iterations, block=compacted(block, stay))
        after = float(np.linalg.norm(narrow.misses))
        if after < before * (1 - _LEAST_GAIN):
            self._now, self._misses = Selection(many[stay], narrow.g), narrow.misses
        else:
            self._count //= 2
        return Progress("swaps", self._round, self.rounds, problem.error(self._misses), keep)

    def selection(self) -> Selection:
        """The current units."""
        return self._now

    def state(self) -> State:
        """What :meth:`resume` needs."""
        now = {"units": self._now.units.copy(), "g": self._now.g.copy(), "misses": self._misses.copy()}
        return {**now, "round": self._round, "count": self._count}

    def resume(self, state: State) -> None:
        """Go on from ``state``."""
        saved = Fields(state, "swaps", "units", "g", "misses", "round", "count")
        now, misses = saved.selection(self.problem.size), saved.array("misses", (self.problem.rows,))
        self._round, self._count = saved.whole("round"), saved.whole("count")
        self._now, self._misses = now, misses
