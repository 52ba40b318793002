"""Which inputs of a model's layers are constant, whatever goes into the model.

The model runs with NaN for everything that depends on its input: NaN survives arithmetic, so what stays finite does not
depend on it. Comparisons hide NaN (``torch.where(x > 0, x, 0)``); therefore the same places are filled with random
numbers next, and with what the example inputs give at last: a constant is what every run agrees on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from l0hooks._torch.modules import parameters_of
from l0hooks._torch.running import evaluating, slow_attention
from l0hooks._torch.trees import tree_map
from l0hooks.attach.copies import run_copy
from l0hooks.structure.layers import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, is_hugging_face_conv1d

Way = Literal["taint", "random", "plain"]
_STANDARD = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *EMBEDDINGS)
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, ArithmeticError)
_ROUNDING = 8  # units in the last place by which one constant may differ between positions: means of many, odd lanes
_DECADES = -2.0, 4.0  # the scales of the random numbers: below and above what a model may compare with


def constant_inputs(model: nn.Module, example_inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The input channels of Linear, convolution and Hugging Face ``Conv1D`` layers that never change.

    Parameters
    ----------
    model : nn.Module
        Plain; not changed.
    example_inputs : sequence
        Positional arguments.

    Returns
    -------
    dict
        For every such layer that is called as one, by its name: a float64 tensor with the value of each input channel,
        the same for all examples, positions and calls; NaN where there is no such value. Empty if the model cannot be
        run on other numbers than the examples.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> with torch.no_grad():
    ...     _ = model[0].weight[0].zero_(), model[0].bias.copy_(torch.tensor([3.0, 4.0]))
    >>> constant_inputs(model, (torch.zeros(1, 2),))["2"].tolist()
    [3.0, nan]
    """
    probe = run_copy(model)
    watches = {name: _Watch(m) for name, m in probe.named_modules() if is_standard(m)}
    with ExitStack() as stack:
        for watch in watches.values():
            stack.callback(watch.module.register_forward_hook(watch, with_kwargs=True, prepend=True).remove)
        stack.enter_context(evaluating(probe))
        stack.enter_context(slow_attention())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # or it would compile each run anew
        try:
            for way, change in _RUNS:
                for watch in watches.values():
                    watch.begin(way, change)
                probe(*tree_map(change, tuple(example_inputs)))
        except _FAILURES:
            return {}
    return {name: watch.constants() for name, watch in watches.items() if watch.low is not None}


def is_standard(module: nn.Module) -> bool:
    """Whether a layer computes what its class in torch (in transformers) does, with a weight of its own."""
    if parameters_of(module).get("weight") is None or "forward" in vars(module):
        return False
    if is_hugging_face_conv1d(module):
        return True
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _STANDARD)


def _with_nan(value: Any) -> Any:
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return torch.full_like(value, math.nan)
    return math.nan if isinstance(value, float) else value


def _with_other_integers(value: Any) -> Any:
    """NaN, and other tokens, masks and lengths, which NaN cannot stand for."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return ~value
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return torch.zeros_like(value) if bool(value.any()) else torch.ones_like(value)
    return _with_nan(value)


def _with_noise(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    low, high = _DECADES
    return torch.randn_like(value) * 10 ** (low + (high - low) * torch.rand_like(value))


def _positive(value: Any) -> Any:
    return _with_noise(value).abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _negative(value: Any) -> Any:
    return -_positive(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _unchanged(value: Any) -> Any:
    return value


_RUNS: tuple[tuple[Way, Callable[[Any], Any]], ...] = (
    *(("taint", change) for change in (_with_other_integers, _with_nan)),
    *(("random", change) for change in (_positive, _negative, *[_with_noise] * 6)),
    ("plain", _unchanged),
)


class _Watch:
    """A forward hook: what goes into one layer in every run, and what must come out of it.

    Attributes
    ----------
    module : nn.Module
    low, high : Tensor or None
        The smallest and the largest number that each input channel has been; None before the first call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self._eps = 0.0
        self._way: Way = "plain"
        self._change: Callable[[Any], Any] = _unchanged
        self._call = 0
        self._tainted: list[Tensor] = []
        self._carrier = copy.deepcopy(module)
        with torch.no_grad():
            weight = self._carrier.get_parameter("weight")
            weight.copy_(weight != 0)
            bias = parameters_of(self._carrier).get("bias")
            if bias is not None:
                bias.zero_()

    def begin(self, way: Way, change: Callable[[Any], Any]) -> None:
        """Get ready for another run, in which ``change`` makes what depends on the model's input."""
        self._way, self._change, self._call = way, change, 0
        if way == "taint":
            self._tainted = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        name = None if args else next(iter(kwargs))
        x: Tensor = args[0] if name is None else kwargs[name]
        if isinstance(module, EMBEDDINGS):
            tainted = self._carrier.get_parameter("weight").any(0).expand(output.shape)
        else:
            self._record(x)
        if self._way == "plain":
            return output
        if self._way == "random":
            self._call += 1
            return torch.where(self._tainted[self._call - 1], self._change(output), output)
        if not isinstance(module, EMBEDDINGS):

            def run(layer: nn.Module, value: Tensor) -> Tensor:
                if name is None:
                    found: Tensor = type(layer).forward(layer, value, *args[1:], **kwargs)
                else:
                    found = type(layer).forward(layer, **{**kwargs, name: value})
                return found

            # zero weights stop NaN here, as they stop every number in the model itself
            tainted = run(self._carrier, x.isnan().to(x.dtype)) > 0.5
            output = run(module, x.masked_fill(x.isnan(), 0))
        self._tainted.append(tainted)
        return torch.where(tainted, math.nan, output)

    def _record(self, x: Tensor) -> None:
        layer = isinstance(self.module, (*CONVOLUTIONS, *TRANSPOSED))
        axis = x.dim() - self.module.get_parameter("weight").dim() + 1 if layer else -1
        values = x.detach().double().movedim(axis, 0).flatten(1)
        low, high = values.amin(1), values.amax(1)  # NaN if there is one
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self._eps = torch.finfo(x.dtype).eps

    def constants(self) -> Tensor:
        """The value of each input channel, NaN where it has more than one."""
        if self.low is None or self.high is None:
            raise RuntimeError("a layer that was never called has no inputs")
        scale = torch.maximum(self.low.abs(), self.high.abs())
        agreed = (self.high - self.low <= _ROUNDING * self._eps * scale) & scale.isfinite()
        return torch.where(agreed, (self.low + self.high) / 2, math.nan)
