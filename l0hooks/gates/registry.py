"""Every gate that lives, by a number; and whether one is new or has another parameter than before."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from l0hooks.gates.protocols import OptimizedGate, Rule

_numbers = itertools.count()
_live: dict[int, weakref.ref[OptimizedGate]] = {}
_changes = itertools.count(1)
_last_change = 0  # of the gates that there are, or of their parameters


def register(gate: OptimizedGate) -> int:
    """Look after ``gate`` for as long as it lives; the number it can be found by."""
    number = next(_numbers)
    _live[number] = weakref.ref(gate, lambda _: _live.pop(number, None))
    note_change()
    return number


def note_change() -> None:
    """Note that a gate is new, or has another parameter than before."""
    global _last_change
    _last_change = next(_changes)


def gate_of(number: int) -> OptimizedGate:
    """The gate that got this number."""
    gate = _live[number]()
    if gate is None:
        raise KeyError(number)
    return gate


def last_change() -> int:
    """A number that grows with every :func:`note_change`."""
    return _last_change


def gate_ids() -> set[int]:
    """The ids of the log-odds of every gate there is."""
    return {id(gate.log_alpha) for gate in all_gates()}


def all_gates() -> list[OptimizedGate]:
    """Every gate there is."""
    references = list(_live.copy().values())  # a copy is one step: other threads may build gates now
    return [gate for reference in references if (gate := reference()) is not None]


def rules_over(gates: Iterable[OptimizedGate]) -> list[Rule]:
    """The rules over ``gates``, each once."""
    return list({id(gate.rule): gate.rule for gate in gates if gate.rule is not None}.values())


@torch.library.custom_op("l0hooks::support", mutates_args=())
def _support_op(log_alpha: Tensor, key: int) -> Tensor:
    return gate_of(key).support().clone()


@_support_op.register_fake
def _(log_alpha: Tensor, key: int) -> Tensor:
    return torch.empty_like(log_alpha, dtype=torch.bool)
