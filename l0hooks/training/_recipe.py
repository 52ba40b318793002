"""``recipe``: the settings that did best in our measurements, for a number of steps, in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from l0hooks.attach.spec import GateSpec
from l0hooks.errors import InvalidValueError, explain
from l0hooks.gates.registry import gate_ids
from l0hooks.structure.layers import Granularity
from l0hooks.training._param_groups import param_groups
from l0hooks.training.budget import Budget

_CHOOSING = 0.7  # share of the steps in which the support is chosen
_CUTS = 15  # while a structured budget runs
_COUPLED_RATE = 0.1  # of coupled gates, with Adam
_TRAVEL, _SLOWEST, _FASTEST = 90.0, 0.02, 0.3  # of other gates: rate times budget steps, and the rate's range


@dataclass(frozen=True)
class Recipe:
    """Settings for a training run of some length; :func:`recipe` makes it.

    Attributes
    ----------
    steps : int
        Optimiser steps of the whole run.
    budget_steps : int
        Those until the support is fixed.
    spec : GateSpec
        For ``sparsify``.
    gate_lr : float
        The gates' learning rate, for Adam and its kind.

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model, plan = nn.Linear(8, 4), recipe(steps=1000)
    >>> _ = sparsify(model, plan.spec, budget=plan.budget(sparsity=0.9))
    >>> optimizer = torch.optim.Adam(plan.param_groups(model, lr=1e-3))
    >>> scheduler = plan.scheduler(optimizer)
    >>> plan.budget_steps, [round(rate, 3) for rate in scheduler.get_last_lr()]
    (700, [0.001, 0.129])
    """

    steps: int
    budget_steps: int
    spec: GateSpec
    gate_lr: float

    @property
    def structured(self) -> bool:
        """Whether gates are on coupled groups."""
        return self.spec.granularity == "coupled"

    def budget(self, **size: Any) -> Budget:
        """The budget for a size: ``sparsity=``, ``keep=`` or ``speedup=``, and other settings of ``Budget``.

        Of coupled groups, parameters are counted, and what is closed for good is cut while training.
        """
        settings: dict[str, Any] = {"steps": self.budget_steps}
        if self.structured:
            unit = "latency" if "speedup" in size else "params"
            settings |= {"unit": unit, "cut_every": max(1, self.budget_steps // _CUTS)}
        return Budget(**(settings | size))

    def param_groups(self, model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """:func:`l0hooks.param_groups` with the gates' rate."""
        return param_groups(model, lr=lr, gate_lr=self.gate_lr, weight_decay=weight_decay)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> RecipeScheduler:
        """The schedule of the learning rates; call its ``step()`` after each step of the optimiser."""
        return RecipeScheduler(optimizer, self)


class RecipeScheduler(LambdaLR):
    """The rate of weights stays for half the steps and then falls along half a cosine; that of gates stays.

    When the support is fixed, the optimiser starts anew: its averages are those of gates that moved.

    Parameters
    ----------
    optimizer : Optimizer
        Gates in groups of their own, as :func:`l0hooks.param_groups` makes them.
    recipe : Recipe

    Raises
    ------
    InvalidValueError
        If a group holds weights and gates.

    Examples
    --------
    >>> optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=1.0)
    >>> scheduler = RecipeScheduler(optimizer, recipe(steps=4))
    >>> for _ in range(4):
    ...     optimizer.step()
    ...     scheduler.step()
    ...     print(round(scheduler.get_last_lr()[0], 3))
    1.0
    1.0
    0.5
    0.0
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        known = gate_ids()
        of_gates = [[id(p) in known for p in group["params"]] for group in optimizer.param_groups]
        if any(any(own) and not all(own) for own in of_gates):
            raise InvalidValueError(
                explain(
                    "Recipe.scheduler",
                    "weights and gates must be in groups of their own.",
                    got="a group that holds both",
                    hint="optimizer(recipe.param_groups(model, lr=...))",
                )
            )
        self._fixed = recipe.budget_steps
        rates: list[Callable[[int], float]] = [
            _Constant() if all(own) else _HalfCosine(recipe.steps) for own in of_gates
        ]
        super().__init__(optimizer, rates)

    def step(self, epoch: int | None = None) -> None:
        """Go one step on; forget the optimiser's averages when the support is fixed."""
        super().step(epoch)
        if self.last_epoch == self._fixed:
            for state in self.optimizer.state.values():
                state.clear()


class _Constant:
    """The factor 1."""

    def __call__(self, step: int) -> float:
        return 1.0


@dataclass
class _HalfCosine:
    """1 for half the steps, then half a cosine to 0."""

    steps: int

    def __call__(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(max(0.0, 2 * step / self.steps - 1), 1.0)))


def recipe(*, steps: int, granularity: Granularity = "weight") -> Recipe:
    """The settings that did best in ``benchmarks.frontier``, for a run of so many steps.

    The support is chosen in 70 % of the steps; then the weights alone train. Gates on single weights have no noise
    (``family="deterministic"``): they follow the loss of the network that will be kept. Their rate is 90 / steps of the
    budget, within [0.02, 0.3]: in a short run gates must move faster. Coupled groups have Hard Concrete noise for each
    example, and are cut while they train.

    Parameters
    ----------
    steps : int, >= 2
        Optimiser steps of the whole run.
    granularity : str or (int, int)
        As in :class:`l0hooks.GateSpec`.

    Returns
    -------
    Recipe

    Raises
    ------
    InvalidValueError
        If ``steps`` is no such number.
    SpecError
        If the granularity is unknown.

    Examples
    --------
    >>> recipe(steps=1000).spec.family, recipe(steps=1000, granularity="coupled").spec.noise
    ('deterministic', 'example')
    """
    if type(steps) is not int or steps < 2:
        raise InvalidValueError(
            explain("recipe", "steps must be those of the whole run.", expected="an integer >= 2", got=steps)
        )
    coupled = granularity == "coupled"
    spec = (
        GateSpec(granularity="coupled", noise="example")
        if coupled
        else GateSpec(granularity=granularity, family="deterministic")
    )
    choosing = max(1, int(_CHOOSING * steps))
    rate = _COUPLED_RATE if coupled else min(max(_TRAVEL / choosing, _SLOWEST), _FASTEST)
    return Recipe(steps, choosing, spec, rate)
