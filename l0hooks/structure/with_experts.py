"""The channel groups of a model and the experts that are found beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.running import evaluating
from l0hooks._torch.tensors import beside, has_meta
from l0hooks._torch.trees import tree_leaves, tree_map_only
from l0hooks.errors import UnsupportedModuleError
from l0hooks.structure.expert_blocks import Calls, ExpertBlock, expert_blocks, recorded
from l0hooks.structure.expert_groups import group_of_experts, group_of_neurons, weights_of_outputs
from l0hooks.structure.expert_trial import Trial
from l0hooks.structure.groups import ChannelGroup, ChannelGroups, FrozenChannels

Find = Callable[[nn.Module, Sequence[Any]], ChannelGroups]


def with_experts(model: nn.Module, example_inputs: Sequence[Any], find: Find) -> ChannelGroups:
    """The groups that ``find`` finds in the exported graph, and groups of experts, which are found by running blocks.

    Where blocks of experts cannot be exported, because their code depends on what the router chose, the rest of the
    model is exported without them.

    Parameters
    ----------
    model : nn.Module
    example_inputs : sequence
        Positional arguments of ``model``.
    find : callable
        The groups of a model.
    """
    blocks = [] if has_meta(model) else expert_blocks(model)
    if not blocks:
        return find(model, example_inputs)
    with evaluating(model):
        calls = recorded(model, blocks, beside(model, example_inputs))
        blocks = [block for block in blocks if calls[block.name].inputs and calls[block.name].first]
        groups, frozen = _tried(model, blocks, calls)
    try:
        found = find(model, example_inputs)
    except UnsupportedModuleError:
        if not groups:
            raise
        with _without(model, blocks, calls):
            found = find(model, example_inputs)
        inside = tuple(block.name for block in blocks)
        frozen.append(FrozenChannels(inside, "their code depends on the data, so that experts alone are found in them"))
    return _joined(found, groups, frozen)


def _tried(
    model: nn.Module, blocks: Sequence[ExpertBlock], calls: dict[str, Calls]
) -> tuple[list[ChannelGroup], list[FrozenChannels]]:
    groups: list[ChannelGroup] = []
    frozen: list[FrozenChannels] = []
    for block in blocks:
        trial = Trial(model, block, calls[block.name])
        written = weights_of_outputs(trial)
        experts: ChannelGroup | str = "no weight of theirs multiplies their outputs alone"
        if written is not None:
            experts = group_of_experts(trial, written)
            neurons = group_of_neurons(trial, written)
            groups += [] if neurons is None else [neurons]
        if isinstance(experts, str):
            frozen.append(FrozenChannels((block.owners[-1],), f"experts: {experts}"))
        else:
            groups.append(experts)
    return groups, frozen


def _joined(found: ChannelGroups, groups: Sequence[ChannelGroup], frozen: Sequence[FrozenChannels]) -> ChannelGroups:
    """All groups in the order of the model's layers, as far as no two hold the same axis; and what is frozen."""
    taken = {(name, site.axis) for group in found for site in group.sites for name in site.names if not site.stacked}
    free = [g for g in groups if taken.isdisjoint((n, s.axis) for s in g.sites if not s.stacked for n in s.names)]
    traced = {name for name, _ in taken}
    stacks = [(g, {name for site in g.sites if site.stacked for name in site.names}) for g in free]
    free = [group for group, names in stacks if group.kind == "expert" or traced.isdisjoint(names)]
    names = {name for group in free for site in group.sites for name in site.names}
    names |= {name.removesuffix(".weight") for name in names}
    left = []
    for one in found.frozen:
        modules = tuple(module for module in one.modules if module not in names)
        left += [replace(one, modules=modules)] if modules else []
    return ChannelGroups((*found.groups, *free), (*left, *frozen))


@contextmanager
def _without(model: nn.Module, blocks: Sequence[ExpertBlock], calls: Mapping[str, Calls]) -> Iterator[None]:
    """Let ``blocks`` return numbers that depend on all that they are given, in the shapes of what they return."""
    with ExitStack() as stack:
        for block in blocks:
            module = model.get_submodule(block.name)
            args, kwargs = calls[block.name].inputs[0]
            with torch.no_grad():
                returned = module(*args, **kwargs)
            vars(module)["forward"] = _stand_in(_first(args, kwargs), returned)
            stack.callback(vars(module).pop, "forward")
        yield


def _first(*given: Any) -> Tensor:
    """The first floating-point tensor."""
    found: Tensor = next(t for t in tree_leaves(given) if isinstance(t, Tensor) and t.is_floating_point())
    return found


def _stand_in(given: Tensor, returned: Any) -> Callable[..., Any]:
    """A function that any graph takes, in place of one that depends on the data."""

    def mixed(*args: Any, **kwargs: Any) -> Any:
        x = _first(args, kwargs)
        total = x.cumsum(-1)

        def like(leaf: Tensor) -> Tensor:
            if leaf.shape == given.shape:
                return total.to(leaf.dtype)
            return (total.mean() + x.new_zeros(leaf.shape)).to(leaf.dtype)

        return tree_map_only(Tensor, like, returned)

    return mixed
