"""Take closed blocks out of a plain model, and follow the names of what comes after them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import nn

from l0hooks._torch.modules import unhook
from l0hooks.attach.copies import run_copy
from l0hooks.attach.walk import Gated
from l0hooks.structure import ChannelGroup
from l0hooks.structure.block_probe import IdentityBlock
from l0hooks.structure.cut_modules import Bools
from l0hooks.structure.remove_blocks import Renaming, remove_blocks, renamed

T = TypeVar("T")


def closed_blocks(every: Iterable[Gated]) -> list[str]:
    """The names of the blocks whose gates do not stay."""
    return [one.layer.block.name for one in every if one.layer is not None and not bool(one.gate.support().all())]


def close_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Let these blocks return their input, **in place**."""
    for name in names:
        IdentityBlock().attach(model.get_submodule(name))


def without_blocks(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, Renaming]:
    """A copy of ``model``, in which these blocks return their input, without them, and the new names of the others.

    It shares the parameters of ``model``; ``model`` itself if there are no blocks to remove.
    """
    if not names:
        return model, {}
    small = run_copy(model)
    renaming = remove_blocks(small, names)
    for module in small.modules():
        unhook(module, IdentityBlock)
    return small, renaming


def groups_after(groups: Iterable[tuple[ChannelGroup, Bools]], renaming: Renaming) -> list[tuple[ChannelGroup, Bools]]:
    """``groups`` with the new names of what they hold, without what is gone."""
    if not renaming:
        return list(groups)
    rename = partial(renamed, renaming=renaming)
    return [(left, stays) for group, stays in groups if (left := group.renamed(rename)) is not None]


def named_after(values: Mapping[str, T], renaming: Renaming) -> dict[str, T]:
    """``values`` by the new names of their tensors, without those that are gone."""
    if not renaming:
        return dict(values)
    return {new: value for name, value in values.items() if (new := renamed(name, renaming)) is not None}
