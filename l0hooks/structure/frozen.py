"""What cannot be removed from a traced model, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from l0hooks.structure.groups import ChannelGroup, FrozenChannels, Ints
from l0hooks.structure.references import Parameter
from l0hooks.structure.tracer import Tracer

_PARTS = ("weight", "bias", "in_proj", "q_proj", "k_proj", "v_proj")  # tensors that are shown by their layer's name
_FIXED = ("positions of a kernel", "counts the channels inside a group", "rows of an embedding")


def cannot_go(group: ChannelGroup, training_only: AbstractSet[str] = frozenset()) -> str:
    """Why a group that the graph allows to cut is left alone; empty if it is not.

    Parameters
    ----------
    group : ChannelGroup
    training_only : set of str
        Parameters and buffers that are used in training only.
    """
    if all(name in training_only for site in group.sites for name in site.names):
        return "used in training only"
    if not group.readers:
        return "no weight reads them"
    given = [site for site in group.sites if not site.reads]
    if not given:
        return "only the model's own code fills them"
    buffers = [site for site in given if site.buffer]
    if buffers and not group.writers and (buffers == given or any(len(site.shape) > 1 for site in buffers)):
        return "only a buffer holds them, and its module may make it anew"
    return ""


def frozen_channels(
    tracer: Tracer, group_of: Ints, groups: Sequence[ChannelGroup], left: Sequence[int]
) -> Iterator[FrozenChannels]:
    """Parameters with channels that cannot be removed, by reason.

    Parameters
    ----------
    tracer : Tracer
    group_of : numpy array
        The group of every class, -1 without one.
    groups : sequence of ChannelGroup
    left : sequence of int
        The groups that :func:`cannot_go` leaves alone.
    """
    by_reason: dict[str, dict[str, None]] = {}
    why = {number: cannot_go(groups[number], tracer.training_only) for number in left}
    for number in left:
        for site in groups[number].sites:
            if site.buffer and groups[number].readers and not groups[number].writers:
                by_reason.setdefault(why[number], {})[site.names[0]] = None
    for parameter in tracer.parameters:
        if parameter.is_buffer:
            continue
        if not parameter.is_used:
            by_reason.setdefault("not used in evaluation", {})[_shown(parameter)] = None
        for labels in _written(tracer, parameter, group_of):
            numbers = group_of[tracer.classes.roots(labels).numpy()]
            for number in (-1, *left):
                part = torch.from_numpy(numbers == number)
                if part.any():
                    reason = (
                        tracer.why(labels[part]) if number == -1 else cannot_go(groups[number], tracer.training_only)
                    )
                    count = "" if part.all() else f" ({int(part.sum())} of {len(part)})"
                    by_reason.setdefault(reason, {})[_shown(parameter) + count] = None
    for reason, modules in by_reason.items():
        yield FrozenChannels(tuple(modules), reason)


def _written(tracer: Tracer, parameter: Parameter, group_of: Ints) -> list[Tensor]:
    """The labels along the axes of a parameter by which it counts as removable or frozen; one axis, as a rule."""
    if parameter.elements is not None:
        labels = parameter.elements.reshape(-1)
        return [labels] if (group_of[tracer.classes.roots(labels).numpy()] < 0).all() else []
    written = [labels for axis, labels in enumerate(parameter.axes[:2]) if axis not in parameter.read_axis]
    if not parameter.read_axis and len(written) > 1:
        # of the two axes of an embedding or a grouped kernel one never has channels
        written = [labels for labels in written if not tracer.why(labels).startswith(_FIXED)]
    return written[:1]


def _shown(parameter: Parameter) -> str:
    """The layer that holds a parameter, or the parameter's own name if that says more."""
    module, _, name = parameter.names[0].rpartition(".")
    return module if module and name.startswith(_PARTS) else parameter.names[0]
