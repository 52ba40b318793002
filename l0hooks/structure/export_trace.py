"""Trace an exported graph to find which channels of which parameters must be removed together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from l0hooks._torch.graphs import export
from l0hooks._torch.running import OUT_OF_MEMORY, evaluating
from l0hooks._torch.tensors import beside, is_placed, memory_of, same_tensor
from l0hooks.structure import rules_channels, rules_einsum, rules_indices  # noqa: F401  they fill the table
from l0hooks.structure.example_inputs import ExampleInputs, positional
from l0hooks.structure.export_errors import export_failure
from l0hooks.structure.fx_nodes import first_of, has_shape, is_mutable, name_of, region_of, shape_of
from l0hooks.structure.references import Parameter, Reference
from l0hooks.structure.rules_elementwise import FILLED, MOVEMENT, POINTWISE
from l0hooks.structure.table import RULES
from l0hooks.structure.tracer import Tracer, constants
from l0hooks.structure.training_trace import training_program, used_in_training_only
from l0hooks.structure.union_find import squeeze_constant, varies

FRESH = FILLED | {"empty", "new_empty"}
_MOST_ELEMENTS = 2**21  # of a tensor that is filled piece by piece; a larger one is frozen


def export_and_trace(
    model: nn.Module, example_inputs: ExampleInputs, *, training: bool = False
) -> tuple[torch.export.ExportedProgram, Tracer]:
    """Export ``model`` in evaluation mode and trace the channels of its graph.

    Parameters
    ----------
    model : nn.Module
    example_inputs : sequence
        Positional arguments of ``model``.
    training : bool
        Trace the layers that are used in training only, too. What can be removed is then what both graphs permit.

    Raises
    ------
    SpecError
        If ``example_inputs`` are no arguments of the model.
    UnsupportedModuleError
        If ``torch.export`` cannot take the model; the message says where it stopped.
    """
    example_inputs = positional(model, example_inputs)
    with exporting(model):
        try:
            program = export(model, beside(model, example_inputs))
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            raise export_failure(model, example_inputs, error) from error
        tracer = trace(program)
    unused = frozenset(name for p in tracer.parameters if not p.is_used for name in p.names)
    if training and unused and used_in_training_only(model, example_inputs, unused):
        other = training_program(model, example_inputs)
        tracer = tracer if other is None else trace(program, other)
        tracer.training_only = unused
    return program, tracer


@contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """The state in which ``model`` is exported: evaluation, and nothing kept from before.

    Everything is restored afterwards.
    """
    with evaluating(model, afresh=True), warnings.catch_warnings():
        # torch warns of attributes that the trace sets: they are put back
        warnings.filterwarnings("ignore", "The tensor attributes? .*during export", UserWarning)
        yield


def trace(*programs: torch.export.ExportedProgram) -> Tracer:
    """A tracer with labels for every value of exported programs of one model; its classes are final."""
    t = Tracer()
    _place_inputs(t, programs)
    for node in (node for program in programs for node in program.graph.nodes):
        if node.op == "call_function":
            t.values[node] = _call(t, node)
        elif node.op == "output":
            for value in node.all_input_nodes:
                t.freeze_value(node, value, "an output of the model")
    _settle(t)
    return t


def _place_inputs(t: Tracer, programs: Sequence[torch.export.ExportedProgram]) -> None:
    tied: dict[tuple[Any, ...], Parameter] = {}
    by_name: dict[str, Parameter] = {}
    memory: list[tuple[int, int, Parameter]] = []
    input_atom = t.classes.new(1)
    t.classes.freeze(input_atom, "an input of the model")
    for program in programs:
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            name = str(names.get(node.name))
            tensor = program.state_dict.get(name, program.constants.get(name))
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() == 0:
                t.values[node] = constants(node.meta.get("val"), int(input_atom))
                continue
            key = same_tensor(tensor)
            if name not in by_name:
                if key not in tied:
                    tied[key] = Parameter([], tensor.shape, node.name in signature.inputs_to_buffers)
                    t.parameters.append(tied[key])
                    if is_placed(tensor):
                        memory.append((*memory_of(tensor), tied[key]))
                by_name[name] = tied[key]
                tied[key].names.append(name)
            t.values[node] = Reference(by_name[name], tuple(range(tensor.dim())))
    _freeze_overlapping(t, memory)


def _freeze_overlapping(t: Tracer, memory: list[tuple[int, int, Parameter]]) -> None:
    """Freeze parameters that share memory in different shapes: one is the transpose or a part of the other."""
    memory.sort(key=lambda part: part[:2])
    end, last = 0, memory[0][2] if memory else None
    for first, after, parameter in memory:
        if first < end and last is not None:
            for p, other in ((last, parameter), (parameter, last)):
                for labels in t.axes_of(p):
                    t.classes.freeze(labels, f"shares memory with {other.names[0]} in another shape")
        if after > end:
            end, last = after, parameter


def _run(t: Tracer, region: fx.GraphModule, given: Sequence[Any]) -> Any:
    """The labels that a region of the graph returns; they pass through it as through the graph itself."""
    places = [node for node in region.graph.nodes if node.op == "placeholder"]
    for place, value in zip(places, given, strict=True):
        if isinstance(value, fx.Node):
            t.values[place] = t.values.get(value)
            t.uniform[place] = t.uniform.get(value, frozenset())
            if value in t.derived:
                t.derived.add(place)
    found: Any = None
    for node in region.graph.nodes:
        if node.op == "call_function":
            t.values[node] = _call(t, node)
        elif node.op == "output":
            found = node.args[0]
    return list(map(t.values.get, found)) if isinstance(found, (list, tuple)) else t.values.get(found)


def _call(t: Tracer, node: fx.Node) -> Any:
    region = region_of(node)
    if region is not None:
        return _run(t, *region)
    name, mutable = name_of(node), is_mutable(node)
    if node.meta.get("val") is None and not mutable:
        return None  # an assertion
    _note_uniform(t, node, name, mutable)
    if name in FRESH and has_shape(node) and 0 < shape_of(node).numel() <= _MOST_ELEMENTS and _is_written(node):
        return t.fresh(node)
    if not _any_labels(t, node):
        return t.frozen_like(node)
    if name not in RULES:
        return t.freeze_all(node, f"operator {name} has no rule")
    if not all(map(has_shape, (node, *node.all_input_nodes))):
        return t.freeze_all(node, f"operator {name} has a shape that depends on the data")
    found = RULES[name](t, node)
    if mutable:
        target = t.labels(first_of(node))
        t.classes.unite(target, found)  # tensors that share its memory change, too
        if t.made and found is not target:
            t.written.append(squeeze_constant(target))
    return found


def _is_written(node: fx.Node) -> bool:
    """Whether a later operator writes into a tensor, or into a view of it."""
    for user in node.users:
        first = user.op == "call_function" and user.all_input_nodes[0] is node
        if first and (is_mutable(user) or (name_of(user) in MOVEMENT and _is_written(user))):
            return True
    return False


def _note_uniform(t: Tracer, node: fx.Node, name: str, mutable: bool) -> None:
    """Remember tensors filled with one number, and elementwise results of them."""
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
    """Whether an input of ``node`` is a parameter or has channels that can be removed."""
    for source in node.all_input_nodes:
        value = t.values.get(source)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(p, Reference) or (isinstance(p, Tensor) and not t.classes.is_frozen(p)) for p in parts):
            return True
    return False


def _settle(t: Tracer) -> None:
    """Merge classes until, at every reshape, each class consists of whole slabs along one axis."""
    for parameter in t.parameters:
        if parameter.elements is not None and parameter.axes:
            for labels in (*parameter.axes, parameter.elements):
                t.classes.freeze(labels, f"{parameter.names[0]} is used both as a weight and as an activation")
    t.freeze_unwritten()
    tensors = [*t.reshaped, *(p.elements for p in t.parameters if p.elements is not None)]
    while sum(_make_slabs(t, labels) for labels in tensors):
        pass


def _make_slabs(t: Tracer, labels: Tensor) -> bool:
    """Merge classes until each consists of whole slabs along one axis. Returns whether any were merged."""
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
