"""What ``prune`` could not cut, found before training: members closed at random are cut out of a copy of the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from l0hooks._torch.running import evaluating
from l0hooks._torch.tensors import has_meta, is_sharded
from l0hooks._torch.trees import tree_leaves
from l0hooks.errors import L0HooksWarning, SpecError, UnsupportedModuleError, explain, in_one_line
from l0hooks.export.cut_groups import SPELLINGS
from l0hooks.export.group_search import GroupSearch, kind_of
from l0hooks.export.trial_cuts import TrialCuts
from l0hooks.structure import ChannelGroup
from l0hooks.structure.example_inputs import ExampleInputs, positional

T = TypeVar("T")
_SHOWN = 4  # groups in a warning


@dataclass(frozen=True)
class DryRun:
    """What a dry run of ``prune`` found.

    Attributes
    ----------
    refused : dict from int to str
        The groups that cannot be cut, by their position, and why.
    graphs : str
        What is wrong with the other groups as modules, where only graphs can be cut; empty if modules can be.
    """

    refused: dict[int, str]
    graphs: str = ""


def groups_that_can_be_cut(
    model: nn.Module, chosen: Sequence[tuple[ChannelGroup, T]], example_inputs: ExampleInputs, *, declared: bool
) -> tuple[list[tuple[ChannelGroup, T]], str]:
    """``chosen`` without the groups that ``prune`` could not cut, which a warning names, and a note on the others.

    Parameters
    ----------
    model : nn.Module
        Without gates; not changed.
    chosen : sequence of pairs
        Groups, each with anything.
    example_inputs : sequence or mapping
        Arguments of ``model``.
    declared : bool
        Whether the groups were given by hand. Then one that cannot be cut is an error.

    Warns
    -----
    L0HooksWarning
        If a group is left out.

    Raises
    ------
    SpecError
        If no group is left, or one that was given cannot be cut.
    UnsupportedModuleError, StateError
        As :func:`dry_run`.
    """
    try:
        found = dry_run(model, [group for group, _ in chosen], example_inputs, declared=declared)
    except UnsupportedModuleError as error:
        if not _keeps_a_graph(model):
            raise
        why = in_one_line(error.__cause__ or error)
        return list(chosen), f"no dry run of prune, because the model keeps tensors of a forward with gradients ({why})"
    note = ""
    if found.graphs:
        note = (
            f"prune may return graphs, because the model's own code holds sizes by hand ({found.graphs}). {SPELLINGS}"
        )
    if not found.refused:
        return list(chosen), note
    left = list(found.refused)
    shown = "; ".join(str(chosen[number][0]) for number in left[:_SHOWN])
    shown += f"; and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    reason = found.refused[left[0]]
    if declared or len(left) == len(chosen):
        raise SpecError(
            explain(
                "sparsify",
                "coupled groups must be such that prune can cut them.",
                got=f"in a dry run of prune, {shown}: {reason}",
                hint=f"{SPELLINGS} dry_run=False attaches gates all the same",
            )
        )
    text = f"sparsify: without gates stays what prune could not cut: {shown}. A dry run of prune says: {reason}"
    warnings.warn(text, L0HooksWarning, stacklevel=3)
    return [pair for number, pair in enumerate(chosen) if number not in found.refused], note


def _keeps_a_graph(model: nn.Module) -> bool:
    """Whether modules keep tensors of an earlier forward that gradients flow through: these cannot be copied."""
    kept = (leaf for module in model.modules() for leaf in tree_leaves(dict(vars(module))))
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in kept)


def dry_run(
    model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: ExampleInputs, *, declared: bool = False
) -> DryRun:
    """Close members of ``groups`` at random and cut them out of a copy of ``model``, as ``prune`` would.

    A fifth to a half of each group is closed. The outputs of the copy before and after the cut are compared. Where they
    differ, groups are added in halves, until it is known which cannot be cut: one of n costs about 2 log n tries.
    Nothing is tried on the meta device and on sharded models.

    Parameters
    ----------
    model : nn.Module
        Without gates; neither changed nor run itself.
    groups : sequence of ChannelGroup
    example_inputs : sequence or mapping
        Arguments of ``model``.
    declared : bool
        Whether the groups were given by hand. Then it is also checked that nothing but their readers reads them.

    Returns
    -------
    DryRun

    Raises
    ------
    UnsupportedModuleError
        If the model cannot be copied.
    StateError
        If outputs of the model cannot be compared, or a copy of the model computes something else.

    Examples
    --------
    >>> import torch
    >>> from l0hooks import channel_groups
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(3, 4)
    >>> dry_run(model, channel_groups(model, (x,)), (x,))
    DryRun(refused={}, graphs='')
    """
    if has_meta(model) or any(is_sharded(parameter) for parameter in model.parameters()):
        return DryRun({})
    with evaluating(model):  # what a copy shares with the model, such as a hook's own tensors, is restored
        return _found(TrialCuts(model, groups, positional(model, example_inputs), declared=declared), groups)


def _found(trial: TrialCuts, groups: Sequence[ChannelGroup]) -> DryRun:
    numbers = list(range(len(groups)))
    why = trial.fault(numbers, thorough=True)
    if not why:
        return DryRun({}, trial.graphs)
    search = GroupSearch([kind_of(group) for group in groups])
    search.add(numbers, partial(trial.fault, thorough=False), why)
    if len(search.refused) > 1:  # if it is one, all groups together were the thorough try
        search.add(search.forgotten(), partial(trial.fault, thorough=True), why)
    if len(search.refused) == len(groups):
        trial.refuse_if_it_varies()
    return DryRun(dict(sorted(search.refused.items())), trial.graphs if search.good else "")
