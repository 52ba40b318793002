"""Norms of a stream that lost channels: centred over those that are open, and folded once the others are cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l0hooks._torch.modules import unhook
from l0hooks.structure.cut_modules import Bools
from l0hooks.structure.groups import ChannelGroup
from l0hooks.structure.width.parts import NormKind, WidthNorm

_CENTRING = ("layer", "group")


def centring_norms(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[nn.Module, NormKind]]:
    """The norms of a stream that subtract a mean, each module once; none of a group that is no stream."""
    norms = () if group.width is None else group.width.norms
    found = {model.get_submodule(norm.module): norm.kind for norm in norms if norm.kind in _CENTRING}
    yield from found.items()


def centred(x: Tensor, is_open: Tensor, kind: NormKind) -> Tensor:
    """The input of a norm minus its mean over the open channels; closed channels, which are zero, stay zero.

    Parameters
    ----------
    x : Tensor, shape (..., channels) for "layer", (examples, channels, ...) for "group"
        Zero in closed channels.
    is_open : Tensor, boolean, shape (channels,)
    kind : "layer" or "group"

    Returns
    -------
    Tensor, shape and dtype of ``x``

    Examples
    --------
    >>> centred(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([True, False, True]), "layer")
    tensor([-1.,  0.,  1.])
    """
    mask = is_open.to(x.dtype)
    count = mask.sum().clamp(min=1)
    if kind == "layer":
        rows = x.reshape(-1, x.shape[-1])
        return rows.addr(rows.mv(mask / count), mask, alpha=-1).view(x.shape)  # in one pass
    mask = mask.view(-1, *[1] * (x.dim() - 2))
    axes = list(range(1, x.dim()))
    return x - x.mean(axes, keepdim=True) * (x.shape[1] / count) * mask


class CentreFixed:
    """A forward pre-hook for a norm of a plain model, whose stream has closed channels that are not cut yet.

    Parameters
    ----------
    is_open : Tensor, boolean, shape (channels,)
    kind : "layer" or "group"
    """

    def __init__(self, is_open: Tensor, kind: NormKind) -> None:
        self._is_open = is_open
        self._kind: NormKind = kind

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Centre the input of the norm."""
        if args:
            return (centred(args[0], self._is_open, self._kind), *args[1:]), kwargs
        return args, {**kwargs, "input": centred(kwargs["input"], self._is_open, self._kind)}


def centre_norms(model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]]) -> None:
    """Let the norms of streams with closed channels take means over the open ones, **in place**.

    :func:`fold_norms` takes the hooks away again. Epsilons that are those of a dtype are written down, so that copies
    in another dtype have the same.
    """
    for group, stays in groups:
        if group.width is None or stays.all():
            continue
        for norm in group.width.norms:
            own = vars(model.get_submodule(norm.module))
            own[norm.epsilon] = _epsilon(model.get_submodule(norm.module), norm)
        for module, kind in centring_norms(model, group):
            (weight, *_) = module.parameters()
            hook = CentreFixed(torch.from_numpy(stays).to(weight.device), kind)
            module.register_forward_pre_hook(hook.enter, with_kwargs=True)


@torch.no_grad()
def fold_norms(model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]]) -> None:
    """Make the norms of streams that were cut from n to r channels compute what they did, **in place**.

    The weight is multiplied with √(n/r), and ε with n/r.

    Parameters
    ----------
    model : nn.Module
        Already cut, with tensors of its own.
    groups : sequence of (ChannelGroup, bool array)
        What was cut; those that are no streams are passed over.
    """
    for group, stays in groups:
        if group.width is None or stays.all():
            continue
        ratio = group.size / int(np.count_nonzero(stays))
        for names, offset in {norm.weight: norm.offset for norm in group.width.norms}.items():
            weight = model.get_parameter(names[0])
            weight.add_(offset).mul_(math.sqrt(ratio)).sub_(offset)
        for module_name, norm in {norm.module: norm for norm in group.width.norms}.items():
            module = model.get_submodule(module_name)
            vars(module)[norm.epsilon] = _epsilon(module, norm) * ratio
            unhook(module, CentreFixed)


def _epsilon(module: nn.Module, norm: WidthNorm) -> float:
    """A norm's epsilon; nn.RMSNorm without one has that of a dtype, which is seen where its input is almost zero."""
    written: float | None = vars(module)[norm.epsilon]
    if written is not None:
        return written
    dtype = module.get_parameter("weight").dtype
    tiny = torch.full((1,), 1e-30 if dtype is not torch.float16 else 2.0**-24, dtype=dtype)
    root = float(nn.functional.rms_norm(tiny, (1,)).double() / tiny.double())
    known = {torch.finfo(one).eps for one in (dtype, torch.float32)}
    return min(known, key=lambda epsilon: abs(math.log(epsilon * root * root)))
