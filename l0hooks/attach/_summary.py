"""``summary``: a gated model counted as it is now, layer by layer and group by group."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from l0hooks._torch.modules import all_tensors
from l0hooks._torch.tensors import distinct
from l0hooks.attach.spec import named_modules
from l0hooks.attach.summary_table import CoupledTotals, Summary, SummaryRow
from l0hooks.attach.walk import Coupled, Gated, iter_gated
from l0hooks.errors import L0HooksWarning
from l0hooks.gates.progress import unfinished, warn_if_tied
from l0hooks.gates.registry import rules_over
from l0hooks.structure import ChannelGroup
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.structure.macs import count_positions, total_macs


def summary(model: nn.Module, *, example_inputs: ExampleInputs | None = None) -> Summary:
    """How sparse ``model`` is now.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    example_inputs : sequence or mapping, optional
        Arguments of ``model``, to count multiply-adds; those of ``sparsify`` serve if not given.
        Counts are those of one example: one index along the first axis of the first tensor, or all of it where the
        layer that reads it takes it without a batch.

    Returns
    -------
    Summary

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> _ = sparsify(model, "weight")
    >>> report = summary(model, example_inputs=(torch.zeros(1, 8),))
    >>> report.parameters, report.macs, report.sparsity
    (192, 192, 0.0)
    >>> report.model_parameters, report.model_macs  # of layers without gates, too
    (212, 192)
    """
    positions = None if example_inputs is None else count_positions(model, example_inputs)
    every = list(iter_gated(model))
    return summarise(model, every, gates_kept(every), positions)


def gates_kept(every: Iterable[Gated]) -> dict[int, int]:
    """How many gates stay, by the id of the gate; one member of a coupled group at least."""
    return {id(one.gate): max(one.gate.kept(), int(one.coupled is not None)) for one in every}


@torch.no_grad()
def summarise(
    model: nn.Module,
    every: Sequence[Gated],
    kept: Mapping[int, int],
    positions: Mapping[tuple[int, str], float] | None,
) -> Summary:
    """:func:`summary` from what is known already.

    Parameters
    ----------
    model : nn.Module
    every : sequence of Gated
        All its gates.
    kept : mapping from the id of a gate to int
        From :func:`gates_kept`.
    positions : mapping, optional
        From :func:`l0hooks.structure.macs.count_positions`.
    """
    rows = tuple(_row(gated, kept[id(gated.gate)], positions) for gated in every)
    own = {id(p) for gated in every for p in gated.gate.parameters()}
    dense = distinct([p for p in _initialised(model.parameters()) if id(p) not in own])
    total, memory = sum(p.numel() for p in dense), sum(p.numel() * p.element_size() for p in dense)
    firsts = (one.coupled for one in every if one.coupled and one.coupled.number == 0)
    coupled = tuple(_totals(one, model, kept, positions) for one in firsts)
    macs = None if positions is None else round(total_macs(model, positions))
    budgets = tuple(rule.progress() for rule in rules_over(one.gate for one in every))
    ungated = tuple(_ungated(model, every))
    return Summary(rows, total, ungated, coupled, model_macs=macs, budgets=budgets, model_memory=memory)


def warn_unfinished(where: str, report: Summary) -> None:
    """Warn if the schedule of a budget has not ended, with target, size and step.

    Parameters
    ----------
    where : str
        The call that was made, for the message.
    report : Summary
        Of the gated model.
    """
    text = unfinished(where, report.budgets)
    if text is not None:
        warnings.warn(text, L0HooksWarning, stacklevel=3)


def warn_tied(where: str, every: Iterable[Gated]) -> None:
    """Warn if the order of equal log-odds has decided which gates of a budget stay at its target."""
    for rule in rules_over(one.gate for one in every):
        if not rule.progress().missed:
            warn_if_tied(where, rule.ties())


def _totals(
    coupled: Coupled, model: nn.Module, kept: Mapping[int, int], positions: Mapping[tuple[int, str], float] | None
) -> CoupledTotals:
    """The totals of the plan that a coupled gate belongs to; weights that are gated otherwise have rows."""
    plan, without = coupled.plan, coupled.otherwise
    if positions is not None:
        plan = replace(plan, positions=_named(positions, model, coupled.prefix))
    counts = [group.size for group in plan.groups], [kept[id(gate)] for gate in coupled.gates]
    parameters = (plan.parameters(c.__getitem__, without) for c in counts)
    macs = (round(plan.macs(c.__getitem__, without)) for c in counts) if plan.positions else (None, None)
    each = element_sizes(model, coupled.prefix)
    memory = (plan.memory(c.__getitem__, each, without) for c in counts)
    return CoupledTotals(*parameters, *macs, *memory)


def element_sizes(model: nn.Module, prefix: str = "") -> dict[str, int]:
    """The bytes of one element of each parameter, by its name without ``prefix``."""
    return {
        f"{name}.{tensor_name}".removeprefix(prefix).removeprefix("."): tensor.element_size()
        for name, _, tensor_name, tensor in all_tensors(model)
    }


def _named(positions: Mapping[tuple[int, str], float], model: nn.Module, prefix: str) -> dict[str, float]:
    """By a parameter's name instead of its module; a module with several names under one of them."""
    return {
        f"{name}.{tensor_name}".removeprefix(prefix).removeprefix("."): positions[id(module), tensor_name]
        for name, module, tensor_name, _ in all_tensors(model)
        if (id(module), tensor_name) in positions
    }


def _coupled_row(gated: Gated, group: ChannelGroup, kept: int) -> SummaryRow:
    """One group as if the others were kept whole."""
    each = group.parameters_each
    return SummaryRow(
        name=group.name,
        kind=group.kind,
        granularity="coupled",
        gates=group.size,
        expected_sparsity=1 - gated.gate.mean_keep_prob(),
        sparsity=1 - kept / group.size,
        parameters=each * group.size,
        parameters_kept=each * kept,
        macs=None,
        macs_kept=None,
    )


def _row(gated: Gated, kept: int, positions: Mapping[tuple[int, str], float] | None) -> SummaryRow:
    if gated.coupled is not None:
        return _coupled_row(gated, gated.coupled.plan.groups[gated.coupled.number], kept)
    gates, keep_prob = gated.gate.log_alpha.numel(), gated.gate.mean_keep_prob()
    parameters = sum(site.weight.numel() for site in gated.weights())
    macs = _macs(gated, positions)
    first = gated.sites[0] if gated.sites else None
    plain = first is None or first.tensor_name == "weight"
    return SummaryRow(
        name=" = ".join(dict.fromkeys(s.module_name for s in gated.sites))
        if plain and first
        else (first.name if first else gated.name),
        kind=_kind(gated.module),
        granularity=first.gating.granularity if first else None,
        gates=gates,
        expected_sparsity=1 - keep_prob,
        sparsity=1 - kept / gates,
        parameters=parameters,
        parameters_kept=kept * parameters // gates,
        macs=macs,
        macs_kept=None if macs is None else kept * macs // gates,
    )


def _macs(gated: Gated, positions: Mapping[tuple[int, str], float] | None) -> int | None:
    total = 0
    for site in gated.sites:
        count = site.gating.positions if positions is None else positions.get((id(site.module), site.tensor_name), 0)
        if count is None:
            return None
        total += round(count * site.weight.numel())
    return total


def _ungated(model: nn.Module, every: Iterable[Gated]) -> Iterator[str]:
    plans = {id(one.coupled.plan): one.coupled.plan for one in every if one.coupled}.values()
    coupled = {site.module for plan in plans for group in plan.groups for site in group.sites}
    for name, module in named_modules(model):
        if name not in coupled and any(p.ndim > 1 for p in _initialised(module.parameters(recurse=False))):
            yield f"{name or 'the model itself'} ({_kind(module)})"


def _initialised(parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Without those of lazy modules, which have no shape yet."""
    return (p for p in parameters if not isinstance(p, UninitializedParameter))


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")
