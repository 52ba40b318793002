"""What gates, the rules over them, and the hooks of optimisers must know of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class Rule(Protocol):
    """What decides for several gates together which of them stay; a budget.

    Attributes
    ----------
    finished : bool
        Whether the support is fixed: gates no longer move, and training uses their final values.
    """

    finished: bool

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

    def refresh(self) -> tuple[object, ...]:
        """Bring ``mask`` and ``held`` of every gate up to date; a key that tells one state from another."""
        ...

    def before_step(self) -> None:
        """An optimiser is about to use the gradients; possibly once more."""
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
