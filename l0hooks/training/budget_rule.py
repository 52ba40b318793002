"""``BudgetRule``: one shift that all gates of a budget share keeps their expected size on schedule."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l0hooks._torch.tensors import is_meta
from l0hooks.errors import StateError, explain
from l0hooks.gates.gate import Gate
from l0hooks.gates.progress import Progress
from l0hooks.gates.protocols import OptimizedGate
from l0hooks.schedules import NAMED, Schedule
from l0hooks.training.budget import Budget, described, invalid_budget
from l0hooks.training.closing import ClosedGates
from l0hooks.training.cutting import MUST, Cutter, warn_uncut
from l0hooks.training.fitting_support import FittingSupport, choose_at_once
from l0hooks.training.shared_shift import SharedShift
from l0hooks.training.size import Size

_LARGEST_SHIFT = 1e3  # far more than log-odds can differ


class BudgetRule:
    """Holds the gates of one budget together; :func:`set_budget` makes it.

    Attributes
    ----------
    budget : Budget
    gates : tuple of Gate
    size : Size
        The size by the numbers of gates that stay.
    start, target : float
        Expected size at step 0, and the one to reach.
    step : int
        Steps taken.
    finished : bool
        Whether the schedule has ended and the support is fixed.
    limits : (float, float) or None
        For the log-odds, wider than a gate's own: a common shift must not press its gates together at an end.
    cutter : Cutter or None
        With ``cut_every``: what cuts the model that the budget was set for. A copy has none.

    Raises
    ------
    StateError
        If a gate is on the meta device, where log-odds have no data.

    Examples
    --------
    >>> from l0hooks import Gate, set_budget
    >>> (rule,) = set_budget(Gate(100), Budget(keep=10, steps=5))
    >>> for _ in range(5):
    ...     rule.advance()
    >>> rule.finished, round(rule.expected()), rule.target
    (True, 10, 10.0)
    """

    limits: tuple[float, float] | None = (-30.0, 15.0)

    def __init__(self, budget: Budget, gates: Sequence[Gate], size: Size) -> None:
        if any(is_meta(gate.log_alpha) for gate in gates):
            raise StateError(
                explain(
                    "Budget",
                    "gates that are put under a budget must have data.",
                    got="device meta",
                    hint="model.to_empty(device=...) and load_state_dict, then l0hooks.set_budget(model, Budget(...))",
                )
            )
        self.budget, self.automatic = budget, budget.automatic
        self.weights: tuple[weakref.ref[nn.Parameter], ...] = ()
        self.gates = tuple(gates)
        self.size, self.step = size, 0
        self._shift = SharedShift(self.gates, size)
        self._closed = None if budget.cut_every is None else ClosedGates(self.gates, size, budget.min_keep)
        self.cutter: Cutter | None = None
        self._support = FittingSupport(self.gates, size, budget.min_keep, self._closed)
        self.start = self.expected()
        self.target = budget.target(size.whole)
        self._schedule = self._make_schedule()
        self._least = size.of(size.least(budget.min_keep))
        self._moved: set[int] = set()  # the gates that this step has moved, by number
        self._stays_whole = False  # the model cannot be cut, which was said
        _ = self.scheduled  # refuses a schedule whose first value is not finite

    def _make_schedule(self) -> Schedule:
        if not self.budget.steps:
            return lambda _: self.target
        named = self.budget.schedule
        make = NAMED[named] if isinstance(named, str) else named
        return make(self.start, self.target, self.budget.steps)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        self.finished = step >= self.budget.steps  # torch.compile guards on this alone, not on every step

    @property
    def scheduled(self) -> float:
        """The size that the schedule asks for now, within what the gates can reach."""
        if self.finished:
            return self.target
        value = float(self._schedule(self.step))
        if not np.isfinite(value):
            raise invalid_budget(f"the schedule must be finite at step {self.step}.", value)
        return min(max(value, self._least), self.size.whole)

    def expected(self) -> float:
        """The expected size of the gates as they stand."""
        return self._shift.expected()

    def progress(self) -> Progress:
        """How far the schedule has come, and the size that evaluation keeps now."""
        kept = np.array([gate.kept() for gate in self.gates], np.float64)
        sizes = {"kept": self.size.of(kept), "target": self.target, "whole": self.size.whole}
        cut = 0 if self.cutter is None else self.cutter.parameters_cut
        return Progress(step=self.step, steps=self.budget.steps, unit=self.budget.unit, cut=cut, **sizes)

    # --- training --------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Take the share along the constraint out of the gradient, or keep the gates where they are."""
        if not self.finished:
            self._shift.project_gradients()
            return
        for gate in self.gates:
            gate.log_alpha.grad = None  # the optimiser's momentum must not move them either

    def after_step(self, moved: Sequence[OptimizedGate]) -> None:
        """Count an optimiser's step, if the budget is to count them itself; that of several over its gates, once."""
        if self.finished or not self.automatic:
            return
        known = set(map(id, moved))
        numbers = {number for number, gate in enumerate(self.gates) if id(gate) in known}
        if self._moved and self._moved.isdisjoint(numbers):
            self._moved |= numbers
            self._settle()
        else:
            self._moved = numbers
            self.advance()

    def after_ascent(self) -> None:
        """Do nothing: a shift has no multipliers."""

    def penalty(self) -> Tensor:
        """Zero: nothing is added to the loss."""
        return self.gates[0].log_alpha.new_zeros(())

    def advance(self) -> None:
        """Go one step along the schedule and shift the gates to the size it asks for."""
        if self.finished:
            return
        self.step += 1
        self._settle()
        if self.finished and self._fix_target():
            self._settle()
        if self._closed is not None:
            self._close_and_cut(self._closed)
        # sharded gates are gathered one by one within a forward, perhaps in lower precision: choose the support now
        if self.finished or self._support.is_sharded():
            self.refresh()

    def finish(self) -> None:
        """Fix the support at the target, as if the schedule had ended."""
        if self.finished:
            return
        self.step = math.ceil(self.budget.steps) - 1
        self.advance()

    def _close_and_cut(self, closed: ClosedGates) -> None:
        """Hold what is closed for good; now and then close more, and cut it."""
        closed.hold()
        if self.finished:
            self.refresh()
            closed.close([~gate.support() for gate in self.gates])
        elif self.step % (self.budget.cut_every or 1) == 0:
            closed.close_seldom_open()
        else:
            return
        if not self._stays_whole:
            why = "a copy, which does not know the model that it belongs to"
            if self.cutter is not None:
                why = self.cutter.cut(self.gates, closed.masks, all_of_them=self.finished)
            self._stays_whole = bool(why)
            if why:
                warn_uncut(why)

    def _fix_target(self) -> bool:
        """Decide at last which size is the target; whether it is another one than before."""
        return False

    def _settle(self) -> None:
        """Bring the gates to the size that the schedule asks for."""
        self._shift.settle(self.scheduled)

    @torch.no_grad()
    def start_from(self, scores: Sequence[Tensor | None]) -> None:
        """Raise the log-odds of each array of gates by its ``scores``; the expected size stays what it is.

        A budget without steps then closes all gates but the largest that fit into it.
        """
        for gate, score in zip(self.gates, scores, strict=True):
            if score is not None:
                gate.log_alpha.add_(score)
        if not self.budget.steps:
            self._fix_target()
            choose_at_once(self.gates, self.support_at(self.target))
            self.refresh()
            return
        self._shift.settle(self.start)
        self._shift.restart()
        self.start = self.expected()  # to the last bit
        self._schedule = self._make_schedule()

    def __getstate__(self) -> dict[str, Any]:
        # no lambda in a pickle, and nothing of another model
        return self.__dict__ | {"_schedule": None, "weights": (), "cutter": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._schedule = self._make_schedule()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state(self) -> tuple[float, ...]:
        """The step, the size that the schedule started from, and the last shift."""
        return self.step, self.start, self._shift.last

    def takes(self, *state: float) -> bool:
        """Whether :meth:`state` can have said this."""
        step, start, shift = state
        within = 0 <= step <= math.ceil(self.budget.steps) and 0 <= start <= self.size.whole * (1 + 1e-6)
        return within and float(step).is_integer() and abs(shift) <= _LARGEST_SHIFT

    def identity(self) -> tuple[float, ...]:
        """Numbers that are equal for budgets between which checkpoints may move."""
        return self.target, self.size.whole, *self.budget.identity()

    def describe(self, identity: Sequence[float]) -> str:
        """The budget that :meth:`identity` is of, in words."""
        target, whole = identity[:2]
        return f"{target:,.6g} of {whole:,.6g} {described(identity[2:])}"

    def resume(self, *state: float) -> None:
        """Go on from what :meth:`state` said."""
        self.step, self.start = int(state[0]), state[1]
        self._schedule = self._make_schedule()
        self._moved.clear()
        self._shift.restart(state[2])
        if self._closed is not None:
            self._closed.restart()

    def before_load(self, module: nn.Module, checkpoint: Mapping[str, Any], prefix: str) -> None:
        """Cut the model as it was cut when the checkpoint was written."""
        if self.cutter is None or self._closed is None or not self.cutter.is_of(module):
            return
        gone = self.cutter.gone_in(self.gates, checkpoint, prefix)
        if any(bool(mask.any()) for mask in gone):
            self._closed.close(gone)
            why = self.cutter.cut(self.gates, self._closed.masks, all_of_them=True)
            if why:
                raise StateError(explain("load_state_dict", MUST, got=why))

    # --- the support -----------------------------------------------------------------------------------------------

    def refresh(self) -> tuple[object, ...]:
        """Bring ``mask``, and once finished ``held``, of every gate up to date; a key of the state they belong to."""
        key = self._support.state(self.step, fixed=self.finished)
        if not self._support.is_of(key):
            self._support.update(key, self.scheduled, fixed=self.finished)
        return key

    def ties(self, masks: Sequence[Tensor] | None = None) -> tuple[int, int]:
        """How many gates have the log-odds of one that is decided otherwise, of those that stay and of the others.

        By default for the support as it is now.
        """
        return self._support.ties([gate.support() for gate in self.gates] if masks is None else masks)

    def support_at(self, allowed: float) -> list[Tensor]:
        """The largest log-odds that fit into a size, ``min_keep`` of every array first; of equal ones the first."""
        return self._support.masks(allowed)
