"""``CoupledPlan``: the coupled groups of a model, and its cost when some of their members stay."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from l0hooks.structure.blocks import Block
from l0hooks.structure.cost_form import CostForm, Cubes, Floats
from l0hooks.structure.groups import ChannelGroup, GroupSite

Count = Callable[[int], int]
Unit = Literal["params", "macs", "memory"]
Sites = list[tuple[int, GroupSite]]
Each = Callable[[tuple[str, ...], Sites], tuple[float, Sites]]


@dataclass(frozen=True)
class CoupledPlan:
    """The coupled groups of a model, and the model's cost when some of their members are removed.

    Blocks that can be removed whole are numbered after the groups; each has one member.

    Attributes
    ----------
    groups : tuple of ChannelGroup
    positions : mapping from parameter name to float
        Multiply-adds per weight for one of the example inputs; each layer appears under one of its names.
    declared : bool
        Whether the groups were declared by hand; no exported graph shows then that they are complete.
    blocks : tuple of Block
    """

    groups: tuple[ChannelGroup, ...]
    positions: Mapping[str, float] = field(default_factory=dict)
    declared: bool = False
    blocks: tuple[Block, ...] = ()
    _quadratic_forms: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, object]) -> CoupledPlan:
        # the copies share the large index arrays
        return CoupledPlan(self.groups, self.positions, self.declared, self.blocks)

    @property
    def sizes(self) -> list[int]:
        """How many members each group has, then each block."""
        return [*(group.size for group in self.groups), *(1 for _ in self.blocks)]

    def tensors(self, without: AbstractSet[str] = frozenset()) -> dict[tuple[str, ...], Sites]:
        """Every parameter that holds members of a group, with its sites and the number of each site's group.

        And every parameter of a block, without sites if it holds no members.
        """
        found: dict[tuple[str, ...], Sites] = {}
        for number, group in enumerate(self.groups):
            for site in group.sites:
                if not site.buffer and without.isdisjoint(site.names):
                    found.setdefault(site.names, []).append((number, site))
        for names in self._shapes:
            if without.isdisjoint(names):
                found.setdefault(names, [])
        return found

    @cached_property
    def _shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The shapes of the parameters of blocks."""
        return dict(tensor for block in self.blocks for tensor in block.tensors)

    @cached_property
    def _block_of(self) -> dict[tuple[str, ...], int]:
        """The number of the block that a parameter belongs to."""
        first = len(self.groups)
        return {names: first + n for n, block in enumerate(self.blocks) for names, _ in block.tensors}

    def parts(self, names: tuple[str, ...], sites: Sites) -> list[int]:
        """The numbers of the groups and the block that the size of a parameter depends on."""
        block = self._block_of.get(names)
        return [*(number for number, _ in sites), *(() if block is None else (block,))]

    def parameters(self, kept: Count, without: AbstractSet[str] = frozenset()) -> int:
        """The parameters left in the tensors of all groups when ``kept(g)`` members of group g stay.

        The size of a tensor is the product of the lengths left along its axes. Parameters named in
        ``without`` are not counted.
        """
        return sum(self._elements(names, sites, kept) for names, sites in self.tensors(without).items())

    def macs(self, kept: Count, without: AbstractSet[str] = frozenset()) -> float:
        """The multiply-adds of the layers of all groups when ``kept(g)`` members of group g stay."""
        return sum(
            uses(names, sites, self.positions) * self._elements(names, self.by_token(sites), kept)
            for names, sites in self.tensors(without).items()
            if not self.positions.keys().isdisjoint(names)
        )

    def by_token(self, sites: Sites) -> Sites:
        """The sites of a tensor that change what one example costs: fewer experts are used more often each."""
        found = [(n, site) for n, site in sites if self.groups[n].kind != "expert" or not site.of_experts]
        return found or [(number, replace(site, indices=site.indices[:, :0])) for number, site in sites[:1]]

    def form(
        self, count: int, numbers: Mapping[int, int], each: Each, without: AbstractSet[str] = frozenset()
    ) -> CostForm:
        """The cost of all tensors as a polynomial in the numbers of members that stay, ``count`` of them.

        The size of a tensor is the product of the lengths left along its axes, and of its block's gate.
        ``each(names, sites)`` is what an element costs, and the sites that count. ``numbers`` maps a group or block to
        its index in the form; those without an index keep all members.
        """
        by_block: dict[int | None, list[tuple[tuple[str, ...], Sites]]] = defaultdict(list)
        for names, sites in self.tensors(without).items():
            block = self._block_of.get(names)
            by_block[None if block is None else numbers.get(block)].append((names, sites))
        constant, linear, square = 0.0, np.zeros(count), np.zeros((count, count))
        cubes: dict[int, Floats] = {}
        for layer, tensors in by_block.items():
            own_linear, own_square, own = np.zeros(count), np.zeros((count, count)), 0.0
            for names, sites in tensors:
                value, counted = each(names, sites)
                own += self._add_product(own_linear, own_square, value, (names, counted), numbers)
            if layer is None:
                constant, linear, square = constant + own, linear + own_linear, square + own_square
            else:  # an open gate is 1: the block's cost times its gate
                linear[layer] += own
                square[layer] += own_linear / 2
                square[:, layer] += own_linear / 2
                cubes[layer] = own_square
        return CostForm(constant, linear, square, Cubes.of_blocks(cubes))

    def _add_product(
        self,
        linear: Floats,
        square: Floats,
        each: float,
        tensor: tuple[tuple[str, ...], Sites],
        numbers: Mapping[int, int],
    ) -> float:
        """Add the cost of one tensor to a quadratic form; return its constant part."""
        names, sites = tensor
        if not sites:
            return each * math.prod(self._shapes[names])
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

    def memory(self, kept: Count, each: Mapping[str, int], without: AbstractSet[str] = frozenset()) -> int:
        """The bytes left in the tensors of all groups when ``kept(g)`` members of group g stay.

        ``each`` has the bytes of one element of every parameter, by its name.
        """
        tensors = self.tensors(without).items()
        return sum(_of_one(names, each) * self._elements(names, sites, kept) for names, sites in tensors)

    def expected(
        self, keep: Sequence[Tensor], without: AbstractSet[str], unit: Unit, each: Mapping[str, int] | None = None
    ) -> Tensor:
        """Expected :meth:`parameters`, :meth:`macs` or :meth:`memory` when members stay independently.

        Gradients flow to the probabilities ``keep``.
        """
        key = unit, tuple((each or {}).values()), frozenset(without), keep[0].device
        if (form := self._quadratic_forms.get(key)) is None:
            form = self._quadratic_form(without, unit, each or {}, keep[0].device)
            if type(form[1]) is Tensor:  # do not cache the tensor subclasses of tracers
                self._quadratic_forms[key] = form
        constant, linear, square, cubes, varies = form
        mean = _sums(keep)
        cost: Tensor = constant + (linear + mean @ square) @ mean
        variance = _sums([p * (1 - p) for p in keep]) if varies or len(cubes.layers) else mean
        if varies:  # groups on both axes of a tensor: E[k²] = E[k]² + Var[k]
            cost = cost + square.diagonal() @ variance
        return cost + cubes.expected(mean, variance) if len(cubes.layers) else cost

    def _quadratic_form(
        self, without: AbstractSet[str], unit: Unit, bytes_each: Mapping[str, int], device: torch.device
    ) -> tuple[float, Tensor, Tensor, Cubes, bool]:
        def each(names: tuple[str, ...], sites: Sites) -> tuple[float, Sites]:
            if unit == "macs":
                return uses(names, sites, self.positions), self.by_token(sites)
            return (float(_of_one(names, bytes_each)) if unit == "memory" else 1.0), sites

        count = len(self.sizes)
        form = self.form(count, {n: n for n in range(count)}, each, without)
        with torch.inference_mode(False):  # training uses these tensors, too
            tensors = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in (form.linear, form.square)]
        return form.constant, tensors[0], tensors[1], form.cubes, bool(form.square.diagonal().any())

    def _elements(self, names: tuple[str, ...], sites: Sites, kept: Count) -> int:
        block = self._block_of.get(names)
        axes = list(sites[0][1].shape if sites else self._shapes[names])
        for number, site in sites:
            axes[site.axis] -= site.indices.shape[1] * (self.groups[number].size - kept(number))
        return math.prod(axes) * (1 if block is None else kept(block))


def _of_one(names: Sequence[str], each: Mapping[str, int]) -> int:
    """The value of a tensor that is known by one of its names."""
    return next(each[name] for name in names if name in each)


def uses(names: Sequence[str], sites: Sites, positions: Mapping[str, float]) -> float:
    """How often each element of a tensor is used for one example, at all places that go by these names.

    Of a stack of tensors, the mean over them.
    """
    total = sum(positions.get(name, 0.0) for name in names)
    return total / len(names) if sites and sites[0][1].stacked else total


def _sums(arrays: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.sum().to(arrays[0].device) for x in arrays])
