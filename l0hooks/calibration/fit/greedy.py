"""The greedy stage: orthogonal matching pursuit in blocks, for few units."""

from __future__ import annotations

import numpy as np

from l0hooks.calibration.fit.saved import Fields
from l0hooks.calibration.fit.stage import Progress, Selection, State, largest, refit
from l0hooks.calibration.numerics.columns import Floats
from l0hooks.calibration.numerics.problem import Problem

# with at most one unit for two targets; with more
_FEW_UNITS_ROUNDS, _MANY_UNITS_ROUNDS = 100, 40
_FEW_UNITS_ITERATIONS, _MANY_UNITS_ITERATIONS = 100, 30  # of each refit


class GreedyStage:
    """Adds the units whose columns are nearest in direction to the remaining misses, and refits, round by round.

    Parameters
    ----------
    problem : Problem
    keep : int
        The number of units to choose, those that must stay included.
    rounds : int, > 0, optional
    iterations : int, > 0, optional
        Of each refit. Both are larger by default where there is at most one unit for two targets.

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> matrix = sparse.csr_array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    >>> stage = GreedyStage(prepare(matrix, [4.0, 4.0]), keep=1)
    >>> _ = stage.advance()
    >>> stage.selection().units, stage.done
    (array([2]), True)

    References
    ----------
    Bruckstein, Elad & Zibulevsky (2008), On the uniqueness of nonnegative sparse solutions to underdetermined systems
    of equations, section III, for the pursuit with non-negative coefficients.
    """

    def __init__(
        self, problem: Problem, keep: int, *, rounds: int | None = None, iterations: int | None = None
    ) -> None:
        many = 2 * keep > problem.rows
        usual_rounds = _MANY_UNITS_ROUNDS if many else _FEW_UNITS_ROUNDS
        usual_iterations = _MANY_UNITS_ITERATIONS if many else _FEW_UNITS_ITERATIONS
        self.problem, self.keep = problem, keep
        self.iterations = usual_iterations if iterations is None else iterations
        self._block = max(1, keep // (usual_rounds if rounds is None else rounds))
        self._units = np.flatnonzero(problem.kept)
        self._g = np.maximum(problem.low[self._units], np.minimum(1.0, problem.high[self._units]))
        self._misses = problem.misses(problem.estimates(self._g, self._units))

    @property
    def done(self) -> bool:
        """Whether ``keep`` units are chosen."""
        return len(self._units) >= self.keep

    @property
    def misses(self) -> Floats:
        """Scaled misses of the units chosen so far."""
        return self._misses

    @property
    def resumable(self) -> bool:
        """True: the state may be saved after every step."""
        return True

    def advance(self) -> Progress:
        """Add one block of units."""
        problem = self.problem
        scores = problem.promise(self._misses)
        scores[self._units] = -np.inf
        new = largest(scores, min(self._block, self.keep - len(self._units)))
        units = np.concatenate([self._units, new])
        usual = np.median(self._g[self._g > 0]) if (self._g > 0).any() else problem.size / self.keep
        order = np.argsort(units)
        fitted = refit(
            problem,
            units[order],
            np.concatenate([self._g, np.full(len(new), 0.05 * usual)])[order],
            iterations=self.iterations,
            relaxed=True,
        )
        self._units, self._g, self._misses = units[order], fitted.g, fitted.misses
        steps = -(-self.keep // self._block)
        step = min(steps, -(-len(self._units) // self._block))
        return Progress("greedy", step, steps, problem.error(self._misses), int((self._g > 0).sum()))

    def selection(self) -> Selection:
        """The units chosen so far."""
        return Selection(self._units, self._g)

    def state(self) -> State:
        """What :meth:`resume` needs."""
        return {"units": self._units.copy(), "g": self._g.copy(), "misses": self._misses.copy()}

    def resume(self, state: State) -> None:
        """Go on from ``state``."""
        saved = Fields(state, "greedy", "units", "g", "misses")
        now, self._misses = saved.selection(self.problem.size), saved.array("misses", (self.problem.rows,))
        self._units, self._g = now.units, now.g


def worth_their_price(problem: Problem, price: float) -> Selection:
    """Choose units one by one, while each lowers the loss by more than half the price.

    Parameters
    ----------
    problem : Problem
    price : float, > 0

    Returns
    -------
    Selection
        Empty if not even the first unit is worth its price.

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> problem = prepare(sparse.csr_array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.1]]), [4.0, 4.0])
    >>> [worth_their_price(problem, price).units.tolist() for price in (0.1, 10.0)]
    [[2], []]
    """
    most = min(problem.size, problem.rows + 1)
    stage = GreedyStage(problem, most, rounds=most)
    best, least = stage.selection(), float(stage.misses @ stage.misses) / 2
    while not stage.done:
        stage.advance()
        found = stage.selection()
        fitted = refit(problem, found.units, found.g, iterations=_FEW_UNITS_ITERATIONS)
        cost = fitted.loss + price / 2 * len(found.units)
        if cost >= least:
            break
        best, least = Selection(found.units, fitted.g), cost
    return best
