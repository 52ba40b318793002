"""Gates on the channels of a residual stream: what writes the stream is multiplied, and its norms are centred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l0hooks.attach.coupled_weight import CoupledWeight
from l0hooks.gates.gate import Gate
from l0hooks.gates.shared_sampling import SharedSampling
from l0hooks.structure.group_costs import CoupledPlan
from l0hooks.structure.width.fold import centred
from l0hooks.structure.width.parts import NormKind


class Written(NamedTuple):
    """An axis of a parameter that holds all channels of a stream, in order: its group's number, gate and axis.

    ``open_only``: the factor is 1 where a gate is not 0.
    """

    number: int
    gate: Gate
    axis: int
    open_only: bool


class WidthWeight(CoupledWeight):
    """A parameter that writes residual streams: each such axis is multiplied with the gates of the stream.

    It may read other groups, as the last layer of a branch does, whose gates multiply its input axis.

    Parameters
    ----------
    plan : CoupledPlan
    members : dict from group number to Gate
        The groups it reads; perhaps none.
    name : str
        The parameter's name in the plan.
    shape : tuple of int
        The parameter's.
    written : sequence of Written
        The axes along which it writes.
    shared : SharedSampling
        All gates of the plan.
    positions : float, optional
    example_noise : bool
        One mask for each example along the axis that it reads. Streams have one draw for a forward.
    """

    def __init__(
        self,
        plan: CoupledPlan,
        members: Mapping[int, Gate],
        name: str,
        shape: tuple[int, ...],
        *,
        written: Sequence[Written],
        shared: SharedSampling,
        positions: float | None = None,
        example_noise: bool = False,
    ) -> None:
        super().__init__(plan, members, name, shape, shared=shared, positions=positions, example_noise=example_noise)
        streams = {one.number: one.gate for one in written}
        self.numbers = (*self.numbers, *streams)
        self.gates = (*self.gates, *streams.values())
        self.coupled.extend(streams.values())
        places = {number: len(members) + n for n, number in enumerate(streams)}
        self._written = tuple(
            (places[one.number], tuple(-1 if d == one.axis else 1 for d in range(len(shape))), one.open_only)
            for one in written
        )

    def factor(self, values: Sequence[Tensor], rest: float = 1.0) -> Tensor:
        """The product along all axes; with ``rest`` 0 the sum, for what is counted for each gate alone."""
        parts = [super().factor(values[: len(self._reads)], rest)] if self._reads else []
        for place, view, open_only in self._written:
            value = values[place]
            if open_only and rest:
                value = (value > 0).to(value.dtype) + 0 * value  # a slope of zero, where one is asked for
            parts.append(value.view(view))
        laid, *others = parts
        for part in others:
            laid = laid * part if rest else laid + part
        return laid

    def sampled(self, weight: Tensor) -> Tensor:
        if self._reads:
            weight = super().sampled(weight)
        for place, view, open_only in self._written:
            gates = self.shared.sample(self.gates[place])
            if open_only:
                gates = (gates > 0).to(weight.dtype)
            weight = weight * gates.view(view).to(weight.dtype)
        return weight

    def open_channels(self, number: int, *, training: bool) -> Tensor:
        """Which channels of the stream with this number are open in the running forward: boolean."""
        gate = self.gates[self.numbers.index(number)]
        return (self.shared.sample(gate) if training else gate.value()).detach() > 0


class CentreInput:
    """A forward pre-hook for a norm that subtracts the mean: over the open channels of its stream alone.

    Parameters
    ----------
    gating : WidthWeight
        That of a parameter which writes the stream.
    number : int
        The stream's in the plan.
    kind : "layer" or "group"
    """

    def __init__(self, gating: WidthWeight, number: int, kind: NormKind) -> None:
        self._gating = gating
        self._number = number
        self._kind: NormKind = kind

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Hook ``module``, a norm."""
        return module.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Centre the input of the norm."""
        is_open = self._gating.open_channels(self._number, training=module.training)
        if args:
            return (centred(args[0], is_open, self._kind), *args[1:]), kwargs
        return args, {**kwargs, "input": centred(kwargs["input"], is_open, self._kind)}
