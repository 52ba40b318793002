"""Which residual streams are gated, and the hooks on their norms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import get_args

from torch import nn
from torch.utils.hooks import RemovableHandle

from l0hooks.attach.gated_weight import Gating
from l0hooks.attach.spec import GateSpec
from l0hooks.attach.width_weight import CentreInput, WidthWeight
from l0hooks.errors import L0HooksWarning, explain
from l0hooks.structure import ChannelGroup, ChannelGroups, Kind, channel_groups
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.structure.width.fold import centring_norms

_WIDTH = "width"
_SHOWN = 3  # reasons in a warning


def find_groups(model: nn.Module, specs: Sequence[GateSpec], example_inputs: ExampleInputs) -> ChannelGroups:
    """The groups of ``model``; its residual streams among them where one of ``specs`` names their kind."""
    return channel_groups(model, example_inputs, kinds=get_args(Kind) if any(map(_names_width, specs)) else None)


def without_expert_streams(
    chosen: Sequence[tuple[ChannelGroup, GateSpec]],
) -> list[tuple[ChannelGroup, GateSpec]]:
    """``chosen`` without streams that experts write whose own gates multiply the same weights; a warning names them."""
    of_experts = {
        name for group, _ in chosen if group.kind == "expert" for site in group.readers for name in site.names
    }
    stay: list[tuple[ChannelGroup, GateSpec]] = []
    left: list[str] = []
    for group, spec in chosen:
        parts = () if group.width is None else group.width.gates
        met = [name for part in parts for name in part.names if name in of_experts]
        left += met[:1]
        stay += [] if met else [(group, spec)]
    if left:
        text = explain(
            f"sparsify: {left[0]!r}",
            "a weight carries gates of experts or of the stream that it writes.",
            got="both kinds; the residual width stays without gates",
            hint='kinds without "expert"',
        )
        warnings.warn(text, L0HooksWarning, stacklevel=6)
    return stay


def warn_without_width(
    specs: Sequence[GateSpec], chosen: Sequence[tuple[ChannelGroup, GateSpec]], found: Sequence[ChannelGroup]
) -> None:
    """Warn if residual width was asked for and no stream will be gated."""
    if not any(map(_names_width, specs)) or any(group.kind == _WIDTH for group, _ in chosen):
        return
    reasons = list(dict.fromkeys(f.reason for f in found.frozen)) if isinstance(found, ChannelGroups) else []
    excluded = any(group.kind == _WIDTH for group in found)
    got = "a stream of which a layer is excluded" if excluded else "none; frozen: " + "; ".join(reasons[:_SHOWN])
    text = explain(
        "sparsify",
        "residual width is gated where all norms of a stream are certain and none of its layers is excluded.",
        got=got,
        hint="print(l0hooks.channel_groups(model, example_inputs, kinds=('width',)))",
    )
    warnings.warn(text, L0HooksWarning, stacklevel=5)


def gated_modules(model: nn.Module, group: ChannelGroup) -> set[nn.Module]:
    """The modules whose parameters, or whose input, the gates of a group multiply or centre."""
    owners = {model.get_submodule(name.rpartition(".")[0]) for site in group.gated for name in site.names}
    return owners | {module for module, _ in centring_norms(model, group)}


def hook_norms(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, GateSpec]], gatings: Sequence[Gating]
) -> list[RemovableHandle]:
    """Let the norms of gated streams that subtract a mean take it over the open channels."""
    handles = []
    for number, (group, _) in enumerate(groups):
        for module, kind in centring_norms(model, group):
            gating = next(one for one in gatings if isinstance(one, WidthWeight) and number in one.numbers)
            handles.append(CentreInput(gating, number, kind).attach(module))
    return handles


def _names_width(spec: GateSpec) -> bool:
    return spec.kinds is not None and _WIDTH in spec.kinds
