"""Gates on coupled groups: one gate array for a group, multiplied into every weight (or input) that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l0hooks.gate import Gate
from l0hooks.structure import ChannelGroup, GroupSite
from l0hooks.weights import Gating

Count = Callable[[int], Any]


@dataclass(frozen=True)
class CoupledPlan:
    """The groups that were gated together, and what their members cost.

    Attributes
    ----------
    groups : tuple of ChannelGroup
    positions : mapping from parameter name to float
        Multiply-adds per weight in one pass over the example inputs.
    declared : bool
        Whether the groups were given by hand, so that no graph says that they are complete.
    """

    groups: tuple[ChannelGroup, ...]
    positions: Mapping[str, float] = field(default_factory=dict)
    declared: bool = False

    def __deepcopy__(self, memo: dict[int, object]) -> CoupledPlan:
        return CoupledPlan(
            self.groups, self.positions, self.declared
        )  # a plan of its own, whose large index arrays are shared

    def tensors(self, without: AbstractSet[str] = frozenset()) -> dict[tuple[str, ...], list[tuple[int, GroupSite]]]:
        """Every parameter that loses members, with its sites and the number of the group each belongs to."""
        found: dict[tuple[str, ...], list[tuple[int, GroupSite]]] = {}
        for number, group in enumerate(self.groups):
            for site in group.sites:
                if not site.buffer and without.isdisjoint(site.names):
                    found.setdefault(site.names, []).append((number, site))
        return found

    def parameters(self, kept: Count, without: AbstractSet[str] = frozenset()) -> Any:
        """Parameters that stay in the tensors the groups run through, when ``kept(g)`` members of group g do.

        A tensor's share is the product of what stays along its axes; with expected numbers this is the expectation for
        independent groups. Parameters named in ``without`` are not counted.
        """
        return sum(self._elements(sites, kept) for sites in self.tensors(without).values())

    def macs(self, kept: Count, without: AbstractSet[str] = frozenset()) -> Any:
        """The same in multiply-adds of the layers among them."""
        return sum(
            self.positions[names[0]] * self._elements(sites, kept)
            for names, sites in self.tensors(without).items()
            if names[0] in self.positions
        )

    def _elements(self, sites: Sequence[tuple[int, GroupSite]], kept: Count) -> Any:
        axes: list[Any] = list(sites[0][1].shape)
        for number, site in sites:
            axes[site.axis] = axes[site.axis] - site.indices.shape[1] * (self.groups[number].size - kept(number))
        total = axes[0]
        for length in axes[1:]:
            total = total * length
        return total


class CoupledWeight(Gating):
    """The weight of a reader, its input axis multiplied with the gates of every group it reads.

    Parameters
    ----------
    plan : CoupledPlan
    members : dict from group number to Gate
        The groups this weight reads.
    name : str
        The parameter's name in the plan.
    dimensions : int
        Number of axes of the weight.
    example_noise : bool
        Draw one mask for each example and multiply it into the layer's input, rather than one for each step.
    """

    index: Tensor

    def __init__(
        self,
        plan: CoupledPlan,
        members: Mapping[int, Gate],
        name: str,
        dimensions: int,
        *,
        positions: float | None = None,
        example_noise: bool = False,
    ) -> None:
        super().__init__("coupled", positions)
        self.plan = plan
        self.name = name
        self.numbers = tuple(members)
        self.coupled = nn.ModuleList(members.values())
        self.example_noise = example_noise
        index, self.axis = _index_of(plan, self.numbers, name)
        self.dimensions = dimensions
        self._view = tuple(-1 if d == self.axis else 1 for d in range(dimensions))
        device = next(iter(members.values())).log_alpha.device
        self.register_buffer("index", torch.from_numpy(index).to(device), persistent=False)

    @property
    def gates(self) -> tuple[Gate, ...]:
        return tuple(gate for gate in self.coupled if isinstance(gate, Gate))

    def factor(self, values: Sequence[Tensor], rest: float = 1.0) -> Tensor:
        return self._assemble(values, rest).view(self._view)

    def mask(self, examples: int) -> Tensor:
        """Sampled gates of the input channels, one row for each example: float32, shape (examples, channels)."""
        return self._assemble([gate.sample(examples) for gate in self.gates], 1.0)

    def _assemble(self, values: Sequence[Tensor], rest: float) -> Tensor:
        ungated = values[0].new_full((*values[0].shape[:-1], 1), rest)
        return torch.cat([ungated, *values], dim=-1)[..., self.index]

    def _sampled(self, weight: Tensor) -> Tensor:
        return weight if self.example_noise else super()._sampled(weight)


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
    """A forward pre-hook that multiplies a reader's input with a mask drawn for each example.

    Parameters
    ----------
    gating : CoupledWeight
    channel : int, < 0
        The input's channel axis, counted from the last.
    """

    def __init__(self, gating: CoupledWeight, channel: int) -> None:
        self.gating = gating
        self.channel = channel

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.gating.training:
            return None
        if args:
            return (self._masked(args[0]), *args[1:]), kwargs
        name = "input" if "input" in kwargs else "x"  # transformers' name in Conv1D
        return args, {**kwargs, name: self._masked(kwargs[name])}

    def _masked(self, x: Tensor) -> Tensor:
        view = [1] * x.dim()
        if x.dim() > -self.channel:  # else a single example without a batch axis
            view[0] = x.shape[0]
        mask = self.gating.mask(view[0]).to(x.dtype)
        view[self.channel] = -1
        return x * mask.view(view)
