"""How operators of an exported graph change when channels are cut: sizes, pieces and groups in their arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from l0hooks._torch.graphs import schema_of
from l0hooks.errors import StateError, explain
from l0hooks.structure.cut_modules import Bools, Cut
from l0hooks.structure.fx_nodes import argument, first_of, name_of
from l0hooks.structure.groups import Ints
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.union_find import squeeze_constant, squeeze_other, varies

_RESHAPES = ("view", "reshape", "_unsafe_view", "expand", "broadcast_to")
_FRESH = ("zeros", "ones", "full", "empty")


class Remaining:
    """The positions of a labelled axis that remain after the cuts."""

    def __init__(self, tracer: Tracer, cuts: Sequence[Cut]) -> None:
        self._classes = tracer.classes
        axes = {name: p.axes for p in tracer.parameters if p.axes for name in p.names}
        removed = [np.zeros(0, np.int64)]
        for cut in cuts:
            for axis, stay in cut.kept if cut.names[0] in axes else ():
                roots = tracer.classes.roots(axes[cut.names[0]][axis]).numpy()
                removed.append(np.delete(roots, stay))
        self._removed = np.unique(np.concatenate(removed))

    def along(self, labels: object) -> tuple[int, Bools] | None:
        """The axis that is cut and a mask of the positions that remain; None if nothing is cut."""
        if not isinstance(labels, Tensor):
            return None
        roots = squeeze_constant(self._classes.roots(labels))
        stays = self._stay(roots)
        if stays.all():
            return None
        axis = next((d for d in range(roots.dim()) if varies(roots, d)), None)
        if axis is None:
            raise StateError(
                explain("prune", "a part of cut channels must keep some of them.", got="a part that is cut whole")
            )
        return axis, np.moveaxis(stays, axis, 0).reshape(roots.shape[axis], -1)[:, 0]

    def count(self, labels: Tensor, axis: int) -> int:
        """How many positions along ``axis`` remain; none if a piece is cut whole."""
        roots = self._classes.roots(labels)
        if not varies(roots, axis) and roots.shape[axis] > 1:
            return int(roots.shape[axis])
        rows = squeeze_other(roots, axis).movedim(axis, 0).reshape(roots.shape[axis], -1)
        return int(self._stay(rows).any(1).sum())

    def _stay(self, roots: Tensor) -> Bools:
        stays: Bools = ~np.isin(roots.numpy(), self._removed)
        return stays


def edit(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    """Change the arguments of ``node``, **in place**, to what remains of the labels of its value and its inputs."""
    name = name_of(node)
    editor = EDITORS.get("reshape" if name in _RESHAPES else name)
    if editor is not None:
        editor(node, value, sources, remaining)


def _reshape(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    cut = remaining.along(value)
    if cut is not None:
        axis, stays = cut
        sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        position = axis - (value.dim() - len(sizes))
        if sizes[position] != -1:
            sizes[position] = _shorter(node, sizes[position], stays)
        node.args = (node.args[0], sizes, *node.args[2:])


def _fresh(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    """A tensor that the code makes with a size by hand, and into which channels are written."""
    cut = remaining.along(value)
    if cut is not None:
        axis, stays = cut
        place = 1 if name_of(node).startswith("new_") else 0
        sizes: list[Any] = list(node.args[place])  # type: ignore[arg-type]
        sizes[axis] = _shorter(node, sizes[axis], stays)
        node.args = (*node.args[:place], sizes, *node.args[place + 1 :])


def _shorter(node: fx.Node, size: int | fx.Node, stays: Bools) -> int | fx.Node:
    """The new length of a cut axis; a length that depends on the batch size shrinks in proportion."""
    if isinstance(size, int):
        return int(stays.sum())
    with node.graph.inserting_before(node):
        times = node.graph.call_function(operator.mul, (size, int(stays.sum())))
        return node.graph.call_function(operator.floordiv, (times, len(stays)))


def _unflatten(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    cut = remaining.along(value)
    if cut is not None:
        axis, stays = cut
        _, dim, sizes = node.args[:3]
        first = int(dim) % (value.dim() - len(sizes) + 1)  # type: ignore[arg-type]
        new: list[Any] = list(sizes)  # type: ignore[arg-type]
        if first <= axis < first + len(new) and new[axis - first] != -1:
            new[axis - first] = int(stays.sum())
        node.args = (node.args[0], dim, new, *node.args[3:])


def _split(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    dim = int(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % value[0].dim()  # type: ignore[arg-type]
    sizes = [remaining.count(part, dim) for part in value]
    if sizes != [part.shape[dim] for part in value]:
        node.target = torch.ops.aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _picked(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    """An operator that takes or moves whole positions of one axis, as its arguments say: a slice, a roll, a shuffle."""
    cut = remaining.along(sources[0])
    if cut is None:
        return
    axis, stays = cut
    taken = _taken(node, axis, sources[0])
    if taken is None:
        return
    now = (np.cumsum(stays) - 1)[taken[stays[taken]]]
    if len(now) == 0 or np.array_equal(now, np.arange(now[0], now[0] + len(now))):
        first = int(now[0]) if len(now) else 0
        node.target, node.kwargs = torch.ops.aten.slice.Tensor, {}
        node.args = (node.args[0], axis, first, first + len(now), 1)
    else:
        with node.graph.inserting_before(node):
            positions = _constant(node, torch.from_numpy(now))
        node.target, node.kwargs = torch.ops.aten.index_select.default, {}
        node.args = (node.args[0], axis, positions)


def _taken(node: fx.Node, axis: int, labels: Tensor) -> Ints | None:
    """The positions along a cut axis in the order in which ``node`` gives them; None if it moves along others only."""
    name, length, rank = name_of(node), labels.shape[axis], labels.dim()
    places: Ints = np.arange(length)
    given = {a.name: argument(node, a.name) for a in schema_of(node).arguments[1:]}
    if name == "roll":
        dims = [d % rank for d in given["dims"]]
        if axis not in dims:
            return None
        others = [n for n, d in enumerate(dims) if d != axis]
        if others:
            with node.graph.inserting_before(node):
                along = [given["shifts"][n] for n in others], [dims[n] for n in others]
                node.replace_input_with(
                    first_of(node), node.graph.call_function(torch.ops.aten.roll.default, (node.args[0], *along))
                )
        return np.roll(places, sum(n for n, d in zip(given["shifts"], dims, strict=True) if d == axis))
    if name == "channel_shuffle":
        return places.reshape(given["groups"], -1).T.reshape(-1) if axis == 1 else None
    if given["dim"] % rank != axis:
        return None
    start, step = given["start"], given.get("step", 1)
    end = given["end"] if name == "slice" else given["length"]
    if not all(isinstance(n, (int, type(None))) for n in (start, end)):
        raise _cannot("a slice of cut channels must have fixed ends.", node)
    return places[start:end:step] if name == "slice" else places[start:][:end]


def _select(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    """One position of a cut axis; the tracer keeps it, and it has another number now."""
    cut = remaining.along(sources[0])
    dim, index = argument(node, "dim"), argument(node, "index")
    if cut is not None and dim % sources[0].dim() == cut[0]:
        node.args = (node.args[0], dim, int(np.cumsum(cut[1])[index]) - 1)


def _unbind(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    """Parts of a cut axis that are put together again at once: those that remain."""
    cut = remaining.along(sources[0])
    if cut is None or argument(node, "dim") % sources[0].dim() != cut[0]:
        return
    numbers, stays = np.cumsum(cut[1]) - 1, cut[1]
    for part in list(node.users):
        number = int(part.args[1])  # type: ignore[arg-type]
        if stays[number]:
            part.args = (node, int(numbers[number]))
            continue
        for user in list(part.users):
            user.args = ([one for one in user.args[0] if one is not part], *user.args[1:])  # type: ignore[union-attr]
        node.graph.erase_node(part)


def _constant(node: fx.Node, tensor: Tensor) -> fx.Node:
    """``tensor`` as a buffer of the graph that ``node`` belongs to, on the device of its value."""
    module = node.graph.owning_module
    if module is None:
        raise _cannot("a graph must belong to a module.", node)
    name = f"positions_{node.name}"
    module.register_buffer(name, tensor.to(node.meta["val"].device), persistent=False)
    return node.graph.get_attr(name)


def _cannot(must: str, node: fx.Node) -> StateError:
    return StateError(explain("prune", must, got=f"{node.format_node()}"))


def _convolution(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    position = [a.name for a in schema_of(node).arguments].index("groups")
    if len(node.args) > position:
        groups = _scaled(node.args[position], sources[0], remaining)
        node.args = (*node.args[:position], groups, *node.args[position + 1 :])


def _group_norm(node: fx.Node, value: Any, sources: list[Any], remaining: Remaining) -> None:
    node.args = (node.args[0], _scaled(node.args[1], sources[0], remaining), *node.args[2:])


def _scaled(groups: Any, labels: Any, remaining: Remaining) -> int:
    """The number of groups that remain after whole groups of channels are cut."""
    cut = remaining.along(labels)
    return int(groups) if cut is None or int(groups) == 1 else int(groups) * int(cut[1].sum()) // len(cut[1])


EDITORS: dict[str, Callable[[fx.Node, Any, list[Any], Remaining], None]] = {
    "reshape": _reshape,
    "unflatten": _unflatten,
    **dict.fromkeys((*_FRESH, *(f"new_{name}" for name in _FRESH)), _fresh),
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "tensor_split": _split,
    **dict.fromkeys(("slice", "narrow", "roll", "channel_shuffle"), _picked),
    "select": _select,
    "unbind": _unbind,
    "group_norm": _group_norm,
    **{f"conv{kind}": _convolution for kind in ("1d", "2d", "3d")},
    **{f"conv_transpose{kind}": _convolution for kind in ("1d", "2d", "3d")},
}
