"""``CoupledPlan``: the coupled groups of a model, and its cost when some of their members stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l0hooks.structure.groups import ChannelGroup, GroupSite

Count = Callable[[int], int]
Floats = npt.NDArray[np.float64]
Unit = Literal["params", "macs", "memory"]


@dataclass(frozen=True)
class CoupledPlan:
    """The coupled groups of a model, and the model's cost when some of their members are removed.

    Attributes
    ----------
    groups : tuple of ChannelGroup
    positions : mapping from parameter name to float
        Multiply-adds per weight for one of the example inputs; each layer appears under one of its names.
    declared : bool
        Whether the groups were declared by hand; no exported graph shows then that they are complete.
    """

    groups: tuple[ChannelGroup, ...]
    positions: Mapping[str, float] = field(default_factory=dict)
    declared: bool = False
    _quadratic_forms: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, object]) -> CoupledPlan:
        return CoupledPlan(self.groups, self.positions, self.declared)  # the copies share the large index arrays

    def tensors(self, without: AbstractSet[str] = frozenset()) -> dict[tuple[str, ...], list[tuple[int, GroupSite]]]:
        """Every parameter that holds members of a group, with its sites and the number of each site's group."""
        found: dict[tuple[str, ...], list[tuple[int, GroupSite]]] = {}
        for number, group in enumerate(self.groups):
            for site in group.sites:
                if not site.buffer and without.isdisjoint(site.names):
                    found.setdefault(site.names, []).append((number, site))
        return found

    def parameters(self, kept: Count, without: AbstractSet[str] = frozenset()) -> int:
        """The parameters left in the tensors of all groups when ``kept(g)`` members of group g stay.

        The size of a tensor is the product of the lengths left along its axes. Parameters named in
        ``without`` are not counted.
        """
        return sum(self._elements(sites, kept) for sites in self.tensors(without).values())

    def macs(self, kept: Count, without: AbstractSet[str] = frozenset()) -> float:
        """The multiply-adds of the layers of all groups when ``kept(g)`` members of group g stay."""
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
        """Add the cost of one tensor to a quadratic form in the numbers of members that stay; return its constant part.

        The size of a tensor is the product of the lengths left along its axes; each element costs ``each``. ``numbers``
        maps a group to its index in the form; groups without an index keep all members.
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

    def memory(self, kept: Count, each: Mapping[str, int], without: AbstractSet[str] = frozenset()) -> int:
        """The bytes left in the tensors of all groups when ``kept(g)`` members of group g stay.

        ``each`` has the bytes of one element of every parameter, by its name.
        """
        return sum(_of_one(names, each) * self._elements(sites, kept) for names, sites in self.tensors(without).items())

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
        constant, linear, square, varies = form
        mean = _sums(keep)
        cost: Tensor = constant + (linear + mean @ square) @ mean
        if varies:  # groups on both axes of a tensor: E[k²] = E[k]² + Var[k]
            cost = cost + square.diagonal() @ _sums([p * (1 - p) for p in keep])
        return cost

    def _quadratic_form(
        self, without: AbstractSet[str], unit: Unit, bytes_each: Mapping[str, int], device: torch.device
    ) -> tuple[float, Tensor, Tensor, bool]:
        count = len(self.groups)
        constant, linear, square = 0.0, np.zeros(count), np.zeros((count, count))
        numbers = {n: n for n in range(count)}
        for names, sites in self.tensors(without).items():
            each = 1.0
            if unit == "macs":
                each = sum(self.positions.get(name, 0.0) for name in names)
            elif unit == "memory":
                each = float(_of_one(names, bytes_each))
            constant += self.add_product(linear, square, each, sites, numbers)
        with torch.inference_mode(False):  # training uses these tensors, too
            tensors = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in (linear, square)]
        return constant, tensors[0], tensors[1], bool(square.diagonal().any())

    def _elements(self, sites: Sequence[tuple[int, GroupSite]], kept: Count) -> int:
        axes = list(sites[0][1].shape)
        for number, site in sites:
            axes[site.axis] -= site.indices.shape[1] * (self.groups[number].size - kept(number))
        return math.prod(axes)


def _of_one(names: Sequence[str], each: Mapping[str, int]) -> int:
    """The value of a tensor that is known by one of its names."""
    return next(each[name] for name in names if name in each)


def _sums(arrays: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.sum().to(arrays[0].device) for x in arrays])
