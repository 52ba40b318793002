"""What gates, the rules over them, the hooks of optimisers and the kernels must know of each other."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from l0hooks.gates.constants import Constants
from l0hooks.gates.progress import Progress

Drawn = Tensor | tuple[int, int]  # levels of the gates, or the seed of their noise and its first number


class Rule(Protocol):
    """What decides for several gates together which of them stay; a budget.

    Attributes
    ----------
    finished : bool
        Whether the support is fixed: gates no longer move, and training uses their final values.
    automatic : bool
        Whether it counts the steps of the optimisers that move its gates.
    """

    finished: bool
    automatic: bool

    @property
    def weights(self) -> Sequence[weakref.ref[nn.Parameter]]:
        """The parameters of the model it was made for that are no gates; a copy has none."""
        ...

    def progress(self) -> Progress:
        """How far its schedule has come."""
        ...

    def ties(self) -> tuple[int, int]:
        """How many gates have the log-odds of one that is decided otherwise, of those that stay and of the others."""
        ...

    @property
    def step(self) -> int:
        """How many steps it has taken."""
        ...

    def state(self) -> tuple[float, ...]:
        """What a checkpoint needs to resume."""
        ...

    def resume(self, *state: float) -> None:
        """Go on from there."""
        ...

    def before_load(self, module: nn.Module, checkpoint: Mapping[str, Any], prefix: str) -> None:
        """A checkpoint is about to be loaded into ``module``, whose names in it begin with ``prefix``."""
        ...

    def takes(self, *state: float) -> bool:
        """Whether it can go on from there."""
        ...

    def identity(self) -> tuple[float, ...]:
        """Numbers that are equal for rules between which checkpoints may move."""
        ...

    def describe(self, identity: Sequence[float]) -> str:
        """What a rule with these numbers is, in words."""
        ...

    def refresh(self) -> tuple[object, ...]:
        """Bring ``mask`` and ``held`` of every gate up to date; returns a key of the rule's state."""
        ...

    def before_step(self) -> None:
        """An optimiser is about to use the gradients; called again if it evaluates them again."""
        ...

    def after_step(self, moved: Sequence[OptimizedGate]) -> None:
        """An optimiser has moved these gates."""
        ...

    def after_ascent(self) -> None:
        """An optimiser has moved the multipliers, if there are any."""
        ...

    def penalty(self) -> Tensor:
        """What it adds to the loss, shape ()."""
        ...


class OptimizedGate(Protocol):
    """A gate as an optimiser's step sees it.

    Attributes
    ----------
    log_alpha : Parameter
    multipliers : Parameter or None
        The Lagrange multipliers of a budget, at the first of its gates.
    rule : Rule or None
    """

    log_alpha: nn.Parameter
    multipliers: nn.Parameter | None
    rule: Rule | None

    def project(self) -> None:
        """Bring ``log_alpha`` back into the limits."""
        ...

    def follow_schedule(self) -> None:
        """Go one step along the temperature's schedule."""
        ...

    def end_forward(self) -> None:
        """A forward that was interrupted before this step is over."""
        ...

    def support(self) -> Tensor:
        """Which gates stay: boolean, shape of ``log_alpha``."""
        ...


class Kernels(Protocol):
    """What both modules of kernels offer."""

    def fits(self, weight: Tensor, log_alpha: Tensor) -> bool:
        """Whether the kernels can multiply ``weight`` with gates."""
        ...

    def gated(
        self, weight: Tensor, log_alpha: Tensor, seed: int, start: int, constants: Constants
    ) -> tuple[Tensor, Drawn]:
        """The product, and what its gates can be computed from again."""
        ...

    def gates_of(self, log_alpha: Tensor, drawn: Drawn, constants: Constants) -> Tensor:
        """The gates again."""
        ...

    def gated_backward(
        self,
        grad: Tensor,
        weight: Tensor,
        log_alpha: Tensor,
        drawn: Drawn,
        constants: Constants,
        deferred: tuple[Tensor, float] | None,
        *,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the weight and of log_alpha, each if it is wanted."""
        ...
