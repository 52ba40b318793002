"""``finish_budget``: fix the support of gates under budgets now."""

from __future__ import annotations

from torch import nn

from l0hooks.errors import StateError, explain
from l0hooks.gates.gate import iter_gates
from l0hooks.training.budget_rule import BudgetRule


def finish_budget(model: nn.Module) -> list[BudgetRule]:
    """Fix the support of every budget of ``model`` at its target now, **in place**, as if its schedule had ended.

    The gates with the largest ``log_alpha`` that fit into the target stay, the others close. From then on gates no
    longer move and have no noise; the weights can train on. Use it where a schedule cannot end by itself: training
    was stopped early, an earlier checkpoint was loaded, or the model is an averaged copy that no optimiser steps.

    Parameters
    ----------
    model : nn.Module
        With gates under budgets. A budget that also holds gates elsewhere is finished as a whole; one whose schedule
        has ended stays as it is.

    Returns
    -------
    list of BudgetRule
        One for each budget.

    Raises
    ------
    StateError
        If no gate of the model has a budget, or a gate is NaN; nothing is changed.

    Examples
    --------
    >>> from l0hooks import Budget, prune, sparsify, summary
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> _ = sparsify(model, "weight", budget=Budget(keep=5, steps=1000))
    >>> summary(model).parameters_kept > 25
    True
    >>> (rule,) = finish_budget(model)
    >>> summary(model).parameters_kept, rule.finished
    (5, True)
    """
    gates = dict(iter_gates(model))
    rules = list({id(gate.rule): gate.rule for gate in gates.values() if isinstance(gate.rule, BudgetRule)}.values())
    if not rules:
        got = "gates without budgets" if gates else "no gates"
        hint = "set_budget(model, Budget(...))" if gates else "sparsify(model, spec, budget=Budget(...))"
        raise StateError(explain("finish_budget", "the model must hold gates with a budget.", got=got, hint=hint))
    spoiled = [gate for rule in rules if not rule.finished for gate in rule.gates if gate.log_alpha.isnan().any()]
    if spoiled:
        raise StateError(
            explain("finish_budget", "gates that are NaN cannot be ranked.", got="NaN", hint="a smaller gate_lr")
        )
    for rule in rules:
        rule.finish()
    return rules
