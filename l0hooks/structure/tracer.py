"""``Tracer``: the labels of an exported graph's values, and how they are merged and frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from l0hooks.structure.fx_nodes import has_shape, is_static, place_of, shape_of
from l0hooks.structure.groups import ChannelGroup
from l0hooks.structure.references import Parameter, Reference
from l0hooks.structure.union_find import Classes, compress, constant, squeeze_constant, squeeze_other, varies


class Tracer:
    """Labels for every value of an exported program.

    Attributes
    ----------
    classes : Classes
    parameters : list of Parameter
        With ``classes`` the result of tracing.
    values : dict
        The labels of each node's value; None for what has no labels, such as numbers and shapes known only at run time.
    reshaped : list
        Labels after each reshape.
    heads : list of Tensor
        Labels that vary along the head axis of attention.
    mixed : list
        Labels that were merged, and why.
    uniform : dict
        Of tensors that the graph itself fills: the axes, counted from the right, along which their numbers are equal.
    derived : set
        Nodes whose labels are those of elements of parameters alone, moved or transformed.
    made, written : list
        Tensors that the graph makes empty or filled, to write into them later, and what was written into.
    training_only : frozenset of str
        Parameters and buffers that are used in training only; empty unless that was traced, too.
    own_rules : mapping from fx.Node to function
        Rules for single nodes, in place of those of their operators.
    widths : dict from int to ChannelGroup
        The residual streams among the groups, by the number of the group.
    """

    def __init__(self) -> None:
        self.classes = Classes()
        self.values: dict[fx.Node, Any] = {}
        self.parameters: list[Parameter] = []
        self.reshaped: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.mixed: list[tuple[Tensor, str]] = []
        self.uniform: dict[fx.Node, frozenset[int]] = {}
        self.derived: set[fx.Node] = set()
        self.made: list[tuple[fx.Node, Tensor]] = []
        self.written: list[Tensor] = []
        self.training_only: frozenset[str] = frozenset()
        self.own_rules: Mapping[fx.Node, Callable[[Tracer, fx.Node], Any]] = {}
        self.widths: dict[int, ChannelGroup] = {}

    # --- for the rules -------------------------------------------------------------------------------------------

    def is_weight(self, node: object) -> bool:
        """Whether ``node`` is a parameter, perhaps transposed."""
        return isinstance(node, fx.Node) and isinstance(self.values.get(node), Reference)

    def is_derived(self, node: fx.Node) -> bool:
        """Whether ``node`` is a parameter of several axes, perhaps moved or transformed element by element."""
        value = self.values.get(node)
        return node in self.derived or (isinstance(value, Reference) and len(value.parameter.shape) > 1)

    def axes(self, node: fx.Node) -> list[Tensor]:
        """The labels along each axis of a parameter."""
        reference: Reference = self.values[node]
        axes = self.axes_of(reference.parameter)
        return [constant((1,)) if d < 0 else axes[d] for d in reference.order]

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
        own = [d for d in value.order if d >= 0]
        gone = [d for d in range(len(parameter.shape)) if d not in own]  # of length 1
        labels = parameter.elements.permute(*own, *gone)
        for _ in gone:
            labels = labels.select(-1, 0)
        for axis, d in enumerate(value.order):
            labels = labels.unsqueeze(axis) if d < 0 else labels
        return labels

    def roots(self, node: fx.Node) -> Tensor:
        """The roots of a node's labels."""
        return self.classes.roots(self.labels(node))

    def operand(self, node: fx.Node) -> Tensor:
        """A node's labels, with length 1 along axes where all its numbers are equal."""
        labels: Tensor = self.labels(node)
        for axis in self.uniform.get(node, ()):
            if self.classes.is_frozen(labels):
                labels = labels.narrow(axis, 0, 1)
        return labels

    def compressed(self, node: fx.Node) -> Tensor:
        """A node's labels with stride 0 along every axis where they do not vary."""
        return compress(self.labels(node), self.roots(node))

    def collapse(self, node: fx.Node, axis: int) -> Tensor:
        """Merge labels that share an index along ``axis``; returns the labels along that axis."""
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
        """Merge labels that vary along ``axis``, and remember the reason. Returns whether they varied."""
        if not varies(self.classes.roots(labels), axis):
            return False
        self.classes.unite(labels, labels.narrow(axis, 0, 1))
        self.mixed.append((labels, _reason(node, reason)))
        return True

    def freeze(self, node: fx.Node, labels: Tensor, reason: str) -> None:
        """Mark everything in ``labels`` as never removed."""
        self.classes.freeze(labels, _reason(node, reason))

    def freeze_indices(self, node: fx.Node, *indices: fx.Node) -> None:
        """Freeze the activations that ``node`` uses as indices."""
        for source in indices:
            self.freeze_value(node, source, "used as an index")

    def freeze_all(self, node: fx.Node, reason: str) -> Tensor:
        """Freeze all inputs of ``node``; returns the labels of a frozen result."""
        for value in node.all_input_nodes:
            self.freeze_value(node, value, reason)
        frozen: Tensor = self.frozen_like(node)
        return frozen

    def why(self, labels: Tensor) -> str:
        """Why single members of ``labels`` cannot be removed."""
        reason = self.classes.reason_of(labels)
        if not reason:
            roots = set(self.classes.roots(labels).reshape(-1).tolist())
            for merged, mixed in self.mixed:
                if not roots.isdisjoint(squeeze_constant(self.classes.roots(merged)).reshape(-1).tolist()):
                    return mixed
        return reason or "a single channel or head"

    def fresh(self, node: fx.Node) -> Tensor:
        """Labels of a tensor that the graph makes and then writes into, one for each element."""
        labels = self.classes.new(shape_of(node).numel()).reshape(shape_of(node))
        self.made.append((node, labels))
        return labels

    def freeze_unwritten(self) -> None:
        """Freeze the elements of such tensors that nothing was written into."""
        none = torch.zeros(1, dtype=torch.int64, device="cpu")
        written = torch.cat([none, *(labels.reshape(-1) for labels in self.written)])
        for node, labels in self.made:
            self.freeze(node, labels[~torch.isin(labels, written)], "filled by the model's own code")

    def combine(self, node: fx.Node, tensors: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Labels of an elementwise result.

        Channels that line up are merged. An operand that is broadcast across the channels of another is frozen. A
        frozen operand that is not broadcast freezes the channels of the others.
        """
        rank = len(shape)
        operands = [t.reshape((1,) * (rank - t.dim()) + tuple(t.shape)) for t in tensors]
        self._flatten_at_frozen(node, operands)
        if self.freeze_broadcast(node, operands, range(rank)):
            self._flatten_at_frozen(node, operands)
        carriers = [t for t in operands if not self.classes.is_frozen(t)]
        if not carriers:
            return self._frozen(operands, shape)
        for t in carriers[1:]:
            self.classes.unite(carriers[0], t)
        return compress(carriers[0], self.classes.roots(carriers[0])).expand(shape)

    def freeze_broadcast(self, node: fx.Node, operands: Sequence[Tensor], axes: Iterable[int]) -> bool:
        """Freeze operands of length 1 along an axis where another's labels vary. Returns whether there were any."""
        found = False
        moving = [{d for d in axes if varies(self.classes.roots(t), d)} for t in operands]
        for i in sorted(range(len(operands)), key=lambda i: self.classes.count(operands[i])):  # the most channels stay
            t = operands[i]
            if any(t.shape[d] == 1 for d in set().union(*moving)) and not self.classes.is_frozen(t):
                self.freeze(node, t, "broadcast across channels")
                moving[i], found = set(), True
        return found

    # --- for the trace of the graph ------------------------------------------------------------------------------

    def axes_of(self, parameter: Parameter) -> list[Tensor]:
        """The labels along each axis of ``parameter``, made at the first call."""
        if not parameter.axes:
            parameter.axes = [self.classes.new(n) for n in parameter.shape]
        return parameter.axes

    def collapse_labels(self, labels: Tensor, axis: int) -> Tensor:
        """Merge those of ``labels`` that share an index along ``axis``; returns the labels along that axis."""
        labels = squeeze_other(labels, axis)
        if labels.numel() == 0:
            return constant((labels.shape[axis],))
        rows = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
        if rows.shape[1] > 1:
            self.classes.unite(rows[:, :1], rows)
        return rows[:, 0].contiguous()

    def freeze_value(self, node: fx.Node, source: fx.Node, reason: str) -> None:
        """Freeze all labels of the value of ``source``; ``node`` is named in the reason."""
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
        """Frozen labels for a node's value, with the reason of its inputs."""
        value = node.meta.get("val")
        if isinstance(value, Tensor) and has_shape(node):
            inputs = [t for t in map(self.values.get, node.all_input_nodes) if isinstance(t, Tensor)]
            return self._frozen(inputs, value.shape)
        return constants(value)

    def _frozen(self, inputs: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Frozen labels of ``shape``, with the first reason found in ``inputs``."""
        return constant(shape, next(filter(None, map(self.classes.first_frozen, inputs)), 0))

    def _flatten_at_frozen(self, node: fx.Node, operands: Sequence[Tensor]) -> None:
        """Along axes where an operand is frozen but not broadcast, the others cannot be cut either."""
        frozen = [t for t in operands if self.classes.is_frozen(t)]
        met = {d for t in frozen for d in range(t.dim()) if t.shape[d] > 1}
        reason = next(filter(None, map(self.classes.reason_of, frozen)), "combined with a tensor that has no channels")
        for t in operands if met else ():
            self.flatten(node, t, [d for d in met if t.shape[d] > 1], reason)


def constants(value: object, label: int = 0) -> Any:
    """Frozen labels for a tensor or a sequence of tensors; None for other values."""
    if isinstance(value, (list, tuple)):
        return [constants(v, label) for v in value]
    return constant(value.shape, label) if isinstance(value, Tensor) and is_static(value) else None


def _reason(node: fx.Node, reason: str) -> str:
    return reason if " at " in reason else f"{reason}{place_of(node)}"
