"""The optimiser and the noise of the gate stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l0hooks.gates.noise import GateNoise, NoiseSource


class GateDescent(torch.optim.Optimizer):
    """Descent with momentum, its steps divided by one number: the root mean square of all gradients so far.

    The relative sizes of the gradients are kept. Adam divides each coordinate by a number of its own; gates that are
    seldom open would then follow a random walk.

    Parameters
    ----------
    params : iterable of Tensor
    lr : float, > 0
        A gradient of the usual size moves its coordinate by this much.
    momentum, decay : float in (0, 1)
        How slowly the mean of the gradients and the mean of their squares change.
    largest : float, > 0
        No coordinate moves further in one step.

    Examples
    --------
    >>> x = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = GateDescent([x], lr=0.1)
    >>> x.grad = torch.tensor([3.0, 4.0])
    >>> _ = optimizer.step()
    >>> x.detach()
    tensor([-0.0849, -0.1131])
    """

    def __init__(
        self, params: Any, *, lr: float, momentum: float = 0.9, decay: float = 0.99, largest: float = 0.5
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay, "largest": largest})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._move(x, x.grad, group)
        return loss

    def _move(self, x: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[x]
        if not state:
            state.update(steps=0, square=0.0, mean=torch.zeros_like(x))
        square = float(torch.dot(grad.flatten(), grad.flatten())) / max(1, int(torch.count_nonzero(grad)))
        state["steps"] += 1
        state["square"] = group["decay"] * state["square"] + (1 - group["decay"]) * square
        state["mean"].lerp_(grad, 1 - group["momentum"])
        unbiased = state["square"] / (1 - group["decay"] ** state["steps"])
        rate = group["lr"] / (1 - group["momentum"] ** state["steps"]) / (math.sqrt(unbiased) + 1e-20)
        x.sub_((state["mean"] * rate).clamp_(-group["largest"], group["largest"]))


class NumberedNoise(GateNoise):
    """Noise that depends on a seed and the number of the epoch alone; torch's own generator is not used."""

    def __init__(self, random_state: int) -> None:
        super().__init__(NoiseSource().add_entry("", ()), 0)
        self.random_state, self.epoch = random_state, 0

    def seed(self) -> int:
        """The seed of this epoch."""
        (seed,) = np.random.SeedSequence([self.random_state, self.epoch, 0]).generate_state(1, np.uint64)
        return int(seed)
