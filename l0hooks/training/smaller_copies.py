"""Plain copies of a gated model, cut to some members of its coupled groups, to be timed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from l0hooks._torch.running import OUT_OF_MEMORY
from l0hooks.attach.copies import run_copy
from l0hooks.attach.plain import plain_copy
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import L0HooksWarning, in_one_line
from l0hooks.export.comparison import Comparison, tolerance
from l0hooks.export.cut_and_repair import cut_and_repair
from l0hooks.export.cut_groups import shrink
from l0hooks.export.outputs import difference, largest, outputs_of
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_modules import Bools, plan_cuts
from l0hooks.training.cutting import without_trace


def smaller_copy(model: nn.Module, stays: Mapping[int, Bools], examples: Sequence[Any]) -> nn.Module:
    """What :func:`l0hooks.prune` would make of ``model`` if these members stayed, with every gate that stays at 1.

    It is compared on the examples alone, where its own modules remain, and nothing is said about graphs:
    :func:`l0hooks.prune` does both.

    Parameters
    ----------
    model : nn.Module
        With coupled gates alone. Not changed.
    stays : mapping from the id of a gate to bool array
    examples : sequence
        Positional arguments.

    Raises
    ------
    StateError
        If the model cannot be cut.
    """
    coupled = [(one, one.coupled) for one in iter_gated(model) if one.coupled is not None]
    groups = [(of.group, stays[id(one.gate)]) for one, of in coupled]
    declared = any(of.plan.declared for _, of in coupled)
    with without_trace(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", L0HooksWarning)
        plain = run_copy(plain_copy(model))
        _close(plain, groups)
        small = run_copy(plain)
        if cut_and_repair(small, plan_cuts(groups), groups, _OnExamples(plain, examples)):
            comparison = Comparison(plain, examples, stays=False)
            small, _ = shrink(plain, groups, comparison, examples, declared=declared)
    return small.eval()


class _OnExamples:
    """What a model computes for the examples alone: the shortest check that a cut runs as it should."""

    def __init__(self, plain: nn.Module, examples: Sequence[Any]) -> None:
        self.inputs = [tuple(examples)]
        self._expected = outputs_of(plain, self.inputs)
        self._allowed = tolerance(plain)

    def wrong(self, model: nn.Module, *, folded: bool = False) -> str:
        """What is wrong with the outputs of ``model``, empty if nothing is."""
        try:
            gap = largest(difference, self._expected, outputs_of(model, self.inputs))
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001  # a model's own code can raise anything if sizes do not fit
            return in_one_line(error)
        return "" if gap <= self._allowed else f"a difference of {gap:.1e} of the output's scale"


def _close(plain: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]]) -> None:
    """Put zeros where weights read members that do not stay, in new tensors."""
    for group, stays in groups:
        for site in group.readers:
            tensor: nn.Parameter | None = None
            for place in site.names:
                module, _, name = place.rpartition(".")
                if tensor is None:
                    old = plain.get_submodule(module).get_parameter(name)
                    dead = torch.from_numpy(site.indices[~stays].reshape(-1)).to(old.device)
                    tensor = nn.Parameter(old.detach().index_fill(site.axis, dead, 0), requires_grad=old.requires_grad)
                setattr(plain.get_submodule(module), name, tensor)
