"""A clock that counts instead of timing: multiply-adds, with channels in whole multiples, as processors work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MATRIX = {"mm", "addmm", "bmm", "baddbmm"}
VIEWS = {
    "t", "view", "_unsafe_view", "transpose", "permute", "expand", "detach", "unsqueeze", "squeeze", "select", "slice",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Seconds of the operators that run: ``each`` for a multiply-add, ``number`` for a number that another writes."""

    def __init__(self, step: int, each: float, number: float) -> None:
        super().__init__()
        self.step, self.each, self.number = step, each, number
        self.seconds = 0.0

    def up(self, channels: int) -> int:
        return math.ceil(channels / self.step) * self.step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in MATRIX:
            a, b = [t for t in args if isinstance(t, Tensor) and t.dim() >= 2][-2:]
            batch = a.shape[0] if a.dim() == 3 else 1
            self.seconds += self.each * batch * a.shape[-2] * self.up(a.shape[-1]) * self.up(b.shape[-1])
        elif name == "convolution":
            x, weight, transposed, groups = args[0], args[1], args[6], args[8]
            places = (x if transposed else result).shape[2:].numel() * x.shape[0]
            first, second = self.up(weight.shape[0] // groups), self.up(weight.shape[1])
            self.seconds += self.each * places * groups * first * second * weight.shape[2:].numel()
        elif isinstance(result, Tensor) and name not in VIEWS:
            self.seconds += self.number * result.numel()
        return result


class FakeClock:
    """Seconds by counting; ``calls`` is how many were timed, and ``extra`` what every one takes besides."""

    def __init__(self, step: int = 1, each: float = 1e-6, number: float = 0.0) -> None:
        self.step, self.each, self.number = step, each, number
        self.calls, self.extra = 0, 0.0

    def __call__(self, run: Callable[[], object]) -> float:
        self.calls += 1
        with Counter(self.step, self.each, self.number) as counter:
            run()
        return counter.seconds + self.extra or 1e-12


@torch.no_grad()
def seconds(model: torch.nn.Module, inputs: tuple[Any, ...], clock: FakeClock) -> float:
    """What a model takes in evaluation mode by the clock."""
    return clock(lambda: model.eval()(*inputs))
