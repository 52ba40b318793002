"""What every trainer's callback does: check the optimiser, add the penalties, tell the sizes, prune and save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l0hooks._torch.tensors import whole
from l0hooks.attach._summary import summary
from l0hooks.attach.spec import Pattern
from l0hooks.errors import StateError, explain
from l0hooks.export._prune import prune
from l0hooks.export.save import save_pruned
from l0hooks.gates.gate import iter_gates
from l0hooks.training.penalties import Strength, penalty

Penalties = Mapping[str, Strength | Mapping[Pattern, Strength]]


def check_optimizers(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], hint: str) -> None:
    """Refuse an optimiser under which gates decay, or that does not move them.

    Raises
    ------
    StateError
        If the model has no gates, one of them is under weight decay, or no optimiser has it.
    """
    gates = dict(iter_gates(model))
    if not gates:
        raise _refusal("the model must hold gates.", "none", "l0hooks.sparsify(model, ...) before training")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decay = {id(p): group.get("weight_decay", 0.0) for group in groups for p in group["params"]}
    for name, gate in gates.items():
        if not gate.log_alpha.requires_grad:
            continue
        if id(gate.log_alpha) not in decay:
            raise _refusal("the optimizer must move the gates.", f"one without {name!r}", hint)
        if decay[id(gate.log_alpha)]:
            raise _refusal("gates must not decay.", f"weight decay {decay[id(gate.log_alpha)]} on {name!r}", hint)


def _refusal(must: str, got: str, hint: str) -> StateError:
    return StateError(explain("SparsifyCallback", must, got=got, hint=hint))


def add_penalties(model: nn.Module, penalties: Penalties, scale: float = 1.0) -> float:
    """Add the penalties' gradient, times ``scale``, to those that are there; the penalties' value.

    The gradients are handed over, not accumulated by a backward pass: accumulation and wrappers do not see them, so
    that they count once for each optimiser step and are the same in every process.
    """
    with torch.enable_grad():
        total = penalty(model, **penalties)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None and parameter.grad is None:
                parameter.grad = grad * scale
            elif grad is not None and parameter.grad is not None:
                parameter.grad.add_(grad, alpha=scale)
    return float(whole(total.detach()))


def sizes(model: nn.Module) -> dict[str, float]:
    """What a trainer logs: the sparsity expected and evaluated, and where budgets stand."""
    report = summary(model)
    found = {"l0_expected_sparsity": report.expected_sparsity, "l0_sparsity": report.sparsity}
    rules = {id(gate.rule): gate.rule for _, gate in iter_gates(model) if gate.rule is not None}
    if rules:
        found["l0_budget_step"] = float(max(rule.step for rule in rules.values()))
    return found


@contextlib.contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """The model's own ``forward``, without what accelerate has put before it for mixed precision."""
    added: dict[str, Any] = {k: model.__dict__.pop(k) for k in ("forward", "_original_forward") if k in model.__dict__}
    if "_original_forward" not in added:  # not accelerate's
        model.__dict__.update(added)
    try:
        yield
    finally:
        model.__dict__.update(added)


def pruned_and_saved(model: nn.Module, example_inputs: Sequence[Any] | None, path: Path | None) -> nn.Module:
    """The plain model, in evaluation mode, and written to ``path``."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with plain_forward(model):
            plain = prune(model, example_inputs=example_inputs).eval()
    finally:
        for module in training:
            module.training = True
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_pruned(plain, path)
    return plain
