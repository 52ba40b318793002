"""Cuts of members that are closed at random, in copies of a model without gates."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from l0hooks._torch.running import OUT_OF_MEMORY
from l0hooks.attach.copies import run_copy
from l0hooks.attach.open_experts import HeldOpen
from l0hooks.errors import StateError, UnsupportedModuleError, explain, in_one_line
from l0hooks.export.comparison import Comparison
from l0hooks.export.cut_and_repair import cut_and_repair
from l0hooks.export.cut_groups import inside, refuse_read_members, without_experts, without_hint
from l0hooks.export.recipe import rewrite_by
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_graph import Traced, traced_once
from l0hooks.structure.cut_modules import Bools, Cut, plan_cuts
from l0hooks.structure.groups import Ints
from l0hooks.structure.routers import HiddenExperts
from l0hooks.structure.width.fold import centre_norms

_SEED = 20180101
_FEWEST, _MOST = 0.2, 0.5  # the share of a group that is closed
_FEW, _MORE = 12, 60  # repairs that are tried before a graph, and after it


class TrialCuts:
    """Cuts of some of the groups at a time, each in a copy of its own."""

    def __init__(
        self, model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Sequence[Any], *, declared: bool
    ) -> None:
        random = np.random.default_rng(_SEED)
        self._model, self._inputs, self._declared = model, example_inputs, declared
        self._closings = [(group, _some_stay(group, random)) for group in groups]
        self._traced: Traced | None = None
        self.graphs = ""  # why the groups that could be cut last were cut as a graph

    def fault(self, numbers: Sequence[int], *, thorough: bool) -> str:
        """Why the groups with these numbers cannot be cut together; empty if they can.

        What costs most is tried last, and only if ``thorough``.
        """
        closings = [self._closings[number] for number in numbers]
        twin = _closed(self._model, closings)
        comparison = self._comparison(twin)
        if self._declared:
            try:
                refuse_read_members(copy.deepcopy(twin), closings, comparison)
            except StateError as error:
                return without_hint(error)
        small, left = without_experts(twin, closings)
        cuts = plan_cuts(left)
        wrong = cut_and_repair(run_copy(small), cuts, left, comparison, most=_FEW)
        if not wrong:
            self.graphs = ""
            return ""
        wrong_graph = self._fault_as_graph(small, cuts, comparison, afresh=small is not twin)
        if wrong_graph and not (thorough and self._is_cut_otherwise(small, left, comparison)):
            return f"as modules: {wrong}; as a graph: {wrong_graph}"
        self.graphs = wrong
        return ""

    def refuse_if_it_varies(self) -> None:
        """Refuse a model with a copy, without any cut, that computes something else."""
        wrong = self._comparison(self._model).wrong(run_copy(self._model))
        if wrong:
            raise StateError(
                explain(
                    "sparsify",
                    "a copy of the model must compute what the model computes, or prune cannot compare them.",
                    got=wrong,
                    hint="a model whose evaluation is deterministic; dry_run=False attaches gates all the same",
                )
            )

    def _comparison(self, twin: nn.Module) -> Comparison:
        try:
            return Comparison(twin, self._inputs, quick=True)
        except StateError as error:
            raise StateError(
                explain(
                    "sparsify",
                    "outputs must be such that prune can compare them.",
                    got=without_hint(error),
                    hint="example inputs from the data; dry_run=False attaches gates all the same",
                )
            ) from error

    def _fault_as_graph(self, twin: nn.Module, cuts: Sequence[Cut], comparison: Comparison, *, afresh: bool) -> str:
        try:
            if self._traced is None and not afresh:  # in a copy of its own: a graph shares the buffers of its model
                self._traced = traced_once(run_copy(self._model), self._inputs)
            graph, sizes = rewrite_by(twin, cuts, self._inputs, "none", traced=None if afresh else self._traced)
        except OUT_OF_MEMORY:
            raise
        except (StateError, UnsupportedModuleError) as error:
            return without_hint(error)
        except Exception as error:  # noqa: BLE001  # what prune would raise after training, from wherever
            return in_one_line(error)
        return comparison.wrong(graph, accepts=sizes.accept)

    def _is_cut_otherwise(
        self, twin: nn.Module, closings: Sequence[tuple[ChannelGroup, Bools]], comparison: Comparison
    ) -> bool:
        """Whether modules can be cut after more repairs, or some as modules and others as graphs."""
        wrong = cut_and_repair(run_copy(twin), plan_cuts(closings), closings, comparison, most=_MORE)
        return not wrong or inside(twin, closings, comparison) is not None


def _some_stay(group: ChannelGroup, random: np.random.Generator) -> Bools:
    """Which members stay: as many as must, in their multiples; at least one does not, if that is possible."""
    wanted = group.size - max(1, round(group.size * random.uniform(_FEWEST, _MOST)))
    count = -(-max(wanted, group.least) // group.multiple) * group.multiple
    stays = np.ones(group.size, np.bool_)
    stays[random.choice(group.size, max(group.size - count, 0), replace=False)] = False
    return stays


@torch.no_grad()
def _closed(model: nn.Module, closings: Sequence[tuple[ChannelGroup, Bools]]) -> nn.Module:
    """A copy of ``model`` in which the weights that gates of closed members multiply are zero there."""
    zeroed: dict[int, nn.Parameter] = {}
    for group, stays in closings:
        for name, axis, dead in _dead(group, stays):
            old = model.get_parameter(name)
            if id(old) not in zeroed:
                zeroed[id(old)] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            zeroed[id(old)].index_fill_(axis, torch.from_numpy(dead).to(old.device), 0)
    try:
        twin = run_copy(model, zeroed)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # whatever an object in the model raises when it is copied
        raise UnsupportedModuleError(
            explain(
                "sparsify",
                "the model must be one that can be copied, because prune cuts a copy.",
                got=in_one_line(error),
                hint="dry_run=False attaches gates all the same",
            )
        ) from error
    centre_norms(twin, closings)
    for group, stays in closings:
        if group.router is not None:
            hidden = HiddenExperts(group.router, HeldOpen(torch.from_numpy(stays)))
            hidden.attach(twin.get_submodule(group.router.module))
    return twin


def _dead(group: ChannelGroup, stays: Bools) -> Iterator[tuple[str, int, Ints]]:
    """Names and axes of the weights that the gates of a group multiply, and where closed members lie along them."""
    for part in () if group.width is None else group.width.gates:
        yield from ((name, part.axis, np.flatnonzero(~stays)) for name in part.names)
    for site in group.readers if group.width is None else ():
        dead = site.indices[~stays].reshape(-1)
        for member, name in enumerate(site.names):
            if not site.stacked:
                yield name, site.axis, dead
            elif site.axis:
                yield name, site.axis - 1, dead
            elif member in dead:  # the whole weight of one expert
                yield name, 0, np.arange(site.shape[1])
