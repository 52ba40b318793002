"""Cut the closed members of coupled groups out of a plain model, and prove on examples that nothing else changed."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from l0hooks.attach.copies import run_copy
from l0hooks.attach.walk import Gated
from l0hooks.errors import StateError, UnsupportedModuleError, explain
from l0hooks.export.comparison import Comparison
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_graph import rewrite
from l0hooks.structure.cut_modules import Bools, Cut, apply_cuts, plan_cuts

_rewritten: weakref.WeakKeyDictionary[nn.Module, tuple[list[Cut], tuple[Any, ...]]] = weakref.WeakKeyDictionary()
_MOST_NAMES = 8  # of attributes tried in a repair: 2^8 evaluations at the most


def members_that_stay(gated: Iterable[Gated]) -> list[tuple[ChannelGroup, Bools]]:
    """The final support of every coupled group; of one that is closed altogether, the member nearest to staying."""
    found = []
    for one in gated:
        if one.coupled is not None:
            mask = one.gate.support().cpu().numpy()
            if not mask.any():
                mask = np.arange(len(mask)) == int(one.gate.log_alpha.argmax())
            found.append((one.coupled.plan.groups[one.coupled.number], mask))
    return found


def shrink(
    model: nn.Module,
    groups: Sequence[tuple[ChannelGroup, Bools]],
    comparison: Comparison,
    example_inputs: Sequence[Any],
    *,
    declared: bool = False,
) -> tuple[nn.Module, str]:
    """A copy of ``model`` cut down to the members that stay: its own modules if they can be, else its exported graph.

    Parameters
    ----------
    model : nn.Module
        Plain, its closed members multiplied with zero wherever they are read; not changed.
    groups : sequence of (ChannelGroup, bool array)
    comparison : Comparison
        With what the gated model computes; for an exported graph, which is free in its batch size alone, on inputs of
        the examples' size only.
    example_inputs : sequence
    declared : bool
        Whether groups were given by hand: prove first that nothing else reads their closed members.

    Returns
    -------
    (nn.Module, str)
        The smaller model, and a remark for the report; empty if it consists of the model's own modules.

    Raises
    ------
    StateError
        If neither computes what it should, or something reads closed members.
    """
    cuts = plan_cuts(groups)
    small = copy.deepcopy(model) if declared else run_copy(model)  # cutting puts new tensors in place of old ones
    if declared:
        _refuse_read_members(small, groups, comparison)
    wrong = _cut_modules(small, cuts, groups, comparison)
    if not wrong:
        return small, ""
    hint = "exclude the group: sparsify(model, 'coupled', exclude=...)"
    try:
        small = rewrite(model, cuts, example_inputs)
        failed = comparison.wrong(small, every_size=False)
    except StateError as error:
        failed = _in_one_line(error)
    except UnsupportedModuleError as error:
        failed = _in_one_line(error)
        hint = f"sizes that the code takes from its layers; every layer in declare_group; or {hint}"
    if not failed:
        _rewritten[small] = cuts, tuple(example_inputs)
        return small, (
            "a GraphModule for evaluation and inputs of the examples' size (batches of any), because the model's own"
            f" code holds sizes by hand ({wrong})"
        )
    raise StateError(
        explain(
            "prune",
            "the smaller model must compute what the gated one computes.",
            got=f"as modules: {wrong}; as a graph: {failed}",
            hint=hint,
        )
    )


def _refuse_read_members(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]], comparison: Comparison
) -> None:
    """Fill what will be cut with noise, **in place**: if that shows, something reads it that no gate closes.

    A closed member may happen to be zero on all example inputs; cutting it would then look right.
    """
    for sign in (1.0, -1.0):  # what one draw leaves below a ReLU, the other lifts above it
        _fill(model, groups, sign)
        wrong = comparison.wrong(model)
        if wrong:
            raise StateError(
                explain(
                    "prune",
                    "closed members must be irrelevant, whatever they hold.",
                    got=f"{wrong} with other numbers in them",
                    hint="name every layer that reads the group in declare_group(inputs=...); leave the group out if "
                    "anything else does; example inputs on which evaluation is deterministic",
                )
            )


@torch.no_grad()
def _fill(model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]], sign: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for group, stays in groups:
        for site in group.sites:
            if site.reads or site.buffer or stays.all():
                continue
            path, _, name = site.names[0].rpartition(".")
            tensor = model.get_submodule(path).get_parameter(name)
            dead = torch.from_numpy(site.indices[~stays].reshape(-1)).to(tensor.device)
            shape = [len(dead) if d == site.axis else n for d, n in enumerate(tensor.shape)]
            noise = torch.randn(shape, generator=generator, dtype=torch.float32)
            tensor.index_copy_(site.axis, dead, (sign * noise).to(tensor))


def _in_one_line(error: Exception) -> str:
    """A message without its hint."""
    return " ".join(str(error).partition("\n  try:")[0].split())


def _cut_modules(
    model: nn.Module,
    cuts: Sequence[Cut],
    groups: Sequence[tuple[ChannelGroup, Bools]],
    comparison: Comparison,
) -> str:
    """Cut the modules of ``model`` **in place**, repairing attributes; what is wrong then, empty if nothing is."""
    apply_cuts(model, cuts)
    wrong = comparison.wrong(model)
    if not wrong:
        return ""
    for changes in _repairs(model, groups, cuts):
        old = [(module, name, vars(module)[name]) for module, name, _ in changes]
        for module, name, value in changes:
            vars(module)[name] = value
        if not comparison.wrong(model):
            return ""
        for module, name, value in old:
            vars(module)[name] = value
    return wrong


def rewritten_from(model: nn.Module) -> tuple[list[Cut], tuple[Any, ...]] | None:
    """The cuts and example inputs that a pruned model's graph was rewritten for; None for a model of modules."""
    return _rewritten.get(model)


def _repairs(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]], cuts: Sequence[Cut]
) -> Iterator[list[tuple[nn.Module, str, int]]]:
    """Sets of integer attributes, near the cuts, that equal an old size and might have to become the new one.

    Attributes are tried by name, the same name in all modules at once, few names before many.
    """
    sizes: dict[nn.Module, dict[int, int]] = {}
    for cut in cuts:
        for owner in _owners(model, cut.names[0]):
            for axis, kept in cut.kept:
                sizes.setdefault(owner, {})[cut.shape[axis]] = len(kept)
    for group, mask in groups:
        stay = int(mask.sum())
        for site in group.sites:
            for owner in _owners(model, site.names[0]):
                known = sizes.setdefault(owner, {})
                known[group.size] = stay
                known[group.size * site.indices.shape[1]] = stay * int(site.indices.shape[1])
    candidates: dict[str, list[tuple[nn.Module, str, int]]] = {}
    for module, known in sizes.items():
        for name, value in vars(module).items():
            if type(value) is int and known.get(value, value) != value:
                candidates.setdefault(name, []).append((module, name, known[value]))
    names = sorted(candidates)[:_MOST_NAMES]
    for count in range(1, len(names) + 1):
        for subset in itertools.combinations(names, count):
            yield [change for name in subset for change in candidates[name]]


def _owners(model: nn.Module, parameter: str) -> Iterator[nn.Module]:
    """The modules around a layer, from the one that holds it outwards; not the layer itself, whose sizes are known."""
    path = parameter.rpartition(".")[0]
    while path:
        path = path.rpartition(".")[0]
        yield model.get_submodule(path)
