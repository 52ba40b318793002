"""Copies of a block of experts that are tried out: multiplied, cut, and compared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.modules import buffers_of, parameters_of
from l0hooks._torch.running import OUT_OF_MEMORY
from l0hooks.errors import in_one_line
from l0hooks.structure.cut_experts import list_of
from l0hooks.structure.expert_blocks import Calls, ExpertBlock, outputs_of_block
from l0hooks.structure.groups import ChannelGroup, GroupSite

_ROUNDING_ULPS = 1000  # units in the last place by which two runs of one block may differ, in its own dtype
_LARGEST_TOLERANCE = 0.05


@dataclass
class Trial:
    """A block, what it is given, and copies of it that are tried out.

    Attributes
    ----------
    model : nn.Module
        That holds the block. Not changed.
    block : ExpertBlock
    calls : Calls
    """

    model: nn.Module
    block: ExpertBlock
    calls: Calls

    def names(self, site: GroupSite) -> tuple[str, ...]:
        """The names of a site's tensors inside the block."""
        start = f"{self.block.name}." if self.block.name else ""
        return tuple(name.removeprefix(start) for name in site.names if name.startswith(start))

    def inside(self, group: ChannelGroup) -> ChannelGroup:
        """The group by names inside the block."""
        start = f"{self.block.name}." if self.block.name else ""
        sites = tuple(replace(site, names=self.names(site)) for site in group.sites)
        counts = tuple((f"{module}.".removeprefix(start).rstrip("."), name) for module, name in group.counts)
        return replace(group, sites=sites, counts=counts)

    def copied(self, factors: Sequence[tuple[GroupSite, Tensor]] = ()) -> nn.Module:
        """A copy of the block with some tensors multiplied; other parameters are shared."""
        module = self.model.get_submodule(self.block.name)
        twin = copy.deepcopy(module, {id(p): p for p in module.parameters()})
        for site, factor in factors:
            names = self.names(site)
            parts = list(factor.expand(len(names), *factor.shape[1:])) if site.stacked else [factor]
            for name, part in zip(names if site.stacked else names[:1], parts, strict=True):
                weight = twin.get_parameter(name)
                product = nn.Parameter(weight.detach() * part.to(weight), requires_grad=False)
                for other in [name] if site.stacked else names:
                    path, _, own = other.rpartition(".")
                    setattr(twin.get_submodule(path), own, product)
        return twin

    def of_router(self, site: GroupSite) -> bool:
        """Whether a site is one of the router's own tensors."""
        return site.module == self.block.router

    def rotated(self) -> nn.Module:
        """A copy in which every expert, with its row of the router, takes the place of the next one."""
        twin = self.copied()
        for path in dict.fromkeys(list_of(replace(s, names=self.names(s))) for s in self.block.sites if s.stacked):
            modules = list(twin.get_submodule(path).children())
            twin.set_submodule(path, nn.ModuleList([modules[-1], *modules[:-1]]))
        for site in (site for site in self.block.sites if not site.stacked):
            for name in self.names(site):
                path, _, own = name.rpartition(".")
                module = twin.get_submodule(path)
                table: dict[str, Any] = buffers_of(module) if site.buffer else parameters_of(module)
                rolled = table[own].detach().roll(1, 0)
                table[own] = rolled if site.buffer else nn.Parameter(rolled, requires_grad=False)
        return twin

    def run(self, block: nn.Module) -> list[Tensor]:
        """The first tensor that a copy of the block returns, for each call."""
        return outputs_of_block(block, self.calls)

    def differs(self, expected: Sequence[Tensor], block: nn.Module) -> str:
        """How the outputs of a copy differ from what they should be; empty if they do not.

        Only the first tensor counts: others, such as the router's logits, have a place for each expert.
        """
        try:
            got = self.run(block)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001  # a block's own code can raise anything if sizes do not fit
            return in_one_line(error)
        if [t.shape for t in got] != [t.shape for t in expected]:
            return "outputs of other shapes"
        gaps = [gap(a, b) for a, b in zip(expected, got, strict=True)]
        wrong = max((value for value, allowed in gaps if not value <= allowed), default=0.0)
        return f"a difference of {wrong:.1e} of the output's scale" if wrong else ""


def gap(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest difference as a share of the scale, and what rounding may make it."""
    allowed = min(_ROUNDING_ULPS * torch.finfo(a.dtype).eps, _LARGEST_TOLERANCE)
    scale = float(a.double().abs().max()) if a.numel() else 1.0
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return float("inf"), allowed
    return float((a.double() - b.double()).abs().max() if a.numel() else 0.0) / (scale or 1.0), allowed
