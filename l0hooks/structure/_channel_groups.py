"""``channel_groups``: find the channel groups of a model in its exported graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import rearrange
from torch import nn

from l0hooks.structure.example_inputs import ExampleInputs, positional
from l0hooks.structure.export_trace import export_and_trace
from l0hooks.structure.frozen import cannot_go, frozen_channels
from l0hooks.structure.groups import ChannelGroup, ChannelGroups, FrozenChannels, GroupSite, Ints, Kind
from l0hooks.structure.references import Parameter
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.training_trace import breaking_training
from l0hooks.structure.union_find import squeeze_constant, varies
from l0hooks.structure.width.search import trace_with_width
from l0hooks.structure.with_experts import with_experts


def channel_groups(
    model: nn.Module, example_inputs: ExampleInputs, *, kinds: Collection[Kind] | None = None
) -> ChannelGroups:
    """The channels, neurons and attention heads that can be removed from ``model``; its residual width if asked for.

    The model is exported in evaluation mode and is not changed; if it has layers that it calls in training only, as
    the auxiliary heads of GoogLeNet, a second time in training mode. Each group lists every tensor axis that holds its
    members. If gates multiply the weights that *read* the members, a member with a closed gate can be cut out of
    all these axes without changing any output.

    Parameters
    ----------
    model : nn.Module
        Any model that ``torch.export`` takes.
    example_inputs : sequence or mapping
        Arguments of ``model``: positional ones, keyword ones as a tokenizer returns them, or both, the keywords last.
    kinds : collection of "channel", "neuron", "head" and "width", optional
        Only groups of these kinds; without it, of all but "width". The channels of a residual stream, "width", are
        found only where they are named here.

    Returns
    -------
    ChannelGroups
        A sequence of :class:`ChannelGroup`; ``.frozen`` says what cannot be removed and why.

    Raises
    ------
    SpecError
        If ``example_inputs`` are no arguments of the model.
    UnsupportedModuleError
        If ``torch.export`` cannot trace the model.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> print(channel_groups(model, (torch.zeros(2, 8),)))
    0 outputs → 2 inputs: 16 neurons, 13 parameters each
    frozen: an output of the model: 2
    """
    return with_experts(model, positional(model, example_inputs), lambda m, i: groups_and_program(m, i, kinds)[0])


def groups_and_program(
    model: nn.Module, example_inputs: ExampleInputs, kinds: Collection[Kind] | None = None
) -> tuple[ChannelGroups, torch.export.ExportedProgram]:
    """The groups that the exported graph shows, experts left out, and the program of the evaluation.

    Parameters
    ----------
    model : nn.Module
    example_inputs : sequence or mapping
    kinds : collection of str, optional
    """
    example_inputs = positional(model, example_inputs)
    tracing = partial(trace_with_width, model, _assembled) if kinds is not None and "width" in kinds else None
    program, tracer = export_and_trace(model, example_inputs, training=True, tracing=tracing)
    found = groups_of(tracer)
    if kinds is not None:
        found = ChannelGroups(tuple(group for group in found if group.kind in kinds), found.frozen)
    left = set(breaking_training(model, example_inputs, found) if tracer.training_only else [])
    if not left:
        return found, program
    names = dict.fromkeys(site.module or site.names[0] for number in left for site in found[number].writers)
    why = FrozenChannels(tuple(names), "what is used in training only would not run without them")
    stay = tuple(group for number, group in enumerate(found) if number not in left)
    return ChannelGroups(stay, (*found.frozen, why)), program


def groups_of(tracer: Tracer) -> ChannelGroups:
    """The groups in a traced graph."""
    groups, group_of = _assembled(tracer)
    groups = tuple(tracer.widths.get(number, group) for number, group in enumerate(groups))
    left = [number for number, group in enumerate(groups) if cannot_go(group, tracer.training_only)]
    frozen = frozen_channels(tracer, group_of, groups, left)
    return ChannelGroups(tuple(group for number, group in enumerate(groups) if number not in left), tuple(frozen))


def _assembled(tracer: Tracer) -> tuple[tuple[ChannelGroup, ...], Ints]:
    """All groups in a traced graph, those that cannot go among them; and the number of each class's group."""
    sites = list(_sites(tracer))
    group_of, rank, heads = _members(tracer, sites)
    return _assemble(sites, group_of, rank, heads), group_of


@dataclass(frozen=True)
class _Axis:
    """A parameter's axis and the class of each of its positions."""

    parameter: Parameter
    axis: int
    roots: Ints


def _sites(tracer: Tracer) -> Iterator[_Axis]:
    for parameter in tracer.parameters:
        if parameter.elements is None:
            for axis, vector in enumerate(parameter.axes):
                yield _Axis(parameter, axis, tracer.classes.roots(vector).numpy())
        else:
            roots = tracer.classes.roots(parameter.elements)
            for axis in range(roots.dim()):
                if varies(roots, axis):  # labels vary along one axis at most: the first of each slab is enough
                    first = roots.movedim(axis, 0).reshape(roots.shape[axis], -1)[:, 0]
                    yield _Axis(parameter, axis, first.numpy())


def _members(tracer: Tracer, sites: list[_Axis]) -> tuple[Ints, Ints, list[bool]]:
    """Each class's group and position in it, -1 for a class without one; for each group whether its members are heads.

    Classes that occur at the same sites with the same width form a group.
    """
    random = np.random.default_rng(0)
    signature = np.zeros(len(tracer.classes), np.uint64)
    first_seen = np.full(len(tracer.classes), np.iinfo(np.int64).max)
    offset = 0
    for site in sites:
        classes, first, counts = np.unique(site.roots, return_index=True, return_counts=True)
        marks = random.integers(1, 2**63, size=int(counts.max(initial=1)) + 1, dtype=np.uint64)
        signature[classes] += marks[counts]  # equal sums: equal sites and widths, wrong with probability 2^-63
        first_seen[classes] = np.minimum(first_seen[classes], offset + first)
        offset += len(site.roots)
    signature[0] = 0
    members = np.flatnonzero(signature)
    members = members[np.argsort(first_seen[members], kind="stable")]
    by_signature: dict[int, list[int]] = {}
    for member, mark in zip(members.tolist(), signature[members].tolist(), strict=True):
        by_signature.setdefault(mark, []).append(member)
    group_of, rank = np.full(len(tracer.classes), -1), np.full(len(tracer.classes), -1)
    in_heads = {int(r) for labels in tracer.heads for r in np.unique(squeeze_constant(tracer.classes.roots(labels)))}
    heads: list[bool] = []
    for classes_of_group in by_signature.values():
        if len(classes_of_group) > 1:
            group_of[classes_of_group] = len(heads)
            rank[classes_of_group] = np.arange(len(classes_of_group))
            heads.append(classes_of_group[0] in in_heads)
    return group_of, rank, heads


def _assemble(sites: list[_Axis], group_of: Ints, rank: Ints, heads: list[bool]) -> tuple[ChannelGroup, ...]:
    sizes = np.bincount(group_of[group_of >= 0], minlength=len(heads))
    found: list[list[GroupSite]] = [[] for _ in heads]
    for site in sites:
        groups, ranks = group_of[site.roots], rank[site.roots]
        for group in np.unique(groups[groups >= 0]).tolist():
            positions = np.flatnonzero(groups == group)
            order = positions[np.argsort(ranks[positions], kind="stable")]
            parameter, reads = site.parameter, site.axis in site.parameter.read_axis
            indices = rearrange(order, "(member width) -> member width", member=int(sizes[group]))
            names, shape = tuple(parameter.names), tuple(parameter.shape)
            found[group].append(GroupSite(names, shape, site.axis, indices, reads, parameter.is_buffer))
    return tuple(
        ChannelGroup(_kind(group, head), int(size), tuple(group))
        for group, size, head in zip(found, sizes, heads, strict=True)
    )


def _kind(sites: list[GroupSite], in_attention: bool) -> Kind:
    weights = [s for s in sites if len(s.shape) > 1 and not s.buffer]
    if in_attention and any(s.indices.shape[1] > 1 for s in weights):
        return "head"
    return "channel" if any(len(s.shape) > 2 for s in weights) else "neuron"
