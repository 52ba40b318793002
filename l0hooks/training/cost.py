"""A model's size as a function of how many gates stay: in gates, parameters, bytes or multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import nn
from torch.nn.parameter import UninitializedParameter

from l0hooks._torch.modules import tensors_of
from l0hooks._torch.tensors import distinct
from l0hooks.attach.gated_weight import Site
from l0hooks.attach.measured_size import Unit
from l0hooks.attach.walk import Gated
from l0hooks.errors import SpecError, explain
from l0hooks.structure.cost_form import NONE
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.structure.group_costs import CoupledPlan, Sites
from l0hooks.structure.macs import count_positions, total_macs
from l0hooks.training.block_lists import block_lists
from l0hooks.training.size import Size

Positions = Mapping[tuple[int, str], float]


def size_of(
    model: nn.Module,
    gated: Sequence[Gated],
    every: Sequence[Gated],
    unit: Unit,
    example_inputs: ExampleInputs | None,
    *,
    whole: bool,
) -> Size:
    """The size of ``model`` in ``unit``, by the numbers of gates that stay in the arrays of ``gated``.

    Parameters
    ----------
    model : nn.Module
    gated : sequence of Gated
        Arrays of gates that may vary.
    every : sequence of Gated
        All of the model.
    unit : "gates", "params", "macs" or "memory"
    example_inputs : sequence or None
        Positional arguments of ``model``, for multiply-adds.
    whole : bool
        Count what has no gates, too; else only the tensors that ``gated`` removes from.

    Raises
    ------
    SpecError
        If multiply-adds are asked for without example inputs, bytes of gates that are on no coupled group, or a tensor
        that counts also belongs to other gates.
    """
    counts = np.array([one.gate.log_alpha.numel() for one in gated], np.int64)
    zeros = np.zeros((len(gated), len(gated)))
    if unit == "gates":
        return Size(counts, 0.0, np.ones(len(gated)), zeros, lists=block_lists(gated))
    standalone = next((one.name for one in gated if not one.sites and one.layer is None), None)
    if standalone is not None:
        raise SpecError(
            explain(f"budget over {standalone!r}", "a standalone gate has no parameters.", hint='unit="gates"')
        )
    single = next((one.name for one in gated if one.coupled is None and one.layer is None), None)
    if unit == "memory" and single is not None:
        raise SpecError(
            explain(
                'Budget(unit="memory")',
                "bytes are saved where members of coupled groups are cut; the zeros of other gates take theirs.",
                expected='granularity "coupled" alone',
                got=f"other gates on {single!r}",
                hint='unit="params"',
            )
        )
    positions = _positions(model, unit, example_inputs)
    linear, square, constant, cubes = np.zeros(len(gated)), zeros, 0.0, NONE
    for number, one in enumerate(gated):
        for site in _every_use(one, unit) if one.coupled is None else ():
            uses = 1.0 if positions is None else positions.get((id(site.module), site.tensor_name), 0.0)
            linear[number] += uses * site.weight.numel() / counts[number]
    otherwise = {site.name for one in every if one.coupled is None for site in one.sites}
    for plan, prefix, numbers in _plans(gated):
        without = {name.removeprefix(prefix) for name in otherwise}
        for names, sites in () if whole else plan.tensors(without).items():
            inside = [number in numbers for number in plan.parts(names, sites)]
            if any(inside) and not all(inside):
                raise _shared(prefix + names[0])
            without |= set() if any(inside) else set(names)
        each = partial(_each, model, (plan, prefix), unit, positions)
        form = plan.form(len(gated), numbers, each, frozenset(without))
        constant, linear, square = constant + form.constant, linear + form.linear, square + form.square
        cubes = cubes.and_those(form.cubes, len(gated))
    floor = np.array([0 if one.coupled is None else one.coupled.group.least for one in gated], np.int64)
    size = Size(counts, constant, linear, square, floor, cubes=cubes, lists=block_lists(gated))
    return replace(size, constant=constant + _total(model, every, unit, positions) - size.whole) if whole else size


def _every_use(one: Gated, unit: Unit) -> Sequence[Site]:
    """The weights behind gates: tied ones once for parameters, at each of their sites for multiply-adds."""
    return list(one.weights()) if unit == "params" else one.sites


def _positions(model: nn.Module, unit: Unit, example_inputs: ExampleInputs | None) -> Positions | None:
    if unit != "macs":
        return None
    if example_inputs is None:
        raise SpecError(
            explain(
                "budget",
                "multiply-adds are counted by running the model.",
                got="no example_inputs",
                hint='sparsify(model, spec, budget=Budget(sparsity=0.5, unit="macs"), example_inputs=(x,))',
            )
        )
    return count_positions(model, example_inputs)


def _each(
    model: nn.Module,
    where: tuple[CoupledPlan, str],
    unit: Unit,
    positions: Positions | None,
    names: tuple[str, ...],
    sites: Sites,
) -> tuple[float, Sites]:
    """What each element of a parameter costs, and the sites that count."""
    plan, prefix = where
    if positions is None:
        return (float(_bytes(model, prefix + names[0])) if unit == "memory" else 1.0), sites
    stack = len(names) if sites and sites[0][1].stacked else 1
    return _uses(model, [prefix + name for name in names], positions) / stack, plan.by_token(sites)


def _uses(model: nn.Module, names: Sequence[str], positions: Positions) -> float:
    """Multiply-adds of each element of a parameter, at all places that go by these names."""
    parts = [name.rpartition(".") for name in names]
    keys = {(id(model.get_submodule(module)), tensor_name) for module, _, tensor_name in parts}
    return sum(positions.get(key, 0.0) for key in keys)


def _plans(gated: Sequence[Gated]) -> list[tuple[CoupledPlan, str, dict[int, int]]]:
    """The plans of coupled gates, what a wrapper puts before their names, and each group's place in ``gated``."""
    found: dict[int, tuple[CoupledPlan, str, dict[int, int]]] = {}
    for number, one in enumerate(gated):
        part = one.coupled or one.layer
        if part is not None:
            _, _, numbers = found.setdefault(id(part.plan), (part.plan, part.prefix, {}))
            numbers[part.number] = number
    return list(found.values())


def _bytes(model: nn.Module, name: str) -> int:
    """The bytes of one element of a parameter."""
    module, _, tensor_name = name.rpartition(".")
    return dict(tensors_of(model.get_submodule(module)))[tensor_name].element_size()


def _total(model: nn.Module, every: Sequence[Gated], unit: Unit, positions: Positions | None) -> float:
    """The size of the whole model, without the gates' own parameters."""
    if positions is None:
        own = {id(p) for one in every for p in one.gate.parameters()}
        found = [p for p in model.parameters() if id(p) not in own and not isinstance(p, UninitializedParameter)]
        each = [p.element_size() if unit == "memory" else 1 for p in distinct(found)]  # tied ones once
        return float(sum(p.numel() * n for p, n in zip(distinct(found), each, strict=True)))
    return total_macs(model, positions)


def _shared(name: str) -> SpecError:
    return SpecError(
        explain(
            repr(name),
            "parameters and multiply-adds can be budgeted in parts only where the parts share no tensor.",
            got="gates of two budgets on it",
            hint='one budget for all gates, or unit="gates"',
        )
    )
