"""``ChannelGroup``: channels, neurons or heads that can be removed, with all their places; and what cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["channel", "neuron", "head"]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroupSite:
    """One parameter axis that a group runs through.

    Attributes
    ----------
    names : tuple of str
        Qualified names of the parameter or buffer; several if it is tied.
    shape : tuple of int
    axis : int
    indices : numpy array, int64, shape (members of the group, width)
        Where along the axis each member lies.
    reads : bool
        Whether layers read their input along this axis: here a gate is exact.
    buffer : bool
        Whether it is a buffer.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from l0hooks import channel_groups
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> (reader,) = channel_groups(model, (torch.zeros(2, 8),))[0].readers
    >>> reader.names, reader.axis, reader.indices.shape
    (('2.weight',), 1, (16, 1))
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int
    indices: Ints
    reads: bool
    buffer: bool

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the parameter."""
        return self.names[0].rpartition(".")[0]

    @property
    def parameters_each(self) -> int:
        """Numbers that vanish from this parameter with one member, the others all kept."""
        if self.buffer:
            return 0
        total = int(np.prod(self.shape))
        return total // self.shape[self.axis] * int(self.indices.shape[1])


@dataclass(frozen=True)
class ChannelGroup:
    """Channels, neurons or heads of one kind: every member can be removed independently of the others.

    Attributes
    ----------
    kind : "channel", "neuron" or "head"
    size : int
        Number of members.
    sites : tuple of GroupSite
        Everywhere a member has to be cut out.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from l0hooks import channel_groups
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> group = channel_groups(model, (torch.zeros(2, 8),))[0]
    >>> group.kind, group.size, [site.names for site in group.sites]
    ('neuron', 16, [('0.weight',), ('0.bias',), ('2.weight',)])
    """

    kind: Kind
    size: int
    sites: tuple[GroupSite, ...]

    @property
    def writers(self) -> tuple[GroupSite, ...]:
        """Weights that produce the members."""
        return tuple(s for s in self.sites if not s.reads and len(s.shape) > 1 and not s.buffer)

    @property
    def readers(self) -> tuple[GroupSite, ...]:
        """Weights that read the members."""
        return tuple(s for s in self.sites if s.reads)

    @property
    def name(self) -> str:
        """Name of the first module that produces the members (that reads them, if none does)."""
        return _names((*self.writers, *self.sites)[:1])

    @property
    def parameters_each(self) -> int:
        """Parameters that vanish with one member, all others kept."""
        return sum(site.parameters_each for site in self.sites)

    def __str__(self) -> str:
        producing = {s.module for s in self.writers}
        between = [s for s in self.sites if not s.reads and s.module not in producing]
        parts = [
            _names(self.writers) + " outputs" if self.writers else "",
            _names(between),
            _names(self.readers) + " inputs" if self.readers else "",
        ]
        noun = self.kind if self.size == 1 else self.kind + "s"
        return f"{' → '.join(p for p in parts if p)}: {self.size:,} {noun}, {self.parameters_each:,} parameters each"


@dataclass(frozen=True)
class FrozenChannels:
    """Outputs of layers that cannot be removed, and why.

    Attributes
    ----------
    modules : tuple of str
        Qualified names of the layers.
    reason : str

    Examples
    --------
    >>> print(FrozenChannels(("head",), "an output of the model"))
    frozen: an output of the model: head
    """

    modules: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"frozen: {self.reason}: {', '.join(self.modules)}"


@dataclass(frozen=True)
class ChannelGroups(Sequence[ChannelGroup]):
    """All groups of a model, in the order of its layers; prints one line each, and what is frozen.

    Attributes
    ----------
    groups : tuple of ChannelGroup
    frozen : tuple of FrozenChannels

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from l0hooks import channel_groups
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> found = channel_groups(model, (torch.zeros(2, 8),))
    >>> len(found), found.frozen[0].modules
    (1, ('2',))
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenChannels, ...]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.groups, *self.frozen)))


def _names(sites: Sequence[GroupSite]) -> str:
    shown = list(dict.fromkeys(s.module or s.names[0] for s in sites))
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
