"""Cut members of groups out of modules, experts of a list among them, with the counts that modules hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from l0hooks.structure.cut_modules import Bools, apply_cuts, groups_left, plan_cuts
from l0hooks.structure.groups import ChannelGroup, GroupSite

KEPT = "kept_experts"  # at a list: how many experts the dense model's has, and which of them are left
Closing = tuple[ChannelGroup, Bools]


def cut_members(model: nn.Module, groups: Sequence[Closing]) -> None:
    """Leave only the members whose mask is true, **in place**; modules leave their lists.

    Parameters
    ----------
    model : nn.Module
        Plain.
    groups : sequence of (ChannelGroup, bool array)

    Examples
    --------
    >>> model = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    >>> names = tuple(f"{n}.weight" for n in range(3))
    >>> site = GroupSite(names, (3, 1, 1), 0, np.arange(3)[:, None], False, False, stacked=True)
    >>> cut_members(model, [(ChannelGroup("expert", 3, (site,)), np.array([True, False, True]))])
    >>> len(model)
    2
    """
    lists = {path: stays for group, stays in groups for path in lists_of(group)}
    apply_cuts(model, plan_cuts(groups))
    for path, stays in lists.items():
        shorten(model, path, np.flatnonzero(stays).tolist())
    set_counts(model, groups)


def lists_of(group: ChannelGroup) -> list[str]:
    """The lists of modules whose items are the members of a group."""
    if group.kind != "expert":
        return []
    return list(dict.fromkeys(list_of(site) for site in group.sites if site.stacked))


def list_of(site: GroupSite) -> str:
    """The list that a stacked site's tensors belong to: what their names begin with, up to the first that differs."""
    first, second = (name.split(".") for name in site.names[:2])
    return ".".join(first[: next(n for n, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)])


def shorten(model: nn.Module, path: str, kept: Collection[int]) -> None:
    """Leave only some modules in a list, **in place**, numbered anew; the list remembers which they were."""
    modules = model.get_submodule(path)
    if not isinstance(modules, nn.ModuleList):
        raise TypeError(path)
    count, before = vars(modules).get(KEPT, (len(modules), tuple(range(len(modules)))))
    for number in sorted(set(range(len(modules))) - set(kept), reverse=True):
        del modules[number]
    vars(modules)[KEPT] = count, tuple(before[number] for number in sorted(kept))


def kept_experts(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By the name of each list that lost experts: how many the dense model's has, and which of them are left."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: vars(module)[KEPT] for name, module in lists.items() if KEPT in vars(module)}


@torch.no_grad()
def set_counts(model: nn.Module, groups: Iterable[Closing]) -> None:
    """Give modules the number of members that stay, where they hold it, **in place**."""
    for group, stays in groups:
        for module, name in group.counts:
            vars(model.get_submodule(module))[name] = int(stays.sum())


def cut_experts(model: nn.Module, groups: Sequence[Closing]) -> list[Closing]:
    """Cut the experts among ``groups`` out of ``model``, **in place**; the other groups as they are in it then.

    Parameters
    ----------
    model : nn.Module
        Plain.
    groups : sequence of (ChannelGroup, bool array)
    """
    experts = [one for one in groups if one[0].kind == "expert"]
    if not experts:
        return list(groups)
    cut_members(model, experts)
    _set_outer_counts(model, experts)
    others = [(group, stays) for group, stays in groups if group.kind != "expert"]
    whole = [(group, np.ones(group.size, np.bool_)) for group, _ in others]
    left = groups_left([*experts, *whole])[len(experts) :]
    return [(_renamed(group, experts), stays) for group, (_, stays) in zip(left, others, strict=True)]


def _renamed(group: ChannelGroup, experts: Sequence[Closing]) -> ChannelGroup:
    """The group with the names that the modules of shortened lists have now."""
    kept = {path: np.flatnonzero(stays).tolist() for one, stays in experts for path in lists_of(one)}
    sites = []
    for site in group.sites:
        names = site.names
        if site.stacked and (path := list_of(site)) in kept:
            names = site.names[: len(kept[path])]
        sites.append(replace(site, names=names))
    return replace(group, sites=tuple(sites))


def _set_outer_counts(model: nn.Module, experts: Sequence[Closing]) -> None:
    """Give the modules around all blocks the number of experts, if all blocks keep equally many."""
    numbers = {(group.size, int(stays.sum())) for group, stays in experts}
    if len(numbers) != 1:
        return
    ((old, new),) = numbers
    inside = [group.router.module.rpartition(".")[0] for group, _ in experts if group.router is not None]
    for name, module in model.named_modules():
        around = all(path == name or path.startswith(f"{name}.".lstrip(".")) for path in inside)
        for attribute, value in list(vars(module).items()) if around else ():
            if type(value) is int and value == old and "expert" in attribute.lower():
                vars(module)[attribute] = new


def length_of_experts(module: nn.Module) -> int:
    """The length of a list of modules that are alike and hold parameters; 0 of anything else.

    Examples
    --------
    >>> length_of_experts(nn.ModuleList(nn.Linear(2, 2) for _ in range(3))), length_of_experts(nn.Linear(2, 2))
    (3, 0)
    """
    if not isinstance(module, nn.ModuleList):
        return 0
    kinds = {(type(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters())) for m in module}
    return len(module) if len(kinds) == 1 and any(kind for _, kind in kinds) else 0
