"""What happens around every step of every optimiser: gates are projected, schedules go on, rules hold."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from l0hooks.errors import StateError, explain

if TYPE_CHECKING:
    from l0hooks.gates.gate import Gate

Step = tuple[tuple[Any, ...], dict[str, Any]]
_live: weakref.WeakValueDictionary[int, Gate] = weakref.WeakValueDictionary()
_keys = itertools.count()
_held: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[tuple[Gate, Tensor]]] = weakref.WeakKeyDictionary()
_steps = 0


class Rule(Protocol):
    """What decides for several gates together which of them stay; a budget.

    Attributes
    ----------
    finished : bool
        Whether the support is fixed: gates no longer move, and training uses their final values.
    """

    finished: bool

    @property
    def step(self) -> int:
        """How many steps it has taken."""
        ...

    def state(self) -> tuple[float, ...]:
        """What a checkpoint needs to resume."""
        ...

    def resume(self, *state: float) -> None:
        """Go on from there."""
        ...

    def refresh(self) -> tuple[object, ...]:
        """Bring ``mask`` and ``held`` of every gate up to date; a key that tells one state from another."""
        ...

    def before_step(self) -> None:
        """An optimiser is about to use the gradients; possibly once more."""
        ...

    def after_step(self, moved: Sequence[Gate]) -> None:
        """An optimiser has moved these gates."""
        ...

    def after_ascent(self) -> None:
        """An optimiser has moved the multipliers, if there are any."""
        ...

    def penalty(self) -> Tensor:
        """What it adds to the loss, shape ()."""
        ...


def register(gate: Gate) -> int:
    """Look after ``gate`` for as long as it lives; the number it can be found by."""
    key = next(_keys)
    _live[key] = gate
    return key


def gate_of(key: int) -> Gate:
    """The gate that got this number."""
    return _live[key]


def steps_taken() -> int:
    """How many steps all optimisers of this process have taken: fused ones change tensors without a new version."""
    return _steps


def gate_ids() -> set[int]:
    """The ids of the log-odds of every gate there is."""
    return {id(gate.log_alpha) for gate in _live.values()}


def _moved(optimizer: torch.optim.Optimizer) -> list[Gate]:
    """The gates that ``optimizer`` moves."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [gate for gate in _live.values() if id(gate.log_alpha) in own]


def _rules(gates: Sequence[Gate]) -> list[Rule]:
    """The rules over ``gates``, each once."""
    return list({id(gate.rule): gate.rule for gate in gates if gate.rule is not None}.values())


def _priced(optimizer: torch.optim.Optimizer, upwards: bool) -> list[Rule]:
    """The rules whose multipliers ``optimizer`` raises, or lowers."""
    groups = [group for group in optimizer.param_groups if bool(group.get("maximize")) is upwards]
    own = {id(p) for group in groups for p in group["params"]}
    return [gate.rule for gate in _live.values() if gate.rule is not None and id(gate.multipliers) in own]


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
    if _priced(optimizer, upwards=False):
        raise StateError(
            explain(
                "optimizer.step",
                "the multipliers of a budget must ascend.",
                expected="them in a group of their own with maximize=True",
                got="a group that minimises",
                hint="optimizer(param_groups(model, lr=..., gate_lr=...))",
            )
        )
    moved = _moved(optimizer)
    rules = _rules(moved)
    closure: Callable[[], object] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not rules or closure is None:
        for rule in rules:
            rule.before_step()
        return None
    fixed = [gate for gate in moved if gate.rule is not None and gate.rule.finished]
    _held[optimizer] = [(gate, gate.log_alpha.detach().clone()) for gate in fixed]

    def then_rules() -> object:  # the gradients come only now; Lightning passes every step as a closure
        loss = closure()
        for rule in rules:
            rule.before_step()
        return loss

    return (args[0], then_rules, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    global _steps
    _steps += 1
    moved = _moved(optimizer)
    for gate, log_alpha in _held.pop(optimizer, ()):
        gate.log_alpha.detach().copy_(log_alpha)  # LBFGS moves parameters that have no gradient
    for gate in moved:
        gate.project()
        gate.follow_schedule()
    for rule in _rules(moved):
        rule.after_step(moved)
    for rule in _priced(optimizer, upwards=True):
        rule.after_ascent()
    for gate in _live.values():
        gate.end_forward()


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
