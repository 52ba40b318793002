"""Rules of budgets in time: at the end of the schedule pruned models are timed, and their times decide."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from l0hooks.errors import L0HooksWarning, explain
from l0hooks.gates.gate import Gate
from l0hooks.gates.progress import Progress
from l0hooks.training.budget import Budget, described
from l0hooks.training.budget_rule import BudgetRule
from l0hooks.training.clocks import clock_for
from l0hooks.training.lagrangian import LagrangianRule
from l0hooks.training.measured_target import Measured, TimedModel
from l0hooks.training.size import Size
from l0hooks.training.time_table import LatencyTable

_WHERE = 'Budget(unit="latency")'


class TimedRule(BudgetRule):
    """Holds the gates of one budget in time together; :func:`set_budget` makes it.

    Until the schedule ends the size is the time that the table of layers predicts. Then pruned copies of the model are
    timed beside a dense one, and the support is the largest that meets the time.

    Attributes
    ----------
    size : Size
        Microseconds by the numbers of gates that stay, as the table predicts them.
    target : float, microseconds
        What the table predicts for the size to reach; from the end of the schedule on, for the support.
    table : LatencyTable
        What the layers take.
    measured : Measured or None
        What the pruned model takes, once the support is fixed. A checkpoint does not hold it.

    Examples
    --------
    >>> from l0hooks import set_budget, sparsify
    >>> model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64)).eval()
    >>> x = torch.randn(256, 64)
    >>> _ = sparsify(model, "coupled", example_inputs=(x,))
    >>> (rule,) = set_budget(model, Budget(speedup=1.5, steps=0), example_inputs=(x,))
    >>> rule.finished, rule.measured.speedup > 1.4
    (True, True)
    """

    table: LatencyTable
    measured: Measured | None = None
    timed_model: TimedModel | None = None

    @property
    def goal(self) -> float:
        """The share of the dense model's time that is wanted."""
        return self.budget.target(self.size.whole) / self.size.whole

    def progress(self) -> Progress:
        """How far the schedule has come, and the predicted time of what evaluation keeps now."""
        return replace(super().progress(), unit="µs")

    def _fix_target(self) -> bool:
        """Time pruned models, and fix how many gates of each array stay."""
        found: Any = "a copy, which does not know the model that it belongs to"
        if self.timed_model is not None:
            bounds = self.target, self._least, self.size.whole
            found = self.timed_model.find(self.gates, self.support_at, bounds, self.goal)
        if isinstance(found, str):
            _warn_unmeasured(found)
            masks = self.support_at(self.target)
        else:
            masks, self.measured, met = found
            if not met:
                _warn_missed(self.goal, self.measured)
        self._hold([int(mask.sum()) for mask in masks])
        return True

    def _hold(self, counts: Sequence[int]) -> None:
        """Let so many gates of each array stay, those with the largest ``log_alpha``."""
        self._support.counts = tuple(counts)
        self.target = self.size.of(np.array(counts, np.float64))

    # --- checkpoints: times are those of one machine, so that shares and numbers of gates are saved ------------------

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"timed_model": None}

    def state(self) -> tuple[float, ...]:
        """The step, the start's share of the whole, the last shift, and how many gates of each array stay."""
        step, start, shift = super().state()
        counts = self._support.counts or [-1] * len(self.gates)
        return step, start / self.size.whole, shift, *counts

    def takes(self, *state: float) -> bool:
        """Whether :meth:`state` can have said this."""
        step, share, shift, *counts = state
        fixed = step >= self.budget.steps
        known = all(
            0 < n <= whole and float(n).is_integer() if fixed else n == -1
            for n, whole in zip(counts, self.size.counts.tolist(), strict=True)
        )
        return known and super().takes(step, share * self.size.whole, shift)

    def identity(self) -> tuple[float, ...]:
        """Numbers that are equal for budgets between which checkpoints may move, also to another machine."""
        wanted = self.budget.keep or self.budget.target(1.0)
        return wanted, float(self.size.counts.sum()), *self.budget.identity()

    def describe(self, identity: Sequence[float]) -> str:
        """The budget that :meth:`identity` is of, in words."""
        wanted, gates = identity[:2]
        time = f"{wanted:.4g} of the time" if wanted < 1 else f"{wanted:,.6g} µs"
        return f"{time} with {gates:,.0f} gates, {described(identity[2:])}"

    def resume(self, *state: float) -> None:
        """Go on from what :meth:`state` said; a support that was fixed stays, whatever it takes here."""
        step, share, shift, *counts = state
        self._support.counts, self.target = None, self.budget.target(self.size.whole)
        if counts[0] >= 0:
            self._hold([int(n) for n in counts])
        super().resume(step, share * self.size.whole, shift)


class TimedLagrangianRule(TimedRule, LagrangianRule):
    """:class:`TimedRule` with a price in the loss in place of the common shift.

    Examples
    --------
    >>> issubclass(TimedLagrangianRule, LagrangianRule)
    True
    """


def timed_rule(
    budget: Budget, gates: Sequence[Gate], size: Size, table: LatencyTable, timed: tuple[nn.Module, Sequence[Any]]
) -> TimedRule:
    """The rule of a budget in time over the gates of a model, with the model's positional arguments.

    Raises
    ------
    SpecError
        If there is no clock for the device of ``table``.
    """
    rule = (TimedLagrangianRule if budget.method == "lagrangian" else TimedRule)(budget, gates, size)
    rule.table = table
    clock = budget.clock or clock_for(torch.device(table.device))
    model, examples = timed
    rule.timed_model = TimedModel(model, examples, clock, table.device, keep_dense=budget.cut_every is not None)
    return rule


def _warn_unmeasured(why: str) -> None:
    text = explain(
        _WHERE,
        "the support is fixed by the times of pruned models.",
        got=f"none: {why}",
        hint="the table of layers alone has decided; time the pruned model",
    )
    warnings.warn(text, L0HooksWarning, stacklevel=2)


def _warn_missed(goal: float, measured: Measured) -> None:
    text = explain(
        _WHERE,
        "no support within the budget's limits is as fast as asked.",
        expected=f"{1e3 * goal * measured.dense:.3g} ms, {1 / goal:.2f} times faster",
        got=f"{1e3 * measured.pruned:.3g} ms, {measured.speedup:.2f} times faster: the nearest, which was taken",
        hint="gates on more layers, a smaller min_keep or round_to, or a smaller speedup",
    )
    warnings.warn(text, L0HooksWarning, stacklevel=2)
