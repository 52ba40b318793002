"""Copies of a gated model that take no more memory than they are for."""

from __future__ import annotations

import copy

from torch import nn

from l0hooks.attach.gated_weight import iter_sites
from l0hooks.gates.gate import iter_gates


def run_copy(model: nn.Module) -> nn.Module:
    """A copy to be run in evaluation mode: modules, buffers and attributes of its own, the parameters of ``model``.

    Examples
    --------
    >>> model = nn.Linear(2, 2)
    >>> run_copy(model).weight is model.weight
    True
    """
    shared = [*model.parameters(), *(site.gating.kept for site in iter_sites(model)), *_of_gates(model)]
    return copy.deepcopy(model, {id(one): one for one in shared})


def fold_copy(model: nn.Module) -> nn.Module:
    """A copy whose gates are to be folded into its weights: all of its own, but what the gates hold.

    Examples
    --------
    >>> from l0hooks import iter_gates, sparsify
    >>> model = nn.Linear(2, 2)
    >>> _ = sparsify(model)
    >>> twin = fold_copy(model)
    >>> (_, gate), (_, other) = *iter_gates(model), *iter_gates(twin)
    >>> gate is other, gate.log_alpha is other.log_alpha
    (False, True)
    """
    return copy.deepcopy(model, {id(one): one for one in _of_gates(model)})


def _of_gates(model: nn.Module) -> list[object]:
    gates = [gate for _, gate in iter_gates(model)]
    return [tensor for gate in gates for tensor in (gate.log_alpha, gate.mask, gate.held) if tensor is not None]
