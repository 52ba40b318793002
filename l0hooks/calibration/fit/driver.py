"""Runs the solver for one or several K, reports progress, calls callbacks, and writes and reads checkpoints."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from l0hooks.calibration.data.inputs import Inputs
from l0hooks.calibration.data.reach import weight_limits
from l0hooks.calibration.fit.candidates import Options
from l0hooks.calibration.fit.checkpoint import Checkpoint
from l0hooks.calibration.fit.polished import Polished, Verdict
from l0hooks.calibration.fit.progress import Callback, Display, Update, Watch
from l0hooks.calibration.fit.saved import Fields
from l0hooks.calibration.fit.saved_solver import read_outcomes, read_rows
from l0hooks.calibration.fit.solver import Solver
from l0hooks.calibration.fit.stage import Selection, State
from l0hooks.calibration.numerics.columns import Floats, Integers, shared
from l0hooks.calibration.numerics.preparation import ErrorOptions, UnitOptions, prepare
from l0hooks.calibration.numerics.problem import ClusterDistance, Loss, Problem

_LEAST_IMPORTANCE = 1e-12  # of a target that is only part of the hierarchy, as a share of the largest
HISTORY_COLUMNS = ("stage", "step", "steps", "error", "active", "seconds")


@dataclass(frozen=True)
class Outcome:
    """What the solver found for one K.

    Attributes
    ----------
    keep : int or None
    weights : float64, shape (N,)
    selection : Selection
    stage : str
        The best candidate.
    verdict : "met", "impossible" or "unknown"
        Whether all targets are met; if not, whether it is proved that the chosen units cannot.
    conflict : float64, shape (Q,), or None
        Multipliers of the proof.
    optimal : bool
        Whether the optimum of the last fit is certified.
    reason : str
    candidates : dict from name to mean \\|relative error\\|
        All that were tried.
    rows : list of dict
        The history.
    """

    keep: int | None
    weights: Floats
    selection: Selection
    stage: str
    verdict: Verdict
    conflict: Floats | None
    optimal: bool
    reason: str
    candidates: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)


def prepared(
    inputs: Inputs,
    *,
    loss: Loss,
    consistency: float,
    offset: float = 1.0,
    cluster_distance: ClusterDistance = "once",
) -> Problem:
    """The problem that the stages work on, of the targets that have importance, parents or children."""
    people, rows = inputs.people, rows_of_problem(inputs)
    whole = len(rows) == len(inputs.importance)
    place = np.zeros(len(inputs.importance), np.int64)
    place[rows] = np.arange(len(rows))
    problem = prepare(
        inputs.matrix if whole else inputs.matrix[rows],
        inputs.lower[rows],
        inputs.upper[rows],
        errors=ErrorOptions(
            loss=loss,
            offset=offset,
            importance=np.maximum(inputs.importance[rows], _LEAST_IMPORTANCE * inputs.importance.max()),
            hierarchy=[(int(place[parent]), place[list(children)].tolist()) for parent, children in inputs.hierarchy],
            consistency=consistency,
        ),
        units=UnitOptions(people.design, keep=people.keep, leave_out=people.leave_out, clusters=people.clusters),
        dtype=inputs.dtype,
    )
    low, high = weight_limits(people, on_weight=inputs.bounds_on == "weight")
    if people.clusters is not None or len(people.leave_out):
        first = np.full(problem.size, len(problem.members))
        inside = np.flatnonzero(problem.members >= 0)
        np.minimum.at(first, problem.members[inside], inside)  # a cluster's households have the same bounds
        low, high = low[first], high[first]
    low /= problem.design
    high /= problem.design
    sizes = None
    if people.clusters is not None and cluster_distance == "members":
        sizes = np.bincount(problem.members[problem.members >= 0], minlength=problem.size).astype(np.float64)
    return replace(problem, low=shared(low), high=shared(high), counts=sizes)


def rows_of_problem(inputs: Inputs) -> Integers:
    """The targets that have importance, parents or children."""
    counts = inputs.importance > 0
    counts[[number for parent, children in inputs.hierarchy for number in (parent, *children)]] = True
    return np.flatnonzero(counts)


def conflicting(inputs: Inputs, outcome: Outcome) -> tuple[Hashable, ...]:
    """The targets that a proof needs, those with the largest multipliers first; parents for their conditions."""
    if outcome.conflict is None:
        return ()
    rows = np.concatenate([rows_of_problem(inputs), [parent for parent, _ in inputs.hierarchy]]).astype(np.int64)
    order = np.argsort(-np.abs(outcome.conflict), kind="stable")[: np.count_nonzero(outcome.conflict)]
    return tuple(dict.fromkeys(inputs.targets.labels[int(rows[place])] for place in order))


class Driver:
    """Takes the solver through all K, largest first.

    Parameters
    ----------
    problem : Problem
    options : Options
        ``keep`` is not read.
    sizes : sequence of int or None
        None: no number was asked for.
    callbacks : sequence of Callback
    display : Display
    checkpoint : Checkpoint, optional
    keep_checkpoint : bool
        Whether its file stays at the end, with the outcomes, instead of being deleted.
    """

    def __init__(
        self,
        problem: Problem,
        options: Options,
        sizes: Sequence[int | None],
        *,
        callbacks: Sequence[Callback] = (),
        display: Display,
        checkpoint: Checkpoint | None = None,
        keep_checkpoint: bool = False,
    ) -> None:
        self.options, self.sizes = options, list(sizes)
        self._problems = [problem] * len(self.sizes)  # each solver takes one away, so that the last one can free memory
        self.callbacks, self.display, self.checkpoint = callbacks, display, checkpoint
        self.keep_checkpoint = keep_checkpoint
        self.outcomes: list[Outcome] = []
        self._rows: list[dict[str, Any]] = []
        self._stopped = ""
        self._watch = Watch()

    def run(self) -> list[Outcome]:
        """One outcome for each K; work that a checkpoint holds is not repeated."""
        saved = None if self.checkpoint is None else self.checkpoint.read()
        if saved is not None:
            self._restore(saved)
        try:
            while len(self.outcomes) < len(self.sizes):
                solver = self._solver()
                if saved is not None:
                    solver.resume(saved["solver"])
                    saved = None
                else:
                    self._stopped = ""
                if self._stopped:
                    solver.try_no_more()
                self.outcomes.append(self._solve(solver))
                self._rows = []
        finally:
            self.display.close()
        if self.checkpoint is not None and self.keep_checkpoint:
            self.checkpoint.try_to_write(self._state(None))
        elif self.checkpoint is not None:
            self.checkpoint.remove()
        return self.outcomes

    def _solver(self) -> Solver:
        before = self.outcomes[-1].selection if self.outcomes else None
        options = replace(self.options, keep=self.sizes[len(self.outcomes)])
        return Solver(self._problems.pop(), options, before, frugal=True)

    def _solve(self, solver: Solver) -> Outcome:
        while not solver.done and not (self._stopped and solver.candidates):
            update = self._watch.update(solver.advance())
            self._rows.append({name: vars(update)[name] for name in HISTORY_COLUMNS})
            self.display.show(update)
            self._call_callbacks(update, solver)
            if self.checkpoint is not None and self.checkpoint.due and solver.resumable:
                self.checkpoint.try_to_write(self._state(solver))
        return self._outcome(solver)

    def _call_callbacks(self, update: Update, solver: Solver) -> None:
        for callback in self.callbacks:
            if callback(update):
                self._stopped = f"stopped by a callback after {update.stage} {update.step}/{update.steps}"
                solver.end_stage()
                solver.try_no_more()

    def _outcome(self, solver: Solver) -> Outcome:
        best = solver.best()
        polished: Polished = best.polished
        selection = polished.selection
        return Outcome(
            keep=solver.options.keep,
            weights=solver.problem.weights(selection.g, selection.units),
            selection=selection,
            stage=best.name,
            verdict=polished.verdict,
            conflict=polished.conflict,
            optimal=polished.converged,
            reason=polished.reason + (f"; {self._stopped}" if self._stopped else ""),
            candidates={candidate.name: candidate.polished.error for candidate in solver.candidates},
            rows=self._rows,
        )

    def _state(self, solver: Solver | None) -> State:
        outcomes = [{**vars(one), "selection": vars(one.selection)} for one in self.outcomes]
        return {
            "outcomes": outcomes,
            "rows": self._rows,
            "seconds": self._watch.seconds(),
            "stopped": self._stopped,
            "solver": None if solver is None else solver.state(),  # of a finished fit there is none
        }

    def _restore(self, saved: State) -> None:
        state = Fields(saved, "fit", "outcomes", "rows", "seconds", "stopped", "solver")
        problem = self._problems[0]
        finished = read_outcomes(state.listed("outcomes"), self.sizes, len(problem.members), problem, HISTORY_COLUMNS)
        rows, seconds = read_rows(state.listed("rows"), HISTORY_COLUMNS), state.number("seconds", least=0)
        self._rows, self._stopped = rows, state.text("stopped")
        over = len(finished) == len(self.sizes)
        state.check("solver", (state.any("solver") is None) is over, "none if all outcomes are there, else one")
        self.outcomes = [Outcome(**one) for one in finished]
        del self._problems[: len(self.outcomes)]
        self._watch = Watch(before=seconds)
