"""What happens around a step of an optimiser to the gates that it moves: projection, schedules, rules.

Other gates are left alone. Which gates an optimiser moves is looked up once, and again when its parameters, or the
gates, are no longer the same objects.
"""

from __future__ import annotations

import gc
import operator
import warnings
import weakref
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from l0hooks.errors import L0HooksWarning, StateError, explain
from l0hooks.gates.protocols import OptimizedGate, Rule
from l0hooks.gates.registry import all_gates, last_change, rules_over

Step = tuple[tuple[Any, ...], dict[str, Any]]
_steps = 0


def steps_taken() -> int:
    """How many steps all optimisers of this process have taken: fused ones change tensors without a new version."""
    return _steps


@dataclass(frozen=True)
class _Held:
    """A gate of which an optimiser holds the log-odds, or the multipliers of its rule."""

    reference: weakref.ref[OptimizedGate]
    parameter: nn.Parameter
    group: int
    multipliers: bool

    @property
    def gate(self) -> OptimizedGate | None:
        """The gate, if it lives and still has this parameter."""
        gate = self.reference()
        if gate is None:
            return None
        return gate if (gate.multipliers if self.multipliers else gate.log_alpha) is self.parameter else None


class _Holding:
    """The gates that one optimiser moves, for as long as parameters and gates are the same objects."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._change = last_change()
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        group_of = {id(p): number for number, group in enumerate(self._groups) for p in group}
        self.held: list[_Held] = []
        for gate in all_gates():
            for parameter in (gate.log_alpha, gate.multipliers):
                if parameter is not None and id(parameter) in group_of:
                    multipliers = parameter is gate.multipliers
                    self.held.append(_Held(weakref.ref(gate), parameter, group_of[id(parameter)], multipliers))
        self.others = [weakref.ref(gate) for gate in all_gates() if _is_missing(gate, group_of)]
        self.before: list[tuple[OptimizedGate, Tensor]] = []  # log-odds that a step must not move

    def is_current(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether nothing has changed."""
        groups = optimizer.param_groups
        return (
            self._change == last_change()
            and len(groups) == len(self._groups)
            and all(map(_same_objects, self._groups, (group["params"] for group in groups)))
            and all(one.gate is not None for one in self.held)
        )

    def moved(self) -> list[OptimizedGate]:
        """The gates whose log-odds the optimiser moves."""
        return [gate for one in self.held if not one.multipliers and (gate := one.gate) is not None]

    def rules_of_multipliers(self, optimizer: torch.optim.Optimizer, *, upwards: bool) -> list[Rule]:
        """The rules whose multipliers the optimiser raises, or lowers."""
        found = []
        for one in self.held:
            gate = one.gate if one.multipliers else None
            raised = bool(optimizer.param_groups[one.group].get("maximize"))
            if gate is not None and gate.rule is not None and raised is upwards:
                found.append(gate.rule)
        return found


def _counts_steps(gate: OptimizedGate) -> bool:
    """Whether an optimiser must hold the gate, because the schedule of its budget counts that one's steps."""
    rule = gate.rule
    return rule is not None and rule.automatic and not rule.finished and gate.log_alpha.requires_grad


def _is_missing(gate: OptimizedGate, parameters: Container[int]) -> bool:
    """Whether these parameters, by their ids, are weights of a model without the gate, whose budget counts steps."""
    if gate.rule is None or not _counts_steps(gate) or id(gate.log_alpha) in parameters:
        return False
    weights = [weight for one in gate.rule.weights if (weight := one()) is not None]
    return any(id(weight) in parameters for weight in weights)


def _same_objects(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


_warned: weakref.WeakSet[Rule] = weakref.WeakSet()
_holdings: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Holding] = weakref.WeakKeyDictionary()


def optimizers_of(parameters: Iterable[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """The optimisers that have taken a step and hold one of ``parameters``."""
    wanted = set(map(id, parameters))
    return [one for one in list(_holdings) if any(id(p) in wanted for g in one.param_groups for p in g["params"])]


def _holding(optimizer: torch.optim.Optimizer) -> _Holding:
    found = _holdings.get(optimizer)
    if found is None or not found.is_current(optimizer):
        before = [] if found is None else found.before
        found = _holdings[optimizer] = _Holding(optimizer)
        found.before = before
    return found


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
    holding = _holding(optimizer)
    if not holding.held:
        return None
    if holding.rules_of_multipliers(optimizer, upwards=False):
        raise StateError(
            explain(
                "optimizer.step",
                "the multipliers of a budget must ascend.",
                expected="them in a group of their own with maximize=True",
                got="a group that minimises",
                hint="optimizer(param_groups(model, lr=..., gate_lr=...))",
            )
        )
    moved = holding.moved()
    rules = rules_over(moved)
    closure: Callable[[], object] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not rules or closure is None:
        for rule in rules:
            rule.before_step()
        return None
    fixed = [gate for gate in moved if gate.rule is not None and gate.rule.finished]
    holding.before = [(gate, gate.log_alpha.detach().clone()) for gate in fixed]

    def then_rules() -> object:  # the gradients come only now; Lightning passes every step as a closure
        loss = closure()
        for rule in rules:
            rule.before_step()
        return loss

    return (args[0], then_rules, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    global _steps
    _steps += 1
    holding = _holding(optimizer)
    if holding.others:
        _warn_if_not_held(holding)
    if not holding.held or is_skipped(optimizer):
        return
    moved = holding.moved()
    before, holding.before = holding.before, []
    for gate, log_alpha in before:
        gate.log_alpha.detach().copy_(log_alpha)  # LBFGS moves parameters that have no gradient
    for gate in moved:
        gate.project()
        gate.follow_schedule()
    for rule in rules_over(moved):
        rule.after_step(moved)
    for rule in holding.rules_of_multipliers(optimizer, upwards=True):
        rule.after_ascent()
    for gate in moved:
        gate.end_forward()


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler has made the step that just ended do nothing: a fused optimiser is called then, too."""
    found: Tensor | None = vars(optimizer).get("found_inf")
    return found is not None and bool(found)


def _warn_if_not_held(holding: _Holding) -> None:
    """Warn if an optimiser moves weights of a model whose gates under a budget no optimiser holds."""
    others = [gate for one in holding.others if (gate := one()) is not None]
    trained = [gate for gate in others if gate.log_alpha.grad is not None and _counts_steps(gate)]
    if not trained:
        return
    holding.others = []
    # an optimiser that has taken no step yet is known to the garbage collector alone
    every = [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer)]
    groups = [group for one in every for group in vars(one).get("param_groups", ())]  # another thread may build one
    held = {id(p) for group in groups for p in group["params"]}
    lost = [gate for gate in trained if id(gate.log_alpha) not in held]
    rules = [rule for rule in rules_over(lost) if rule not in _warned]
    if not rules:
        return
    _warned.update(rules)
    progress = [rule.progress() for rule in rules]
    text = explain(
        "optimizer.step",
        "no optimizer holds the gates of a budget: they do not learn, and its schedule stands still.",
        expected="; ".join(f"{one.target:,.0f} {one.unit} after {one.steps:,} steps" for one in progress),
        got="; ".join(f"{one.kept:,.0f} {one.unit} at step {one.step:,}" for one in progress),
        hint="optimizer(l0hooks.param_groups(model, lr=..., gate_lr=...)), built after sparsify",
    )
    warnings.warn(text, L0HooksWarning, stacklevel=4)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
