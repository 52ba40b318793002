"""``latency_table``: time the layers of a model by themselves, whole and at smaller widths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l0hooks._torch.modules import NORMS
from l0hooks._torch.running import evaluating, slow_attention
from l0hooks._torch.trees import tree_leaves
from l0hooks.attach.copies import run_copy
from l0hooks.structure.cut_modules import apply_cuts, plan_cuts
from l0hooks.structure.groups import ChannelGroup
from l0hooks.structure.layers import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, is_hugging_face_conv1d
from l0hooks.training.clocks import Clock, interleaved, least_seconds
from l0hooks.training.time_table import WIDTHS, LatencyTable, LayerTimes, Times, fitted, proportional

_CUT_ALONE = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *NORMS, nn.GroupNorm, nn.LayerNorm, nn.PReLU, *EMBEDDINGS)


@dataclass(frozen=True)
class Side:
    """The gated channels along one axis of a layer.

    Attributes
    ----------
    length : int
        Of the axis.
    groups : tuple of (int, ChannelGroup)
        The number of each group among the gates, and the group with this layer's tensors alone.
    widths : tuple of int
        How many channels a member of each group has here.
    """

    length: int
    groups: tuple[tuple[int, ChannelGroup], ...]
    widths: tuple[int, ...]

    def left(self, kept: Sequence[int]) -> int:
        """The length when ``kept`` members of each group stay."""
        lost = (w * (group.size - n) for w, (_, group), n in zip(self.widths, self.groups, kept, strict=True))
        return self.length - sum(lost)


Sides = Mapping[bool, Side]  # by whether the layer reads along it


def sides_of(groups: Mapping[int, ChannelGroup]) -> dict[str, dict[bool, Side]]:
    """The sides of every layer that holds members of ``groups``, by the qualified name of its module."""
    found: dict[str, dict[bool, list[tuple[int, ChannelGroup]]]] = {}
    for number, group in groups.items():
        places: dict[tuple[str, bool], list[Any]] = {}
        for site in group.sites:
            for name in site.names:
                module, _, tensor = name.rpartition(".")
                places.setdefault((module, site.reads), []).append(replace(site, names=(tensor,)))
        for (module, reads), sites in places.items():
            own = replace(group, sites=tuple(sorted(sites, key=lambda s: -len(s.shape))))  # the weight first
            found.setdefault(module, {}).setdefault(reads, []).append((number, own))
    return {module: {reads: _side(own) for reads, own in sides.items()} for module, sides in found.items()}


def _side(groups: Sequence[tuple[int, ChannelGroup]]) -> Side:
    firsts = [group.sites[0] for _, group in groups]
    return Side(firsts[0].shape[firsts[0].axis], tuple(groups), tuple(s.indices.shape[1] for s in firsts))


def measure(
    plain: nn.Module,
    groups: Mapping[int, ChannelGroup],
    multiples: Mapping[int, int],
    example_inputs: Sequence[Any],
    clock: Clock,
) -> LatencyTable:
    """Time a plain model and each of its layers that holds members of ``groups``.

    Parameters
    ----------
    plain : nn.Module
        Run in evaluation mode; not changed.
    groups : mapping from int to ChannelGroup
    multiples : mapping from int to int
        What the number of members that stay in each group will be a multiple of.
    example_inputs : sequence
        Positional arguments.
    clock : Clock

    Returns
    -------
    LatencyTable
    """
    sides = sides_of(groups)
    device = next(plain.parameters()).device
    with evaluating(plain):
        calls = _calls(plain, sides, example_inputs)
        known: dict[object, LayerTimes] = {}
        for name, arguments, written in calls:
            module = plain.get_submodule(name)
            key = _key(module, sides[name], arguments)
            if key in known:
                known[key] = replace(known[key], names=(*known[key].names, name))
            else:
                known[key] = _layer_times((name, arguments, written), module, sides[name], multiples, clock)
        (readings,) = interleaved(clock, [partial(plain, *example_inputs)])
    whole = float(np.median(readings)) * 1e6
    return LatencyTable(str(device), torch.get_num_threads(), whole, tuple(known.values()))


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Call = tuple[str, Arguments, int]  # the layer, what it was given, and how many numbers it returned


def _calls(model: nn.Module, names: Mapping[str, object], example_inputs: Sequence[Any]) -> list[Call]:
    """The calls of layers in one run, in their order."""
    found: list[Call] = []

    def noted(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            numbers = sum(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            found.append((name, (args, kwargs), numbers))

        return hook

    modules = {id(module): (name, module) for name in names for module in [model.get_submodule(name)]}
    handles = [module.register_forward_hook(noted(name), with_kwargs=True) for name, module in modules.values()]
    try:
        with slow_attention():  # which calls no layers
            model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _key(module: nn.Module, sides: Sides, arguments: Arguments) -> object:
    """Equal for calls that take the same time."""
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    layouts = [(t.shape, t.stride(), t.dtype) for t in tensors]
    weights = [(p.shape, p.stride(), p.dtype) for p in module.parameters()]
    members = {
        reads: (side.length, *((group.size, width) for (_, group), width in zip(side.groups, side.widths, strict=True)))
        for reads, side in sides.items()
    }
    return repr((type(module), module, layouts, weights, sorted(members.items())))


def _layer_times(call: Call, module: nn.Module, sides: Sides, multiples: Mapping[int, int], clock: Clock) -> LayerTimes:
    """The readings of one layer at all pairs of widths, and their fit."""
    name, arguments, numbers = call
    lengths = {reads: sides[reads].length if reads in sides else 0 for reads in (True, False)}
    alone = _can_be_cut_alone(module) and isinstance(arguments[0][0] if arguments[0] else None, Tensor)
    times: list[tuple[int, int, float]] = []
    for shares in _grid(sides) if alone else [dict.fromkeys(sides, 1.0)]:
        kept = {reads: _members(side, multiples, shares[reads]) for reads, side in sides.items()}
        left = {reads: sides[reads].left(kept[reads]) if reads in sides else 0 for reads in (True, False)}
        run = _cut_call(module, sides, kept, arguments) if alone else partial(module, *arguments[0], **arguments[1])
        times.append((left[True], left[False], least_seconds(clock, run) * 1e6))
    found: Times = tuple(times)
    terms = fitted(found) if alone else proportional(found)
    written = numbers // lengths[False] if lengths[False] else 0
    return LayerTimes((name,), type(module).__name__, lengths[True], lengths[False], found, terms, written, alone)


def _can_be_cut_alone(module: nn.Module) -> bool:
    """Whether a cut layer runs on an input cut in the same way: layers of torch, called as they are."""
    of_torch = type(module).forward.__module__.startswith("torch.nn.")
    return (isinstance(module, _CUT_ALONE) and of_torch) or is_hugging_face_conv1d(module)


def _grid(sides: Sides) -> Iterator[dict[bool, float]]:
    for shares in itertools.product(WIDTHS, repeat=len(sides)):
        yield dict(zip(sides, shares, strict=True))


def _members(side: Side, multiples: Mapping[int, int], share: float) -> list[int]:
    """How many members of each group stay at a share of them, in multiples."""
    kept = []
    for number, group in side.groups:
        step = min(multiples[number], group.size)
        kept.append(group.size if share == 1 else min(max(round(share * group.size / step), 1) * step, group.size))
    return kept


def _cut_call(
    module: nn.Module, sides: Sides, kept: Mapping[bool, Sequence[int]], arguments: Arguments
) -> Callable[[], object]:
    """A call of a copy of a layer with fewer members, on an input of the length that it then reads."""
    small = run_copy(module)
    masks = [
        (group, np.arange(group.size) < count)
        for reads, side in sides.items()
        for (_, group), count in zip(side.groups, kept[reads], strict=True)
    ]
    apply_cuts(small, plan_cuts(masks))
    (first, *others), named = arguments
    axis = _input_axis(small)
    if axis is not None and first.shape[axis] != _input_length(small):
        narrow = first.narrow(axis, 0, _input_length(small))
        first = torch.empty_like(narrow).copy_(narrow)  # dense, with the axes in the order that they had
    return partial(small, first, *others, **named)


def _input_axis(module: nn.Module) -> int | None:
    """The axis of its input along which a layer reads channels; an embedding reads none."""
    if isinstance(module, EMBEDDINGS):
        return None
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return -1 - len(module.kernel_size)
    return 1 if isinstance(module, (*NORMS, nn.GroupNorm, nn.PReLU)) else -1


def _input_length(module: nn.Module) -> int:
    for kind, name in (
        ((*CONVOLUTIONS, *TRANSPOSED), "in_channels"),
        (nn.Linear, "in_features"),
        (NORMS, "num_features"),
    ):
        if isinstance(module, kind):
            return int(vars(module)[name])
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    return int(module.get_parameter("weight").shape[0])
