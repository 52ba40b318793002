"""Groups of experts, and of neurons within experts: tried out on the blocks that look as if they held them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from l0hooks._torch.running import OUT_OF_MEMORY
from l0hooks._torch.trees import tree_leaves
from l0hooks.errors import in_one_line
from l0hooks.structure.cut_experts import cut_members
from l0hooks.structure.cut_modules import Bools
from l0hooks.structure.expert_trial import Trial, gap
from l0hooks.structure.groups import ChannelGroup, GroupSite, Ints
from l0hooks.structure.routers import HiddenExperts, Router
from l0hooks.structure.settings import integers

_MULTIPLES = (8, 4, 2)  # of neurons: kernels for grouped products want rows of 16 bytes in every dtype


def group_of_experts(trial: Trial, written: tuple[GroupSite, ...]) -> ChannelGroup | str:
    """The experts of a block as a group; why they cannot be cut if they cannot.

    Closed experts are hidden from the router in one copy, and cut out of another by hand; both must compute the same.

    Parameters
    ----------
    trial : Trial
    written : tuple of GroupSite
        From :func:`weights_of_outputs`.
    """
    router = _router(trial)
    if isinstance(router, str):
        return router
    if trial.differs(trial.run(trial.copied()), trial.rotated()):
        return "their router works by groups of experts, or by their order"
    block, why = trial.block, ""
    reading = {site.names for site in written}
    sites = tuple(replace(site, reads=site.names in reading) for site in block.sites)
    for counts in _counts(trial, block.count, block.owners):
        own = tuple(name for module, name in counts if module == block.router)
        group = ChannelGroup("expert", block.count, sites, counts=counts, router=replace(router, counts=own))
        for least in range(1, block.count):
            found = replace(group, least=least)
            why = _cut_differs(trial, found, written, least)
            if not why:
                others = (_cut_differs(trial, found, written, n) for n in (least, block.count - 1, least))
                why = next(filter(None, others), "")
                if not why:
                    return found
    return f"without some of them their block computes something else: {why}"


def weights_of_outputs(trial: Trial) -> tuple[GroupSite, ...] | None:
    """The tensors that multiply what an expert returns: its last weight and that one's bias.

    If they are multiplied by a number for each expert, outputs are linear in these numbers.
    """
    weights = [site for site in trial.block.sites if len(site.shape) > 2 and not site.buffer]
    vectors = [site for site in trial.block.sites if len(site.shape) == 2 and not site.buffer]
    vectors = [site for site in vectors if not trial.of_router(site)]
    choices = [(weight, *more) for weight in reversed(weights) for more in _subsets(vectors)]
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.rand(trial.block.count, generator=generator) + 0.5 for _ in range(2))
    for sites in choices:
        try:
            results = [trial.run(trial.copied(_laid(sites, z))) for z in (one, two, one + two, 0 * one)]
        except OUT_OF_MEMORY:
            raise
        except Exception:  # noqa: BLE001  # a block's own code can raise anything; the next choice may fit
            continue
        a, b, both, none = (found[0] for found in results)
        (off, allowed), (moved, _) = gap(a + b, both + none), gap(a, none)
        if off <= allowed < moved:
            return tuple(sites)
    return None


def _subsets(sites: Sequence[GroupSite]) -> Iterator[tuple[GroupSite, ...]]:
    """All subsets of a few sites, large ones first."""
    for count in range(len(sites), -1, -1):
        yield from itertools.islice(itertools.combinations(sites, count), 8)


def _laid(sites: Sequence[GroupSite], z: Tensor) -> list[tuple[GroupSite, Tensor]]:
    """A number for each expert, laid over the tensors of its output."""
    return [(site, z.view(-1, *[1] * (len(site.shape) - 1))) for site in sites]


def _router(trial: Trial) -> Router | str:
    """How experts are hidden from the block's router; why they cannot be."""
    block = trial.block
    if not trial.calls.chosen:
        return "the example inputs do not run their router"
    returned = [t for t in tree_leaves(trial.calls.chosen[0]) if isinstance(t, Tensor)]
    if len(returned) == 1 and returned[0].is_floating_point() and returned[0].shape[-1:] == (block.count,):
        return Router(block.router)
    fills = tuple(_fill(t, block.count) for t in returned)
    if all(t.is_floating_point() and fill is None for t, fill in zip(returned, fills, strict=True)):
        return "their router returns neither logits nor indices"
    start = f"{block.router}." if block.router else ""
    rows = [n.removeprefix(start) for s in block.sites for n in s.names if n.startswith(start)]
    own = tuple(name for name in rows if "." not in name)
    return Router(block.router, own, (), fills)


def _fill(value: Tensor, count: int) -> float | None:
    """What stands for a hidden expert in what a router returns: no probability, or a logit of −∞."""
    if not value.is_floating_point() or value.shape[-1:] != (count,):
        return None
    return 0.0 if bool((value >= 0).all()) else -torch.inf


def _counts(trial: Trial, count: int, owners: Sequence[str]) -> Iterator[tuple[tuple[str, str], ...]]:
    """Attributes that may hold the number of experts: those that are named so, all that equal it, none."""
    every = [
        (owner, str(path[0]))
        for owner in dict.fromkeys(owners)
        if not type(module := trial.model.get_submodule(owner)).__module__.startswith("torch.nn.")
        for path, value in integers(module)
        if len(path) == 1 and value == count
    ]
    named = [(owner, name) for owner, name in every if "expert" in name.lower()]
    yield from dict.fromkeys(tuple(chosen) for chosen in (named, every, []))


def _cut_differs(trial: Trial, group: ChannelGroup, written: Sequence[GroupSite], stay: int) -> str:
    """How a block without all but ``stay`` experts differs from one that hides them; empty if it does not."""
    generator = torch.Generator().manual_seed(stay)
    stays = torch.zeros(group.size, dtype=torch.bool)
    stays[torch.randperm(group.size, generator=generator)[:stay]] = True
    z = torch.where(stays, torch.rand(group.size, generator=generator) + 0.5, 0.0)
    hidden, small = (trial.copied(_laid(written, z)) for _ in range(2))
    inside = trial.inside(group)
    if group.router is not None:
        start = f"{trial.block.name}." if trial.block.name else ""
        path = f"{group.router.module}.".removeprefix(start).rstrip(".")
        HiddenExperts(group.router, lambda _: stays).attach(hidden.get_submodule(path))
    try:
        expected = trial.run(hidden)
        cut_members(small, [(inside, stays.numpy())])
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # noqa: BLE001  # a block's own code can raise anything if sizes do not fit
        return in_one_line(error)
    return trial.differs(expected, small)


def group_of_neurons(trial: Trial, written: tuple[GroupSite, ...]) -> ChannelGroup | None:
    """The neurons between the two products of experts, the same in all experts; None if there are none.

    Parameters
    ----------
    trial : Trial
    written : tuple of GroupSite
        From :func:`weights_of_outputs`.
    """
    reader, taken = written[0], {site.names for site in written}
    others = [site for site in trial.block.sites if site.names not in taken and not trial.of_router(site)]
    for axis, up, interleaved in itertools.product((2, 1), (1, 2), (False, True)):
        found = _neurons(trial, reader, axis, others, (up, interleaved))
        if found is not None:
            return found
    return None


def _neurons(
    trial: Trial, reader: GroupSite, axis: int, others: Sequence[GroupSite], layout: tuple[int, bool]
) -> ChannelGroup | None:
    """The group if neurons lie along ``axis`` of the reader, and so along the others; None if they do not."""
    size = reader.shape[axis]
    up, interleaved = layout
    members = np.arange(size)[:, None]
    sites = [replace(reader, axis=axis, indices=members, reads=True)]
    for site in others:
        along = up if len(site.shape) == 3 else 1
        indices = _positions(site.shape[along], size, interleaved)
        if indices is not None:
            sites.append(replace(site, axis=along, indices=indices, reads=False))
        elif len(site.shape) == 3:
            return None
    if len(sites) < 2 or size < 2:
        return None
    order = {site.names: n for n, site in enumerate(trial.block.sites)}
    multiple = next((n for n in _MULTIPLES if size % n == 0 and size > n), 1)
    owners = dict.fromkeys(site.module for site in sites)
    counts = tuple(
        (owner, str(path[0]))
        for owner in owners
        for path, value in integers(trial.model.get_submodule(owner))
        if len(path) == 1 and value == size and "inter" in str(path[0])
    )
    ordered = tuple(sorted(sites, key=lambda site: order[site.names]))
    group = ChannelGroup("neuron", size, ordered, multiple=multiple, counts=counts)
    return group if _are_neurons(trial, group) else None


def _positions(length: int, size: int, interleaved: bool) -> Ints | None:
    """Where neurons stand along an axis: once, or twice where a gate and a product come from one weight."""
    if length == size and not interleaved:
        return np.arange(size)[:, None]
    if length != 2 * size:
        return None
    return rearrange(np.arange(length), "(n two) -> n two" if interleaved else "(two n) -> n two", two=2)


def _are_neurons(trial: Trial, group: ChannelGroup) -> bool:
    """Whether a block with closed neurons computes what it does without them."""
    (reader,) = group.readers
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        stay = max(group.size // 2 // group.multiple, 1) * group.multiple
        stays = torch.zeros(group.size, dtype=torch.bool)
        stays[torch.randperm(group.size, generator=generator)[:stay]] = True
        view = [-1 if d == reader.axis else 1 for d in range(len(reader.shape))]
        closed = [(reader, stays.float().view(view))]
        expected, small = trial.run(trial.copied(closed)), trial.copied(closed)
        mask: Bools = stays.numpy()
        cut_members(small, [(trial.inside(group), mask)])
        if trial.differs(expected, small):
            return False
    return True
