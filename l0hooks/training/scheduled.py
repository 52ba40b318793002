"""What follows a schedule during training: temperatures of gates, strengths of penalties.

One step is one step of an optimiser: passes that only accumulate gradients, evaluate or sample do not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from l0hooks.attach.by_pattern import by_pattern
from l0hooks.attach.spec import Pattern
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import InvalidValueError, StateError, explain
from l0hooks.gates.constants import GAMMA, ZETA, check_constants
from l0hooks.gates.optimizer_hooks import is_skipped
from l0hooks.schedules import Schedule


def temperature_schedule(model: nn.Module, schedule: Schedule | Mapping[Pattern, Schedule]) -> None:
    """Let the temperature of gates follow a schedule, **in place**, from its value at step 0 on.

    A gate goes one step whenever the optimiser that holds its ``log_alpha`` does. Its temperature and its step are in
    the model's ``state_dict``: attach the schedule first, then load. Gates whose support a budget has fixed stay as
    they are. A schedule that a gate had before is replaced, and counts from 0 again.

    Parameters
    ----------
    model : nn.Module
        With gates.
    schedule : callable, int -> float > 0, or mapping from pattern to such
        One for all gates; with a mapping, the first pattern that matches a gated module counts, and gates that none
        matches are left alone.

    Raises
    ------
    StateError
        If there is no gate below ``model``.
    SpecError
        If a pattern matches no gate.
    InvalidValueError
        If a schedule does not start with a positive number; no gate is changed. Later, in ``optimizer.step()``, if it
        comes to one that is not.

    Examples
    --------
    >>> from l0hooks import Gate
    >>> from l0hooks.schedules import linear
    >>> gate = Gate(4)
    >>> temperature_schedule(gate, linear(1.0, 0.5, steps=10))
    >>> optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    >>> for _ in range(5):
    ...     gate().sum().backward()
    ...     optimizer.step()
    >>> gate.temperature
    0.75
    """
    gated = list(iter_gated(model))
    if not gated:
        raise StateError(explain("temperature_schedule", "the model must hold gates.", got="none"))
    parts = (
        by_pattern(model, gated, schedule, where="temperature_schedule")
        if isinstance(schedule, Mapping)
        else [(schedule, gated)]
    )
    chosen = [(one.gate, one_schedule) for one_schedule, part in parts for one in part]
    for _, one_schedule in chosen:
        check_constants("temperature_schedule", one_schedule(0), GAMMA, ZETA)
    for gate, one_schedule in chosen:
        gate.schedule, gate.scheduled_steps = one_schedule, 0
        gate.temperature = one_schedule(0)


class Scheduled:
    """A number that follows a schedule: the strength of a penalty that warms up, say.

    It counts the steps of ``optimizer``, or, without one, its own :meth:`step`. Like PyTorch's learning-rate
    schedulers it has a ``state_dict``, to be saved beside the model's and the optimiser's.

    Parameters
    ----------
    schedule : callable, int -> float
    optimizer : torch.optim.Optimizer, optional
        Whose steps count.

    Examples
    --------
    >>> from l0hooks import penalty
    >>> from l0hooks import Gate
    >>> from l0hooks.schedules import linear
    >>> gate = Gate(4, init_keep_prob=0.5)
    >>> optimizer = torch.optim.SGD(gate.parameters(), lr=0.0)
    >>> strength = Scheduled(linear(0.0, 1.0, steps=4), optimizer)
    >>> for _ in range(4):
    ...     loss = penalty(gate, l0=strength.value)
    ...     loss.backward()
    ...     optimizer.step()
    >>> round(loss.item(), 3), strength.value
    (1.5, 1.0)
    """

    def __init__(self, schedule: Schedule, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._schedule = schedule
        self._steps = 0
        self._count(optimizer)

    def _count(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Count the steps of ``optimizer``, if there is one."""
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        if optimizer is not None:
            optimizer.register_step_post_hook(self._after_step)

    def __getstate__(self) -> dict[str, Any]:
        """With the optimiser itself: copied or pickled together they belong together again."""
        optimizer = None if self._optimizer is None else self._optimizer()
        return {"schedule": self._schedule, "steps": self._steps, "optimizer": optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Count the steps of the optimiser that came with the state, which torch gives no hooks."""
        self._schedule, self._steps = state["schedule"], state["steps"]
        self._count(state["optimizer"])

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not is_skipped(optimizer):
            self.step()

    @property
    def steps(self) -> int:
        """How many steps it has taken."""
        return self._steps

    @property
    def value(self) -> float:
        """The number as it is now."""
        return float(self._schedule(self._steps))

    def step(self) -> None:
        """Go one step along the schedule. Runs by itself if an optimiser was given."""
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The steps taken; the schedule itself is code, and is given again."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state`` was taken.

        Raises
        ------
        InvalidValueError
            If it is not a ``Scheduled``'s.
        """
        steps = state.get("steps")
        if set(state) != {"steps"} or not isinstance(steps, int) or steps < 0:
            raise InvalidValueError(
                explain("Scheduled.load_state_dict", "the state must be a Scheduled's.", expected="steps", got=state)
            )
        self._steps = steps

    def __repr__(self) -> str:
        return f"Scheduled(value={self.value:.4g}, steps={self._steps})"
