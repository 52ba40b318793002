"""Cut members of channel groups out of the modules of a model, and update the sizes that the modules store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l0hooks._torch.modules import NORMS
from l0hooks.structure.groups import ChannelGroup
from l0hooks.structure.layers import CONVOLUTIONS, TRANSPOSED, is_hugging_face_conv1d

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """The indices of one parameter or buffer that are kept along each axis that is cut."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kept: tuple[tuple[int, tuple[int, ...]], ...]


def plan_cuts(groups: Iterable[tuple[ChannelGroup, Bools]]) -> list[Cut]:
    """The cuts that leave only the members whose mask is true; several groups may cut one axis.

    Tensors of experts in a list are cut one by one; that experts leave the list is no cut.

    Parameters
    ----------
    groups : iterable of (ChannelGroup, bool array of shape (group.size,))

    Returns
    -------
    list of Cut
    """
    groups = list(groups)
    stacks = {site.names for group, _ in groups for site in group.sites if site.stacked}
    cuts = []
    for (names, shape), kept in _kept(groups).items():
        if names in stacks:
            inside = tuple((axis - 1, indices) for axis, indices in kept.items() if axis)
            cuts += [Cut((name,), shape[1:], inside) for name in names if inside]
        elif kept:
            cuts.append(Cut(names, shape, tuple(kept.items())))
    return cuts


def _kept(
    groups: Iterable[tuple[ChannelGroup, Bools]],
) -> dict[tuple[tuple[str, ...], tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """For every tensor, by its names and shape, the positions that are kept along each axis that is cut."""
    masks: dict[tuple[tuple[str, ...], tuple[int, ...]], dict[int, Bools]] = {}
    for group, stays in groups:
        for site in group.sites:
            axes = masks.setdefault((site.names, site.shape), {})
            mask = axes.setdefault(site.axis, np.ones(site.shape[site.axis], np.bool_))
            mask[site.indices[~stays].reshape(-1)] = False
    return {
        tensor: {axis: tuple(np.flatnonzero(mask).tolist()) for axis, mask in axes.items() if not mask.all()}
        for tensor, axes in masks.items()
    }


def groups_left(groups: Sequence[tuple[ChannelGroup, Bools]]) -> list[ChannelGroup]:
    """The groups as they are once :func:`plan_cuts` of them was applied: shapes and positions of what stays.

    Examples
    --------
    >>> from l0hooks import channel_groups
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> (group,) = channel_groups(model, (torch.ones(1, 2),))
    >>> (left,) = groups_left([(group, np.array([True, False, True]))])
    >>> left.size, left.first.shape, left.first.indices.tolist()
    (2, (2, 2), [[0], [1]])
    """
    every = _kept(groups)
    found = []
    for group, stays in groups:
        sites = []
        for site in group.sites:
            along = every[site.names, site.shape]
            shape = tuple(len(along.get(axis, range(n))) for axis, n in enumerate(site.shape))
            indices = site.indices[stays]
            if site.axis in along:
                indices = np.searchsorted(along[site.axis], indices)
            sites.append(replace(site, shape=shape, indices=indices))
        found.append(replace(group, size=int(stays.sum()), sites=tuple(sites)))
    return found


def composed(first: Sequence[Cut], second: Sequence[Cut]) -> list[Cut]:
    """The cuts that do at once what ``first`` and then ``second`` do.

    Examples
    --------
    >>> composed([Cut(("a",), (4,), ((0, (0, 2, 3)),))], [Cut(("a",), (3,), ((0, (1, 2)),))])
    [Cut(names=('a',), shape=(4,), kept=((0, (2, 3)),))]
    """
    found = {cut.names: cut for cut in first}
    for cut in second:
        names = next((names for names in found if not set(names).isdisjoint(cut.names)), cut.names)
        earlier = found.get(names, Cut(cut.names, cut.shape, ()))
        kept = dict(earlier.kept)
        for axis, indices in cut.kept:
            kept[axis] = tuple(kept[axis][n] for n in indices) if axis in kept else indices
        found[names] = Cut(names, earlier.shape, tuple(kept.items()))
    return list(found.values())


@torch.no_grad()
def apply_cuts(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Slice parameters and buffers of ``model`` **in place** and update the sizes that its modules store."""
    touched: dict[str, nn.Module] = {}
    for cut in cuts:
        sliced: Tensor | None = None
        for name in cut.names:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            old: Tensor | None = attrgetter(attribute)(module)
            if old is None:
                continue
            if sliced is None:
                sliced = _sliced(old, cut)
            setattr(module, attribute, sliced)  # a Parameter if the old tensor was one
            touched[path] = module
    correct_sizes(touched.values())


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in all places of ``model`` where ``old`` is, **in place**."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def sliced(tensor: Tensor, cut: Cut) -> Tensor:
    """The part of a tensor that ``cut`` keeps, without a gradient.

    Examples
    --------
    >>> sliced(torch.arange(6).view(2, 3), Cut(("a",), (2, 3), ((1, (0, 2)),)))
    tensor([[0, 2],
            [3, 5]])
    """
    result = tensor.detach()
    for axis, kept in cut.kept:
        result = result.index_select(axis, torch.tensor(kept, device=result.device))
    return result


def _sliced(tensor: Tensor, cut: Cut) -> Tensor:
    """:func:`sliced`; a Parameter if ``tensor`` is one."""
    result = sliced(tensor, cut)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(result.contiguous(), requires_grad=tensor.requires_grad)
    return result


def correct_sizes(modules: Collection[nn.Module]) -> None:
    """Make ``in_features``, ``num_features``, ``groups`` and the like agree with the tensors of ``modules``."""
    for module in modules:
        for kinds, correct in _CORRECTIONS:
            if isinstance(module, kinds):
                correct(module)
    for module in filter(is_hugging_face_conv1d, modules):
        # transformers' names for in and out
        module.nx, module.nf = module.get_parameter("weight").shape  # type: ignore[assignment]


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
    if module.num_groups > 1:  # else the norm of a stream, of which single channels go
        module.num_groups = module.num_groups * module.weight.shape[0] // module.num_channels
    module.num_channels = module.weight.shape[0]


def _embedding(module: nn.Embedding) -> None:
    module.embedding_dim = module.weight.shape[1]


def _layer_norm(module: nn.LayerNorm | nn.RMSNorm) -> None:
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
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.PReLU,), _prelu),
)
