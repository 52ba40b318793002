"""Cut what coupled gates have closed for good out of a model while it trains, **in place**."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l0hooks._torch.running import evaluating
from l0hooks._torch.tensors import is_sharded
from l0hooks.attach.copies import folded_copy, folded_weights, run_copy
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.attach.plain import make_plain
from l0hooks.attach.walk import Gated, iter_gated
from l0hooks.errors import L0HooksWarning, StateError, explain
from l0hooks.export.comparison import Comparison
from l0hooks.export.cut_and_repair import cut_and_repair
from l0hooks.export.cut_groups import members_that_stay
from l0hooks.gates.gate import Gate, iter_gates
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_modules import Bools, plan_cuts
from l0hooks.structure.routers import hidden_experts
from l0hooks.structure.width.fold import centre_norms
from l0hooks.training.cut_changes import Changes

MUST = "the model must be one that can be cut as the checkpoint's was."
_LEAST_SHARE = 0.02  # of the members: fewer are not worth the comparison


class Cutter:
    """Cuts one model whenever enough of its members are closed for good.

    Parameters
    ----------
    model : nn.Module
        With coupled gates alone. Not kept alive.
    example_inputs : sequence
        Positional arguments of ``model``.

    Attributes
    ----------
    parameters_cut : int
        How many parameters are gone.
    """

    def __init__(self, model: nn.Module, example_inputs: Sequence[Any]) -> None:
        self._model = weakref.ref(model)
        self._examples = tuple(example_inputs)
        self.parameters_cut = 0

    def is_of(self, module: nn.Module) -> bool:
        """Whether ``module`` is the model."""
        return self._model() is module

    def cut(self, gates: Sequence[Gate], closed: Sequence[Tensor], *, all_of_them: bool = False) -> str:
        """Cut the members whose gates are ``closed``; why it cannot be done, empty if it was or is not worth it.

        Parameters
        ----------
        gates : sequence of Gate
            Those of a budget.
        closed : sequence of Tensor, boolean
            Which of each are closed for good.
        all_of_them : bool
            However few they are.
        """
        model = self._model()
        if model is None:
            return "the model is gone"
        gone = sum(int(mask.sum()) for mask in closed)
        if not gone or not (all_of_them or gone >= _LEAST_SHARE * sum(mask.numel() for mask in closed)):
            return ""
        stays = {id(gate): ~mask.cpu().numpy() for gate, mask in zip(gates, closed, strict=True)}
        before = _weights(model)
        why = _obstacle(model) or _cut(model, stays, self._examples)
        if not why:
            self.parameters_cut += before - _weights(model)
        return why

    def gone_in(self, gates: Sequence[Gate], state: Mapping[str, Any], prefix: str) -> list[Tensor]:
        """Which members a checkpoint lacks, because they were cut before it was written: boolean, for each gate.

        Raises
        ------
        StateError
            If it holds members that the model has lost.
        """
        model = self._model()
        names = {} if model is None else {id(gate): f"{prefix}{name}" for name, gate in iter_gates(model)}
        found = []
        for gate in gates:
            own = torch.arange(gate.drawn) if gate.positions is None else gate.positions.cpu()
            wanted = own
            if f"{names.get(id(gate))}.log_alpha" in state:
                saved = state.get(f"{names[id(gate)]}.positions")
                wanted = torch.arange(gate.drawn) if saved is None else saved.cpu()
            if not bool(torch.isin(wanted, own).all()):
                got = "a model that was cut further than the checkpoint"
                raise StateError(explain("load_state_dict", MUST, got=got, hint="sparsify a new copy of the model"))
            found.append(~torch.isin(own, wanted).to(gate.log_alpha.device))
        return found


def warn_uncut(why: str) -> None:
    """Say that the model trains on uncut, and why; what it learns is the same."""
    text = explain(
        "Budget(cut_every=...)",
        "closed members can be cut while training only where the model's own modules stay.",
        got=why,
        hint="training goes on with the whole model, and l0hooks.prune cuts it at the end",
    )
    warnings.warn(text, L0HooksWarning, stacklevel=2)


def _weights(model: nn.Module) -> int:
    """The parameters of ``model`` that are no gates."""
    own = {id(gate.log_alpha) for _, gate in iter_gates(model)}
    return sum(p.numel() for p in model.parameters() if id(p) not in own)


def _obstacle(model: nn.Module) -> str:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes, whose buckets of gradients have fixed sizes"
    if any(is_sharded(p) or p.is_meta for p in model.parameters()):
        return "parameters that are sharded or without data"
    if hidden_experts(model):
        return "gates on experts, which prune alone cuts"
    return ""


def _cut(model: nn.Module, stays: Mapping[int, Bools], examples: Sequence[Any]) -> str:
    """Cut ``model`` down to the members that stay, checked before and after; why not, empty if it was done."""
    every = [one for one in iter_gated(model) if one.coupled is not None]
    groups = [_group(one, stays) for one in every]
    with without_trace(model):
        with evaluating(model):
            plain = _plain(model, every)
            comparison = Comparison(model, examples, twin=plain)
        small, cuts = run_copy(plain), plan_cuts(groups)
        wrong = cut_and_repair(small, cuts, groups, comparison)
        changes = Changes()
        wrong = wrong or changes.plan_tensors(model, cuts)
        if wrong:
            return wrong
        try:
            changes.settings(model, plain, small)
            changes.tensors()
            changes.gates(every, groups)
            again = _plain(model, every)
            # its place in an array decides whether torch computes a gate by vector instructions, which round otherwise
            wrong = comparison.wrong(again, folded=True)
        except BaseException:  # the user may interrupt
            changes.take_back()
            raise
        if wrong:
            changes.take_back()
    return wrong


def _plain(model: nn.Module, every: Sequence[Gated]) -> nn.Module:
    """A plain copy with the gates folded in."""
    sites = list(iter_sites(model))
    plain = make_plain(folded_copy(model, sites, folded_weights(sites)))
    centre_norms(plain, members_that_stay(every))
    return plain


def _group(one: Gated, stays: Mapping[int, Bools]) -> tuple[ChannelGroup, Bools]:
    """A group and what stays of it: of a residual stream all, whose norms would have to be folded while they train."""
    if one.coupled is None:
        raise TypeError(one)
    group = one.coupled.group
    if group.width is not None:
        return group, np.ones(group.size, np.bool_)
    return group, stays.get(id(one.gate), np.ones(group.size, np.bool_))


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Leave the random numbers of training as they are."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        yield
