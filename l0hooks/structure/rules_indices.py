"""Rules for operators that read or write at indices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from l0hooks.structure.fx_nodes import argument, first_of, name_of, shape_of
from l0hooks.structure.table import rule
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.union_find import compress, constant, varies


@rule("index", "gather", "index_select", "take_along_dim")
def _index(t: Tracer, node: fx.Node) -> Tensor:
    x, out = node.all_input_nodes[0], shape_of(node)
    if name_of(node) != "index":
        axis = argument(node, "dim") % len(shape_of(x))
        used = [axis]
        index = argument(node, "indices" if name_of(node) == "take_along_dim" else "index")
        if _without(out, axis) != _without(shape_of(x), axis) or _is_index_by_channel(index, axis):
            return t.freeze_all(node, f"indices of their own for each channel, in {name_of(node)}")
    else:
        indices = argument(node, "indices")
        used = [d for d, i in enumerate(indices) if i is not None]
    t.freeze_indices(node, *node.all_input_nodes[1:])
    labels = t.labels(x)
    for d in used:
        t.merge(node, labels, d, f"looked up by {name_of(node)}")
    labels = t.compressed(x)
    rest = [d for d in range(labels.dim()) if d not in used]
    if not any(varies(labels, d) for d in rest):
        return constant(out, int(labels.reshape(-1)[0])) if labels.numel() else constant(out)
    if name_of(node) == "index" and used != list(range(used[0], used[-1] + 1)):
        return t.freeze_all(node, "indexed along separate axes")
    before = [d for d in rest if d < used[0]]
    after = len(rest) - len(before)
    middle = len(out) - len(before) - after
    for d in used:
        labels = labels.narrow(d, 0, 1)
    kept = labels.reshape([labels.shape[d] for d in rest])
    view = [*kept.shape[: len(before)], *([1] * middle), *kept.shape[len(before) :]]
    return kept.reshape(view).expand(out)


@rule("index_add", "index_add_", "index_copy", "index_copy_", "index_reduce", "index_reduce_")
@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def _write_at_indices(t: Tracer, node: fx.Node) -> Tensor:
    """Rows are added to others, or replace them, as messages between the nodes of a graph; channels stay apart."""
    into, index = first_of(node), argument(node, "index")
    axis = argument(node, "dim") % len(shape_of(into))
    sources = [source for source in node.all_input_nodes if source is not index]
    arrays = [source for source in sources if len(shape_of(source)) == len(shape_of(into))]
    alike = all(_without(shape_of(source), axis) == _without(shape_of(into), axis) for source in arrays)
    alike = alike and all(shape_of(source)[axis] for source in arrays)
    if not alike or _is_index_by_channel(index, axis):
        return t.freeze_all(node, f"indices of their own for each channel, in {name_of(node)}")
    t.freeze_indices(node, index)
    for source in arrays:
        t.flatten(node, t.labels(source), [axis], f"written at an index by {name_of(node)}")
    labels = {source: t.operand(source) for source in sources}
    for source in arrays:
        labels[source] = compress(labels[source], t.classes.roots(labels[source])).narrow(axis, 0, 1)
    return t.combine(node, list(labels.values()), shape_of(node))


def _is_index_by_channel(index: fx.Node, axis: int) -> bool:
    """Whether an index has numbers of its own for every element, and not one for all that lies across ``axis``."""
    shape = shape_of(index)
    if len(shape) == 1:
        return False
    if index.op != "call_function" or name_of(index) not in ("expand", "expand_as", "broadcast_to", "repeat"):
        return any(n > 1 for n in _without(shape, axis))
    before = shape_of(first_of(index))
    aligned = (1,) * (len(shape) - len(before)) + tuple(before)
    return any(n > 1 for n in _without(aligned, axis))


def _without(shape: Sequence[int], axis: int) -> list[int]:
    return [n for d, n in enumerate(shape) if d != axis]
