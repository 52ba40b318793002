"""``Budget``: the size to reach; one shift that all its gates share keeps their expected size on schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from l0hooks.errors import InvalidValueError, explain, near_names
from l0hooks.families import HardConcreteFamily
from l0hooks.gate import Gate, steps_taken
from l0hooks.hard_concrete import keep_prob
from l0hooks.schedules import Schedule, cosine, cubic, exponential, linear
from l0hooks.sizes import Floats, Size, Unit, fitting

ScheduleName = Literal["cubic", "linear", "cosine", "exponential"]
MakeSchedule = Callable[[float, float, int], Schedule]
_SCHEDULES: dict[str, MakeSchedule] = {
    "cubic": cubic,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
}
LIMITS = (-30.0, 15.0)  # wider than a gate's own: a common shift must not press its gates together at an end
_ACCURACY = 1e-6  # of the whole size
_FARTHEST = 2.0  # that one Newton step may go
_CHUNK = 1 << 16  # gates whose arrays stay in cache


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
    automatic : bool
        Count steps of the optimiser; else those of :meth:`BudgetRule.advance`.

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
    automatic: bool = True

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
        if not callable(self.schedule) and self.schedule not in _SCHEDULES:
            raise invalid_budget(
                "the schedule must be known.", repr(self.schedule), hint=near_names(str(self.schedule), _SCHEDULES)
            )

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
    """

    def __init__(self, budget: Budget, gates: Sequence[Gate], size: Size) -> None:
        self.budget = budget
        self.gates = tuple(gates)
        self.size = size
        self.step = 0
        self.start = self.expected()
        self.target = budget.target(size.whole)
        self._schedule = self._make_schedule()
        self._least = size.of(size.least(budget.min_keep))
        self._moved: set[int] = set()  # the gates that this step has moved, by number
        self._key: tuple[object, ...] = ()
        _ = self.scheduled  # refuses a schedule that starts as no number

    def _make_schedule(self) -> Schedule:
        named = self.budget.schedule
        make = _SCHEDULES[named] if isinstance(named, str) else named
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

    @torch.no_grad()
    def expected(self) -> float:
        """The expected size of the gates as they stand."""
        kept, _, variance = self._sums(0.0)
        return self.size.of(kept, variance)

    # --- training --------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Take the share along the constraint out of the gradient: g − s·Σg / Σs with s = ∂E[size]/∂log_alpha."""
        if self.finished:
            for gate in self.gates:
                gate.log_alpha.grad = None  # the optimiser's momentum must not move them either
            return
        with torch.no_grad():
            device = self.gates[0].log_alpha.device
            sums = [g.log_alpha.grad.sum().to(device) for g in self.gates if g.log_alpha.grad is not None]
            total = float(torch.stack(sums).sum()) if sums else 0.0
            if not total or not np.isfinite(total):  # a scaler is about to skip this step
                return
            kept, slopes, _ = self._sums(0.0)
            price, spread = self.size.price(kept), np.diagonal(self.size.square)
            bends = [float(_bend(gate).sum()) if s else 0.0 for gate, s in zip(self.gates, spread, strict=True)]
            common = total / max(float(price @ slopes + spread @ bends), 1e-30)
            for gate, cost, s in zip(self.gates, price.tolist(), spread.tolist(), strict=True):
                if gate.log_alpha.grad is not None:
                    gate.log_alpha.grad.add_(_slope(gate), alpha=-cost * common)
                    if s:
                        gate.log_alpha.grad.add_(_bend(gate), alpha=-s * common)

    @torch.no_grad()
    def after_step(self, moved: Sequence[Gate]) -> None:
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

    @torch.no_grad()
    def advance(self) -> None:
        """Go one step along the schedule and shift the gates to the size it asks for."""
        if self.finished:
            return
        self.step += 1
        self._settle()
        if self.finished:
            self.refresh()

    def _settle(self) -> None:
        """Shift the gates to the size that the schedule asks for."""
        shift = self._shift(self.scheduled)
        for gate in self.gates:
            gate.log_alpha.add_(shift)

    def _shift(self, wanted: float) -> float:
        """The common shift δ with E[size] = ``wanted``: damped Newton steps, kept between bounds that close in."""
        shift, low, high = 0.0, -np.inf, np.inf
        for _ in range(100):
            kept, slopes, variance = self._sums(shift)
            error = self.size.of(kept, variance) - wanted
            if abs(error) <= _ACCURACY * wanted:
                break
            if not np.isfinite(error):
                return 0.0  # one gate that is no number must not spoil the others
            low, high = (low, shift) if error > 0 else (shift, high)
            slope = max(float(self.size.price(kept) @ slopes), 1e-30)
            moved = shift + min(max(-error / slope, -_FARTHEST), _FARTHEST)
            shift = moved if low < moved < high else (low + high) / 2
        return shift

    def _sums(self, shift: float) -> tuple[Floats, Floats, Floats]:
        """Σ p, Σ p′ and Σ p(1 − p) of every array of gates with its log-odds shifted."""
        device = self.gates[0].log_alpha.device
        parts = [torch.stack(_sums_of(gate, shift)).to(device) for gate in self.gates]
        found: Floats = torch.stack(parts).double().cpu().numpy()
        return found[:, 0], found[:, 1], found[:, 2]

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state(self) -> tuple[float, ...]:
        """The step, and the size that the schedule started from."""
        return self.step, self.start

    def resume(self, *state: float) -> None:
        """Go on from what :meth:`state` said."""
        self.step, self.start = int(state[0]), state[1]
        self._schedule = self._make_schedule()
        self._moved.clear()

    # --- the support -----------------------------------------------------------------------------------------------

    def refresh(self) -> tuple[object, ...]:
        """Bring ``mask``, and once finished ``held``, of every gate up to date; a key of the state they belong to."""
        steps = None if self.finished else steps_taken()  # fused optimisers leave no version
        key = (self.step, steps, *map(_state_of, self.gates))
        if key != self._key:
            with torch.inference_mode(False), torch.no_grad():  # training will use them, too
                for gate, mask in zip(self.gates, self._support(), strict=True):
                    gate.mask = mask
                self._key = key  # before the values, which ask for the support
                for gate in self.gates:
                    gate.held = gate.value() if self.finished else None
        return key

    @torch.no_grad()
    def _support(self) -> list[Tensor]:
        """The largest log-odds that fit into the scheduled size, ``min_keep`` of every array first."""
        device = self.gates[0].log_alpha.device
        arrays = [gate.log_alpha.detach().flatten() for gate in self.gates]
        rank = torch.cat([a.to(device) for a in arrays])
        least = self.size.least(self.budget.min_keep).tolist()
        for part, n in zip(torch.split(rank, [len(a) for a in arrays]), least, strict=True):
            part[part.topk(int(n)).indices] = torch.inf
        order = rank.argsort(descending=True, stable=True).cpu().numpy()
        array_of = np.repeat(np.arange(len(arrays)), self.size.counts)[order]
        stays = np.zeros(len(order), np.bool_)
        stays[order[fitting(self.size, array_of, self.scheduled)]] = True
        masks = torch.split(torch.from_numpy(stays), [len(a) for a in arrays])
        return [m.view_as(g.log_alpha).to(g.log_alpha.device) for m, g in zip(masks, self.gates, strict=True)]


def _sums_of(gate: Gate, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    family, location = gate.family, gate.log_alpha.detach()
    if isinstance(family, HardConcreteFamily):
        offset = shift - gate.temperature * float(np.log(-family.gamma / family.zeta))
        flat, total, square = location.flatten(), location.new_zeros(()), location.new_zeros(())
        for first in range(0, len(flat), _CHUNK):
            p = (flat[first : first + _CHUNK] + offset).sigmoid_()
            total, square = total + p.sum(), square + p.dot(p)
        return total, total - square, total - square
    p, slope = _with_slope(gate, location + shift)
    return p.sum(), slope.sum(), (p * (1 - p)).sum()


def _state_of(gate: Gate) -> tuple[object, ...]:
    """What the support and the final values depend on."""
    found = gate.log_alpha
    version = None if found.is_inference() else found._version
    return version, found.data_ptr(), found.device, gate.temperature, gate.estimator


def _bend(gate: Gate) -> Tensor:
    """d/dlogα of p(1 − p) of every gate."""
    return _slope(gate) * (1 - 2 * gate.family.keep_prob(gate.log_alpha.detach(), gate.temperature))


def _slope(gate: Gate) -> Tensor:
    """p′ of every gate."""
    family, location = gate.family, gate.log_alpha.detach()
    if isinstance(family, HardConcreteFamily):
        p = keep_prob(location, gate.temperature, family.gamma, family.zeta)
        return torch.addcmul(p, p, p, value=-1)
    return _with_slope(gate, location)[1]


def _with_slope(gate: Gate, location: Tensor) -> tuple[Tensor, Tensor]:
    location = location.detach().requires_grad_()
    with torch.enable_grad():
        p = gate.family.keep_prob(location, gate.temperature)
        (slope,) = torch.autograd.grad(p.sum(), location)
    return p.detach(), slope
