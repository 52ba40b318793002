"""Parameter groups for any ``torch.optim`` optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from l0hooks.errors import InvalidValueError, explain
from l0hooks.gates.gate import iter_gates
from l0hooks.gates.registry import gate_ids


def param_groups(
    model: nn.Module, *, lr: float, gate_lr: float, weight_decay: float = 0.0, multiplier_lr: float | None = None
) -> list[dict[str, Any]]:
    """Weights and gates as groups of their own: gates learn at their own rate and never decay.

    Parameters
    ----------
    model : nn.Module
    lr : float, >= 0
        Learning rate of everything but the gates.
    gate_lr : float, >= 0
        Learning rate of the gates; with Adam, 10 to 100 times ``lr`` works well.
    weight_decay : float, >= 0
        For everything but the gates.
    multiplier_lr : float, >= 0, optional
        Learning rate of the multipliers of a ``Budget(method="lagrangian")``, a third group that ascends
        (``maximize=True``); that of the gates if not given.

    Returns
    -------
    list of dict
        Parameters with ``requires_grad=False`` are left out.

    Raises
    ------
    InvalidValueError
        If a number is negative.

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model = nn.Linear(4, 2)
    >>> _ = sparsify(model, "weight")
    >>> [(group["lr"], len(group["params"])) for group in param_groups(model, lr=1e-3, gate_lr=1e-1)]
    [(0.001, 2), (0.1, 1)]
    """
    rates = {"lr": lr, "gate_lr": gate_lr, "weight_decay": weight_decay, "multiplier_lr": multiplier_lr}
    for name, value in rates.items():
        if value is not None and not value >= 0:
            raise InvalidValueError(
                explain("param_groups", f"{name} must not be negative.", expected=">= 0", got=value)
            )
    every = [gate for _, gate in iter_gates(model)]
    gates = [gate.log_alpha for gate in every if gate.log_alpha.requires_grad]
    multipliers = [g.multipliers for g in every if g.multipliers is not None and g.multipliers.requires_grad]
    known = {id(p) for p in gates + multipliers}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": gates, "lr": gate_lr, "weight_decay": 0.0},
    ]
    if multipliers:
        upwards = gate_lr if multiplier_lr is None else multiplier_lr
        groups.append({"params": multipliers, "lr": upwards, "weight_decay": 0.0, "maximize": True})
    return [group for group in groups if group["params"]]


def gates_apart(params: Iterable[Tensor | dict[str, Any]], *, gate_lr: float) -> list[dict[str, Any]]:
    """Parameters or groups as an optimiser takes them, with all gates moved to a last group that does not decay.

    Examples
    --------
    >>> from l0hooks import Gate
    >>> gate = Gate(3)
    >>> groups = gates_apart([nn.Linear(2, 2).weight, gate.log_alpha], gate_lr=0.1)
    >>> [len(group["params"]) for group in groups], groups[-1]["lr"]
    ([1, 1], 0.1)
    """
    given = list(params)
    groups: list[dict[str, Any]] = [g for g in given if isinstance(g, dict)]
    groups = [dict(g, params=list(g["params"])) for g in groups] or [{"params": given}]
    known = gate_ids()
    gates = [p for group in groups for p in group["params"] if id(p) in known]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in known]
    groups = [group for group in groups if group["params"]]
    return [*groups, {"params": gates, "lr": gate_lr, "weight_decay": 0.0}] if gates else groups
