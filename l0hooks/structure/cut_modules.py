"""Cut members of channel groups out of the modules of a model, and keep the modules' own numbers true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l0hooks._torch.modules import NORMS, buffers_of, parameters_of
from l0hooks.structure.groups import ChannelGroup
from l0hooks.structure.layers import CONVOLUTIONS, TRANSPOSED, is_hugging_face_conv1d

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """What stays of one parameter or buffer: the indices kept along each axis that is cut."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kept: tuple[tuple[int, tuple[int, ...]], ...]


def plan_cuts(groups: Iterable[tuple[ChannelGroup, Bools]]) -> list[Cut]:
    """The cuts that leave only the members whose mask is true; several groups may cut one axis.

    Parameters
    ----------
    groups : iterable of (ChannelGroup, bool array of shape (group.size,))

    Returns
    -------
    list of Cut
    """
    masks: dict[tuple[tuple[str, ...], tuple[int, ...]], dict[int, Bools]] = {}
    for group, stays in groups:
        for site in group.sites:
            axes = masks.setdefault((site.names, site.shape), {})
            mask = axes.setdefault(site.axis, np.ones(site.shape[site.axis], np.bool_))
            mask[site.indices[~stays].reshape(-1)] = False
    cuts = []
    for (names, shape), axes in masks.items():
        kept = tuple((axis, tuple(np.flatnonzero(mask).tolist())) for axis, mask in axes.items() if not mask.all())
        if kept:
            cuts.append(Cut(names, shape, kept))
    return cuts


@torch.no_grad()
def apply_cuts(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Slice parameters and buffers of ``model`` **in place** and correct the sizes its modules know themselves by."""
    touched: dict[str, nn.Module] = {}
    for cut in cuts:
        sliced: Tensor | None = None
        for name in cut.names:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            own = parameters_of(module)
            table: Any = own if attribute in own else buffers_of(module)
            old = table[attribute]
            if old is None:
                continue
            if sliced is None:
                sliced = _sliced(old, cut)
            table[attribute] = sliced  # a Parameter where the old one was
            touched[path] = module
    for module in touched.values():
        correct_sizes(module)


def _sliced(tensor: Tensor, cut: Cut) -> Tensor:
    result = tensor.detach()
    for axis, kept in cut.kept:
        result = result.index_select(axis, torch.tensor(kept, device=result.device))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(result.contiguous(), requires_grad=tensor.requires_grad)
    return result


def correct_sizes(module: nn.Module) -> None:
    """Make ``in_features``, ``num_features``, ``groups`` and the like agree with the tensors of ``module``."""
    for kinds, correct in _CORRECTIONS:
        if isinstance(module, kinds):
            correct(module)
    if is_hugging_face_conv1d(module):
        weight = parameters_of(module)["weight"]
        if weight is not None:
            module.nx, module.nf = weight.shape  # type: ignore[assignment]  # transformers' names for in and out


def _linear(module: nn.Linear) -> None:
    module.out_features, module.in_features = module.weight.shape


def _convolution(module: nn.Conv2d) -> None:
    if module.groups > 1:
        module.groups = module.groups * module.weight.shape[0] // module.out_channels
    module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups


def _transposed(module: nn.ConvTranspose2d) -> None:
    if module.groups > 1:
        module.groups = module.groups * module.weight.shape[0] // module.in_channels
    module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups


def _batch_norm(module: nn.BatchNorm2d) -> None:
    for tensor in (module.weight, module.running_mean):
        if tensor is not None:
            module.num_features = tensor.shape[0]


def _group_norm(module: nn.GroupNorm) -> None:
    module.num_groups = module.num_groups * module.weight.shape[0] // module.num_channels
    module.num_channels = module.weight.shape[0]


def _embedding(module: nn.Embedding) -> None:
    module.embedding_dim = module.weight.shape[1]


def _layer_norm(module: nn.LayerNorm) -> None:
    module.normalized_shape = tuple(module.weight.shape)


def _prelu(module: nn.PReLU) -> None:
    module.num_parameters = module.weight.shape[0]


_CORRECTIONS: tuple[tuple[tuple[type[nn.Module], ...], Callable[..., None]], ...] = (
    ((nn.Linear,), _linear),
    (CONVOLUTIONS, _convolution),
    (TRANSPOSED, _transposed),
    (NORMS, _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.LayerNorm,), _layer_norm),
    ((nn.PReLU,), _prelu),
)
