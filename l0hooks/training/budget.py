"""``Budget``: the size that gates are to reach, and how fast."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from l0hooks.attach.measured_size import Unit
from l0hooks.errors import InvalidValueError, explain, near_names
from l0hooks.schedules import NAMED, MakeSchedule, ScheduleName
from l0hooks.training.clocks import Clock
from l0hooks.training.time_table import LatencyTable

BudgetUnit = Literal[Unit, "latency"]
Method = Literal["shift", "lagrangian"]
Constraint = Literal["inequality", "equality"]
_UNITS, _METHODS, _SCHEDULES = get_args(BudgetUnit), get_args(Method), tuple(NAMED)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The size that gates are to reach, and how fast; ``sparsify(model, spec, budget=Budget(sparsity=0.9))``.

    At every optimiser step all log-odds under a budget move by one common shift, so that the expected size is what
    the schedule says. The gradient is that of the shifted gates: its share along the constraint is taken out. After
    ``steps`` the support is fixed: the largest ``log_alpha`` that fit; what is trained from then on are the weights.

    Parameters
    ----------
    sparsity : float in (0, 1), optional
        The share to remove. Either this, or ``keep``, or ``speedup``.
    keep : int, > 0, optional
        The size to keep, in ``unit``.
    speedup : float, > 1, optional
        How many times faster the pruned model is to be than the dense one, measured; ``unit`` is then "latency".
    unit : "gates", "params", "macs", "memory" or "latency"
        What is counted: gates; or parameters, multiply-adds for one example, or the bytes of the parameters, by their
        dtype, of the whole model, those without gates as well; or its microseconds for the example inputs, measured
        where the model is. Bytes and time need coupled gates.
    steps : int, >= 0
        Optimiser steps until the size is reached and the support is fixed. 0: at once, in one shot. The gates that
        stay are then exactly 1.
    schedule : "cubic", "linear", "cosine", "exponential" or callable
        The way there; a callable takes (start, stop, steps) and returns a function of the step.
    min_keep : int, >= 0
        How many gates of each layer or group stay at the least; of a coupled group whose size counts, one.
    prior : float, >= 0
        How much a gate's start depends on the weights behind it: its log-odds are raised by ``prior`` for every
        standard deviation that the logarithm of their size lies above the mean; the expected size stays the same.
        With scores (:func:`l0hooks.set_budget`), that of the score in place of the size. 0: all start alike.
    cut_every : int, >= 1, optional
        Every so many steps, and when the support is fixed, cut the members of coupled groups that are closed for good
        out of the model, in place: training gets cheaper as the model gets smaller. Closed for good is, from then on,
        whatever fewer than one draw in 1,000 opens.
    uniform : bool
        Coupled groups of one kind and size keep the same number of members, as a model's config wants it. With a shift
        they expect equally many at every step, too.
    round_to : int, >= 1, or mapping from a group's kind to int
        Keep members in multiples of this number: 8 for the units of a processor, ``{"neuron": 64}``. A group with fewer
        members keeps all of them.
    automatic : bool
        Count steps of the optimiser; else those of :meth:`~l0hooks.training.BudgetRule.advance`.
    method : "shift" or "lagrangian"
        The common shift, or a price in the loss, ``penalty(model, budget=1.0)``: see
        :class:`~l0hooks.training.LagrangianRule`.
    constraint : "inequality" or "equality", optional
        For the Lagrangian method: at most the scheduled size (the default), or exactly that.
    clock : Clock, optional
        Times calls, for budgets in time. By default wall time on the CPU, events on CUDA.
    table : LatencyTable, optional
        The layers' times, if they were measured before; else the budget measures them.

    Raises
    ------
    InvalidValueError
        If a value is out of range, or not exactly one of ``sparsity``, ``keep`` and ``speedup`` is given.

    Examples
    --------
    >>> import torch
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
    speedup: float | None = None
    unit: BudgetUnit = "gates"
    steps: int = 1000
    schedule: ScheduleName | MakeSchedule = "cubic"
    min_keep: int = 1
    prior: float = 1.0
    cut_every: int | None = None
    uniform: bool = False
    round_to: int | Mapping[str, int] = 1
    automatic: bool = True
    method: Method = "shift"
    constraint: Constraint | None = None
    clock: Clock | None = None
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        if [self.sparsity, self.keep, self.speedup].count(None) != 2:
            got = f"{self.sparsity=}, {self.keep=}, {self.speedup=}"
            raise invalid_budget("exactly one of sparsity, keep and speedup must be given.", got)
        self._check_time()
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise invalid_budget("sparsity must be the share to remove.", self.sparsity, "a number in (0, 1)")
        if self.keep is not None and (type(self.keep) is not int or self.keep < 1):
            raise invalid_budget("keep must be a number to keep.", self.keep, "a positive integer")
        if self.unit not in _UNITS:
            raise invalid_budget("the unit must be known.", repr(self.unit), hint=near_names(self.unit, _UNITS))
        if not (self.steps == 0 or 1 <= self.steps < np.inf):  # NaN
            raise invalid_budget("steps must be finite, and 0 or at least 1.", self.steps, "0, or >= 1")
        if self.steps == 0 and self.method == "lagrangian":
            raise invalid_budget("multipliers need steps to rise.", "steps=0", hint='method="shift" for one shot')
        if type(self.min_keep) is not int or self.min_keep < 0:
            raise invalid_budget("min_keep must not be negative.", self.min_keep, "an integer >= 0")
        if not 0 <= self.prior < np.inf:
            raise invalid_budget("prior must not be negative.", self.prior, "a number >= 0")
        if self.cut_every is not None and (type(self.cut_every) is not int or self.cut_every < 1):
            raise invalid_budget("cut_every must be a number of steps.", self.cut_every, "a positive integer")
        if self.cut_every is not None and self.method == "lagrangian":
            raise invalid_budget("multipliers may open any gate again.", "cut_every", hint='method="shift"')
        multiples = self.round_to.values() if isinstance(self.round_to, Mapping) else [self.round_to]
        if any(type(n) is not int or n < 1 for n in multiples):
            raise invalid_budget(
                "round_to must be a number of members, or one for each kind.", self.round_to, "integers >= 1"
            )
        if not callable(self.schedule) and self.schedule not in NAMED:
            raise invalid_budget(
                "the schedule must be known.", repr(self.schedule), hint=near_names(str(self.schedule), NAMED)
            )
        for name, value, known in (("method", self.method, Method), ("constraint", self.constraint, Constraint)):
            if value not in get_args(known) and (name, value) != ("constraint", None):
                raise invalid_budget(f"the {name} must be known.", repr(value), " or ".join(map(repr, get_args(known))))
        if self.constraint is not None and self.method == "shift":
            raise invalid_budget("a shift takes no constraint.", repr(self.constraint), hint='method="lagrangian"')

    def _check_time(self) -> None:
        """What belongs to budgets in time."""
        if self.speedup is not None:
            if not 1 < self.speedup < np.inf:
                raise invalid_budget("speedup must be how many times faster.", self.speedup, "a number > 1")
            if self.unit not in ("gates", "latency"):
                raise invalid_budget("a speedup is one in time.", repr(self.unit), 'unit="latency"')
            object.__setattr__(self, "unit", "latency")
        if self.unit != "latency" and (self.clock is not None or self.table is not None):
            raise invalid_budget(
                "only budgets in time use a clock or a table.", f"unit={self.unit!r}", 'unit="latency"'
            )

    @property
    def in_blocks(self) -> bool:
        """Whether ``uniform`` or ``round_to`` says anything."""
        return self.uniform or self.round_to != 1

    def target(self, whole: float) -> float:
        """The size to reach, of ``whole``."""
        if self.keep is not None:
            return float(self.keep)
        if self.unit == "latency":
            return whole * (1 - self.sparsity if self.sparsity is not None else 1 / (self.speedup or 1))
        wanted = (1 - self.sparsity) * whole if self.sparsity is not None else whole
        return float(np.floor(wanted * (1 + 1e-12)))  # 0.1 · 1000 is a little less in floating point

    def identity(self) -> tuple[float, ...]:
        """Numbers that are equal for budgets between which checkpoints may move, if their sizes are."""
        schedule = _SCHEDULES.index(self.schedule) if isinstance(self.schedule, str) else -1
        words = (_UNITS.index(self.unit), _METHODS.index(self.method), int(self.constraint == "equality"))
        several = isinstance(self.round_to, Mapping)
        multiples = dict(self.round_to) if isinstance(self.round_to, Mapping) else {"": self.round_to}
        code = zlib.crc32(repr(sorted(multiples.items())).encode()) if several else multiples[""]
        return self.steps, *words, schedule, self.min_keep, self.cut_every or 0, int(self.uniform), several, code


def described(identity: Sequence[float]) -> str:
    """What :meth:`Budget.identity` says, in words; of ``round_to`` by kind only that there is one."""
    unit, method, equality, schedule, least, cut, uniform, several, multiple = map(int, identity[1:])
    names = [*_SCHEDULES, "another"]
    extras = [
        "with equality" if equality else "",
        f"min_keep {least}",
        f"cut_every {cut}" if cut else "",
        "uniform" if uniform else "",
        "round_to by kind" if several else f"round_to {multiple}" if multiple != 1 else "",
    ]
    return (
        f"{_UNITS[unit % len(_UNITS)]} in {identity[0]:g} steps, schedule {names[schedule % len(names)]}, "
        f"method {_METHODS[method % len(_METHODS)]}, {', '.join(filter(None, extras))}"
    ).replace(", with", " with")


def invalid_budget(must: str, got: object, expected: str | None = None, hint: str | None = None) -> InvalidValueError:
    """The error for a budget that cannot be."""
    return InvalidValueError(explain("Budget", must, expected=expected, got=got, hint=hint))
