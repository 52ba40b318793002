"""``preview``: what a budget would leave of a model, before any training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from l0hooks._sparsify import sparsify
from l0hooks.attach._summary import gates_kept, summarise
from l0hooks.attach.plan import Spec
from l0hooks.attach.spec import Pattern
from l0hooks.attach.summary_table import Summary, SummaryRow
from l0hooks.attach.walk import Gated, iter_gated
from l0hooks.structure import ChannelGroup
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.structure.macs import count_positions
from l0hooks.training.budget import Budget
from l0hooks.training.budget_rule import BudgetRule


@dataclass(frozen=True)
class PreviewRow:
    """One size of the model, or the members of one kind.

    Attributes
    ----------
    name : str
        ``"parameters"``, ``"bytes"``, ``"multiply-adds"``; or a kind of coupled group, or a granularity.
    groups : int
        The groups or weights that were counted together; 0 for a size of the model.
    dense, left, smallest : int
        Before; what the budget would leave; and what would be left with every gate closed that can close.

    Examples
    --------
    >>> PreviewRow("neuron", groups=2, dense=64, left=32, smallest=2).share
    0.5
    """

    name: str
    groups: int
    dense: int
    left: int
    smallest: int

    @property
    def share(self) -> float:
        """What would be left, in [0, 1]."""
        return self.left / self.dense if self.dense else 1.0


@dataclass(frozen=True)
class Preview:
    """What a budget would leave of a model; ``print`` it, or take ``to_dict()``.

    Attributes
    ----------
    sizes : tuple of PreviewRow
        Of the whole model: parameters, their bytes, and multiply-adds for one example if example inputs were given.
    kinds : tuple of PreviewRow
        The members of coupled groups by kind, and other gates by granularity.
    left : Summary
        Layer by layer and group by group, what the budget would leave.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> preview(model, "weight", Budget(keep=48)).kinds
    (PreviewRow(name='weight', groups=2, dense=192, left=48, smallest=2),)
    """

    sizes: tuple[PreviewRow, ...]
    kinds: tuple[PreviewRow, ...]
    left: Summary

    def to_dict(self) -> dict[str, Any]:
        """Sizes and kinds as plain data, ready for JSON."""
        names = ("dense", "left", "smallest", "share")
        return {
            part: {row.name: {name: row.__getattribute__(name) for name in names} for row in rows}
            for part, rows in (("sizes", self.sizes), ("kinds", self.kinds))
        }

    def __str__(self) -> str:
        lines = [("", "dense", "left", "share", "smallest")]
        for row in (*self.sizes, *self.kinds):
            count = f"{row.name}, {row.groups:,} group{'' if row.groups == 1 else 's'}" if row.groups else row.name
            lines.append((count, f"{row.dense:,}", f"{row.left:,}", f"{row.share:.2%}", f"{row.smallest:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        cells = [[f"{first:<{widths[0]}}", *map(str.rjust, rest, widths[1:])] for first, *rest in lines]
        return "\n".join("  ".join(line).rstrip() for line in cells)


def preview(
    model: nn.Module,
    spec: Spec,
    budget: Budget | Mapping[Pattern, Budget],
    *,
    example_inputs: ExampleInputs | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    groups: Sequence[ChannelGroup] | None = None,
    scores: Callable[[nn.Module], Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None,
) -> Preview:
    """What ``sparsify(model, spec, budget=budget)`` and training would leave, before any training.

    A copy of the model is brought to the budget in one shot. The size in the budget's own unit is therefore the one
    that training will end with. The other sizes, and how many members of each kind stay, depend on which gates training
    closes. Before it, the size of the weights decides, or ``scores``.

    Parameters
    ----------
    model : nn.Module
        Not changed. The copy takes as much memory once more.
    spec : GateSpec, shorthand, or mapping from pattern to one of these
        As for :func:`l0hooks.sparsify`, like what follows.
    budget : Budget, or mapping from pattern to Budget
        Its steps and schedule do not matter.
    example_inputs : sequence or mapping, optional
        Arguments of ``model``; coupled gates and multiply-adds need them.
    exclude : pattern or sequence of patterns
    groups : sequence of ChannelGroup, optional
    scores : callable from the gated model to scores, or scores of the shape of each gate, optional

    Returns
    -------
    Preview

    Raises
    ------
    SpecError, UnsupportedModuleError, InvalidValueError
        As :func:`l0hooks.sparsify`. If the size cannot be reached, the message has the smallest that can.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> budget = Budget(sparsity=0.5, unit="params")
    >>> print(preview(model, "coupled", budget, example_inputs=(torch.zeros(1, 8),)))
                     dense  left   share  smallest
    parameters         212    95  44.81%        17
    bytes              848   380  44.81%        68
    multiply-adds      192    84  43.75%        12
    neuron, 1 group     16     7  43.75%         1
    """
    at_once = (
        _in_one_shot(budget)
        if isinstance(budget, Budget)
        else {pattern: _in_one_shot(part) for pattern, part in budget.items()}
    )
    gated = copy.deepcopy(model)
    sparsify(gated, spec, example_inputs=example_inputs, exclude=exclude, groups=groups, budget=at_once, scores=scores)
    positions = None if example_inputs is None else count_positions(gated, example_inputs)
    every = list(iter_gated(gated))
    left = summarise(gated, every, gates_kept(every), positions)
    smallest = summarise(gated, every, _least(every), positions)
    return Preview(tuple(_sizes(left, smallest)), tuple(_kinds(left, smallest)), left)


def _in_one_shot(budget: Budget) -> Budget:
    return replace(budget, steps=0, method="shift", constraint=None, cut_every=None)


def _least(every: Sequence[Gated]) -> dict[int, int]:
    """How many gates of each array stay at the least, by the id of the gate."""
    least = gates_kept(every)
    rules = {id(one.gate.rule): one.gate.rule for one in every}.values()
    for rule in (rule for rule in rules if isinstance(rule, BudgetRule)):
        numbers = rule.size.least(rule.budget.min_keep)
        least |= {id(gate): int(number) for gate, number in zip(rule.gates, numbers, strict=True)}
    return least


def _sizes(left: Summary, smallest: Summary) -> Iterator[PreviewRow]:
    """The whole model."""
    yield PreviewRow("parameters", 0, left.model_parameters, left.model_parameters_kept, smallest.model_parameters_kept)
    yield PreviewRow("bytes", 0, left.model_memory, left.model_memory_kept, smallest.model_memory_kept)
    numbers = left.model_macs, left.model_macs_kept, smallest.model_macs_kept
    if None not in numbers:
        yield PreviewRow("multiply-adds", 0, *(number or 0 for number in numbers))


def _kinds(left: Summary, smallest: Summary) -> Iterator[PreviewRow]:
    """The gates of each kind or granularity."""
    kinds = [row.kind if row.granularity == "coupled" else str(row.granularity or "gates") for row in left.rows]
    for kind in dict.fromkeys(kinds):
        rows = [n for n, name in enumerate(kinds) if name == kind]
        dense = sum(left.rows[n].gates for n in rows)
        yield PreviewRow(kind, len(rows), dense, *(sum(_kept(one.rows[n]) for n in rows) for one in (left, smallest)))


def _kept(row: SummaryRow) -> int:
    return round(row.gates * (1 - row.sparsity))
