"""Find residual streams: groups of channels that norms read as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from l0hooks.structure.export_trace import trace
from l0hooks.structure.fx_nodes import name_of
from l0hooks.structure.groups import ChannelGroup, Ints
from l0hooks.structure.references import Reference
from l0hooks.structure.table import RULES, Rule
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.union_find import constant, varies
from l0hooks.structure.width.norms import Norm, find_norms, used_by
from l0hooks.structure.width.parts import Width, WidthGate, WidthNorm
from l0hooks.structure.width.zeros import READING, Stream, not_zero, operators

Assemble = Callable[[Tracer], tuple[tuple[ChannelGroup, ...], Ints]]  # the groups, and that of every class


@dataclass(frozen=True)
class _Use:
    """A norm that reads a stream, and the labels of its channels."""

    norm: Norm
    channels: Tensor


def trace_with_width(model: nn.Module, assemble: Assemble, *programs: torch.export.ExportedProgram) -> Tracer:
    """A tracer as :func:`trace` returns it that lets channels pass through norms where that is certain.

    ``widths`` of the tracer holds the streams found. Where a stream turns out not to be one that can be cut exactly,
    its norms are traced again as what freezes it, with the reason.

    Parameters
    ----------
    model : nn.Module
        The model that was exported.
    assemble : callable
        The groups of a tracer, and for every class the number of its group, -1 without one.
    *programs : ExportedProgram
    """
    found = {node: norm for program in programs for node, norm in find_norms(model, program).items()}
    nodes = operators(programs)
    while True:
        uses: dict[fx.Node, _Use] = {}
        t = trace(*programs, own_rules={node: _rule(norm, uses) for node, norm in found.items()})
        groups, group_of = assemble(t)
        refused: dict[fx.Node, str] = {}
        for number, mine in _by_group(t, list(uses.values()), group_of, refused).items():
            stream = Stream(t, np.flatnonzero(group_of == number))
            why = _obstacle(model, t, groups[number], mine, nodes) or not_zero(stream, nodes, _inner(mine))
            if why:
                refused |= {use.norm.node: why for use in mine}
            else:
                width = Width(tuple(_gates(t, groups[number], mine, nodes, stream)), _norms(t, mine))
                t.widths[number] = replace(groups[number], kind="width", width=width)
        if not refused:
            return t
        found |= refused


# --- tracing ---------------------------------------------------------------------------------------------------------


def _rule(norm: Norm | str, uses: dict[fx.Node, _Use]) -> Rule:
    """The rule for the node where the channels of a norm meet."""

    def refused(t: Tracer, node: fx.Node) -> Tensor:
        labels = t.labels(node.all_input_nodes[0])
        t.flatten(node, labels, [1 if name_of(node) == "group_norm" else -1], str(norm))
        found: Tensor = RULES[name_of(node)](t, node)
        return found

    return refused if isinstance(norm, str) else _passing(norm, uses)


def _passing(norm: Norm, uses: dict[fx.Node, _Use]) -> Rule:
    """A rule that lets channels pass, and notes the norm among ``uses``."""

    def rule(t: Tracer, node: fx.Node) -> Tensor:
        labels = t.labels(norm.x)
        if not _are_apart(t, labels, norm.axis % labels.dim()):
            found: Tensor = RULES[name_of(node)](t, node)
            return found
        uses[node] = _Use(norm, t.collapse(norm.x, norm.axis))
        if norm.result is not node:
            return constant(node.meta["val"].shape)
        view = (-1, *[1] * (labels.dim() - 2)) if norm.axis == 1 else (-1,)
        affine = [t.labels(one).reshape(view) for one in (norm.weight, norm.bias) if one is not None]
        return t.combine(node, [labels, *affine], node.meta["val"].shape)

    return rule


def _are_apart(t: Tracer, labels: Tensor, axis: int) -> bool:
    """Whether merging ``labels`` along all axes but one leaves every weight as many channels as before.

    It would not where the norm is one of each head: the heads of a projection would become one.
    """
    roots = t.classes.roots(labels)
    if not any(varies(roots, d) for d in range(roots.dim()) if d != axis):
        return True
    met = torch.from_numpy(np.unique(roots.select(axis, 0).numpy()))
    vectors = [vector for parameter in t.parameters for vector in parameter.axes if len(vector)]
    return all(int(((met >= vector[0]) & (met <= vector[-1])).sum()) < 2 for vector in vectors)


# --- what was found --------------------------------------------------------------------------------------------------


def _by_group(t: Tracer, uses: Sequence[_Use], group_of: Ints, refused: dict[fx.Node, str]) -> dict[int, list[_Use]]:
    """The norms that read each group; others that read channels which are not frozen are ``refused``."""
    found: dict[int, list[_Use]] = {}
    for use in uses:
        roots = t.classes.roots(use.channels).numpy()
        numbers = np.unique(group_of[roots])
        if (roots == 0).all():
            continue  # frozen, with a reason of its own
        if len(numbers) > 1:
            refused[use.norm.node] = "normalised together with channels of another kind"
        elif numbers[0] < 0 or len(np.unique(roots)) < len(roots):
            refused[use.norm.node] = "normalised together with channels that cannot go alone"
        else:
            found.setdefault(int(numbers[0]), []).append(use)
    return found


def _inner(uses: Sequence[_Use]) -> set[fx.Node]:
    return {node for use in uses for node in use.norm.inner}


def _obstacle(model: nn.Module, t: Tracer, group: ChannelGroup, uses: Sequence[_Use], nodes: Sequence[fx.Node]) -> str:
    """Why a group cannot be a stream; empty if it can."""
    owned = _affine(t, uses)
    inner = _inner(uses)
    written = _tables(t, nodes)
    for site in group.sites:
        name = site.names[0]
        whole = np.array_equal(site.indices, np.arange(site.shape[site.axis])[:, None])
        if site.buffer:
            return f"a buffer is part of the stream, {name}"
        if not whole and (not site.reads or site.names in written):
            return f"a weight that writes the stream holds other channels, too, or in another order, {name}"
        if isinstance(model.get_submodule(site.module), nn.MultiheadAttention):
            return f"read by nn.MultiheadAttention, which has as many channels as its heads, {site.module}"
    for parameter in t.parameters:
        if len(parameter.read_axis) > 1 and any(site.names == tuple(parameter.names) for site in group.sites):
            return f"a weight that is used transposed, too, {parameter.names[0]}"
    for node, value in t.values.items():
        if isinstance(value, Reference) and tuple(value.parameter.names) in owned:
            stray = [user for user in used_by(node) if user not in inner]
            if stray and node.op == "placeholder":
                return f"the weight of a norm is used elsewhere, {value.parameter.names[0]}"
    return ""


def _affine(t: Tracer, uses: Sequence[_Use]) -> dict[tuple[str, ...], _Use]:
    """The norm of each weight and bias of a norm, by the parameter's names."""
    found = {}
    for use in uses:
        for node in (use.norm.weight, use.norm.bias):
            if node is not None:
                found[tuple(t.values[node].parameter.names)] = use
    return found


def _tables(t: Tracer, nodes: Sequence[fx.Node]) -> set[tuple[str, ...]]:
    """The weights of embeddings, whose columns write even if they are read, too."""
    found = set()
    for node in nodes:
        if node.op == "call_function" and name_of(node) == "embedding" and t.is_weight(node.args[0]):
            found.add(tuple(t.values[node.args[0]].parameter.names))  # type: ignore[index]
    return found


def _gates(
    t: Tracer, group: ChannelGroup, uses: Sequence[_Use], nodes: Sequence[fx.Node], stream: Stream
) -> Iterator[WidthGate]:
    """What the gates of a stream multiply."""
    affine, tables = _affine(t, uses), _tables(t, nodes)
    for site in group.sites:
        use = affine.get(site.names)
        if use is None:
            if not site.reads or site.names in tables:
                yield WidthGate(site.names, site.axis)
        elif use.norm.kind != "rms":  # that leaves zeros zero
            yield WidthGate(site.names, site.axis, open_only=not _writes(stream, use.norm))


def _writes(stream: Stream, norm: Norm) -> bool:
    """Whether what a norm returns is added to the stream again, as where norms follow the branches."""
    seen, todo = {norm.result}, [norm.result]
    while todo:
        for user in used_by(todo.pop()):
            if user in seen or user.op != "call_function" or name_of(user) in READING or not stream.is_in(user):
                continue
            others = [one for one in user.all_input_nodes if one not in seen and stream.is_in(one)]
            if name_of(user) in ("add", "add_", "sub") and others:
                return True
            seen.add(user)
            todo.append(user)
    return False


def _norms(t: Tracer, uses: Sequence[_Use]) -> tuple[WidthNorm, ...]:
    found = []
    for use in uses:
        norm = use.norm
        names = tuple(t.values[norm.weight].parameter.names)
        found.append(WidthNorm(norm.module, norm.kind, names, norm.epsilon, norm.offset))
    return tuple(dict.fromkeys(found))
