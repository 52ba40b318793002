"""Which numbers inside a model depend on its inputs, shown by its exported graph.

The graph runs once on the examples. Beside each tensor goes a mask of the same shape: whether a number could be another
for other inputs, whatever they are. A number whose mask is false is a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from l0hooks._torch.graphs import is_random, schema_of
from l0hooks._torch.trees import tree_leaves, tree_map
from l0hooks.structure.dependence_rules import DEPENDENCE, DROPOUT, PURE, Known
from l0hooks.structure.fx_nodes import first_of, is_mutable, name_of


def follow(
    program: torch.export.ExportedProgram, example_inputs: Sequence[Any]
) -> Iterator[tuple[fx.Node, Mapping[fx.Node, Known]]]:
    """Run a program on the examples; every operator comes with what is known of its inputs before it runs.

    Parameters
    ----------
    program : torch.export.ExportedProgram
    example_inputs : sequence
        Positional arguments, as the program was exported for.
    """
    known: dict[fx.Node, Known] = {}
    _place(known, program, example_inputs)
    last_use = {source: node for node in program.graph.nodes for source in node.all_input_nodes}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        yield node, known
        known[node] = _call(node, known)
        for source in {source for source in node.all_input_nodes if last_use[source] is node}:
            del known[source]


def _place(known: dict[fx.Node, Known], program: torch.export.ExportedProgram, example_inputs: Sequence[Any]) -> None:
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_lifted_custom_objs,
    }
    given = iter(tree_leaves(tuple(example_inputs)))
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in names:
            name = names[node.name]
            value = program.state_dict.get(name, program.constants.get(name))
        else:
            value = next(given)
        if isinstance(value, Tensor):
            value = value.detach() if node.name in signature.inputs_to_parameters else value.detach().clone()
        known[node] = Known(value, masks(value, node.name not in names), pure=node.name in names)


def masks(value: Any, filled: bool) -> Any:
    """Masks for the tensors of ``value``, all true or all false."""

    def mask(part: Any) -> Any:
        return torch.full(part.shape, filled, device=part.device) if isinstance(part, Tensor) else None

    return tree_map(mask, value)


def _call(node: fx.Node, known: dict[fx.Node, Known]) -> Known:
    """Run one operator, and find which of its results depend on the inputs."""
    sources = node.all_input_nodes
    name = name_of(node)
    before = _depends(node, name, known)
    args: Any = fx.map_arg(node.args, lambda source: known[source].value)
    kwargs: Any = fx.map_arg(node.kwargs, lambda source: known[source].value)
    value: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    depends = masks(value, before) if isinstance(before, bool) else before
    if _shapes(value) != _shapes(depends):
        depends = masks(value, True)
    pure = all(known[source].pure for source in sources)
    if is_mutable(node):
        _write(known, first_of(node), depends)
    return Known(value, depends, pure)


def _depends(node: fx.Node, name: str, known: Mapping[fx.Node, Known]) -> Any:
    """The masks of an operator's result; a bool if they are all true or all false."""
    sources = [known[source] for source in node.all_input_nodes]
    if (is_random(node) and name not in DROPOUT) or (schema_of(node) is None and name != "getitem"):
        return True
    if all(source.pure for source in sources):
        return name not in PURE  # a range of positions, or a part of a table: another length may give another one
    if name in DEPENDENCE:
        return DEPENDENCE[name](node, known)
    return any(bool(mask.any()) for source in sources for mask in tree_leaves(source.depends) if mask is not None)


def _shapes(value: Any) -> list[Any]:
    return [part.shape for part in tree_leaves(value) if isinstance(part, Tensor)]


def _write(known: dict[fx.Node, Known], target: fx.Node, depends: Any) -> None:
    """An operator has written into ``target``; other tensors in the same memory may depend on inputs from now on."""
    written = known[target].value
    for other in known.values():
        for part in tree_leaves(other.value) if other is not known[target] else ():
            if isinstance(part, Tensor) and _memory(part) == _memory(written):
                other.depends, other.pure = masks(other.value, True), False
    known[target].depends, known[target].pure = depends, False


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
