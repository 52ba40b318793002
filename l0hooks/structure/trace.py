"""Walk an exported graph and find which channels of which parameters live and die together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from l0hooks.placement import beside, same_tensor
from l0hooks.structure.failure import export_failure
from l0hooks.structure.labels import Classes, compress, constant, squeeze_constant, squeeze_other, varies
from l0hooks.structure.rules import FILLED, POINTWISE, RULES, first_of, name_of, shape_of
from l0hooks.structure.ties import memory_of
from l0hooks.tracing import OUT_OF_MEMORY, evaluating


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

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.classes = Classes()
        self.values: dict[fx.Node, Any] = {}
        self.parameters: list[Parameter] = []
        self.reshaped: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.mixed: list[tuple[Tensor, str]] = []
        self.uniform: dict[fx.Node, frozenset[int]] = {}
        self._place_inputs(program)
        for node in program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self._freeze_value(node, value, "an output of the model")
        self._settle()

    # --- what rules ask ------------------------------------------------------------------------------------------

    def is_weight(self, node: object) -> bool:
        """Whether ``node`` is a parameter, perhaps transposed."""
        return isinstance(node, fx.Node) and isinstance(self.values.get(node), Reference)

    def axes(self, node: fx.Node) -> list[Tensor]:
        """The labels along each axis of a parameter."""
        reference: Reference = self.values[node]
        axes = self._axes_of(reference.parameter)
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
        return self._collapse(labels, axis % labels.dim())

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
            self._freeze_value(node, source, "used as an index")

    def freeze_all(self, node: fx.Node, reason: str) -> Tensor:
        """Freeze everything that goes into ``node``; the labels of a frozen result."""
        for value in node.all_input_nodes:
            self._freeze_value(node, value, reason)
        frozen: Tensor = self._frozen_like(node)
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

    # --- inside --------------------------------------------------------------------------------------------------

    def _place_inputs(self, program: torch.export.ExportedProgram) -> None:
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        buffers = set(signature.inputs_to_buffers)
        tied: dict[tuple[Any, ...], Parameter] = {}
        memory: list[tuple[int, int, Parameter]] = []
        outside = self.classes.new(1)
        self.classes.freeze(outside, "an input of the model")
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta.get("val")
            name = names.get(node.name)
            tensor = None if name is None else program.state_dict.get(name, program.constants.get(name))
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() > 0:
                key = same_tensor(tensor)
                if key not in tied:
                    tied[key] = Parameter([], tensor.shape, node.name in buffers)
                    self.parameters.append(tied[key])
                    if tensor.numel() > 0 and not tensor.is_meta:
                        memory.append((*memory_of(tensor), tied[key]))
                tied[key].names.append(str(name))
                self.values[node] = Reference(tied[key], tuple(range(tensor.dim())))
            else:
                self.values[node] = _constants(value, int(outside))
        self._freeze_overlapping(memory)

    def _freeze_overlapping(self, memory: list[tuple[int, int, Parameter]]) -> None:
        """Parameters that share memory but not their shape cannot be cut: one is the other's transpose, or a part."""
        memory.sort(key=lambda part: part[:2])
        end, last = 0, memory[0][2] if memory else None
        for first, after, parameter in memory:
            if first < end and last is not None:
                for p, other in ((last, parameter), (parameter, last)):
                    for labels in self._axes_of(p):
                        self.classes.freeze(labels, f"shares memory with {other.names[0]} in another shape")
            if after > end:
                end, last = after, parameter

    def _call(self, node: fx.Node) -> Any:
        name, mutable = name_of(node), _is_mutable(node)
        if node.meta.get("val") is None and not mutable:
            return None  # an assertion
        self._note_uniform(node, name, mutable)
        if not self._any_labels(node):
            return self._frozen_like(node)
        if name not in RULES:
            return self.freeze_all(node, f"operator {name} has no rule")
        if not all(map(_has_shape, (node, *node.all_input_nodes))):
            return self.freeze_all(node, f"operator {name} has a shape that depends on the data")
        found = RULES[name](self, node)
        if mutable:
            self.classes.unite(self.labels(first_of(node)), found)  # whatever shares its memory changes with it
        return found

    def _note_uniform(self, node: fx.Node, name: str, mutable: bool) -> None:
        """Fresh tensors of one number, and what elementwise operators make of them."""
        if mutable:
            self.uniform.clear()
        elif name in FILLED and _has_shape(node):
            self.uniform[node] = frozenset(range(-len(shape_of(node)), 0))
        elif name in POINTWISE and all(map(_has_shape, (node, *node.all_input_nodes))):
            axes = frozenset(range(-len(shape_of(node)), 0))
            for source in node.all_input_nodes:
                shape = shape_of(source)
                axes &= self.uniform.get(source, frozenset()) | {d for d in axes if -d > len(shape) or shape[d] == 1}
            self.uniform[node] = axes

    def _frozen_like(self, node: fx.Node) -> Any:
        """Frozen labels for a node's value, with the reason of what goes into it."""
        value = node.meta.get("val")
        if isinstance(value, Tensor) and _has_shape(node):
            inputs = [t for t in map(self.values.get, node.all_input_nodes) if isinstance(t, Tensor)]
            return self._frozen(inputs, value.shape)
        return _constants(value)

    def _frozen(self, inputs: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Frozen labels of ``shape``, with the first reason found in ``inputs``."""
        return constant(shape, next(filter(None, map(self.classes.first_frozen, inputs)), 0))

    def _any_labels(self, node: fx.Node) -> bool:
        """Whether a parameter or something removable goes into ``node``."""
        for source in node.all_input_nodes:
            value = self.values.get(source)
            parts = value if isinstance(value, (list, tuple)) else [value]
            if any(
                isinstance(p, Reference) or (isinstance(p, Tensor) and not self.classes.is_frozen(p)) for p in parts
            ):
                return True
        return False

    def _flatten_met(self, node: fx.Node, operands: Sequence[Tensor]) -> None:
        """Along axes where an operand is frozen but not broadcast, the others cannot be cut either."""
        plain = [t for t in operands if self.classes.is_frozen(t)]
        met = {d for t in plain for d in range(t.dim()) if t.shape[d] > 1}
        reason = next(filter(None, map(self.classes.reason_of, plain)), "combined with a tensor that has no channels")
        for t in operands if met else ():
            self.flatten(node, t, [d for d in met if t.shape[d] > 1], reason)

    def _freeze_value(self, node: fx.Node, source: fx.Node, reason: str) -> None:
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

    def _axes_of(self, parameter: Parameter) -> list[Tensor]:
        if not parameter.axes:
            parameter.axes = [self.classes.new(n) for n in parameter.shape]
        return parameter.axes

    def _collapse(self, labels: Tensor, axis: int) -> Tensor:
        labels = squeeze_other(labels, axis)
        rows = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
        if rows.shape[1] > 1:
            self.classes.unite(rows[:, :1], rows)
        return rows[:, 0].contiguous()

    def _settle(self) -> None:
        """At every reshape a class must be whole slabs along one axis; merge until that holds everywhere."""
        for parameter in self.parameters:
            if parameter.elements is not None and parameter.axes:
                for labels in (*parameter.axes, parameter.elements):
                    self.classes.freeze(labels, f"{parameter.names[0]} is used both as a weight and as an activation")
        tensors = [*self.reshaped, *(p.elements for p in self.parameters if p.elements is not None)]
        while sum(self._make_slabs(labels) for labels in tensors):
            pass

    def _make_slabs(self, labels: Tensor) -> bool:
        """Merge classes until each is whole slabs along one axis; whether there was anything to merge."""
        roots = squeeze_constant(self.classes.roots(labels))
        axes = [d for d in range(roots.dim()) if varies(roots, d)]
        if len(axes) < 2:
            return False
        counts = []
        for axis in axes:
            state = self.classes.save()
            self._collapse(labels, axis)
            counts.append(self.classes.count(labels))
            self.classes.restore(state)
        self._collapse(labels, axes[counts.index(max(counts))])
        return True


def export_and_trace(model: nn.Module, example_inputs: Sequence[Any]) -> tuple[torch.export.ExportedProgram, Tracer]:
    """Export ``model`` in evaluation mode and trace the channels of its graph.

    Raises
    ------
    UnsupportedModuleError
        If ``torch.export`` cannot take the model; the message says where it stopped.
    """
    with evaluating(model):
        try:
            program = torch.export.export(model, beside(model, example_inputs), strict=False)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            raise export_failure(model, example_inputs, error) from error
        return program, Tracer(program)


def _constants(value: object, label: int = 0) -> Any:
    """Labels of what cannot be removed; None for what has none."""
    if isinstance(value, (list, tuple)):
        return [_constants(v, label) for v in value]
    return constant(value.shape, label) if isinstance(value, Tensor) and _is_static(value) else None


def _is_static(value: object) -> bool:
    """Whether ``value`` is a tensor, or tensors, whose shape does not depend on data."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_static, value))
    return isinstance(value, Tensor) and all(isinstance(n, int) for n in value.shape)


def _has_shape(node: fx.Node) -> bool:
    return _is_static(node.meta.get("val"))


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _reason(node: fx.Node, reason: str) -> str:
    return reason if " at " in reason else f"{reason}{_place(node)}"


def _place(node: fx.Node) -> str:
    """`` at module``: the innermost module that ran the operator."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values() if path]
    return f" at {names[-1]}" if names else ""
