"""Cut channel groups out of a model's exported graph, for models whose Python code holds sizes by hand."""

from __future__ import annotations

import contextlib
import difflib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from l0hooks._torch.graphs import as_module, plain_graph, schema_of
from l0hooks._torch.running import evaluating
from l0hooks.errors import StateError, explain
from l0hooks.structure.cut_modules import Bools, Cut, apply_cuts
from l0hooks.structure.export_trace import export_and_trace
from l0hooks.structure.fx_nodes import name_of
from l0hooks.structure.rules_elementwise import POINTWISE
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.union_find import squeeze_constant, varies

_RESHAPES = ("view", "reshape", "_unsafe_view", "expand")


def rewrite(model: nn.Module, cuts: Sequence[Cut], example_inputs: Sequence[Any]) -> nn.Module:
    """The exported graph of ``model`` after ``cuts``, as a ``GraphModule`` for evaluation.

    Parameters
    ----------
    model : nn.Module
        Plain and uncut; not changed.
    cuts : sequence of Cut
        Whole members of coupled groups.
    example_inputs : sequence

    Raises
    ------
    StateError
        If the graph uses an operator on cut channels that cannot be rewritten.
    """
    program, tracer = export_and_trace(model, example_inputs)
    graph_module = _flexible(model, example_inputs, program)
    kept = _Kept(tracer, cuts)
    labels = _matched(program, graph_module, tracer)
    for node, (value, sources, equal) in labels.items():
        _shorten_equal(node, value, sources, equal, kept)
        _rewrite_node(node, value, sources, kept)
    apply_cuts(graph_module, cuts)
    graph_module.graph.lint()
    plain = plain_graph(graph_module)
    plain.train(model.training)
    return plain


_Equal = list[frozenset[int]]  # for each input of a node the axes, from the right, along which its numbers are equal


class _Kept:
    """Which positions of a labelled axis stay."""

    def __init__(self, tracer: Tracer, cuts: Sequence[Cut]) -> None:
        self._classes = tracer.classes
        axes = {name: p.axes for p in tracer.parameters if p.axes for name in p.names}
        dead = [np.zeros(0, np.int64)]
        for cut in cuts:
            for axis, stay in cut.kept if cut.names[0] in axes else ():
                roots = tracer.classes.roots(axes[cut.names[0]][axis]).numpy()
                dead.append(np.delete(roots, stay))
        self._dead = np.unique(np.concatenate(dead))

    def along(self, labels: object) -> tuple[int, Bools] | None:
        """The axis that is cut and a mask of what stays along it; None if nothing is cut."""
        if not isinstance(labels, Tensor):
            return None
        roots = squeeze_constant(self._classes.roots(labels))
        stays = ~np.isin(roots.numpy(), self._dead)
        if stays.all():
            return None
        axis = next(d for d in range(roots.dim()) if varies(roots, d))
        return axis, np.moveaxis(stays, axis, 0).reshape(roots.shape[axis], -1)[:, 0]


def _flexible(model: nn.Module, example_inputs: Sequence[Any], program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph with a free batch size where the model allows it."""
    first = torch.export.Dim.AUTO
    shapes = tuple({0: first} if isinstance(x, Tensor) and x.dim() else None for x in example_inputs)
    # a model for one batch size only keeps that; whether it should is for the caller's comparison to say
    with evaluating(model), contextlib.suppress(RuntimeError, ValueError, AssertionError):
        program = torch.export.export(model, tuple(example_inputs), dynamic_shapes=shapes, strict=False)
    return as_module(program)


def _matched(
    program: torch.export.ExportedProgram, module: fx.GraphModule, tracer: Tracer
) -> dict[fx.Node, tuple[Any, list[Any], _Equal]]:
    """For every operator of ``module`` the labels of its value and of its inputs, from the graph that was traced."""

    def operators(graph: fx.Graph) -> list[fx.Node]:
        return [
            n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), (Tensor, tuple, list))
        ]

    traced, running = operators(program.graph), operators(module.graph)
    matcher = difflib.SequenceMatcher(None, [str(n.target) for n in traced], [str(n.target) for n in running], False)
    found: dict[fx.Node, tuple[Any, list[Any], _Equal]] = {}
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            for then, now in zip(traced[a0:a1], running[b0:b1], strict=True):
                inputs = then.all_input_nodes
                equal = [tracer.uniform.get(source, frozenset()) for source in inputs]
                found[now] = tracer.values.get(then), [tracer.values.get(source) for source in inputs], equal
        elif tag != "insert" or any(name_of(n) != "slice" for n in running[b0:b1]):  # a slice of everything is no cut
            raise StateError(explain("prune", "both exports of the model must agree.", got="different operators"))
    return found


def _rewrite_node(node: fx.Node, value: Any, sources: list[Any], kept: _Kept) -> None:
    name = name_of(node)
    editor = _EDITORS.get("reshape" if name in _RESHAPES else name)
    if editor is not None:
        editor(node, value, sources, kept)


def _shorten_equal(node: fx.Node, value: Any, sources: list[Any], equal: _Equal, kept: _Kept) -> None:
    """Cut inputs of an elementwise operator, or masks of attention, made at full length and with all numbers alike."""
    aligned = name_of(node) in POINTWISE or name_of(node) == "scaled_dot_product_attention"
    cut = kept.along(value) if aligned else None
    if cut is None:
        return
    axis, stays = cut[0] - value.dim(), cut[1]
    for source, labels, axes in zip(list(node.all_input_nodes), sources, equal, strict=True):
        full = isinstance(labels, Tensor) and labels.dim() >= -axis and labels.shape[axis] == len(stays)
        if axis in axes and full and kept.along(labels) is None:
            with node.graph.inserting_before(node):
                short = node.graph.call_function(
                    torch.ops.aten.slice.Tensor, (source, labels.dim() + axis, 0, int(stays.sum()))
                )
            node.replace_input_with(source, short)


def _reshape(node: fx.Node, value: Any, sources: list[Any], kept: _Kept) -> None:
    cut = kept.along(value)
    if cut is not None:
        axis, stays = cut
        sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        position = axis - (value.dim() - len(sizes))
        if sizes[position] != -1:
            sizes[position] = _shorter(node, sizes[position], stays)
        node.args = (node.args[0], sizes, *node.args[2:])


def _shorter(node: fx.Node, size: int | fx.Node, stays: Bools) -> int | fx.Node:
    """The new length of a cut axis; one that depends on the batch size shrinks in proportion."""
    if isinstance(size, int):
        return int(stays.sum())
    with node.graph.inserting_before(node):
        times = node.graph.call_function(operator.mul, (size, int(stays.sum())))
        return node.graph.call_function(operator.floordiv, (times, len(stays)))


def _unflatten(node: fx.Node, value: Any, sources: list[Any], kept: _Kept) -> None:
    cut = kept.along(value)
    if cut is not None:
        axis, stays = cut
        _, dim, sizes = node.args[:3]
        first = int(dim) % (value.dim() - len(sizes) + 1)  # type: ignore[arg-type]
        new: list[Any] = list(sizes)  # type: ignore[arg-type]
        if first <= axis < first + len(new) and new[axis - first] != -1:
            new[axis - first] = int(stays.sum())
        node.args = (node.args[0], dim, new, *node.args[3:])


def _split(node: fx.Node, value: Any, sources: list[Any], kept: _Kept) -> None:
    cuts = [kept.along(part) for part in value]
    if not any(cuts):
        return
    dim = int(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % value[0].dim()  # type: ignore[arg-type]
    sizes = [
        int(cut[1].sum()) if cut is not None and cut[0] == dim else int(part.shape[dim])
        for cut, part in zip(cuts, value, strict=True)
    ]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _slice(node: fx.Node, value: Any, sources: list[Any], kept: _Kept) -> None:
    cut = kept.along(sources[0])
    dim = int(node.args[1] if len(node.args) > 1 else 0)  # type: ignore[arg-type]
    if cut is None or cut[0] != dim % sources[0].dim():
        return
    before = np.concatenate([[0], np.cumsum(cut[1])])
    length = len(cut[1])
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    if step != 1 or not isinstance(start, (int, type(None))) or not isinstance(end, (int, type(None))):
        raise StateError(explain("prune", "cut channels can be sliced only in one piece.", got=f"{node.format_node()}"))
    ends = [_clamped(0 if start is None else start, length), _clamped(length if end is None else end, length)]
    node.args = (node.args[0], dim, int(before[ends[0]]), int(before[ends[1]]), 1)


def _clamped(index: int, length: int) -> int:
    return min(max(index + length if index < 0 else index, 0), length)


def _convolution(node: fx.Node, value: Any, sources: list[Any], kept: _Kept) -> None:
    position = [a.name for a in schema_of(node).arguments].index("groups")
    if len(node.args) > position:
        node.args = (*node.args[:position], _scaled(node.args[position], sources[0], kept), *node.args[position + 1 :])


def _group_norm(node: fx.Node, value: Any, sources: list[Any], kept: _Kept) -> None:
    node.args = (node.args[0], _scaled(node.args[1], sources[0], kept), *node.args[2:])


def _scaled(groups: Any, labels: Any, kept: _Kept) -> int:
    """The number of groups that stays when whole groups of channels go."""
    cut = kept.along(labels)
    return int(groups) if cut is None or int(groups) == 1 else int(groups) * int(cut[1].sum()) // len(cut[1])


_EDITORS: dict[str, Callable[[fx.Node, Any, list[Any], _Kept], None]] = {
    "reshape": _reshape,
    "unflatten": _unflatten,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "slice": _slice,
    "group_norm": _group_norm,
    **{f"conv{kind}": _convolution for kind in ("1d", "2d", "3d")},
    **{f"conv_transpose{kind}": _convolution for kind in ("1d", "2d", "3d")},
}
