"""``Tracer``: the labels of an exported graph's values, and how they are merged and frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from l0hooks.structure.fx_nodes import has_shape, is_static, place_of
from l0hooks.structure.union_find import Classes, compress, constant, squeeze_constant, squeeze_other, varies


@dataclass
class Parameter:
    """One parameter or float buffer, tied names together, with the labels of its axes or of its elements.

    Attributes
    ----------
    names : list of str
        Qualified names; several if tied.
    shape : torch.Size
    axes : list of Tensor
        Labels along each axis, once an operator used it as a weight or a vector.
    elements : Tensor or None
        Labels of single elements, once it was used as an activation.
    read_axis : set of int
        Axes along which Linear and convolution layers read channels.
    """

    names: list[str]
    shape: torch.Size
    is_buffer: bool
    axes: list[Tensor] = field(default_factory=list)
    elements: Tensor | None = None
    read_axis: set[int] = field(default_factory=set)


@dataclass
class Reference:
    """A parameter as it stands in the graph, its axes in ``order``."""

    parameter: Parameter
    order: tuple[int, ...]


class Tracer:
    """Labels for every value of an exported program.

    Attributes
    ----------
    classes : Classes
    parameters : list of Parameter
        With ``classes``, the result.
    values : dict
        The labels of each node's value; None for what has no labels, such as numbers and shapes known only at run time.
    reshaped : list
        Labels after each reshape.
    heads : list of Tensor
        Labels along axes that attention takes for heads.
    mixed : list
        Labels that were merged, and why.
    uniform : dict
        Of tensors made by the graph itself, the axes (from the right) along which their numbers are all equal.
    """

    def __init__(self) -> None:
        self.classes = Classes()
        self.values: dict[fx.Node, Any] = {}
        self.parameters: list[Parameter] = []
        self.reshaped: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.mixed: list[tuple[Tensor, str]] = []
        self.uniform: dict[fx.Node, frozenset[int]] = {}

    # --- what rules ask ------------------------------------------------------------------------------------------

    def is_weight(self, node: object) -> bool:
        """Whether ``node`` is a parameter, perhaps transposed."""
        return isinstance(node, fx.Node) and isinstance(self.values.get(node), Reference)

    def axes(self, node: fx.Node) -> list[Tensor]:
        """The labels along each axis of a parameter."""
        reference: Reference = self.values[node]
        axes = self.axes_of(reference.parameter)
        return [axes[d] for d in reference.order]

    def labels(self, node: fx.Node) -> Any:
        """The labels of a node's value; of a parameter, those of its elements."""
        value = self.values.get(node)
        if not isinstance(value, Reference):
            return value
        parameter = value.parameter
        if len(parameter.shape) == 1:
            return self.axes(node)[0]
        if parameter.elements is None:
            count = parameter.shape.numel()
            parameter.elements = self.classes.new(count).reshape(parameter.shape)
        return parameter.elements.permute(value.order)

    def roots(self, node: fx.Node) -> Tensor:
        """The roots of a node's labels."""
        return self.classes.roots(self.labels(node))

    def operand(self, node: fx.Node) -> Tensor:
        """A node's labels, with length 1 along axes where all its numbers are equal anyway."""
        labels: Tensor = self.labels(node)
        for axis in self.uniform.get(node, ()):
            if self.classes.is_frozen(labels):
                labels = labels.narrow(axis, 0, 1)
        return labels

    def compressed(self, node: fx.Node) -> Tensor:
        """A node's labels with stride 0 along every axis where they do not vary."""
        return compress(self.labels(node), self.roots(node))

    def collapse(self, node: fx.Node, axis: int) -> Tensor:
        """Merge labels that share an index along ``axis``; the labels along that axis."""
        labels = self.labels(node)
        return self.collapse_labels(labels, axis % labels.dim())

    def unite(self, node: fx.Node, a: Tensor, b: Tensor) -> None:
        """Merge the classes of two label tensors that broadcast."""
        self.classes.unite(a, b)

    def read(self, node: fx.Node, weight: fx.Node, inputs: Tensor, channels: Tensor) -> None:
        """A layer reads ``channels`` with the axis of ``weight`` whose labels are ``inputs``."""
        reference: Reference = self.values[weight]
        for axis, labels in enumerate(reference.parameter.axes):
            if labels is inputs:
                reference.parameter.read_axis.add(axis)
        self.classes.unite(inputs, channels)

    def flatten(self, node: fx.Node, labels: Tensor, axes: Sequence[int], reason: str) -> None:
        """Merge labels along ``axes``, which are mixed here; freeze them if they vary along no other axis."""
        inside = {d % labels.dim() for d in axes}
        for d in inside:
            if self.merge(node, labels, d, reason):
                roots = self.classes.roots(labels)
                if not any(varies(roots, e) for e in range(labels.dim()) if e not in inside):
                    self.freeze(node, labels, reason)

    def merge(self, node: fx.Node, labels: Tensor, axis: int, reason: str) -> bool:
        """Merge labels that vary along ``axis``, and remember why; whether they did."""
        if not varies(self.classes.roots(labels), axis):
            return False
        self.classes.unite(labels, labels.narrow(axis, 0, 1))
        self.mixed.append((labels, _reason(node, reason)))
        return True

    def freeze(self, node: fx.Node, labels: Tensor, reason: str) -> None:
        """Make sure that nothing in ``labels`` is ever removed."""
        self.classes.freeze(labels, _reason(node, reason))

    def freeze_indices(self, node: fx.Node, *indices: fx.Node) -> None:
        """Activations that decide where ``node`` looks cannot be removed."""
        for source in indices:
            self.freeze_value(node, source, "used as an index")

    def freeze_all(self, node: fx.Node, reason: str) -> Tensor:
        """Freeze everything that goes into ``node``; the labels of a frozen result."""
        for value in node.all_input_nodes:
            self.freeze_value(node, value, reason)
        frozen: Tensor = self.frozen_like(node)
        return frozen

    def why(self, labels: Tensor) -> str:
        """Why what ``labels`` describe cannot be removed piece by piece."""
        reason = self.classes.reason_of(labels)
        if not reason:
            roots = set(self.classes.roots(labels).reshape(-1).tolist())
            for merged, mixed in self.mixed:
                if not roots.isdisjoint(squeeze_constant(self.classes.roots(merged)).reshape(-1).tolist()):
                    return mixed
        return reason or "a single channel or head"

    def permute_weight(self, node: fx.Node, source: fx.Node) -> Reference:
        """A parameter with its axes in another order."""
        reference: Reference = self.values[source]
        sizes = torch.empty(tuple(range(1, len(reference.order) + 1)), device="cpu")
        order = tuple(n - 1 for n in node.target(sizes, *node.args[1:]).shape)  # type: ignore[operator]
        return Reference(reference.parameter, tuple(reference.order[d] for d in order))

    def combine(self, node: fx.Node, tensors: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Labels of an elementwise result.

        Operands whose channels line up are merged. An operand that is broadcast across another's channels keeps
        nothing removable of its own; a frozen operand that is not broadcast there freezes them.
        """
        rank = len(shape)
        operands = [t.reshape((1,) * (rank - t.dim()) + tuple(t.shape)) for t in tensors]
        self._flatten_met(node, operands)
        if self.freeze_broadcast(node, operands, range(rank)):
            self._flatten_met(node, operands)
        carriers = [t for t in operands if not self.classes.is_frozen(t)]
        if not carriers:
            return self._frozen(operands, shape)
        for t in carriers[1:]:
            self.classes.unite(carriers[0], t)
        return compress(carriers[0], self.classes.roots(carriers[0])).expand(shape)

    def freeze_broadcast(self, node: fx.Node, operands: Sequence[Tensor], axes: Iterable[int]) -> bool:
        """Freeze each operand that has length 1 along one of ``axes`` along which another's labels vary; if any."""
        found = False
        moving = [{d for d in axes if varies(self.classes.roots(t), d)} for t in operands]
        for i, t in enumerate(operands):
            if any(t.shape[d] == 1 for d in set().union(*moving)) and not self.classes.is_frozen(t):
                self.freeze(node, t, "broadcast across channels")
                moving[i], found = set(), True
        return found

    # --- what the walk asks, too ---------------------------------------------------------------------------------

    def axes_of(self, parameter: Parameter) -> list[Tensor]:
        """The labels along each axis of ``parameter``, made at the first call."""
        if not parameter.axes:
            parameter.axes = [self.classes.new(n) for n in parameter.shape]
        return parameter.axes

    def collapse_labels(self, labels: Tensor, axis: int) -> Tensor:
        """Merge those of ``labels`` that share an index along ``axis``; the labels along that axis."""
        labels = squeeze_other(labels, axis)
        rows = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
        if rows.shape[1] > 1:
            self.classes.unite(rows[:, :1], rows)
        return rows[:, 0].contiguous()

    def freeze_value(self, node: fx.Node, source: fx.Node, reason: str) -> None:
        """Freeze whatever labels the value of ``source`` has, on behalf of ``node``."""
        value = self.values.get(source)
        if isinstance(value, Reference):
            elements = value.parameter.elements
            found = [*value.parameter.axes, *([] if elements is None else [elements])]
            for labels in found or [self.labels(source)]:
                self.freeze(node, labels, reason)
            return
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, Tensor):
                self.freeze(node, part, reason)

    def frozen_like(self, node: fx.Node) -> Any:
        """Frozen labels for a node's value, with the reason of what goes into it."""
        value = node.meta.get("val")
        if isinstance(value, Tensor) and has_shape(node):
            inputs = [t for t in map(self.values.get, node.all_input_nodes) if isinstance(t, Tensor)]
            return self._frozen(inputs, value.shape)
        return constants(value)

    def _frozen(self, inputs: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Frozen labels of ``shape``, with the first reason found in ``inputs``."""
        return constant(shape, next(filter(None, map(self.classes.first_frozen, inputs)), 0))

    def _flatten_met(self, node: fx.Node, operands: Sequence[Tensor]) -> None:
        """Along axes where an operand is frozen but not broadcast, the others cannot be cut either."""
        plain = [t for t in operands if self.classes.is_frozen(t)]
        met = {d for t in plain for d in range(t.dim()) if t.shape[d] > 1}
        reason = next(filter(None, map(self.classes.reason_of, plain)), "combined with a tensor that has no channels")
        for t in operands if met else ():
            self.flatten(node, t, [d for d in met if t.shape[d] > 1], reason)


def constants(value: object, label: int = 0) -> Any:
    """Labels of what cannot be removed; None for what has none."""
    if isinstance(value, (list, tuple)):
        return [constants(v, label) for v in value]
    return constant(value.shape, label) if isinstance(value, Tensor) and is_static(value) else None


def _reason(node: fx.Node, reason: str) -> str:
    return reason if " at " in reason else f"{reason}{place_of(node)}"
