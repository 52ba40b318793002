"""``set_budget``: put the gates of a model under budgets."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from l0hooks.attach.by_pattern import by_pattern
from l0hooks.attach.spec import Pattern
from l0hooks.attach.walk import Gated, iter_gated
from l0hooks.errors import SpecError, StateError, explain
from l0hooks.structure.example_inputs import ExampleInputs, positional
from l0hooks.training.blocks import in_blocks
from l0hooks.training.budget import Budget, invalid_budget
from l0hooks.training.budget_rule import BudgetRule
from l0hooks.training.cost import size_of
from l0hooks.training.cutting import Cutter
from l0hooks.training.lagrangian import LagrangianRule
from l0hooks.training.latency import table_for, time_of
from l0hooks.training.size import Size
from l0hooks.training.start_scores import check_scores, start_scores
from l0hooks.training.timed_rule import timed_rule


def set_budget(
    model: nn.Module,
    budget: Budget | Mapping[Pattern, Budget],
    *,
    example_inputs: ExampleInputs | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> list[BudgetRule]:
    """Put the gates of ``model`` that have none yet under a budget, **in place**; all or, on any error, none.

    Parameters
    ----------
    model : nn.Module
        With gates.
    budget : Budget, or mapping from pattern to Budget
        One for all gates together, counting the whole model. With a mapping each counts its own part: the gates of
        the modules that the pattern matches (the first that does), and the tensors that they remove from.
    example_inputs : sequence or mapping, optional
        Arguments of ``model``, for budgets of multiply-adds, in time, or with ``cut_every``.
    scores : mapping from the name of a gate to Tensor, >= 0, shape of the gate, optional
        What closing each gate would cost, from :func:`l0hooks.score`. The gates start from it, divided by what a gate's
        removal saves in the budget's unit, in place of the size of the weights behind them.

    Returns
    -------
    list of BudgetRule
        One for each budget: ``expected()``, ``scheduled``, ``target`` and, for budgets that are not automatic,
        ``advance()``.

    Raises
    ------
    StateError
        If there are no gates without a budget.
    SpecError
        If a pattern matches no gate, multiply-adds, time or ``cut_every`` are asked for without example inputs, there
        are gates of single layers beside ``cut_every`` or a budget in time, or ``scores`` lack a gate that multiplies
        weights or have another shape.
    InvalidValueError
        If a size cannot be reached, the message has the smallest that can; if scores are negative or not finite.

    Examples
    --------
    >>> from l0hooks import Gate
    >>> gate = Gate(100)
    >>> (rule,) = set_budget(gate, Budget(keep=10, steps=5, automatic=False))
    >>> for _ in range(5):
    ...     rule.advance()
    >>> int(gate.support().sum()), round(rule.expected(), 3)
    (10, 10.0)
    """
    every = list(iter_gated(model))
    free = [one for one in every if one.gate.rule is None]
    if not free:
        got = "gates that have budgets" if every else "none"
        raise StateError(explain("set_budget", "the model must hold gates without a budget.", got=got))
    own = {id(p) for one in every for p in one.gate.parameters()}
    weights = tuple(weakref.ref(p) for p in model.parameters() if id(p) not in own)
    rules: list[BudgetRule] = []
    starts: list[list[Tensor | None]] = []
    cutter = _cutter(model, every, budget, example_inputs)
    given = None if scores is None else check_scores(model, free, scores)
    for part, one_budget in _parts(model, free, budget):
        gates, table = [one.gate for one in part], None
        if one_budget.unit == "latency":
            table = table_for(model, part, every, one_budget, example_inputs)
            size = time_of(table, part)
        else:
            size = size_of(model, part, every, one_budget.unit, example_inputs, whole=not isinstance(budget, Mapping))
        size = in_blocks(size, part, one_budget)
        _refuse_unreachable(one_budget, size)
        if table is not None and example_inputs is not None:
            rules.append(timed_rule(one_budget, gates, size, table, (model, positional(model, example_inputs))))
        else:
            rules.append((LagrangianRule if one_budget.method == "lagrangian" else BudgetRule)(one_budget, gates, size))
        starts.append(start_scores(part, one_budget, size, given))
    before = [(one.gate, one.gate.log_alpha.detach().clone(), one.gate.limits) for one in free]
    try:
        for rule, start in zip(rules, starts, strict=True):
            _begin(rule, start, weights)
            rule.cutter = None if rule.budget.cut_every is None else cutter
    except BaseException:  # the user may interrupt
        for gate, log_alpha, limits in before:
            gate.rule, gate.multipliers, gate.limits = None, None, limits
            gate.mask = gate.held = None
            gate.log_alpha.detach().copy_(log_alpha)
        raise
    return rules


def _cutter(
    model: nn.Module,
    every: Sequence[Gated],
    budget: Budget | Mapping[Pattern, Budget],
    example_inputs: ExampleInputs | None,
) -> Cutter | None:
    """What cuts the model while it trains, if a budget wants that and it can be done."""
    if all(one.cut_every is None for one in ([budget] if isinstance(budget, Budget) else budget.values())):
        return None
    others = [one.name for one in every if one.coupled is None]
    if others or example_inputs is None:
        raise SpecError(
            explain(
                "Budget(cut_every=...)",
                "only members of coupled groups are cut while training, and what is left is compared on examples.",
                expected='granularity "coupled" alone, and example_inputs',
                got=f"other gates on {others[0]!r}" if others else "no example_inputs",
            )
        )
    return Cutter(model, positional(model, example_inputs))


def _begin(rule: BudgetRule, start: list[Tensor | None], weights: tuple[weakref.ref[nn.Parameter], ...]) -> None:
    """Put the gates of ``rule`` under it, **in place**."""
    rule.weights = weights
    for gate in rule.gates:
        gate.rule = rule
        gate.limits = rule.limits or gate.limits
    if any(part is not None for part in start) or not rule.budget.steps:
        rule.start_from(start)
    if isinstance(rule, LagrangianRule):
        rule.add_multipliers()


def _parts(
    model: nn.Module, free: Sequence[Gated], budget: Budget | Mapping[Pattern, Budget]
) -> list[tuple[list[Gated], Budget]]:
    """The gates of each budget."""
    if isinstance(budget, Budget):
        return [(list(free), budget)]
    parts = by_pattern(model, free, budget, where="set_budget")
    for pattern, (_, part) in zip(budget, parts, strict=True):
        if not part:
            raise SpecError(
                explain("set_budget", "each budget must have gates.", got=f"{pattern!r}, whose gates have others")
            )
    return [(part, one_budget) for one_budget, part in parts]


def _refuse_unreachable(budget: Budget, size: Size) -> None:
    least = size.of(size.least(budget.min_keep))
    target = budget.target(size.whole)
    if not least <= target < size.whole:
        smallest = f"a {budget.unit} size of {least:,.0f} of {size.whole:,.0f}, sparsity {1 - least / size.whole:.4f}"
        raise invalid_budget(
            "the size must be one that the gates can reach.",
            f"{target:,.0f}",
            f"at least {smallest}; less than the whole",
            "gates on more layers, or a smaller min_keep" if target < least else "a smaller size",
        )
