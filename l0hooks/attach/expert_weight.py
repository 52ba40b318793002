"""Gates of experts on the weights that write their outputs, perhaps with gates of neurons along another axis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from l0hooks.attach.coupled_weight import CoupledWeight
from l0hooks.attach.spec import GateSpec
from l0hooks.errors import L0HooksWarning, explain
from l0hooks.structure import ChannelGroup, GroupSite
from l0hooks.structure.cut_experts import lists_of


class ExpertWeight(CoupledWeight):
    """A weight multiplied with one gate for each expert, or for the expert that it belongs to, and others' gates.

    Every group lies along one axis of the weight; the factor is the product over the groups.
    """

    def _place(self) -> None:
        """Where each group's gates lie: the shape of their view, or the one member that the weight belongs to."""
        self._views: list[tuple[int | None, tuple[int, ...]]] = []
        for number in self.numbers:
            site = next(s for s in self.plan.groups[number].readers if self.name in s.names)
            axis = site.axis - 1 if site.stacked else site.axis
            view = tuple(-1 if d == axis else 1 for d in range(len(self.shape)))
            self._views.append((site.names.index(self.name) if axis < 0 else None, view))
        self._index, self.axis = np.zeros(0, np.int64), -1
        self._view = ()

    def _index_on(self, device: object) -> None:
        """No positions: gates lie in order along whole axes."""

    def factor(self, values: Sequence[Tensor], rest: float = 1.0) -> Tensor:
        laid = [
            value.view(view) if member is None else value[member].view(view)
            for value, (member, view) in zip(values, self._views, strict=True)
        ]
        return math.prod(laid[1:], start=laid[0])

    def sampled(self, weight: Tensor) -> Tensor:
        return weight * self.factor([self.shared.sample(gate) for gate in self.gates]).to(weight.dtype)


def expert_readers(group: ChannelGroup) -> tuple[GroupSite, ...]:
    """The sites of a group whose weights need :class:`ExpertWeight`: those of experts, and those of stacked weights."""
    return tuple(site for site in group.readers if group.kind == "expert" or site.stacked)


def shared_by_experts(chosen: Sequence[tuple[ChannelGroup, GateSpec]]) -> list[tuple[ChannelGroup, GateSpec]]:
    """``chosen`` without groups inside single experts of a list whose experts have gates; a warning names them.

    What such a group costs would depend on which expert stays, not on how many do.
    """
    lists = [f"{path}." for group, _ in chosen for path in lists_of(group)]
    stay: list[tuple[ChannelGroup, GateSpec]] = []
    left: list[tuple[ChannelGroup, GateSpec]] = []
    for group, spec in chosen:
        single = [name for site in group.sites if not site.stacked for name in site.names]
        (left if any(name.startswith(path) for name in single for path in lists) else stay).append((group, spec))
    if left:
        text = explain(
            f"sparsify: {left[0][0].name!r}",
            "where experts of a list have gates, neurons are gated in all of them together or in none.",
            got=f"{len(left)} groups within single experts, which stay without gates",
            hint='kinds without "expert"',
        )
        warnings.warn(text, L0HooksWarning, stacklevel=6)
    return stay
