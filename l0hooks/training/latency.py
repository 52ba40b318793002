"""Time as a function of how many gates stay, from a table of measured layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from l0hooks._torch.running import evaluating
from l0hooks._torch.tensors import has_meta
from l0hooks.attach.plain import plain_copy
from l0hooks.attach.walk import Gated, iter_gated
from l0hooks.errors import SpecError, StateError, explain
from l0hooks.structure.example_inputs import ExampleInputs, positional
from l0hooks.structure.groups import ChannelGroup
from l0hooks.training.budget import Budget
from l0hooks.training.clocks import Clock, clock_for, interleaved, ratio, shared
from l0hooks.training.layer_times import Side, Sides, measure, sides_of
from l0hooks.training.size import Floats, Ints, Size
from l0hooks.training.smaller_copies import smaller_copy
from l0hooks.training.time_table import LatencyTable

_WHERE = 'Budget(unit="latency")'


def latency_table(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    clock: Clock | None = None,
    round_to: int | Mapping[str, int] = 1,
) -> LatencyTable:
    """Time the layers of a gated model at several widths, on the device where it is, in evaluation mode.

    Every layer that holds members of coupled groups is timed by itself, on the input that it gets in the model, with
    100, 70, 40 and 15 % of its members along each axis; layers that are alike once. Then the whole model is timed
    beside a pruned one with half the members of each group, which shows how much of the time outside the layers
    shrinks with them.

    Parameters
    ----------
    model : nn.Module
        With coupled gates. Not changed.
    example_inputs : sequence or mapping
        Arguments of ``model``, of the size that counts: the time is that of this batch.
    clock : Clock, optional
        By default wall time on the CPU, events on CUDA.
    round_to : int or mapping from a group's kind to int
        What the numbers of members that stay will be multiples of.

    Returns
    -------
    LatencyTable
        For ``Budget(speedup=..., table=...)``; prints as a table.

    Raises
    ------
    SpecError
        If there are gates other than coupled ones, or none; or no clock for the device.
    StateError
        If the model is on the meta device, or cannot be cut.

    Examples
    --------
    >>> import torch
    >>> from l0hooks import sparsify
    >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> x = torch.randn(16, 8)
    >>> _ = sparsify(model, "coupled", example_inputs=(x,))
    >>> table = latency_table(model, (x,))
    >>> [(layer.kind, layer.inputs, layer.outputs) for layer in table.layers]
    [('Linear', 0, 64), ('Linear', 64, 0)]
    """
    every = list(iter_gated(model))
    check_gates(model, every)
    examples = positional(model, example_inputs)
    groups = _groups(every)
    multiples = {
        n: round_to if isinstance(round_to, int) else round_to.get(group.kind, 1) for n, group in groups.items()
    }
    plain = plain_copy(model)
    clock = shared(clock or clock_for(next(plain.parameters()).device))
    half = {
        id(one.gate): np.arange(group.size) < _half(group.size, multiples[n])
        for (n, group), one in zip(groups.items(), every, strict=True)
    }
    small = smaller_copy(model, half, examples)  # first: a model that cannot be cut need not be timed
    table = measure(plain, groups, multiples, examples, clock)
    with evaluating(plain), evaluating(small):
        dense, cut = interleaved(clock, [lambda: plain(*examples), lambda: small(*examples)])
    kept = np.array([half[id(one.gate)].sum() for one in every], np.float64)
    return _with_rest(table, every, kept, ratio(cut, dense))


def _half(size: int, multiple: int) -> int:
    step = min(multiple, size)
    return min(max(round(size / 2 / step), 1) * step, size)


def _with_rest(table: LatencyTable, every: Sequence[Gated], kept: Floats, share: float) -> LatencyTable:
    """The table with what each number that a layer writes costs outside the layers."""
    written = sum(len(one.names) * one.written * one.outputs for one in table.layers)
    if table.rest <= 0 or not written:
        return table
    most = replace(table, each_written=table.rest / written)
    none, all_ = (time_of(one, every).of(kept) for one in (table, most))
    vary = float(np.clip((none - share * table.whole) / max(none - all_, 1e-9), 0, 1))
    return replace(most, each_written=vary * most.each_written)


def check_gates(model: nn.Module, every: Sequence[Gated]) -> None:
    """Refuse gates that save no time, and models that cannot be timed.

    Raises
    ------
    SpecError
    StateError
    """
    single = next((one.name for one in every if one.coupled is None), None)
    if single is not None or not every:
        raise SpecError(
            explain(
                _WHERE,
                "only members of coupled groups save time when they are cut; zeros in a dense weight save none.",
                expected='granularity "coupled" for all gates of the model',
                got="no gates" if single is None else f"other gates on {single!r}",
                hint='sparsify(model, "coupled", example_inputs=(x,), budget=Budget(speedup=2.0))',
            )
        )
    prefix = next((one.coupled.prefix for one in every if one.coupled is not None), "")
    if prefix or has_meta(model):
        raise StateError(
            explain(
                _WHERE,
                "the model must run as it was sparsified.",
                got=f"a wrapper that holds it at {prefix.rstrip('.')!r}" if prefix else "device meta",
                hint="set the budget of that module" if prefix else "set the budget once the weights are loaded",
            )
        )


def table_for(
    model: nn.Module,
    part: Sequence[Gated],
    every: Sequence[Gated],
    budget: Budget,
    example_inputs: ExampleInputs | None,
) -> LatencyTable:
    """The table of a budget: the one that it brings, or a new one.

    Raises
    ------
    SpecError
        If there are no example inputs, gates that save no time or have other budgets, or the table is of another model.
    """
    if example_inputs is None or len(part) < len(every):
        raise SpecError(
            explain(
                _WHERE,
                "the whole model is timed, on example inputs.",
                expected="example_inputs, and one budget for all gates of the model",
                got="no example_inputs" if example_inputs is None else "gates under other budgets",
                hint="sparsify(model, 'coupled', budget=Budget(speedup=2.0), example_inputs=(x,))",
            )
        )
    check_gates(model, every)
    if budget.table is None:
        return latency_table(model, example_inputs, clock=budget.clock, round_to=budget.round_to)
    _check_table(budget.table, _groups(every))
    return budget.table


def _check_table(table: LatencyTable, groups: Mapping[int, ChannelGroup]) -> None:
    sides = sides_of(groups)
    known = {name: (layer.inputs, layer.outputs) for layer in table.layers for name in layer.names}
    got = next(
        (f"a table with {name!r} of lengths {known[name]}" for name in known if known[name] != _lengths(sides, name)),
        "",
    )
    in_table = {number for name in known if name in sides for side in sides[name].values() for number, _ in side.groups}
    got = got or next((f"a table without {group.name!r}" for n, group in groups.items() if n not in in_table), "")
    if got:
        raise SpecError(
            explain(
                "Budget(table=...)",
                "a table must be of this model, with gates on the same groups.",
                expected="its layers, with their lengths along the axes that gates shorten",
                got=got,
                hint="Budget(speedup=...) without a table, which times the layers",
            )
        )


def _lengths(sides: Mapping[str, Sides], name: str) -> tuple[int, ...] | None:
    own = sides.get(name)
    return None if own is None else tuple(own[reads].length if reads in own else 0 for reads in (True, False))


def _groups(every: Sequence[Gated]) -> dict[int, ChannelGroup]:
    return {number: one.coupled.group for number, one in enumerate(every) if one.coupled is not None}


def time_of(table: LatencyTable, every: Sequence[Gated]) -> Size:
    """Microseconds of the model by the numbers of members that stay in each group; the whole model as it was timed."""
    groups = _groups(every)
    sides = sides_of(groups)
    counts = np.array([group.size for group in groups.values()], np.int64)
    linear, square, constant = np.zeros(len(counts)), np.zeros((len(counts), len(counts))), 0.0
    for layer in table.layers:
        a, b, c, d = layer.terms
        c += layer.written * table.each_written
        for name in layer.names:
            (x, u), (y, v) = (_length(sides[name].get(reads), counts) for reads in (True, False))
            constant += a + b * x + c * y + d * x * y
            linear += (b + d * y) * u + (c + d * x) * v
            square += d / 2 * (np.outer(u, v) + np.outer(v, u))
    size = Size(counts, constant, linear, square, np.ones(len(counts), np.int64))
    more = size.whole / table.whole  # layers may take more by themselves than in the model
    if more > 1:
        size = Size(counts, constant / more, linear / more, square / more, size.floor)
    return replace(size, constant=size.constant + table.whole - size.whole)


def _length(side: Side | None, counts: Ints) -> tuple[float, Floats]:
    """The length of an axis without gated members, and what a member of each group adds to it."""
    weights = np.zeros(len(counts))
    if side is None:
        return 0.0, weights
    for (number, _), width in zip(side.groups, side.widths, strict=True):
        weights[number] += width
    return float(side.length - weights @ counts), weights
