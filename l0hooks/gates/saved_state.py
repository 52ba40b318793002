"""What a checkpoint holds of a gate besides its log-odds, and whether it belongs to the gate it is loaded into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from l0hooks.errors import StateError, explain
from l0hooks.gates.protocols import Rule

_OWN = 2  # numbers of the gate itself: its temperature and its schedule's step


class Saved(Protocol):
    """A gate as a checkpoint sees it."""

    temperature: float
    scheduled_steps: int
    rule: Rule | None


def state_of(gate: Saved) -> Tensor:
    """The temperature, its schedule's step, the rule's state, and the numbers that say which rule it is."""
    rule = () if gate.rule is None else (*gate.rule.state(), *gate.rule.identity())
    return torch.tensor([gate.temperature, gate.scheduled_steps, *rule], dtype=torch.float64, device="cpu")


def resume(gate: Saved, state: object, where: str) -> None:
    """Give a gate what :func:`state_of` returned, after it was checked.

    Raises
    ------
    StateError
        If it is of another budget, or nothing that a gate has saved.
    """
    gate.temperature, steps, *rest = check_state(gate, state, where)
    gate.scheduled_steps = int(steps)
    if gate.rule is not None:
        gate.rule.resume(*rest)


def check_state(gate: Saved, state: object, where: str) -> list[float]:
    """The numbers of a saved state without those that say which rule it is of.

    Raises
    ------
    StateError
        If they are no such numbers, or the rule is another one than the gate's.
    """
    numbers = state.tolist() if isinstance(state, Tensor) and state.dim() == 1 and not state.is_meta else []
    real = all(type(number) in (int, float) and abs(number) < float("inf") for number in numbers)  # NaN neither
    whole = real and len(numbers) >= _OWN and numbers[0] > 0 and numbers[1] >= 0 and float(numbers[1]).is_integer()
    if not whole:
        raise StateError(
            explain(
                f"{where}: load_state_dict",
                "a gate's extra state must hold its temperature and steps.",
                got=repr(state)[:80],
                hint="a checkpoint of model.state_dict(), unchanged",
            )
        )
    identity = () if gate.rule is None else gate.rule.identity()
    own = 0 if gate.rule is None else len(gate.rule.state())
    size = _OWN + own
    same = _equal(numbers[size:], identity)
    if not same or (gate.rule is not None and not gate.rule.takes(*numbers[_OWN:size])):
        raise _other_budget(gate, numbers, where)
    return numbers[:size]


def check_checkpoint(gate: Saved, state: Mapping[str, Any], prefix: str) -> None:
    """Refuse a checkpoint whose log-odds are of another budget than the gate's, or not finite.

    Parameters
    ----------
    gate : Gate
    state : mapping
        What ``load_state_dict`` was given.
    prefix : str
        Of the gate's names in it.

    Raises
    ------
    StateError
    """
    extra, where = f"{prefix}_extra_state", prefix.rstrip(".") or "Gate"
    for name in ("log_alpha", "multipliers"):
        value = state.get(f"{prefix}{name}")
        if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter) or value.is_meta:
            continue  # parts of a sharded tensor are not looked at
        if not bool(torch.isfinite(value).all()):
            raise StateError(
                explain(
                    f"{where}: load_state_dict",
                    f"{name} must be finite.",
                    got=f"{int((~torch.isfinite(value)).sum()):,} of {value.numel():,} that are not",
                    hint="a checkpoint from before the training diverged",
                )
            )
    if extra in state:
        check_state(gate, state[extra], where)
    elif f"{prefix}log_alpha" in state and gate.rule is not None:
        raise StateError(
            explain(
                f"{where}: load_state_dict",
                "log-odds under a budget must come with its step.",
                expected=extra,
                got="log-odds alone",
                hint="the whole model.state_dict(); or load it before l0hooks.set_budget",
            )
        )


def _equal(found: Sequence[float], own: Sequence[float]) -> bool:
    return len(found) == len(own) and all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(found, own, strict=True))


def _other_budget(gate: Saved, numbers: list[float], where: str) -> StateError:
    got = "no budget" if len(numbers) == _OWN else "another budget"
    expected = "no budget"
    if gate.rule is not None:
        expected = gate.rule.describe(gate.rule.identity())
        found = tuple(numbers[_OWN + len(gate.rule.state()) :])
        got = gate.rule.describe(found) if len(found) == len(gate.rule.identity()) else got
        if _equal(found, gate.rule.identity()):
            got = f"steps and sizes that it cannot have: {numbers[_OWN:]}"
    return StateError(
        explain(
            f"{where}: load_state_dict",
            "a checkpoint must be of gates under the same budget.",
            expected=expected,
            got=got,
            hint="sparsify(..., budget=...) as it was when the checkpoint was written; or, for another budget, load "
            "the checkpoint of a model without one and call l0hooks.set_budget(model, ...) then",
        )
    )
