"""``set_budget``: put the gates of a model under budgets that they can meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks.attach.by_pattern import by_pattern
from l0hooks.attach.spec import Pattern
from l0hooks.attach.walk import Gated, iter_gated
from l0hooks.errors import SpecError, StateError, explain
from l0hooks.training.budget import Budget, BudgetRule, invalid_budget
from l0hooks.training.cost import Size, size_of
from l0hooks.training.lagrangian import LagrangianRule

_FARTHEST = 3.0  # standard deviations that a weight counts for: many are next to nothing


def set_budget(
    model: nn.Module,
    budget: Budget | Mapping[Pattern, Budget],
    *,
    example_inputs: Sequence[Any] | None = None,
) -> list[BudgetRule]:
    """Put the gates of ``model`` that have none yet under a budget, **in place**; all or, on any error, none.

    Parameters
    ----------
    model : nn.Module
        With gates.
    budget : Budget, or mapping from pattern to Budget
        One for all gates together, counting the whole model. With a mapping each counts its own part: the gates of
        the modules that the pattern matches (the first that does), and the tensors that they remove from.
    example_inputs : sequence, optional
        Positional arguments of ``model``, for budgets of multiply-adds.

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
        If a pattern matches no gate, or multiply-adds are asked for without example inputs.
    InvalidValueError
        If a size cannot be reached; the message has the smallest that can.

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
    rules: list[BudgetRule] = []
    scores: list[list[Tensor | None]] = []
    for part, one_budget in _parts(model, free, budget):
        size = size_of(model, part, every, one_budget.unit, example_inputs, whole=not isinstance(budget, Mapping))
        _refuse_unreachable(one_budget, size)
        kind = LagrangianRule if one_budget.method == "lagrangian" else BudgetRule
        rules.append(kind(one_budget, [one.gate for one in part], size))
        scores.append(prior_scores(part, one_budget.prior) if one_budget.prior else [])
    for rule, score in zip(rules, scores, strict=True):
        if any(part is not None for part in score):
            rule.start_from(score)
        for gate in rule.gates:
            gate.rule = rule
            gate.limits = rule.limits or gate.limits
        if isinstance(rule, LagrangianRule):
            rule.add_multipliers()
    return rules


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


@torch.no_grad()
def prior_scores(part: Sequence[Gated], prior: float) -> list[Tensor | None]:
    """How much the weights behind the gates of each array speak for them; None for an array without weights.

    The logarithm of the root mean square of the weights behind a gate, in standard deviations from the mean: that of
    all single weights together, or of the array's own gates where these are channels, kernels or blocks.
    """
    sizes = [_log_size(one) for one in part]
    single = [s for s, one in zip(sizes, part, strict=True) if s is not None and _is_single(one)]
    together = torch.cat([s.flatten().to(single[0].device) for s in single]) if single else None
    scores: list[Tensor | None] = []
    for size, one in zip(sizes, part, strict=True):
        known = together if _is_single(one) else size
        if size is None or known is None or not bool(known.isfinite().any()):
            scores.append(None)
            continue
        finite = known[known.isfinite()]
        spread = finite.std(correction=0).clamp(min=1e-6).to(size.device)
        scores.append(prior * ((size - finite.mean().to(size.device)) / spread).clamp(-_FARTHEST, _FARTHEST))
    return scores


def _is_single(one: Gated) -> bool:
    return bool(one.sites) and one.sites[0].gating.granularity == "weight"


def _log_size(one: Gated) -> Tensor | None:
    """log of the root mean square of the weights behind each gate; None without weights."""
    squares, counts = torch.zeros_like(one.gate.log_alpha), torch.zeros_like(one.gate.log_alpha)
    for site in one.weights():
        gates = site.gating.gates
        with torch.enable_grad():
            values = [torch.ones_like(gate.log_alpha, requires_grad=gate is one.gate) for gate in gates]
            factor = site.gating.factor(values, 0.0)
            mine = next(v for v, gate in zip(values, gates, strict=True) if gate is one.gate)
            weight = site.weight.detach().to(factor)
            squares += torch.autograd.grad((factor * weight.square()).sum(), mine, retain_graph=True)[0]
            counts += torch.autograd.grad((factor * torch.ones_like(weight)).sum(), mine)[0]
    return (squares / counts.clamp(min=1)).log() / 2 if one.sites else None


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
