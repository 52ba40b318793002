"""The largest support whose pruned model meets a time, found by timing pruned models beside the dense one."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.running import OUT_OF_MEMORY, evaluating
from l0hooks._torch.trees import tree_map_only
from l0hooks.attach.plain import plain_copy
from l0hooks.errors import StateError, UnsupportedModuleError, in_one_line
from l0hooks.gates.gate import Gate
from l0hooks.training.clocks import Clock, interleaved, ratio, shared
from l0hooks.training.smaller_copies import smaller_copy

_TOLERANCE = 0.02  # of the time that is wanted: a support that takes so little less is the largest
_RESOLUTION = 1e-3  # of the whole size: supports that are nearer to each other are not told apart
_MOST = 12  # models are timed
_MOST_ON_A_LINE = 3  # that are too slow, before bisection


@dataclass(frozen=True)
class Measured:
    """What a pruned model takes beside the dense one: medians over rounds in which both run.

    Attributes
    ----------
    dense, pruned : float, > 0, seconds
    share : float, > 0
        The pruned model's time over the dense one's, round by round.

    Examples
    --------
    >>> print(Measured(dense=0.3, pruned=0.15, share=0.5))
    2.00 times faster: 150.00 ms instead of 300.00 ms
    """

    dense: float
    pruned: float
    share: float

    @property
    def speedup(self) -> float:
        """How many times faster the pruned model is."""
        return 1 / self.share

    def __str__(self) -> str:
        return f"{self.speedup:.2f} times faster: {1e3 * self.pruned:.2f} ms instead of {1e3 * self.dense:.2f} ms"


def largest_within(
    share_at: Callable[[float], float], first: float, least: float, whole: float, goal: float
) -> tuple[float, bool]:
    """The largest size whose share of the dense time is at most ``goal``, and whether there is one.

    Sizes between one that meets the goal and one that does not are tried, where a straight line between them says,
    until a size takes at most 2 % less than the goal or none is left between. If none meets it, the fastest one tried.

    Parameters
    ----------
    share_at : callable, float -> float
        The share at a size; grows with it but for noise.
    first : float
        The size to begin with.
    least, whole : float
        The smallest size, and the one whose share is 1.
    goal : float, in (0, 1)

    Examples
    --------
    >>> size, met = largest_within(lambda size: 0.2 + 0.8 * size / 100, first=50.0, least=1.0, whole=100.0, goal=0.5)
    >>> met, 0.49 <= 0.2 + 0.8 * size / 100 <= 0.5
    (True, True)
    """
    tried: dict[float, float] = {}
    low, high = (least, 0.0), (whole, 1.0)
    aim, size = goal * (1 - _TOLERANCE / 2), min(max(first, least), whole)
    for _ in range(_MOST):
        share = tried[size] = share_at(size)
        if share <= goal:
            low = (size, share)
        else:
            high = (size, share)
        near = goal * (1 - _TOLERANCE) <= share <= goal
        if near or (size == least and share > goal) or high[0] - low[0] <= _RESOLUTION * whole:
            break
        if low[1]:
            size = _between(low, high, aim)
        elif len(tried) < _MOST_ON_A_LINE:
            size = _below(high, (whole, 1.0), least, aim)
        else:
            size = (least + high[0]) / 2
    if not low[1] and least not in tried:  # none was fast enough
        tried[least] = share_at(least)
        low = (least, tried[least])
    if 0 < low[1] <= goal:
        return low[0], True
    return min(tried, key=lambda one: (tried[one], -one)), False


def _between(low: tuple[float, float], high: tuple[float, float], aim: float) -> float:
    """Where a line between two sizes says that the share is ``aim``, but not close to either of them."""
    width = high[0] - low[0]
    wanted = low[0] + width * (aim - low[1]) / max(high[1] - low[1], 1e-9)
    return min(max(wanted, low[0] + 0.1 * width), high[0] - 0.1 * width)


def _below(high: tuple[float, float], whole: tuple[float, float], least: float, aim: float) -> float:
    """Where the line through the whole says that the share is ``aim``, below a size that takes too long."""
    if high[0] >= whole[0] or high[1] >= whole[1]:  # such a line falls nowhere
        wanted = high[0] * aim / high[1]
    else:
        wanted = high[0] - (high[1] - aim) * (whole[0] - high[0]) / (whole[1] - high[1])
    return max(min(wanted, high[0] - 0.05 * (high[0] - least)), least)


class TimedModel:
    """Times pruned copies of one model beside a dense copy, on the device where the layers were timed.

    Parameters
    ----------
    model : nn.Module
        With coupled gates alone. Not kept alive.
    examples : sequence
        Positional arguments.
    clock : Clock
    device : str
    keep_dense : bool
        Copy the dense model now, because it will be cut in place.
    """

    def __init__(
        self, model: nn.Module, examples: Sequence[Any], clock: Clock, device: str, *, keep_dense: bool
    ) -> None:
        self._model = weakref.ref(model)
        self._examples = tuple(examples)
        self._clock = clock
        self._device = torch.device(device)
        self._dense = plain_copy(model) if keep_dense else None  # cutting puts new tensors in place of these

    def find(
        self,
        gates: Sequence[Gate],
        masks_at: Callable[[float], list[Tensor]],
        bounds: tuple[float, float, float],
        goal: float,
    ) -> tuple[list[Tensor], Measured, bool] | str:
        """The largest support that takes at most ``goal`` of the dense time, or the fastest; why not, as a string.

        Parameters
        ----------
        gates : sequence of Gate
        masks_at : callable, float -> list of Tensor, boolean
            The support of each gate at a size.
        bounds : (float, float, float)
            The size to begin with, the smallest, and the whole.
        goal : float, in (0, 1)
        """
        model = self._model()
        if model is None:
            return "the model is gone"
        dense = self._placed(plain_copy(model) if self._dense is None else self._dense)
        found: dict[tuple[int, ...], Measured] = {}

        def measured(size: float) -> Measured:
            masks = masks_at(size)
            key = tuple(int(mask.sum()) for mask in masks)
            if key not in found:
                stays = {id(gate): mask.cpu().numpy() for gate, mask in zip(gates, masks, strict=True)}
                found[key] = self._measure(dense, self._placed(smaller_copy(model, stays, self._examples)))
            return found[key]

        try:
            size, met = largest_within(lambda size: measured(size).share, *bounds, goal)
        except OUT_OF_MEMORY:
            raise
        except (StateError, UnsupportedModuleError) as error:
            return in_one_line(error)
        return masks_at(size), measured(size), met

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self._device)

    def _measure(self, dense: nn.Module, small: nn.Module) -> Measured:
        examples = tree_map_only(Tensor, lambda t: t.to(self._device), self._examples)
        with evaluating(dense), evaluating(small):
            calls = [partial(dense, *examples), partial(small, *examples)]
            before, after = interleaved(shared(self._clock), calls)
        return Measured(statistics.median(before), statistics.median(after), ratio(after, before))
