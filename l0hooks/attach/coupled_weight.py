"""Gates on coupled groups: one gate array for a group, multiplied into every weight (or input) that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l0hooks._torch.modules import Traversal
from l0hooks._torch.tensors import is_meta
from l0hooks.attach.gated_weight import Gating
from l0hooks.gates.gate import Gate
from l0hooks.gates.shared_sampling import SharedSampling
from l0hooks.structure.group_costs import CoupledPlan


@dataclass(slots=True)
class RunningCall:
    """Whether the call of a layer that is running has its gates on its input."""

    on_input: bool = False


class CoupledWeight(Gating):
    """The weight of a reader, its input axis multiplied with the gates of every group it reads.

    Parameters
    ----------
    plan : CoupledPlan
    members : dict from group number to Gate
        The groups this weight reads.
    name : str
        The parameter's name in the plan.
    shape : tuple of int
        The weight's.
    shared : SharedSampling, optional
        All gates of the plan, which are sampled together; those of ``members`` if not given.
    example_noise : bool
        Draw one mask for each example and multiply it into the layer's input, rather than one for each step.

    Attributes
    ----------
    call : RunningCall
        What :class:`MaskInput` says of the running call of the layer.
    """

    index: Tensor | None

    def __init__(
        self,
        plan: CoupledPlan,
        members: Mapping[int, Gate],
        name: str,
        shape: tuple[int, ...],
        *,
        shared: SharedSampling | None = None,
        positions: float | None = None,
        example_noise: bool = False,
    ) -> None:
        super().__init__("coupled", positions, tuple(members.values()))
        self.shared = SharedSampling(tuple(members.values())) if shared is None else shared
        self.plan = plan
        self.name = name
        self.numbers = self._reads = tuple(members)
        self.coupled = nn.ModuleList(members.values())
        self.example_noise = example_noise
        self.call = RunningCall()
        self._traversal = Traversal()
        self.shape = tuple(shape)
        self._place()
        devices = [gate.log_alpha.device for gate in members.values()]
        self.register_buffer("index", self._index_on(devices[0]) if devices else None, persistent=False)

    def follow(self, plan: CoupledPlan, shape: tuple[int, ...]) -> None:
        """Take the plan of a model that was cut, and the weight's new shape; the gates were cut before."""
        self.plan, self.shape = plan, tuple(shape)
        self._place()
        self.index = self._index_on(self.gates[0].log_alpha.device) if self._reads else None
        self.kept.drop()

    def _place(self) -> None:
        """Find the axis that is read, and where each of its channels has its gate."""
        self._index, self.axis = _index_of(self.plan, self._reads, self.name)
        self._view = tuple(-1 if d == self.axis else 1 for d in range(len(self.shape)))

    def _index_on(self, device: torch.device) -> Tensor | None:
        """Where each channel's gate stands; None where one group's gates lie in order."""
        count = self.plan.groups[self._reads[0]].size
        whole = len(self._reads) == 1 and np.array_equal(self._index, 1 + np.arange(count))
        return None if whole else torch.from_numpy(self._index).to(device)

    def factor(self, values: Sequence[Tensor], rest: float = 1.0) -> Tensor:
        return self._assemble(values, rest).view(self._view)

    def mask(self, examples: int | None = None) -> Tensor:
        """Sampled gates of the input channels: float32, shape (channels,), or (examples, channels)."""
        reading = self.gates[: len(self._reads)]
        return self._assemble([self.shared.sample(gate, examples) for gate in reading], 1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CoupledWeight:
        without_data = self.index is not None and self._traversal.fills(fn, self.index)
        super()._apply(fn, recurse)
        if without_data and self.index is not None and not is_meta(self.index):
            self.index.copy_(torch.from_numpy(self._index))
        return self

    def _materialise(self, device: torch.device) -> None:
        super()._materialise(device)
        if self.index is not None and is_meta(self.index):
            self.index = torch.from_numpy(self._index).to(device)

    def _assemble(self, values: Sequence[Tensor], rest: float) -> Tensor:
        if self.index is None:  # one group, its members in order
            return values[0]
        ungated = values[0].new_full((*values[0].shape[:-1], 1), rest)
        return torch.cat([ungated, *values], dim=-1).index_select(-1, self.index)

    def sampled(self, weight: Tensor) -> Tensor:
        if self.call.on_input:
            return weight
        # also with a draw for each example, where the model's own code uses the weight without calling its layer
        return weight * self.mask().view(self._view).to(weight.dtype)


def _index_of(plan: CoupledPlan, numbers: Sequence[int], name: str) -> tuple[npt.NDArray[np.int64], int]:
    """For each position of the read axis its place in [1, gates of the first group, gates of the second …]."""
    index, axis, start = np.zeros(0, np.int64), 0, 1
    for number in numbers:
        group = plan.groups[number]
        for site in group.readers:
            if name in site.names:
                axis = site.axis
                if not len(index):
                    index = np.zeros(site.shape[axis], np.int64)
                index[site.indices] = start + np.arange(group.size)[:, None]
        start += group.size
    return index, axis


class MaskInput:
    """A pair of forward hooks that multiply a reader's input with its gates, where that is asked for or cheaper.

    With one draw for each example the mask must multiply the input. With one for a step it may multiply the weight as
    well, with the same outputs and gradients: at every call the smaller of the two arrays is multiplied.

    Parameters
    ----------
    gating : CoupledWeight
    channel : int, < 0
        The input's channel axis, counted from the last.
    """

    def __init__(self, gating: CoupledWeight, channel: int) -> None:
        self.gating = gating
        self.channel = channel

    def attach(self, module: nn.Module) -> tuple[RemovableHandle, ...]:
        """Hook ``module``, whose weight ``gating`` is."""
        before = module.register_forward_pre_hook(self.enter, with_kwargs=True)
        return before, module.register_forward_hook(self.leave, always_call=True)

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Mask the input, and note for the weight that it is masked."""
        if not self.gating.training:
            return None
        name = "input" if "input" in kwargs else "x"  # transformers' name in Conv1D
        x = args[0] if args else kwargs[name]
        if not self.gating.example_noise and x.numel() > math.prod(self.gating.shape):
            return None
        self.gating.call.on_input = True
        masked = self._masked(x)
        return ((masked, *args[1:]), kwargs) if args else (args, {**kwargs, name: masked})

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """The call has ended: from now on the weight is read with its gates."""
        self.gating.call.on_input = False

    def _masked(self, x: Tensor) -> Tensor:
        view = [1] * x.dim()
        if not self.gating.example_noise:
            mask = self.gating.mask()
        else:
            if x.dim() > -self.channel:  # else a single example without a batch axis
                view[0] = x.shape[0]
            mask = self.gating.mask(view[0])
        view[self.channel] = mask.shape[-1]
        return x * mask.to(x.dtype).view(view)
