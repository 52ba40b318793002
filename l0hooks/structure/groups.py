"""``ChannelGroup``: channels, neurons or heads that can be removed, and every tensor axis that holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from l0hooks.structure.routers import Router
from l0hooks.structure.width.parts import Width

Kind = Literal["channel", "neuron", "head", "expert", "width", "layer"]
WITHOUT_ASKING: tuple[Kind, ...] = ("channel", "neuron", "head")  # the kinds that are gated if none is named
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroupSite:
    """An axis of a parameter or buffer that holds the members of a group.

    Attributes
    ----------
    names : tuple of str
        Qualified names of the parameter or buffer; several if it is tied.
    shape : tuple of int
        Of the tensor.
    axis : int
    indices : numpy array, int64, shape (members of the group, width)
        The positions of each member along the axis.
    reads : bool
        Whether layers read their input along this axis. Gates on such axes make removal exact.
    buffer : bool
        Whether the tensor is a buffer.
    stacked : bool
        Whether ``names`` are different tensors of equal shape, one for each expert of a list, which count as one
        tensor stacked along a first axis.

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
    stacked: bool = False

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the parameter."""
        return self.names[0].rpartition(".")[0]

    @property
    def of_experts(self) -> bool:
        """Whether the tensor is one of experts, whose first axis or stack counts them, rather than their router's."""
        return self.stacked or len(self.shape) > 2

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape that a tensor of that name has in the model: without the stack's axis."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def parameters_each(self) -> int:
        """Elements removed from this parameter with one member when all others stay; 0 for a buffer."""
        if self.buffer:
            return 0
        total = int(np.prod(self.shape))
        return total // self.shape[self.axis] * int(self.indices.shape[1])


@dataclass(frozen=True)
class ChannelGroup:
    """Channels, neurons, heads or experts: every member can be removed independently of the others.

    Attributes
    ----------
    kind : "channel", "neuron", "head", "expert" or "width"
    size : int
        Number of members.
    sites : tuple of GroupSite
        Every tensor axis that holds the members.
    least : int
        How many members stay at the least: as many experts as a router chooses for each token.
    multiple : int
        The number of members that stay is a multiple of it where ``size`` is: kernels for experts need that.
    counts : tuple of (module, attribute)
        Where modules hold the number of members.
    router : Router or None
        What chooses among experts.
    width : Width or None
        Of the channels of a residual stream: what their gates multiply, and the norms that read them.

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
    least: int = 1
    multiple: int = 1
    counts: tuple[tuple[str, str], ...] = ()
    router: Router | None = None
    width: Width | None = None

    @property
    def writers(self) -> tuple[GroupSite, ...]:
        """Weights that produce the members."""
        return tuple(s for s in self.sites if not s.reads and len(s.shape) > 1 and not s.buffer)

    @property
    def readers(self) -> tuple[GroupSite, ...]:
        """Weights that read the members."""
        return tuple(s for s in self.sites if s.reads)

    @property
    def gated(self) -> tuple[GroupSite, ...]:
        """Parameters that gates multiply: those that read the members; of a residual stream, those that write it."""
        if self.width is None:
            return self.readers
        gated = {(gate.names, gate.axis) for gate in self.width.gates}
        return tuple(site for site in self.sites if (site.names, site.axis) in gated)

    @property
    def first(self) -> GroupSite:
        """The first weight that produces the members; the first place of any kind if none does."""
        return (*self.writers, *self.sites)[0]

    @property
    def name(self) -> str:
        """Name of the first module that produces the members (that reads them, if none does)."""
        return _names((self.first,))

    @property
    def parameters_each(self) -> int:
        """Parameters removed with one member when all others stay."""
        return sum(site.parameters_each for site in self.sites)

    def renamed(self, rename: Callable[[str], str | None]) -> ChannelGroup | None:
        """The group by other names of modules and tensors, without what has none; None if nothing is left."""
        names = [tuple(new for name in site.names if (new := rename(name)) is not None) for site in self.sites]
        sites = tuple(replace(site, names=new) for site, new in zip(self.sites, names, strict=True) if new)
        if not sites:
            return None
        counts = tuple((new, own) for module, own in self.counts if (new := rename(module)) is not None)
        path = None if self.router is None else rename(self.router.module)
        router = None if self.router is None or path is None else replace(self.router, module=path)
        width = None if self.width is None else self.width.renamed(rename)
        return replace(self, sites=sites, counts=counts, router=router, width=width)

    def __str__(self) -> str:
        producing = {s.module for s in self.writers}
        between = [s for s in self.sites if not s.reads and s.module not in producing]
        parts = [
            _names(self.writers) + " outputs" if self.writers else "",
            _names(between),
            _names(self.readers) + " inputs" if self.readers else "",
        ]
        return f"{' → '.join(p for p in parts if p)}: {self._count()}, {self.parameters_each:,} parameters each"

    def _count(self) -> str:
        """The members in words: blocks of channels that only go together, as under a GroupNorm, are groups."""
        nouns = self.kind + "s"
        first = self.first.indices
        width = first.shape[1]
        if self.kind == "head" or width == 1 or (first != first[:, :1] + np.arange(width)).any():
            return f"{self.size:,} {self.kind if self.size == 1 else nouns}"
        return f"{self.size:,} group{'' if self.size == 1 else 's'} of {width:,} {nouns}"


@dataclass(frozen=True)
class FrozenChannels:
    """Outputs of layers that cannot be removed, and why.

    Attributes
    ----------
    modules : tuple of str
        Qualified names of the layers.
    reason : str
        Why they stay.

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
    """All groups of a model in the order of its layers; ``print`` shows one line for each, then what is frozen.

    Attributes
    ----------
    groups : tuple of ChannelGroup
    frozen : tuple of FrozenChannels
        Layers with outputs that cannot be removed.

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
