"""Whether groups that are given by hand fit a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from l0hooks.errors import SpecError, explain
from l0hooks.structure import ChannelGroup, GroupSite
from l0hooks.structure.named_tensors import Tensors


def check_groups(model: nn.Module, groups: object) -> tuple[ChannelGroup, ...]:
    """Groups that were given by hand, once it is sure that they fit ``model`` and each other.

    Raises
    ------
    SpecError
        If they are no groups, do not belong to the model, or claim the same channels.
    """
    if not isinstance(groups, Sequence) or not all(isinstance(group, ChannelGroup) for group in groups):
        got = ", ".join(type(g).__name__ for g in groups) if isinstance(groups, Sequence) else type(groups).__name__
        raise SpecError(
            explain(
                "sparsify", "groups are a sequence of ChannelGroup.", got=got, hint="groups=[declare_group(...), ...]"
            )
        )
    tensors = Tensors(model)
    taken: dict[tuple[str, int], list[tuple[npt.NDArray[np.int64], ChannelGroup]]] = {}
    for group in groups:
        for site in group.sites:
            wrong = _misfit(tensors, group, site)
            if wrong:
                raise SpecError(
                    explain(
                        f"sparsify: group {group.name!r}",
                        "groups must have been declared or found in this model.",
                        got=wrong,
                        hint="declare_group(model, ...), or a part of channel_groups(model, example_inputs)",
                    )
                )
            for indices, other in taken.setdefault((site.names[0], site.axis), []):
                if np.intersect1d(indices, site.indices).size:
                    raise SpecError(
                        explain(
                            f"sparsify: {site.names[0]!r}",
                            "groups must not share channels.",
                            got=f"axis {site.axis} in {other.name!r} and in {group.name!r}",
                            hint="one group, or a pair (name, indices) for each",
                        )
                    )
            taken[site.names[0], site.axis].append((site.indices, group))
    return tuple(groups)


def _misfit(tensors: Tensors, group: ChannelGroup, site: GroupSite) -> str:
    """How a site does not belong to the model; empty if it does."""
    name = site.names[0]
    if name not in tensors.by_name:
        return f"{name!r}, which the model does not have"
    shape, names = tuple(tensors.by_name[name].shape), tensors.names(name)
    if site.stacked:
        alike = [n for n in site.names if n in tensors.by_name and tuple(tensors.by_name[n].shape) == shape]
        shape, names = (len(alike), *shape), tuple(n for n in alike if len(tensors.names(n)) == 1)
    if shape != site.shape or not 0 <= site.axis < len(shape):
        return f"{name!r} of shape {site.shape}, axis {site.axis}, where the model has {shape}"
    if set(names) != set(site.names):
        return f"{', '.join(site.names)} as one tensor, where the model has {', '.join(names)}"
    within = site.indices.size and site.indices.min() >= 0 and site.indices.max() < shape[site.axis]
    if site.indices.ndim != 2 or len(site.indices) != group.size or not within:
        return f"indices of {name!r} that do not lie in its axis {site.axis} of length {shape[site.axis]}"
    return "" if len(np.unique(site.indices)) == site.indices.size else f"an index of {name!r} twice"
