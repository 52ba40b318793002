"""Walk an exported graph and find which channels of which parameters live and die together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from l0hooks._torch.running import OUT_OF_MEMORY, evaluating
from l0hooks._torch.tensors import beside, is_placed, memory_of, same_tensor
from l0hooks.structure.export_errors import export_failure
from l0hooks.structure.fx_nodes import first_of, has_shape, is_mutable, name_of, shape_of
from l0hooks.structure.rules_channels import RULES
from l0hooks.structure.rules_elementwise import FILLED, POINTWISE
from l0hooks.structure.tracer import Parameter, Reference, Tracer, constants
from l0hooks.structure.union_find import squeeze_constant, varies


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
        return program, trace(program)


def trace(program: torch.export.ExportedProgram) -> Tracer:
    """Labels for every value of an exported program, its classes settled."""
    t = Tracer()
    _place_inputs(t, program)
    for node in program.graph.nodes:
        if node.op == "call_function":
            t.values[node] = _call(t, node)
        elif node.op == "output":
            for value in node.all_input_nodes:
                t.freeze_value(node, value, "an output of the model")
    _settle(t)
    return t


def _place_inputs(t: Tracer, program: torch.export.ExportedProgram) -> None:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    buffers = set(signature.inputs_to_buffers)
    tied: dict[tuple[Any, ...], Parameter] = {}
    memory: list[tuple[int, int, Parameter]] = []
    outside = t.classes.new(1)
    t.classes.freeze(outside, "an input of the model")
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
                t.parameters.append(tied[key])
                if is_placed(tensor):
                    memory.append((*memory_of(tensor), tied[key]))
            tied[key].names.append(str(name))
            t.values[node] = Reference(tied[key], tuple(range(tensor.dim())))
        else:
            t.values[node] = constants(value, int(outside))
    _freeze_overlapping(t, memory)


def _freeze_overlapping(t: Tracer, memory: list[tuple[int, int, Parameter]]) -> None:
    """Parameters that share memory but not their shape cannot be cut: one is the other's transpose, or a part."""
    memory.sort(key=lambda part: part[:2])
    end, last = 0, memory[0][2] if memory else None
    for first, after, parameter in memory:
        if first < end and last is not None:
            for p, other in ((last, parameter), (parameter, last)):
                for labels in t.axes_of(p):
                    t.classes.freeze(labels, f"shares memory with {other.names[0]} in another shape")
        if after > end:
            end, last = after, parameter


def _call(t: Tracer, node: fx.Node) -> Any:
    name, mutable = name_of(node), is_mutable(node)
    if node.meta.get("val") is None and not mutable:
        return None  # an assertion
    _note_uniform(t, node, name, mutable)
    if not _any_labels(t, node):
        return t.frozen_like(node)
    if name not in RULES:
        return t.freeze_all(node, f"operator {name} has no rule")
    if not all(map(has_shape, (node, *node.all_input_nodes))):
        return t.freeze_all(node, f"operator {name} has a shape that depends on the data")
    found = RULES[name](t, node)
    if mutable:
        t.classes.unite(t.labels(first_of(node)), found)  # whatever shares its memory changes with it
    return found


def _note_uniform(t: Tracer, node: fx.Node, name: str, mutable: bool) -> None:
    """Fresh tensors of one number, and what elementwise operators make of them."""
    if mutable:
        t.uniform.clear()
    elif name in FILLED and has_shape(node):
        t.uniform[node] = frozenset(range(-len(shape_of(node)), 0))
    elif name in POINTWISE and all(map(has_shape, (node, *node.all_input_nodes))):
        axes = frozenset(range(-len(shape_of(node)), 0))
        for source in node.all_input_nodes:
            shape = shape_of(source)
            axes &= t.uniform.get(source, frozenset()) | {d for d in axes if -d > len(shape) or shape[d] == 1}
        t.uniform[node] = axes


def _any_labels(t: Tracer, node: fx.Node) -> bool:
    """Whether a parameter or something removable goes into ``node``."""
    for source in node.all_input_nodes:
        value = t.values.get(source)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(p, Reference) or (isinstance(p, Tensor) and not t.classes.is_frozen(p)) for p in parts):
            return True
    return False


def _settle(t: Tracer) -> None:
    """At every reshape a class must be whole slabs along one axis; merge until that holds everywhere."""
    for parameter in t.parameters:
        if parameter.elements is not None and parameter.axes:
            for labels in (*parameter.axes, parameter.elements):
                t.classes.freeze(labels, f"{parameter.names[0]} is used both as a weight and as an activation")
    tensors = [*t.reshaped, *(p.elements for p in t.parameters if p.elements is not None)]
    while sum(_make_slabs(t, labels) for labels in tensors):
        pass


def _make_slabs(t: Tracer, labels: Tensor) -> bool:
    """Merge classes until each is whole slabs along one axis; whether there was anything to merge."""
    roots = squeeze_constant(t.classes.roots(labels))
    axes = [d for d in range(roots.dim()) if varies(roots, d)]
    if len(axes) < 2:
        return False
    counts = []
    for axis in axes:
        state = t.classes.save()
        t.collapse_labels(labels, axis)
        counts.append(t.classes.count(labels))
        t.classes.restore(state)
    t.collapse_labels(labels, axes[counts.index(max(counts))])
    return True
