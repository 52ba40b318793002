"""Cut channels that gates on single layers have closed.

What a closed channel still gives, a constant, is added to the biases of the layers that read it.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from l0hooks._torch.modules import parameters_of
from l0hooks.attach.gated_weight import GatedWeight, Site
from l0hooks.errors import StateError, UnsupportedModuleError
from l0hooks.export.comparison import Comparison
from l0hooks.export.constant_inputs import constant_inputs, is_standard
from l0hooks.export.cut_groups import shrink
from l0hooks.structure import ChannelGroup
from l0hooks.structure._channel_groups import groups_and_program
from l0hooks.structure.cut_modules import Bools, plan_cuts
from l0hooks.structure.groups import ChannelGroups, GroupSite
from l0hooks.structure.layers import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, is_gateable, is_hugging_face_conv1d

Closed = dict[str, dict[int, Bools]]
Reasons = npt.NDArray[np.object_]  # for each channel or member, why it has to stay; "" if it can go
_MOST_LAYERS = 4  # that the note names
_IN_NO_GROUP = "*"  # a channel that cannot be removed by itself


def closed_channels(sites: Iterable[Site]) -> Closed:
    """Which channels gates have closed: for each weight with gates on channels, kernels or blocks, by axis.

    Gates on ``"output"`` close output channels, gates on ``"input"`` input channels, others channels of both kinds.
    """
    found: Closed = {}
    for site in sites:
        gating = site.gating
        if not isinstance(gating, GatedWeight) or gating.granularity == "weight" or not is_gateable(site.module):
            continue
        values = [gate.value().detach() for gate in gating.gates]
        shut = (gating.factor(values).to(site.weight.dtype) == 0).expand(site.weight.shape)
        shut = reduce(shut, "first second ... -> first second", "all")
        output = _output_axis(site.module)
        axes = {"output": (output,), "input": (1 - output,)}.get(str(gating.granularity), (0, 1))
        if isinstance(site.module, (*CONVOLUTIONS, *TRANSPOSED)) and site.module.groups > 1:
            axes = (0,)  # the other one counts the channels inside a group
        masks = {axis: shut.all(1 - axis).cpu().numpy() for axis in axes}
        found[site.name] = {axis: mask for axis, mask in masks.items() if mask.any()}
    return {name: masks for name, masks in found.items() if masks}


def after_cuts(closed: Closed, groups: Sequence[tuple[ChannelGroup, Bools]]) -> Closed:
    """``closed`` for a model of which only the members of ``groups`` that stay are left."""
    kept = {(name, axis): list(k) for cut in plan_cuts(groups) for name in cut.names for axis, k in cut.kept}
    return {
        name: {axis: mask[kept[name, axis]] if (name, axis) in kept else mask for axis, mask in masks.items()}
        for name, masks in closed.items()
    }


def cut_closed(
    model: nn.Module, closed: Closed, comparison: Comparison, example_inputs: Sequence[Any]
) -> tuple[nn.Module, str]:
    """A smaller model without the closed channels that nothing needs, and a remark on those that stay.

    What a closed channel still gives, its bias after norms and activations, is a constant. It is added to the biases of
    the layers that read it, if that is exact.

    Parameters
    ----------
    model : nn.Module
        Plain, the gates folded in; not changed.
    closed : dict
        From :func:`closed_channels`.
    comparison : Comparison
        With what the gated model computes.
    example_inputs : sequence

    Returns
    -------
    (nn.Module, str)
        ``model`` itself if nothing can go.
    """
    if not closed:
        return model, ""
    try:
        groups, program = _quiet_groups(model, example_inputs)
        readers = Readers(model, constant_inputs(model, program, example_inputs))
        reasons = [_reasons(group, readers, closed) for group in groups]
        folded, gained = _folded(model, readers, groups, reasons)
        if gained:
            groups, _ = _quiet_groups(folded, example_inputs)  # the new biases belong to groups, too
            reasons = [_reasons(group, readers, closed) for group in groups]
    except UnsupportedModuleError as error:
        return model, f"closed channels stay as zeros: {_first_line(error)}"
    chosen = [(group, why != "") for group, why in zip(groups, reasons, strict=True) if (why == "").any()]
    small, remark = model, ""
    if chosen:
        try:
            small, remark = shrink(folded, chosen, comparison, example_inputs, folded=True)
        except StateError:
            return model, "closed channels stay as zeros: without them the model would compute something else"
    return small, "; ".join(filter(None, (remark, _note(model, closed, groups, reasons))))


def _quiet_groups(
    model: nn.Module, example_inputs: Sequence[Any]
) -> tuple[ChannelGroups, torch.export.ExportedProgram]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporting is not what the user asked for
        return groups_and_program(model, example_inputs)


class Readers:
    """The layers that read channels, and what keeps a channel from being taken out of them.

    Parameters
    ----------
    model : nn.Module
        Plain.
    constants : mapping
        From :func:`constant_inputs`.
    """

    def __init__(self, model: nn.Module, constants: Mapping[str, Tensor]) -> None:
        self._model = model
        self._constants = constants
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._owners = Counter(t.data_ptr() for _, t in tensors if t.numel())

    def reasons(self, site: GroupSite) -> Reasons:
        """For each channel that a weight reads, why it cannot be removed; ``""`` if it can, its constant folded."""
        zero = (_channels(_tensor(self._model, site.names[0]), site.axis) == 0).all(1).cpu().numpy()
        found = np.full(len(zero), "", object)
        found[~zero] = self._obstacle(site)
        if site.module in self._constants and not found.any():
            value = self._constants[site.module].cpu().numpy()
            found[~zero & np.isnan(value)] = f"{site.module} reads varying numbers there"
            found[~zero & ~np.isnan(value) & (value != 0)] = self._unfoldable(site.module)
        return found

    def value(self, site: GroupSite) -> Tensor:
        """The constant in each channel that a weight reads; 0 for channels that vary."""
        size = site.shape[site.axis]
        return self._constants.get(site.module, torch.zeros(size, dtype=torch.float64)).nan_to_num(0.0)

    def _obstacle(self, site: GroupSite) -> str:
        module = self._model.get_submodule(site.module)
        if len(site.names) > 1 or self._owners[_tensor(self._model, site.names[0]).data_ptr()] > 1:
            return f"the weight of {site.module} is shared"
        if site.names[0].rpartition(".")[2] != "weight" or site.axis != 1 - _output_axis(module):
            return f"{site.names[0]} is read without calling a layer"
        if site.module not in self._constants or not is_standard(module):
            return f"{site.module} is not called as a layer of torch"
        return ""

    def _unfoldable(self, name: str) -> str:
        """Why a constant other than 0 cannot be added to the layer's bias."""
        module = self._model.get_submodule(name)
        bias = parameters_of(module).get("bias")
        if isinstance(module, TRANSPOSED):
            return f"its reader {name} is a transposed convolution"
        if isinstance(module, CONVOLUTIONS) and module.padding_mode == "zeros" and _pads(module):
            return f"its reader {name} pads with zeros"
        return "" if bias is None or self._owners[bias.data_ptr()] == 1 else f"its reader {name} shares its bias"


def _reasons(group: ChannelGroup, readers: Readers, closed: Closed) -> Reasons:
    """Why each member of a group has to stay; ``""`` for those that are closed and that no reader needs."""
    found = np.full(group.size, "a part of what can be removed only as a whole", object)
    for site in group.sites:
        for masks in (closed[name] for name in site.names if name in closed):
            if site.axis in masks:
                found[masks[site.axis][site.indices].all(1)] = ""
    if not group.readers:
        found[found == ""] = "no layer reads it"
    for site in group.readers:
        why = readers.reasons(site)[site.indices]
        for column in why.T:
            found = np.where(found == "", column, found)
    if (found == "").all():
        found[0] = "one member has to stay"
    return found


@torch.no_grad()
def _folded(
    model: nn.Module, readers: Readers, groups: ChannelGroups, reasons: Sequence[Reasons]
) -> tuple[nn.Module, bool]:
    """A copy in which no layer reads the members that can go, and whether a layer of it got a bias."""
    folded, gained = copy.deepcopy(model), False
    added: dict[str, Tensor] = {}
    for group, why in zip(groups, reasons, strict=True):
        for site in group.readers:
            weight = _tensor(folded, site.names[0])
            columns = torch.from_numpy(site.indices[why == ""].reshape(-1)).to(weight.device)
            kernels = _channels(weight, site.axis)[columns]
            if not bool(kernels.any()):
                continue
            value = readers.value(site).to(weight.device)[columns]
            sums = reduce(
                kernels.double(), "column (other kernel) -> column other", "sum", other=weight.shape[1 - site.axis]
            )
            added[site.module] = added.get(site.module, torch.zeros_like(sums[0])) + value @ sums
            weight.index_fill_(site.axis, columns, 0)
    for name, change in added.items():
        module = folded.get_submodule(name)
        bias = parameters_of(module).get("bias")
        if bias is None and bool(change.any()):
            weight = module.get_parameter("weight")
            bias = nn.Parameter(weight.new_zeros(len(change)), requires_grad=weight.requires_grad)
            module.register_parameter("bias", bias)
            gained = True
        if bias is not None:
            bias.copy_(bias.double() + change)
    return folded, gained


def _note(model: nn.Module, closed: Closed, groups: ChannelGroups, reasons: Sequence[Reasons]) -> str:
    """Which closed channels stay, and why, in words."""
    why: dict[tuple[str, int], Reasons] = {}
    for group, members in zip(groups, reasons, strict=True):
        for site in group.sites:
            for name in site.names:
                along = why.setdefault((name, site.axis), np.full(site.shape[site.axis], _IN_NO_GROUP, object))
                along[site.indices] = members[:, None]
    frozen = {module: part.reason for part in groups.frozen for module in part.modules}
    lines: dict[str, list[str]] = {"output": [], "input": []}
    for name, masks in closed.items():
        path = name.rpartition(".")[0]
        for axis, mask in masks.items():
            kind = "output" if axis == _output_axis(model.get_submodule(path)) else "input"
            other = "what it reads cannot be removed"
            if kind == "output":
                other = frozen.get(path or name, "its channels cannot be removed one by one")
            found = why.get((name, axis), np.full(len(mask), _IN_NO_GROUP, object))[mask]
            stay = [other if reason == _IN_NO_GROUP else reason for reason in found if reason]
            if stay:
                count = f"{len(stay)} of {mask.sum()}: " if len(stay) < mask.sum() else ""
                lines[kind].append(f"{path or name} ({count}{Counter(stay).most_common(1)[0][0]})")
    parts = []
    for kind, layers in lines.items():
        if layers:
            more = f" and {len(layers) - _MOST_LAYERS} more" if len(layers) > _MOST_LAYERS else ""
            parts.append(f"closed {kind} channels stay as zeros: {'; '.join(layers[:_MOST_LAYERS])}{more}")
    return "; ".join(parts)


def _output_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, (*TRANSPOSED, *EMBEDDINGS)) or is_hugging_face_conv1d(module) else 0


def _tensor(model: nn.Module, name: str) -> Tensor:
    found: Tensor = attrgetter(name)(model)
    return found


def _channels(weight: Tensor, axis: int) -> Tensor:
    """One row for each channel along ``axis``."""
    pattern = "first second ... -> first (second ...)" if axis == 0 else "first second ... -> second (first ...)"
    return rearrange(weight.detach(), pattern)


def _pads(module: nn.Module) -> bool:
    padding: Any = module.padding
    if isinstance(padding, str):
        sizes: Any = module.kernel_size
        return padding == "same" and any(size > 1 for size in sizes)
    return any(size > 0 for size in padding)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
