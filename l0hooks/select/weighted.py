"""Weights of selected items: checked, multiplied by their gates, and scaled to a total."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l0hooks.errors import InvalidValueError, explain
from l0hooks.select.containers import is_sparse, scaled, take
from l0hooks.select.item_gate import ItemGate


def check_weighted(gate: ItemGate, x: Any, w: Any, where: str) -> None:
    """Check that data and weights fit the gate.

    Raises
    ------
    InvalidValueError
        If either does not have n entries, or if the weights are not one-dimensional or not dense.
    """
    gate.check(x, 0, where)
    if is_sparse(w):
        raise InvalidValueError(explain(where, "weights must be dense.", got=type(w).__name__))
    gate.check(w, 0, where, weights=True)


def gated_weights(gate: ItemGate, w: Any, indices: npt.NDArray[np.int64], plain: Tensor | None = None) -> Any:
    """The weights at ``indices`` times the test-time gates, or unchanged where ``plain`` is true."""
    z = gate.final()[torch.from_numpy(indices).to(gate.gate.log_alpha.device)]
    return scaled(take(w, indices, 0), z if plain is None else z.masked_fill(plain.to(z.device), 1.0))


def scale_to_total(where: str, wanted: float, found: float) -> float:
    """The factor that scales a sum of ``found`` to ``wanted``.

    Raises
    ------
    InvalidValueError
        If it is not positive and finite.
    """
    factor = wanted / found if found else math.inf
    if not 0 < factor < math.inf:
        raise InvalidValueError(
            explain(
                where,
                "a total can be preserved only by a positive factor.",
                expected="chosen weights whose sum has the sign of the total",
                got=f"a total of {wanted:g} for weights that sum to {found:g}",
            )
        )
    return factor
