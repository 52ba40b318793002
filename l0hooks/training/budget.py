"""``Budget``: the size to reach; one shift that all its gates share keeps their expected size on schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from l0hooks._torch.tensors import is_meta
from l0hooks.attach.measured_size import Unit
from l0hooks.errors import InvalidValueError, StateError, explain, near_names
from l0hooks.gates.gate import Gate
from l0hooks.gates.protocols import OptimizedGate
from l0hooks.schedules import NAMED, MakeSchedule, Schedule, ScheduleName
from l0hooks.training.cost import Size
from l0hooks.training.fitting_support import FittingSupport
from l0hooks.training.shared_shift import SharedShift

Method = Literal["shift", "lagrangian"]
Constraint = Literal["inequality", "equality"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The size that gates are to reach, and how fast; ``sparsify(model, spec, budget=Budget(sparsity=0.9))``.

    At every optimiser step all log-odds under a budget move by one common shift, so that the expected size is what
    the schedule says. The gradient is that of the shifted gates: its share along the constraint is taken out. After
    ``steps`` the support is fixed: the largest ``log_alpha`` that fit; what is trained from then on are the weights.

    Parameters
    ----------
    sparsity : float in (0, 1), optional
        The share to remove. Either this or ``keep``.
    keep : int, > 0, optional
        The size to keep, in ``unit``.
    unit : "gates", "params" or "macs"
        What is counted: gates; or parameters or multiply-adds of the whole model, those without gates as well.
    steps : int, > 0
        Optimiser steps until the size is reached and the support is fixed.
    schedule : "cubic", "linear", "cosine", "exponential" or callable
        The way there; a callable takes (start, stop, steps) and returns a function of the step.
    min_keep : int, >= 0
        How many gates of each layer or group stay at the least; of a coupled group whose size counts, one.
    prior : float, >= 0
        How much a gate's start depends on the weights behind it: its log-odds are raised by ``prior`` for every
        standard deviation that the logarithm of their size lies above the mean; the expected size stays the same.
        0: all start alike.
    automatic : bool
        Count steps of the optimiser; else those of :meth:`BudgetRule.advance`.
    method : "shift" or "lagrangian"
        The common shift, or a price in the loss, ``penalty(model, budget=1.0)``: see
        :class:`~l0hooks.training.LagrangianRule`.
    constraint : "inequality" or "equality", optional
        For the Lagrangian method: at most the scheduled size (the default), or exactly that.

    Raises
    ------
    InvalidValueError
        If a value is out of range, or not exactly one of ``sparsity`` and ``keep`` is given.

    Examples
    --------
    >>> from l0hooks import sparsify, summary
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> _ = sparsify(model, "weight", budget=Budget(keep=50, steps=10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for _ in range(10):
    ...     model(torch.randn(4, 8)).square().sum().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> summary(model).parameters_kept
    50

    References
    ----------
    Zhu & Gupta (2017), equation 1, for the cubic schedule.
    """

    sparsity: float | None = None
    keep: int | None = None
    unit: Unit = "gates"
    steps: int = 1000
    schedule: ScheduleName | MakeSchedule = "cubic"
    min_keep: int = 1
    prior: float = 1.0
    automatic: bool = True
    method: Method = "shift"
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.keep is None):
            raise invalid_budget("exactly one of sparsity and keep must be given.", f"{self.sparsity=}, {self.keep=}")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise invalid_budget("sparsity must be the share to remove.", self.sparsity, "a number in (0, 1)")
        if self.keep is not None and (type(self.keep) is not int or self.keep < 1):
            raise invalid_budget("keep must be a number to keep.", self.keep, "a positive integer")
        if self.unit not in get_args(Unit):
            raise invalid_budget("the unit must be known.", repr(self.unit), hint=near_names(self.unit, get_args(Unit)))
        if not self.steps >= 1:  # NaN
            raise invalid_budget("steps must be at least 1.", self.steps, ">= 1")
        if type(self.min_keep) is not int or self.min_keep < 0:
            raise invalid_budget("min_keep must not be negative.", self.min_keep, "an integer >= 0")
        if not 0 <= self.prior < np.inf:
            raise invalid_budget("prior must not be negative.", self.prior, "a number >= 0")
        if not callable(self.schedule) and self.schedule not in NAMED:
            raise invalid_budget(
                "the schedule must be known.", repr(self.schedule), hint=near_names(str(self.schedule), NAMED)
            )
        for name, value, known in (("method", self.method, Method), ("constraint", self.constraint, Constraint)):
            if value not in get_args(known) and (name, value) != ("constraint", None):
                raise invalid_budget(f"the {name} must be known.", repr(value), " or ".join(map(repr, get_args(known))))
        if self.constraint is not None and self.method == "shift":
            raise invalid_budget("a shift takes no constraint.", repr(self.constraint), hint='method="lagrangian"')

    def target(self, whole: float) -> float:
        """The size to reach, of ``whole``."""
        if self.keep is not None:
            return float(self.keep)
        wanted = (1 - self.sparsity) * whole if self.sparsity is not None else whole
        return float(np.floor(wanted * (1 + 1e-12)))  # 0.1 · 1000 is a little less in floating point


def invalid_budget(must: str, got: object, expected: str | None = None, hint: str | None = None) -> InvalidValueError:
    """The error for a budget that cannot be."""
    return InvalidValueError(explain("Budget", must, expected=expected, got=got, hint=hint))


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

    Raises
    ------
    StateError
        If a gate is on the meta device, where log-odds have no data.

    Examples
    --------
    >>> from l0hooks import set_budget
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
        self.budget = budget
        self.gates = tuple(gates)
        self.size = size
        self.step = 0
        self._shift = SharedShift(self.gates, size)
        self._support = FittingSupport(self.gates, size, budget.min_keep)
        self.start = self.expected()
        self.target = budget.target(size.whole)
        self._schedule = self._make_schedule()
        self._least = size.of(size.least(budget.min_keep))
        self._moved: set[int] = set()  # the gates that this step has moved, by number
        _ = self.scheduled  # refuses a schedule that starts as no number

    def _make_schedule(self) -> Schedule:
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
        if self.finished or not self.budget.automatic:
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
        """Nothing: a shift has no multipliers."""

    def penalty(self) -> Tensor:
        """Nothing for the loss to pay."""
        return self.gates[0].log_alpha.new_zeros(())

    def advance(self) -> None:
        """Go one step along the schedule and shift the gates to the size it asks for."""
        if self.finished:
            return
        self.step += 1
        self._settle()
        # of sharded gates only some are gathered within a forward, and perhaps rounded
        if self.finished or self._support.is_sharded():
            self.refresh()

    def _settle(self) -> None:
        """Bring the gates to the size that the schedule asks for."""
        self._shift.shift_to(self.scheduled)

    @torch.no_grad()
    def start_from(self, scores: Sequence[Tensor | None]) -> None:
        """Raise the log-odds of each array of gates by its ``scores``; the expected size stays what it is."""
        for gate, score in zip(self.gates, scores, strict=True):
            if score is not None:
                gate.log_alpha.add_(score)
        self._shift.shift_to(self.start)
        self._shift.forget()
        self.start = self.expected()  # to the last bit
        self._schedule = self._make_schedule()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_schedule"}  # no lambda in a pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._schedule = self._make_schedule()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state(self) -> tuple[float, ...]:
        """The step, and the size that the schedule started from."""
        self._shift.forget()
        return self.step, self.start

    def resume(self, *state: float) -> None:
        """Go on from what :meth:`state` said."""
        self.step, self.start = int(state[0]), state[1]
        self._schedule = self._make_schedule()
        self._moved.clear()
        self._shift.forget()

    # --- the support -----------------------------------------------------------------------------------------------

    def refresh(self) -> tuple[object, ...]:
        """Bring ``mask``, and once finished ``held``, of every gate up to date; a key of the state they belong to."""
        key = self._support.state(self.step, fixed=self.finished)
        if not self._support.is_of(key):
            self._support.update(key, self.scheduled, fixed=self.finished)
        return key

    def support_at(self, allowed: float) -> list[Tensor]:
        """The largest log-odds that fit into a size, ``min_keep`` of every array first; of equal ones the first."""
        return self._support.masks(allowed)
