"""Gates on coupled groups: one gate array for a group, multiplied into every weight (or input) that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
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
from l0hooks.gates.shared_sampling import Team
from l0hooks.structure import ChannelGroup, GroupSite

Count = Callable[[int], int]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CoupledPlan:
    """The groups that were gated together, and what their members cost.

    Attributes
    ----------
    groups : tuple of ChannelGroup
    positions : mapping from parameter name to float
        Multiply-adds per weight in one pass over the example inputs; of each layer under one name.
    declared : bool
        Whether the groups were given by hand, so that no graph says that they are complete.
    """

    groups: tuple[ChannelGroup, ...]
    positions: Mapping[str, float] = field(default_factory=dict)
    declared: bool = False
    _forms: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, object]) -> CoupledPlan:
        return CoupledPlan(self.groups, self.positions, self.declared)  # the large index arrays are shared

    def tensors(self, without: AbstractSet[str] = frozenset()) -> dict[tuple[str, ...], list[tuple[int, GroupSite]]]:
        """Every parameter that loses members, with its sites and the number of the group each belongs to."""
        found: dict[tuple[str, ...], list[tuple[int, GroupSite]]] = {}
        for number, group in enumerate(self.groups):
            for site in group.sites:
                if not site.buffer and without.isdisjoint(site.names):
                    found.setdefault(site.names, []).append((number, site))
        return found

    def parameters(self, kept: Count, without: AbstractSet[str] = frozenset()) -> int:
        """Parameters that stay in the tensors the groups run through, when ``kept(g)`` members of group g do.

        A tensor's share is the product of what stays along its axes. Parameters named in ``without`` are not counted.
        """
        return sum(self._elements(sites, kept) for sites in self.tensors(without).values())

    def macs(self, kept: Count, without: AbstractSet[str] = frozenset()) -> float:
        """The same in multiply-adds of the layers among them."""
        return sum(
            sum(self.positions.get(name, 0.0) for name in names) * self._elements(sites, kept)
            for names, sites in self.tensors(without).items()
            if not self.positions.keys().isdisjoint(names)
        )

    def add_product(
        self,
        linear: Floats,
        square: Floats,
        each: float,
        sites: Sequence[tuple[int, GroupSite]],
        numbers: Mapping[int, int],
    ) -> float:
        """Add what stays of one tensor, the product of what stays along two axes, ``each`` for every element.

        As a quadratic form in the numbers of members that stay; ``numbers`` gives each group's place in it, and
        groups without one stay whole. The constant part is returned.
        """
        shape = sites[0][1].shape
        axes = sorted({site.axis for _, site in sites})
        rest = each * float(np.prod([n for axis, n in enumerate(shape) if axis not in axes[:2]]))
        fixed, weights = [], []
        for axis in axes[:2]:
            weight, lost = np.zeros(len(linear)), 0
            for group, site in sites:
                if site.axis == axis and group in numbers:
                    weight[numbers[group]] += site.indices.shape[1]
                    lost += site.indices.shape[1] * self.groups[group].size
            fixed.append(float(shape[axis] - lost))
            weights.append(weight)
        if len(axes) == 1:
            linear += rest * weights[0]
            return rest * fixed[0]
        (a, b), (u, v) = fixed, weights
        linear += rest * (a * v + b * u)
        square += rest / 2 * (np.outer(u, v) + np.outer(v, u))
        return rest * a * b

    def expected(self, keep: Sequence[Tensor], without: AbstractSet[str], *, macs: bool) -> Tensor:
        """Expected :meth:`parameters` or :meth:`macs` for independent members, by the keep probabilities of each group.

        The same numbers in a handful of operations on tensors.
        """
        key = macs, frozenset(without), keep[0].device
        if (form := self._forms.get(key)) is None:
            form = self._form(without, macs=macs, device=keep[0].device)
            if type(form[1]) is Tensor:  # one of a tracer's own is of no use afterwards
                self._forms[key] = form
        constant, linear, square, varies = form
        mean = _sums(keep)
        cost: Tensor = constant + (linear + mean @ square) @ mean
        if varies:  # groups on both axes of a square: E[k²] = E[k]² + Var[k]
            cost = cost + square.diagonal() @ _sums([p * (1 - p) for p in keep])
        return cost

    def _form(
        self, without: AbstractSet[str], *, macs: bool, device: torch.device
    ) -> tuple[float, Tensor, Tensor, bool]:
        count = len(self.groups)
        constant, linear, square = 0.0, np.zeros(count), np.zeros((count, count))
        numbers = {n: n for n in range(count)}
        for names, sites in self.tensors(without).items():
            each = sum(self.positions.get(name, 0.0) for name in names) if macs else 1.0
            constant += self.add_product(linear, square, each, sites, numbers)
        with torch.inference_mode(False):  # training will use them, too
            tensors = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in (linear, square)]
        return constant, tensors[0], tensors[1], bool(square.diagonal().any())

    def _elements(self, sites: Sequence[tuple[int, GroupSite]], kept: Count) -> int:
        axes = list(sites[0][1].shape)
        for number, site in sites:
            axes[site.axis] -= site.indices.shape[1] * (self.groups[number].size - kept(number))
        return math.prod(axes)


def _sums(arrays: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.sum().to(arrays[0].device) for x in arrays])


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
    team : Team, optional
        All gates of the plan, to be sampled together; those of ``members`` if not given.
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
        team: Team | None = None,
        positions: float | None = None,
        example_noise: bool = False,
    ) -> None:
        super().__init__("coupled", positions, tuple(members.values()))
        self._team = Team(tuple(members.values())) if team is None else team
        self.plan = plan
        self.name = name
        self.numbers = tuple(members)
        self.coupled = nn.ModuleList(members.values())
        self.example_noise = example_noise
        self.call = RunningCall()
        self._index, self.axis = _index_of(plan, self.numbers, name)
        self._traversal = Traversal()
        self.shape = tuple(shape)
        self._view = tuple(-1 if d == self.axis else 1 for d in range(len(shape)))
        device = next(iter(members.values())).log_alpha.device
        count = len(next(iter(members.values())).log_alpha)
        whole = len(members) == 1 and np.array_equal(self._index, 1 + np.arange(count))
        self.register_buffer("index", None if whole else torch.from_numpy(self._index).to(device), persistent=False)

    def factor(self, values: Sequence[Tensor], rest: float = 1.0) -> Tensor:
        return self._assemble(values, rest).view(self._view)

    def mask(self, examples: int | None = None) -> Tensor:
        """Sampled gates of the input channels: float32, shape (channels,), or (examples, channels)."""
        return self._assemble([self._team.sample(gate, examples) for gate in self.gates], 1.0)

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
        if self.example_noise or self.call.on_input:
            return weight
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

    With one draw for each example the mask has to lie on the input. With one for a step it may lie on the weight as
    well, with the same outputs and gradients: the smaller of the two arrays is chosen at every call.

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
        """Mask the input, and tell the weight."""
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
        """The call has ended: who looks at the weight from now on sees it with its gates."""
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
