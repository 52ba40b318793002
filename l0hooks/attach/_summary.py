"""``summary``: a gated model counted as it is now, layer by layer and group by group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from l0hooks._torch.modules import tensors_of
from l0hooks._torch.tensors import same_tensor
from l0hooks.attach.spec import named_modules
from l0hooks.attach.summary_table import CoupledTotals, Summary, SummaryRow
from l0hooks.attach.walk import Coupled, Gated, iter_gated
from l0hooks.gates.gate import Gate
from l0hooks.structure import ChannelGroup
from l0hooks.structure.macs import count_positions, total_macs


@torch.no_grad()
def summary(model: nn.Module, *, example_inputs: Sequence[Any] | None = None) -> Summary:
    """How sparse ``model`` is now.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    example_inputs : sequence, optional
        Positional arguments of ``model``, to count multiply-adds; those of ``sparsify`` serve if not given.

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
    rows = tuple(_row(gated, positions) for gated in every)
    own = {id(p) for gated in every for p in gated.gate.parameters()}
    plain = {same_tensor(p): p for p in _initialised(model.parameters()) if id(p) not in own}
    total = sum(p.numel() for p in plain.values())
    firsts = (one.coupled for one in every if one.coupled and one.coupled.number == 0)
    coupled = tuple(_totals(one, model, positions) for one in firsts)
    macs = None if positions is None else round(total_macs(model, positions))
    return Summary(rows, total, tuple(_ungated(model, every)), coupled, model_macs=macs)


def _totals(coupled: Coupled, model: nn.Module, positions: dict[tuple[int, str], float] | None) -> CoupledTotals:
    """The totals of the plan that a coupled gate belongs to; weights that are gated otherwise have rows."""
    plan, without = coupled.plan, coupled.otherwise
    if positions is not None:
        plan = replace(plan, positions=_named(positions, model, coupled.prefix))
    kept = [_kept(gate) for gate in coupled.gates]
    sizes = [group.size for group in plan.groups]
    parameters = (plan.parameters(c.__getitem__, without) for c in (sizes, kept))
    macs = (round(plan.macs(c.__getitem__, without)) for c in (sizes, kept)) if plan.positions else (None, None)
    return CoupledTotals(*parameters, *macs)


def _named(positions: dict[tuple[int, str], float], model: nn.Module, prefix: str) -> dict[str, float]:
    """By a parameter's name instead of its module; a module with several names under one of them."""
    return {
        f"{name}.{tensor_name}".removeprefix(prefix).removeprefix("."): positions[id(module), tensor_name]
        for name, module in model.named_modules()
        for tensor_name, _ in tensors_of(module)
        if (id(module), tensor_name) in positions
    }


def _kept(gate: Gate) -> int:
    """How many members of a coupled group stay: one at least."""
    return max(1, gate.kept())


def _coupled_row(gated: Gated, group: ChannelGroup) -> SummaryRow:
    """One group as if the others were kept whole."""
    kept = _kept(gated.gate)
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


def _row(gated: Gated, positions: dict[tuple[int, str], float] | None) -> SummaryRow:
    if gated.coupled is not None:
        return _coupled_row(gated, gated.coupled.plan.groups[gated.coupled.number])
    gate = gated.gate
    gates, kept, keep_prob = gate.log_alpha.numel(), gate.kept(), gate.mean_keep_prob()
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


def _macs(gated: Gated, positions: dict[tuple[int, str], float] | None) -> int | None:
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
