"""Steps that the callbacks of all trainers share: check optimisers, add penalties, report sizes, prune and save."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l0hooks._torch.tensors import whole
from l0hooks.attach._summary import summary, warn_unfinished
from l0hooks.attach.spec import Pattern
from l0hooks.errors import L0HooksWarning, StateError, explain
from l0hooks.export._prune import prune
from l0hooks.export.save import save_pruned
from l0hooks.gates.gate import iter_gates
from l0hooks.gates.registry import rules_over
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.training.penalties import Strength, penalty

Penalties = Mapping[str, Strength | Mapping[Pattern, Strength]]


def check_optimizers(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], hint: str) -> None:
    """Raise an error if an optimiser applies weight decay to gates, or if none holds them.

    Raises
    ------
    StateError
        If the model has no gates, or if a gate has weight decay or belongs to no optimiser.
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
            raise _refusal("the optimizer must hold the gates.", f"one without {name!r}", hint)
        if decay[id(gate.log_alpha)]:
            raise _refusal(
                "gates must have no weight decay.", f"weight decay {decay[id(gate.log_alpha)]} on {name!r}", hint
            )


def _refusal(must: str, got: str, hint: str) -> StateError:
    return StateError(explain("SparsifyCallback", must, got=got, hint=hint))


def add_penalties(model: nn.Module, penalties: Penalties, scale: float = 1.0) -> float:
    """Add ``scale`` times the gradient of the penalties to the parameters' gradients; returns the penalties' value.

    This bypasses gradient accumulation and wrappers such as DDP, so that the penalties count once for each optimiser
    step and are equal in every process.
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
    """The figures to log: the expected and the evaluated sparsity; step, size and target of the budgets."""
    report = summary(model)
    found = {"l0_expected_sparsity": report.expected_sparsity, "l0_sparsity": report.sparsity}
    if report.budgets:
        found["l0_budget_step"] = float(max(one.step for one in report.budgets))
    for number, one in enumerate(report.budgets):
        ending = f"_{number}" if len(report.budgets) > 1 else ""
        found |= {f"l0_budget_size{ending}": one.kept, f"l0_budget_target{ending}": one.target}
    return found


def warn_if_too_short(model: nn.Module, steps_left: float) -> None:
    """Warn if training is to end before the schedule of a budget does."""
    rules = rules_over(gate for _, gate in iter_gates(model))
    found = [rule.progress() for rule in rules if rule.automatic and not rule.finished]
    late = [one for one in found if one.steps - one.step > steps_left]
    if late:
        text = explain(
            "SparsifyCallback",
            "training ends before the schedule of a budget does.",
            expected="; ".join(f"{one.target:,.0f} {one.unit} after {one.steps - one.step:,} steps" for one in late),
            got=f"{steps_left:,} steps of training",
            hint="Budget(steps=...) of about 70 % of the training",
        )
        warnings.warn(text, L0HooksWarning, stacklevel=3)


def warn_at_the_end(model: nn.Module) -> None:
    """Warn if the schedule of a budget has not ended; where the model is pruned, :func:`prune` does."""
    warn_unfinished("SparsifyCallback", summary(model))


@contextlib.contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Run with the model's own ``forward``, without accelerate's wrapper for mixed precision."""
    added: dict[str, Any] = {k: model.__dict__.pop(k) for k in ("forward", "_original_forward") if k in model.__dict__}
    if "_original_forward" not in added:  # a ``forward`` that accelerate did not set
        model.__dict__.update(added)
    try:
        yield
    finally:
        model.__dict__.update(added)


def pruned_and_saved(model: nn.Module, example_inputs: ExampleInputs | None, path: Path | None) -> nn.Module:
    """The plain model in evaluation mode, saved to ``path`` unless that is None."""
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
