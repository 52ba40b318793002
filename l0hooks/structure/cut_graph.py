"""Cut channel groups out of a model's exported graph, for models whose Python code contains fixed sizes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import repeat
from torch import Tensor, fx, nn

from l0hooks._torch.graphs import as_module, export, plain_graph
from l0hooks._torch.running import OUT_OF_MEMORY
from l0hooks._torch.tensors import beside
from l0hooks._torch.trees import tree_leaves, tree_map
from l0hooks.errors import StateError, explain
from l0hooks.structure.cut_modules import Cut, apply_cuts
from l0hooks.structure.export_trace import export_and_trace, exporting
from l0hooks.structure.fx_nodes import every_node, first_of, name_of, region_of, shape_of
from l0hooks.structure.graph_editors import Remaining, edit
from l0hooks.structure.graph_layers import keep_layers
from l0hooks.structure.graph_sizes import Sizes, sizes_of
from l0hooks.structure.rules_elementwise import POINTWISE
from l0hooks.structure.tracer import Tracer

Free = Literal["all", "batch", "none"]
Traced = tuple[torch.export.ExportedProgram, Tracer]
FREE: tuple[Free, ...] = ("all", "batch", "none")  # what to try, the best first


def rewrite(
    model: nn.Module,
    cuts: Sequence[Cut],
    example_inputs: Sequence[Any],
    free: Free = "all",
    traced: Traced | None = None,
) -> tuple[fx.GraphModule, Sizes]:
    """The exported graph of ``model`` after ``cuts``, as a ``GraphModule`` for evaluation, and what its inputs must be.

    Parameters
    ----------
    model : nn.Module
        Plain and uncut; not changed.
    cuts : sequence of Cut
        Whole members of coupled groups.
    example_inputs : sequence
        Positional arguments of ``model``.
    free : "all", "batch" or "none"
        Which sizes of the inputs may vary, where the model's code lets them: every axis, the first, or none.
    traced : pair, optional
        What :func:`traced_once` returned for these inputs and a model that differs in no more than cut weights.

    Raises
    ------
    StateError
        If the graph uses an operator on cut channels that cannot be rewritten, or the model's code permits no sizes
        but the examples'.
    UnsupportedModuleError
        If the model cannot be exported.
    """
    program, tracer = traced or export_and_trace(model, example_inputs)
    running = program if free == "none" else _with_free_sizes(model, example_inputs, free)
    sizes = sizes_of(running)
    if sizes is None:
        raise StateError(explain("prune", "sizes of inputs must not depend on one another in other ways than a·n + b."))
    graph_module = as_module(running)
    remaining = Remaining(tracer, cuts)
    labels = _matched(program, graph_module, tracer)
    for node, (value, sources, equal) in labels.items():
        _shorten_equal(node, value, sources, equal, remaining)
        edit(node, value, sources, remaining)
    for region in filter(None, map(region_of, labels)):
        region[0].recompile()
    keep_layers(graph_module, model)
    apply_cuts(graph_module, cuts)
    graph_module.graph.lint()
    plain = plain_graph(graph_module)
    return plain.eval(), sizes


def traced_once(model: nn.Module, example_inputs: Sequence[Any]) -> Traced | None:
    """The exported graph of ``model`` and its labels, for several calls of :func:`rewrite`.

    None if the graph has regions, which are changed where they are.

    Raises
    ------
    UnsupportedModuleError
        If the model cannot be exported.
    """
    program, tracer = export_and_trace(model, example_inputs)
    return None if any(map(region_of, program.graph.nodes)) else (program, tracer)


_EqualAxes = list[frozenset[int]]  # for each input: axes, counted from the right, along which its numbers are equal


def _with_free_sizes(model: nn.Module, example_inputs: Sequence[Any], free: Free) -> torch.export.ExportedProgram:
    """The program with sizes that may vary, where the model's code lets them."""
    auto = torch.export.Dim.AUTO

    def axes(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return auto if free == "all" and type(value) is int else None
        return dict.fromkeys(range(value.dim() if free == "all" else min(value.dim(), 1)), auto)

    # torch.export marks the tensors it is given, and an export that fails leaves the marks to all later ones
    inputs = tree_map(_unmarked, beside(model, _two_examples(example_inputs)))
    try:
        with exporting(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first export has given them
            return export(model, inputs, dynamic_shapes=tree_map(axes, inputs))
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # whatever the tracer or the model's code raises where sizes are symbols
        raise StateError(
            explain("prune", "sizes of inputs must be free to vary.", got=f"{type(error).__name__} in torch.export")
        ) from error


def _unmarked(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _two_examples(example_inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The examples; a single one twice, because torch.export takes a size of 1 for fixed."""
    tensors = [leaf for leaf in tree_leaves(tuple(example_inputs)) if isinstance(leaf, Tensor)]
    if not all(t.dim() > 0 and len(t) == 1 for t in tensors):
        return tuple(example_inputs)

    def twice(value: Any) -> Any:
        return repeat(value, "1 ... -> two ...", two=2) if isinstance(value, Tensor) else value

    doubled: tuple[Any, ...] = tree_map(twice, tuple(example_inputs))
    return doubled


def _matched(
    program: torch.export.ExportedProgram, module: fx.GraphModule, tracer: Tracer
) -> dict[fx.Node, tuple[Any, list[Any], _EqualAxes]]:
    """For every operator of ``module`` the labels of its value and inputs, taken from the traced graph."""

    def operators(graph: fx.Graph) -> list[fx.Node]:
        return [
            n
            for n in every_node(graph)
            if n.op == "call_function" and isinstance(n.meta.get("val"), (Tensor, tuple, list)) and not _passes_on(n)
        ]

    traced, running = operators(program.graph), operators(module.graph)
    if [n.target for n in traced] != [n.target for n in running]:
        raise StateError(explain("prune", "both exports of the model must agree.", got="different operators"))
    found: dict[fx.Node, tuple[Any, list[Any], _EqualAxes]] = {}
    for then, now in zip(traced, running, strict=True):
        inputs = _tensors_among(then.all_input_nodes)
        equal = [tracer.uniform.get(source, frozenset()) for source in inputs]
        found[now] = tracer.values.get(then), [tracer.values.get(source) for source in inputs], equal
    return found


def _tensors_among(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that are no sizes."""
    return [node for node in nodes if not isinstance(node.meta.get("val"), (int, torch.SymInt))]


def _passes_on(node: fx.Node) -> bool:
    """Whether a node gives its input unchanged: an alias, or a slice of everything, which one export may leave out."""
    if name_of(node) in ("alias", "detach"):
        return True
    return name_of(node) == "slice" and str(shape_of(node)) == str(shape_of(first_of(node)))  # sizes may be symbols


def _shorten_equal(node: fx.Node, value: Any, sources: list[Any], equal: _EqualAxes, remaining: Remaining) -> None:
    """Shorten what the graph fills with one number, at elementwise and joining operators and as attention masks."""
    aligned = name_of(node) in POINTWISE or name_of(node) in ("scaled_dot_product_attention", "cat", "concat")
    cut = remaining.along(value) if aligned and any(equal) else None
    if cut is None:
        return
    axis, stays = cut[0] - value.dim(), cut[1]
    for source, labels, axes in zip(_tensors_among(node.all_input_nodes), sources, equal, strict=True):
        full = isinstance(labels, Tensor) and labels.dim() >= -axis and labels.shape[axis] == len(stays)
        if axis in axes and full and remaining.along(labels) is None:
            with node.graph.inserting_before(node):
                short = node.graph.call_function(
                    torch.ops.aten.slice.Tensor, (source, labels.dim() + axis, 0, int(stays.sum()))
                )
            node.replace_input_with(source, short)
