"""What a solver and a driver have saved, checked and put into records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from l0hooks.calibration.fit.candidates import Candidate, Chain, Pending
from l0hooks.calibration.fit.polished import Polished, Verdict
from l0hooks.calibration.fit.saved import Fields, each, selection_of
from l0hooks.calibration.fit.stage import Selection
from l0hooks.calibration.numerics.columns import Floats
from l0hooks.calibration.numerics.problem import Problem
from l0hooks.errors import StateError, explain

_POLISHED = tuple(Polished.__dataclass_fields__)
_AT_ONCE = ("random", "all", "path")  # no stages: they take no steps


@dataclass(frozen=True)
class SolverState:
    """A solver's saved state; the state of its stage is checked by the stage."""

    candidate: int
    position: int
    selection: Selection | None
    candidates: list[Candidate]
    pending: list[Pending]
    stage: Any
    patience: Any


def read_solver_state(state: object, problem: Problem, plan: Sequence[Chain], *, patient: bool) -> SolverState:
    """The state of a solver for this problem with this plan, and with patience if it has one.

    Raises
    ------
    StateError
    """
    names = ("candidate", "position", "stage", "selection", "pending", "candidates", "patience")
    saved = Fields(state, "solver", *names)
    candidate = saved.whole("candidate", most=len(plan))
    chain = plan[candidate] if candidate < len(plan) else ()
    position, stage = saved.whole("position", most=len(chain)), saved.any("stage")
    if stage is not None and (position == len(chain) or chain[position] in _AT_ONCE):
        raise _refusal("a stage", f"none at position {position} of {'+'.join(chain) or 'no chain'}")
    if patient:
        patience = Fields(saved.any("patience"), "patience", "least", "waited")
        patience.number("least", least=0, infinite=True)
        patience.whole("waited")
    chosen = saved.any("selection")
    found = SolverState(
        candidate,
        position,
        None if chosen is None else selection_of(chosen, "solver, field 'selection'", problem.size),
        [
            Candidate(one.text("name"), _polished(one.any("polished"), problem))
            for one in each(saved.listed("candidates"), "candidate", "name", "polished")
        ],
        [
            Pending(
                one.text("name"),
                selection_of(one.any("selection"), "a pending candidate", problem.size),
                one.number("norm", least=0, infinite=True),
                one.number("error", least=0, infinite=True),
            )
            for one in each(saved.listed("pending"), "pending", "name", "selection", "norm", "error")
        ],
        stage,
        saved.any("patience"),
    )
    if candidate == len(plan) and not (found.candidates or found.pending):
        raise _refusal("a candidate", "none, and none left to make")
    return found


def read_outcomes(
    outcomes: Sequence[Any], sizes: Sequence[int | None], households: int, problem: Problem, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """The fields of the outcomes that are finished, for the first of ``sizes``.

    Raises
    ------
    StateError
    """
    names = ("keep", "weights", "selection", "stage", "verdict", "optimal", "conflict", "reason", "candidates", "rows")
    if len(outcomes) > len(sizes):
        raise _refusal(f"at most {len(sizes)} outcomes", str(len(outcomes)))
    found = []
    for one, keep in zip(each(outcomes, "outcome", *names), sizes, strict=False):
        if one.any("keep") != keep or isinstance(one.any("keep"), bool):
            raise _refusal(f"an outcome for keep={keep}", repr(one.any("keep"))[:80])
        tried = one.mapping("candidates")
        errors = Fields(tried, "candidates", *tried)
        found.append(
            {
                "keep": keep,
                "weights": one.array("weights", (households,)),
                "selection": selection_of(one.any("selection"), "an outcome", problem.size),
                "stage": one.text("stage"),
                "verdict": one.text("verdict", get_args(Verdict)),
                "optimal": one.flag("optimal"),
                "conflict": _conflict(one, problem),
                "reason": one.text("reason"),
                "candidates": {name: errors.number(name, infinite=True) for name in tried},
                "rows": read_rows(one.listed("rows"), columns),
            }
        )
    return found


def read_rows(rows: Sequence[Any], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a history.

    Raises
    ------
    StateError
    """
    return [
        {
            "stage": row.text("stage"),
            "step": row.whole("step"),
            "steps": row.whole("steps"),
            "error": row.number("error", infinite=True),
            "active": row.whole("active"),
            "seconds": row.number("seconds", least=0),
        }
        for row in each(rows, "row", *columns)
    ]


def _polished(state: object, problem: Problem) -> Polished:
    one = Fields(state, "a polished candidate", *_POLISHED)
    return Polished(
        selection=selection_of(one.any("selection"), "a polished candidate", problem.size),
        misses=one.array("misses", (problem.rows,)),
        error=one.number("error", least=0),
        loss=one.number("loss", least=0),
        deff=one.number("deff", infinite=True),
        objective=one.text("objective", ("least_squares", "distance")),
        feasible=one.flag("feasible"),
        conflict=_conflict(one, problem),
        converged=one.flag("converged"),
        certificate=one.number("certificate", infinite=True),
        reason=one.text("reason"),
    )


def _conflict(one: Fields, problem: Problem) -> Floats | None:
    return None if one.any("conflict") is None else one.array("conflict", (problem.rows,))


def _refusal(expected: str, got: str) -> StateError:
    return StateError(
        explain(
            "checkpoint",
            "a saved state must be one of such a fit.",
            expected=expected,
            got=got,
            hint="another path, or delete the file to begin anew",
        )
    )
