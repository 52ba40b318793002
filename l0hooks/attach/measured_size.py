"""How large a gated model is: in expectation, as evaluation runs it, and once pruned."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from l0hooks._torch.tensors import distinct
from l0hooks.attach._summary import element_sizes
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.attach.summary_table import Summary
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import StateError, explain
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.structure.macs import count_positions

Unit = Literal["gates", "params", "macs", "memory"]


def evaluated_size(report: Summary, unit: Unit) -> int:
    """What evaluation keeps: parameters or their bytes in the whole model, gates, or multiply-adds of gated layers.

    Raises
    ------
    StateError
        If multiply-adds were never counted.
    """
    if unit == "gates":
        return sum(round(row.gates * (1 - row.sparsity)) for row in report.rows)
    if unit == "params":
        return report.model_parameters_kept
    if unit == "memory":
        return report.model_memory_kept
    if report.macs_kept is None:
        raise _not_counted()
    return report.macs_kept


@torch.no_grad()
def expected_size(model: nn.Module, report: Summary, unit: Unit) -> float:
    """The expectation of the same over the gates' noise; ``report`` is the model's summary now.

    Raises
    ------
    StateError
        If multiply-adds were never counted.
    """
    if unit == "gates":
        return sum(row.gates * (1 - row.expected_sparsity) for row in report.rows)
    if unit == "macs" and report.macs is None:
        raise _not_counted()
    if unit == "memory":
        left = float(report.model_memory - sum(part.memory for part in report.coupled))
        for coupled in (one.coupled for one in iter_gated(model) if one.coupled is not None):
            left += float(coupled.expected(unit, element_sizes(model, coupled.prefix)))
        return left
    alone = [row for row in report.rows if row.granularity != "coupled"]
    total = float(report.model_parameters - report.parameters) if unit == "params" else 0.0
    for row in alone:
        total += (row.parameters if unit == "params" else row.macs or 0) * (1 - row.expected_sparsity)
    if len(alone) == len(report.rows):
        return total
    for one in iter_gated(model):
        if one.coupled is not None:
            total += float(one.coupled.expected(unit))
    return total


@torch.no_grad()
def exported_size(model: nn.Module, pruned: nn.Module, unit: Unit, example_inputs: ExampleInputs | None = None) -> int:
    """What ``pruned``, made from the gated ``model``, really has; exact zeros of weights that had gates do not count.

    Raises
    ------
    StateError
        If ``pruned`` still has gates, the unit is gates, or multiply-adds cannot be counted.
    """
    if unit == "gates" or next(iter_gated(pruned), None) is not None:
        got = "a model with gates" if unit != "gates" else "unit='gates'"
        raise StateError(
            explain("exported size", "a pruned model has parameters and no gates.", got=got, hint="prune(model) first")
        )
    if unit == "memory":
        return sum(p.numel() * p.element_size() for p in distinct(list(pruned.parameters())))
    zeros = {_plain(name) for name in _gated_alone(model)}
    if unit == "params":
        return count_parameters(pruned, zeros)
    if example_inputs is None:
        raise StateError(explain("exported size", "multiply-adds need example inputs.", hint="example_inputs=(x,)"))
    positions = count_positions(pruned, example_inputs)
    names = zeros | set(_coupled_names(model))
    counted = {
        name: positions[id(module), own] * _count(p, name in zeros)
        for prefix, module in pruned.named_modules()
        for own, p in module.named_parameters(recurse=False)
        if (name := _plain(f"{prefix}.{own}".lstrip("."))) in names and (id(module), own) in positions
    }
    if not counted:
        raise StateError(
            explain(
                "exported size",
                "multiply-adds are counted at layers.",
                got="a model without any of the gated ones (an exported graph, perhaps)",
                hint='unit="params"',
            )
        )
    return round(sum(counted.values()))


def count_parameters(pruned: nn.Module, gated: AbstractSet[str]) -> int:
    """The parameters of a pruned model, without the zeros of those named in ``gated``, dense or stored in blocks."""
    named = [(n, p) for n, p in pruned.named_parameters() if not isinstance(p, UninitializedParameter)]
    return sum(_count(p, _plain(name) in gated) for name, p in named)


def count_zeros(pruned: nn.Module, gated: AbstractSet[str]) -> int:
    """The zeros that a pruned model stores in the weights named in ``gated``."""
    named = [(n, p) for n, p in pruned.named_parameters() if not isinstance(p, UninitializedParameter)]
    stored = [_stored(p) for name, p in named if _plain(name) in gated]
    return sum(one.numel() - int(torch.count_nonzero(one)) for one in stored)


def _not_counted() -> StateError:
    return StateError(
        explain(
            'unit "macs"',
            "multiply-adds are known only for example inputs.",
            hint="sparsify(model, spec, example_inputs=(x,))",
        )
    )


def _gated_alone(model: nn.Module) -> set[str]:
    return {site.name for site in iter_sites(model) if site.gating.granularity != "coupled"}


def _coupled_names(model: nn.Module) -> Iterator[str]:
    for one in iter_gated(model):
        if one.coupled is not None and one.coupled.number == 0:
            yield from (name for names in one.coupled.plan.tensors() for name in names)


def _plain(name: str) -> str:
    """Without what ``torch.compile`` and data parallel wrappers put before names."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _count(parameter: Tensor, zeros: bool) -> int:
    return int(torch.count_nonzero(_stored(parameter))) if zeros else parameter.numel()


def _stored(parameter: Tensor) -> Tensor:
    return parameter if parameter.layout is torch.strided else parameter.values()
