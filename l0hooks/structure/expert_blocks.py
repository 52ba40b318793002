"""Find the experts of a model and the router that chooses among them, by the shapes of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l0hooks._torch.modules import buffers_of, tensors_of
from l0hooks._torch.trees import tree_leaves, tree_map_only
from l0hooks.structure.cut_experts import length_of_experts
from l0hooks.structure.groups import GroupSite
from l0hooks.structure.named_tensors import Tensors
from l0hooks.structure.stacked_weights import stacked_weights

_OWN_LAYERS = "torch.nn."


@dataclass(frozen=True)
class ExpertBlock:
    """Experts, and the module that holds them and their router.

    Attributes
    ----------
    name : str
        Qualified name of the smallest module that holds both.
    router : str
        Qualified name of the module with a weight of a row for each expert.
    count : int
        Number of experts.
    sites : tuple of GroupSite
        The tensors of the experts, along their first axis: the router's come after them.
    owners : tuple of str
        Modules whose own attributes may hold the number of experts.
    """

    name: str
    router: str
    count: int
    sites: tuple[GroupSite, ...]
    owners: tuple[str, ...]


def expert_blocks(model: nn.Module) -> list[ExpertBlock]:
    """What looks like experts and a router: parameters of three axes, or lists of equal modules, beside a weight with
    as many rows.

    Parameters
    ----------
    model : nn.Module

    Examples
    --------
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    >>> [(block.router, block.count) for block in expert_blocks(Block())]
    [('gate', 3)]
    """
    tensors = Tensors(model)
    found: dict[tuple[str, str], ExpertBlock] = {}
    for name, module in model.named_modules():
        count = _experts_of_list(module) if isinstance(module, nn.ModuleList) else _experts_stacked(module)
        place = None if count is None else _router_near(model, name, module, count)
        if count is None or place is None:
            continue
        of_list = isinstance(module, nn.ModuleList)
        more = _list_sites(tensors, name, module) if of_list else _sites(tensors, name, module)
        block = found.get(place, ExpertBlock(*place, count, (), place))  # several modules may hold one tensor each
        sites = {site.names: site for site in (*block.sites, *more)}
        found[place] = replace(block, sites=tuple(sites.values()), owners=(*block.owners, name))
    return [_with_router(tensors, model, block) for block in found.values()]


def _experts_stacked(module: nn.Module) -> int | None:
    """The number of experts in the parameters of three axes that a module owns; None if there are none."""
    counts = set(stacked_weights(module).values())
    return counts.pop() if len(counts) == 1 and min(counts) > 1 else None


def _experts_of_list(modules: nn.ModuleList) -> int | None:
    """The length of a list of modules that are alike and hold parameters; None if it is another, or holds buffers."""
    count = length_of_experts(modules)
    return count if count > 1 and next(modules.buffers(), None) is None else None


def _initialised(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    lazy = nn.parameter.UninitializedParameter
    return ((name, tensor) for name, tensor in tensors_of(module) if not isinstance(tensor, lazy))


def _router_near(model: nn.Module, name: str, module: nn.Module, count: int) -> tuple[str, str] | None:
    """The nearest module around ``module`` that holds one router outside it, and the router's name."""
    widths = {n for m in module.modules() for _, t in _initialised(m) for n in t.shape}
    path = name
    while path:
        path = path.rpartition(".")[0]
        routers = [
            f"{path}.{n}".strip(".")
            for n, m in model.get_submodule(path).named_modules()
            if not f"{path}.{n}.".lstrip(".").startswith(f"{name}.") and _is_router(m, count, widths)
        ]
        if routers:
            return (path, routers[0]) if len(routers) == 1 else None
    return None


def _is_router(module: nn.Module, count: int, widths: set[int]) -> bool:
    weights = [t for _, t in _initialised(module) if t.dim() == 2]
    layer = type(module).__module__.startswith(_OWN_LAYERS) and not isinstance(module, nn.Linear)
    return not layer and any(t.shape[0] == count and t.shape[1] in widths for t in weights)


def _sites(tensors: Tensors, name: str, module: nn.Module) -> tuple[GroupSite, ...]:
    """Sites along the first axis of a module's own tensors, where it counts experts."""
    count = _experts_stacked(module)
    own = [full for n, t in _initialised(module) if t.shape[:1] == (count,) for full in [f"{name}.{n}".lstrip(".")]]
    return tuple(site_of(tensors, full, 0) for full in own if full in tensors.by_name)


def _list_sites(tensors: Tensors, name: str, modules: nn.Module) -> tuple[GroupSite, ...]:
    """One site for each parameter that all modules of a list have."""
    found = []
    count = len(list(modules.children()))
    for own, parameter in modules.get_submodule("0").named_parameters():
        names = tuple(f"{name}.{n}.{own}".lstrip(".") for n in range(count))
        shape, members = (count, *parameter.shape), np.arange(count)[:, None]
        if all(full in tensors.by_name for full in names):
            found.append(GroupSite(names, shape, 0, members, False, False, stacked=True))
    return tuple(found)


def site_of(tensors: Tensors, name: str, axis: int) -> GroupSite:
    """The site of a tensor whose positions along ``axis`` are the members."""
    shape = tuple(tensors.by_name[name].shape)
    members = np.arange(shape[axis])[:, None]
    return GroupSite(tensors.names(name), shape, axis, members, False, name in tensors.buffers)


def _with_router(tensors: Tensors, model: nn.Module, block: ExpertBlock) -> ExpertBlock:
    """The block with the router's own tensors that have a row for each expert."""
    router = model.get_submodule(block.router)
    own = [name for name, t in (*_initialised(router), *buffers_of(router).items()) if _has_rows(t, block.count)]
    names = [f"{block.router}.{name}".lstrip(".") for name in own]
    sites = [site_of(tensors, name, 0) for name in names if name in tensors.by_name]
    taken = {site.names for site in block.sites}
    return replace(block, sites=(*block.sites, *(site for site in sites if site.names not in taken)))


def _has_rows(tensor: Tensor | None, count: int) -> bool:
    return tensor is not None and tensor.dim() > 0 and tensor.shape[0] == count


@dataclass
class Calls:
    """What the block was given and its router returned, and whether the router ran before the experts.

    Attributes
    ----------
    inputs : list of (args, kwargs)
    chosen : list
        What the router returned.
    first : bool
        Whether the router ran first.
    """

    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]
    chosen: list[Any]
    first: bool = False


def recorded(model: nn.Module, blocks: Sequence[ExpertBlock], examples: Sequence[Any]) -> dict[str, Calls]:
    """What blocks are given and their routers return when ``model`` runs on examples.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    blocks : sequence of ExpertBlock
    examples : sequence
        Positional arguments of ``model``.
    """
    records = {block.name: Calls([], []) for block in blocks}
    handles = []
    ran: set[str] = set()

    def note(name: str, record: Calls) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record.inputs.append((_own(args), _own(kwargs)))

        return model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)

    def follow(block: ExpertBlock, record: Calls) -> Any:
        def after(module: nn.Module, args: object, output: Any) -> None:
            record.chosen.append(_own(output))
            record.first = record.first or block.name not in ran

        return model.get_submodule(block.router).register_forward_hook(after)

    def mark(block: ExpertBlock, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(lambda *_: ran.add(block.name))

    for block in blocks:
        handles += [note(block.name, records[block.name]), follow(block, records[block.name])]
        members = {name.rpartition(".")[0] for site in block.sites for name in site.names} - {block.router}
        handles += [mark(block, model.get_submodule(name)) for name in members]
    try:
        model(*examples)
    finally:
        for handle in handles:
            handle.remove()
    return records


def _own(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone(), value)


def outputs_of_block(block: nn.Module, calls: Calls) -> list[Tensor]:
    """The first floating-point tensor that a block returns, for each of its calls."""
    found = []
    with torch.no_grad():
        for args, kwargs in calls.inputs:
            output = block(*_own(args), **_own(kwargs))
            found += [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()][:1]
    return found
