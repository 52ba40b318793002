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
from l0hooks.gate import Gate, steps_taken, whole
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
        How many gates of each layer or group stay at the least.
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
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise invalid_budget("keep must be a number to keep.", self.keep, "a positive integer")
        if self.unit not in get_args(Unit):
            raise invalid_budget("the unit must be known.", repr(self.unit), hint=near_names(self.unit, get_args(Unit)))
        if self.steps < 1:
            raise invalid_budget("steps must be at least 1.", self.steps, ">= 1")
        if self.min_keep < 0:
            raise invalid_budget("min_keep must not be negative.", self.min_keep, ">= 0")
        if isinstance(self.schedule, str) and self.schedule not in _SCHEDULES:
            raise invalid_budget(
                "the schedule must be known.", repr(self.schedule), hint=near_names(self.schedule, _SCHEDULES)
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
    """

    def __init__(self, budget: Budget, gates: Sequence[Gate], size: Size) -> None:
        self.budget = budget
        self.gates = tuple(gates)
        self.size = size
        self.step = 0
        self.start = self.expected()
        self.target = budget.target(size.whole)
        make = _SCHEDULES[budget.schedule] if isinstance(budget.schedule, str) else budget.schedule
        self._schedule = make(self.start, self.target, budget.steps)
        self._key: tuple[object, ...] = ()
        self._spread = False

    @property
    def first(self) -> Gate:
        """The gate whose optimiser counts the steps."""
        return self.gates[0]

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = value
        self._finished = value >= self.budget.steps  # kept: a compiled model that compared would be one for each step

    @property
    def finished(self) -> bool:
        """Whether the schedule has ended and the support is fixed."""
        return self._finished

    @property
    def scheduled(self) -> float:
        """The size that the schedule asks for now."""
        return self.target if self.finished else float(self._schedule(self.step))

    @torch.no_grad()
    def expected(self) -> float:
        """The expected size of the gates as they stand."""
        kept, _, variance = self._sums(0.0)
        return self.size.of(kept, variance)

    # --- training --------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Take the share along the constraint out of the gradient: g − c·p′·Σg / Σ(c·p′)."""
        if self.finished:
            for gate in self.gates:
                gate.log_alpha.grad = None  # the optimiser's momentum must not move them either
            return
        with torch.no_grad():
            kept, slopes, _ = self._sums(0.0)
            price = self.size.price(kept)
            grads = [(g, c, g.log_alpha.grad) for g, c in zip(self.gates, price.tolist(), strict=True)]
            sums = [whole(grad.sum()) for _, _, grad in grads if grad is not None]
            if sums:
                common = float(torch.stack(sums).sum()) / max(float(price @ slopes), 1e-30)
                for gate, cost, grad in grads:
                    if grad is not None:
                        grad.add_(_slope(gate), alpha=-cost * common)

    def after_step(self) -> None:
        """Count an optimiser step, if the budget is to count them itself."""
        if self.budget.automatic:
            self.advance()

    @torch.no_grad()
    def advance(self) -> None:
        """Go one step along the schedule and shift the gates to the size it asks for."""
        if self.finished:
            return
        self.step += 1
        shift = self._shift(self.scheduled)
        for gate in self.gates:
            gate.log_alpha.add_(shift)
        if self._sharded():
            self.refresh()  # within a forward only some gates are gathered, and perhaps rounded

    def _shift(self, wanted: float) -> float:
        """The common shift δ with E[size] = ``wanted``: damped Newton steps, kept between bounds that close in."""
        shift, low, high = 0.0, -np.inf, np.inf
        for _ in range(100):
            kept, slopes, variance = self._sums(shift)
            error = self.size.of(kept, variance) - wanted
            if abs(error) <= _ACCURACY * wanted:
                break
            low, high = (low, shift) if error > 0 else (shift, high)
            slope = max(float(self.size.price(kept) @ slopes), 1e-30)
            moved = shift + min(max(-error / slope, -_FARTHEST), _FARTHEST)
            shift = moved if low < moved < high else (low + high) / 2
        return shift

    def _sums(self, shift: float) -> tuple[Floats, Floats, Floats]:
        """Σ p, Σ p′ and Σ p(1 − p) of every array of gates with its log-odds shifted."""
        parts = [torch.stack(_sums_of(gate, shift)).to(self.first.log_alpha.device) for gate in self.gates]
        found: Floats = torch.stack(parts).double().cpu().numpy()
        return found[:, 0], found[:, 1], found[:, 2]

    # --- the support -----------------------------------------------------------------------------------------------

    def refresh(self) -> tuple[object, ...]:
        """Bring ``mask``, and once finished ``held``, of every gate up to date; a key of the state they belong to."""
        first = self.first.log_alpha
        if self._sharded():  # gathering and freeing change versions and addresses, not values
            key: tuple[object, ...] = (0 if self.finished else steps_taken(), self.step, self.finished)
        else:
            versions = sum(gate.log_alpha._version for gate in self.gates)
            key = (versions, self.step, self.finished, first.data_ptr(), first.device)
        if key != self._key or self.first.mask is None:
            for gate, mask in zip(self.gates, self._support(), strict=True):
                gate.mask = mask
            self._key = key  # before the values, which ask for the support
            for gate in self.gates:
                gate.held = gate.value().detach() if self.finished else None
        return key

    def _sharded(self) -> bool:
        """Whether ``fully_shard`` has spread the gates; it stays so while they are gathered."""
        self._spread = self._spread or any(hasattr(gate.log_alpha, "full_tensor") for gate in self.gates)
        return self._spread

    @torch.no_grad()
    def _support(self) -> list[Tensor]:
        """The largest log-odds that fit into the scheduled size, ``min_keep`` of every array first."""
        device = self.first.log_alpha.device
        arrays = [whole(gate.log_alpha.detach()).flatten() for gate in self.gates]
        rank = torch.cat([a.to(device) for a in arrays])
        for part, array in zip(torch.split(rank, [len(a) for a in arrays]), arrays, strict=True):
            part[array.topk(min(self.budget.min_keep, len(array))).indices] = torch.inf
        order = rank.argsort(descending=True, stable=True).cpu().numpy()
        array_of = np.repeat(np.arange(len(arrays)), self.size.counts)[order]
        stays = np.zeros(len(order), np.bool_)
        stays[order[fitting(self.size, array_of, self.scheduled)]] = True
        masks = torch.split(torch.from_numpy(stays), [len(a) for a in arrays])
        return [m.view(g.log_alpha.shape).to(g.log_alpha.device) for m, g in zip(masks, self.gates, strict=True)]


def _sums_of(gate: Gate, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    family, location = gate.family, whole(gate.log_alpha.detach())
    if isinstance(family, HardConcreteFamily):
        offset = shift - gate.temperature * float(np.log(-family.gamma / family.zeta))
        flat, total, square = location.flatten(), location.new_zeros(()), location.new_zeros(())
        for first in range(0, len(flat), _CHUNK):
            p = (flat[first : first + _CHUNK] + offset).sigmoid_()
            total, square = total + p.sum(), square + p.dot(p)
        return total, total - square, total - square
    p, slope = _with_slope(gate, location + shift)
    return p.sum(), slope.sum(), (p * (1 - p)).sum()


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
    return p.detach(), torch.autograd.grad(p.sum(), location)[0]
