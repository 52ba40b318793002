"""``Solver``: runs the candidates, each a chain of stages, and finds the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from l0hooks.calibration.fit.candidates import (
    GATES_WITH_SWAPS,
    Candidate,
    Options,
    Pending,
    planned,
    random_selection,
    with_floor,
)
from l0hooks.calibration.fit.gates import GateStage
from l0hooks.calibration.fit.greedy import GreedyStage, worth_their_price
from l0hooks.calibration.fit.polish import polish
from l0hooks.calibration.fit.priced import PricedSwapStage, cheapest
from l0hooks.calibration.fit.saved_solver import read_solver_state
from l0hooks.calibration.fit.stage import Patience, Progress, Selection, Stage, State, refit
from l0hooks.calibration.fit.swaps import PruneStage, SwapStage
from l0hooks.calibration.numerics.columns import rows_of
from l0hooks.calibration.numerics.problem import Problem

_COMPARING_ITERATIONS = 60  # of the refit that selections are compared by
_EQUAL_ERRORS = 0.01  # errors that differ by a smaller share count as equal: the design effect decides
_PROMISING_MISSES = 1e-2  # root mean square of a selection's scaled misses, up to which a polish may meet all targets
_CLOSE_NORMS = 1.1  # selections whose norm of misses is at most this many times the best one's are polished
_CLOSE_IF_UNSETTLED = 2.0  # the largest such factor, where the polish lowers the norm of the misses much
_AGREEING_STARTS = 1.06  # two starts whose norms differ by a smaller factor agree: gates are not tried
_FEW_TARGETS = 200  # up to which greedy search one unit at a time is cheap


class Solver:
    """Runs the candidates step by step and keeps the best.

    In ``"auto"`` these are greedy with swaps, a random selection with swaps, and gates with pruning and swaps, which
    are left out where the first two end equally well. Above 2,000 units gates are made up to one and a half times as
    many units as targets, and greedy search up to five times as many; beyond, these starts end within a few per cent of
    each other once they are polished. From twice as many on a random selection is tried as it is. Those that come close
    to the best, in loss or in error, are polished. The smallest mean relative error wins; of errors within 1 % of it,
    or of targets all met, the smallest design effect.

    Parameters
    ----------
    problem : Problem
    options : Options
    before : Selection, optional
        The result for a larger K, from which this one may be reached by pruning.
    frugal : bool
        Whether the columns of units that are in no selection are freed before the polish.

    Attributes
    ----------
    problem : Problem
        With a positive floor under the weights of chosen units, so that K is exact.
    candidates : list of Candidate
        Those that are finished.

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> rng = np.random.default_rng(0)
    >>> matrix = sparse.csr_array(rng.random((4, 50)))
    >>> solver = Solver(prepare(matrix, matrix @ np.ones(50)), Options(keep=6, epochs=20))
    >>> best = solver.run()
    >>> len(best.polished.selection.units), best.polished.feasible
    (6, True)
    """

    def __init__(
        self, problem: Problem, options: Options, before: Selection | None = None, *, frugal: bool = False
    ) -> None:
        self.options, self._before, self._frugal = options, before, frugal
        self.problem = with_floor(problem, options.keep)
        self.candidates: list[Candidate] = []
        self._pending: list[Pending] = []
        self._plan = planned(self.problem, options, before is not None)
        self._candidate = self._position = 0
        self._stage: Stage | None = None
        self._selection: Selection | None = None
        self._patience = None if options.patience is None else Patience(options.patience)

    @property
    def done(self) -> bool:
        """Whether all candidates that could win are polished."""
        return self._selected and not self._pending

    @property
    def _selected(self) -> bool:
        """Whether no further selection is to be made."""
        if self.candidates or self._candidate >= len(self._plan):  # once the polish has begun, nothing is added
            return True
        norms = sorted(one.norm for one in self._pending if one.name.endswith("swaps"))
        return (
            self._position == 0
            and len(norms) > 1
            and norms[1] <= _AGREEING_STARTS * norms[0]
            and self._plan[self._candidate] == GATES_WITH_SWAPS
        )

    @property
    def resumable(self) -> bool:
        """Whether :meth:`state` may be called now."""
        return self._stage is None or self._stage.resumable

    def run(self) -> Candidate:
        """Take all steps, and return the best candidate."""
        while not self.done:
            self.advance()
        return self.best()

    def best(self) -> Candidate:
        """The best of the finished candidates."""
        errors = np.array([c.polished.error for c in self.candidates])
        met = np.array([c.polished.feasible for c in self.candidates])
        edge = errors.min() * (1 + _EQUAL_ERRORS)
        equal = met if met.any() else errors <= edge
        deff = np.where(equal, [c.polished.deff for c in self.candidates], np.inf)
        return self.candidates[int(np.argmin(deff))]

    def advance(self) -> Progress:
        """Take one step of the stage that runs, or polish one selection."""
        if self._selected:
            return self._polish()
        chain = self._plan[self._candidate]
        while self._stage is None and self._position < len(chain):
            self._begin(chain[self._position])
        if self._stage is None:
            return self._finish_candidate("+".join(chain))
        progress = self._stage.advance()
        if self._stage.done:
            self._finish_stage()
        elif self._patience is not None and self._may_end() and self._patience.is_over(progress):
            self.end_stage()
        return progress

    def _may_end(self) -> bool:
        """Whether errors of the stage that runs can be compared from step to step, and it may end after any of them."""
        stage = self._stage
        return isinstance(stage, (SwapStage, PricedSwapStage)) or (isinstance(stage, GateStage) and stage.settled)

    def end_stage(self) -> None:
        """End gates or swaps with their current selection; a stage that does not have its K units yet goes on."""
        if isinstance(self._stage, (GateStage, SwapStage, PricedSwapStage)):
            self._finish_stage()

    def try_no_more(self) -> None:
        """Finish the selection that is being made, and begin no other."""
        begun = self._stage is not None or self._position > 0 or not self._pending
        self._plan = self._plan[: self._candidate + begun]

    def _begin(self, name: str) -> None:
        """Make the stage of that name; one that needs no steps ends at once."""
        if name in ("random", "all", "path"):
            self._selection, self._position = self._initial(name), self._position + 1
            return
        self._stage = self._make(name)
        if self._stage.done:
            self._finish_stage()

    def _initial(self, name: str) -> Selection:
        problem, keep = self.problem, self.options.keep
        if name == "path" and self._before is not None:
            return self._before
        if name == "all" or keep is None:
            return Selection(np.arange(problem.size), np.ones(problem.size))
        return random_selection(problem, keep, self.options.random_state)

    def _make(self, name: str) -> Stage:
        problem, options = self.problem, self.options
        if name == "gates":
            return GateStage(
                problem, options.keep, l0=options.l0, epochs=options.epochs, random_state=options.random_state
            )
        keep = problem.size if options.keep is None else options.keep
        if name == "greedy":
            return GreedyStage(problem, keep)
        selection = self._initial("random") if self._selection is None else self._selection
        if options.l0 is not None:
            return PricedSwapStage(problem, selection, options.l0)
        return PruneStage(problem, selection, keep) if name == "prune" else SwapStage(problem, selection)

    def _finish_stage(self) -> None:
        stage, keep = self._stage, self.options.keep
        if isinstance(stage, GateStage) and keep is not None:
            self._selection = stage.leading(min(2 * keep, self.problem.size))
        elif stage is not None:
            self._selection = stage.selection()
            self._compare_with_greedy()
        self._stage, self._position = None, self._position + 1
        if self._patience is not None:
            self._patience.begin()

    def _compare_with_greedy(self) -> None:
        """With a price, try greedy search too if targets are few or all gates closed; interchangeable ones may."""
        price, found, few = self.options.l0, self._selection, self.problem.rows <= _FEW_TARGETS
        if price is not None and found is not None and (few or not len(found.units)):
            self._selection = cheapest(self.problem, price, [found, worth_their_price(self.problem, price)])

    def _finish_candidate(self, name: str) -> Progress:
        """Keep the finished selection; whether it is polished depends on the others."""
        selection = self._initial("all") if self._selection is None else self._selection
        norm, error = 0.0, np.inf
        if len(self._plan) > 1:
            block = rows_of(self.problem.columns, selection.units, rough=len(selection.units) > self.problem.rows)
            fitted = refit(self.problem, selection.units, selection.g, iterations=_COMPARING_ITERATIONS, block=block)
            norm, error = float(np.linalg.norm(fitted.misses)), self.problem.error(fitted.misses)
        self._pending.append(Pending(name, selection, norm, error))
        self._selection, self._position, self._candidate = None, 0, self._candidate + 1
        return Progress("choice", self._candidate, len(self._plan), error, len(selection.units))

    def _polish(self) -> Progress:
        """Polish the most promising selection, and drop those that are too far behind it."""
        if self._frugal and not self.candidates:
            wanted = np.zeros(self.problem.size, np.bool_)
            for one in self._pending:
                wanted[one.selection.units] = True
            self.problem = self.problem.only(np.flatnonzero(wanted))
        self._pending.sort(key=lambda one: one.norm)
        first, options = self._pending[0], self.options
        polished = polish(
            self.problem,
            first.selection,
            objective=options.objective,
            distance=options.distance,
            tolerance=options.tolerance,
            rescale_design=options.rescale_design,
            limits=options.polish,
        )
        self.candidates.append(Candidate(first.name, polished))
        reached = min(c.polished.loss for c in self.candidates)
        gained = first.norm / max(float(np.sqrt(2 * polished.loss)), 1e-300)
        close = max(_CLOSE_NORMS, min(gained, _CLOSE_IF_UNSETTLED))  # the polish may reverse the order of such norms
        edge = close * max(first.norm, float(np.sqrt(2 * reached)))
        if polished.feasible:  # another that meets all targets may have a smaller design effect
            edge = _PROMISING_MISSES * math.sqrt(self.problem.rows)
        also = "random" if polished.feasible else None
        least = close * first.error
        self._pending = [one for one in self._pending[1:] if one.norm <= edge or one.error <= least or one.name == also]
        return Progress("polish", 1, 1 + len(self._pending), polished.error, len(first.selection.units))

    def state(self) -> State:
        """What :meth:`resume` needs: numbers, strings, arrays, and lists and dictionaries of them."""
        return {
            "candidate": self._candidate,
            "position": self._position,
            "stage": None if self._stage is None else self._stage.state(),
            "selection": None if self._selection is None else asdict(self._selection),
            "pending": [asdict(one) for one in self._pending],
            "candidates": [{"name": c.name, "polished": asdict(c.polished)} for c in self.candidates],
            "patience": None if self._patience is None else self._patience.state(),
        }

    def resume(self, state: State) -> None:
        """Go on from ``state``, of a solver made with the same arguments."""
        saved = read_solver_state(state, self.problem, self._plan, patient=self._patience is not None)
        self._candidate, self._position, self._selection = saved.candidate, saved.position, saved.selection
        self.candidates, self._pending, self._stage = saved.candidates, saved.pending, None
        if self._patience is not None:
            self._patience.resume(saved.patience)
        if saved.stage is not None:
            self._stage = self._make(self._plan[self._candidate][self._position])
            self._stage.resume(saved.stage)


def path(problem: Problem, sizes: Sequence[int], options: Options) -> dict[int, Candidate]:
    """The best candidate for every K of ``sizes``, from the largest down, each pruned from the last as well.

    Examples
    --------
    >>> from scipy import sparse
    >>> from l0hooks.calibration.numerics.preparation import prepare
    >>> matrix = sparse.csr_array(np.random.default_rng(0).random((4, 50)))
    >>> found = path(prepare(matrix, matrix @ np.ones(50)), [5, 20], Options(epochs=20))
    >>> [(k, len(best.polished.selection.units)) for k, best in found.items()]
    [(20, 20), (5, 5)]
    """
    found: dict[int, Candidate] = {}
    before: Selection | None = None
    for keep in sorted(set(sizes), reverse=True):
        found[keep] = Solver(problem, replace(options, keep=keep), before).run()
        before = found[keep].polished.selection
    return found
