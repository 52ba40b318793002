"""What autograd is doing, and what one node of its graph leaves to another."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.fx import _symbolic_trace


def is_recorded() -> bool:
    """Whether calls of modules are being recorded, by any of torch's tracers."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return _symbolic_trace._is_fx_tracing_flag


def is_traced() -> bool:
    """Whether the plain formulas must run: in a graph being built, under a torch.func transform, in forward mode."""
    building = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    transformed = torch._C._functorch.maybe_current_level() is not None
    return building or transformed or torch.autograd.forward_ad._current_level >= 0


def wants_plain(grad: Tensor) -> bool:
    """Whether a backward pass must consist of ordinary operations: a graph of it is wanted, or ``grad`` is batched."""
    # the last is what torch.autograd.grad(is_grads_batched=True) hands out
    return torch.is_grad_enabled() or is_traced() or torch._C._functorch.is_legacy_batchedtensor(grad)


class LastSample:
    """The autograd node that sampled a gate last, for as long as its graph lives; a copy of the gate has none."""

    def __init__(self) -> None:
        self._node: weakref.ref[Any] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return LastSample, ()

    def __deepcopy__(self, memo: dict[int, object]) -> LastSample:
        return LastSample()

    @property
    def node(self) -> weakref.ref[Any] | None:
        """The node."""
        return self._node

    def note(self, gated: Tensor) -> None:
        """``gated`` was sampled now."""
        self._node = None if gated.grad_fn is None else weakref.ref(gated.grad_fn)


class Debt:
    """Gradients of expected counts, which the node that samples the gates adds to its own in the same pass."""

    def __init__(self) -> None:
        self._task = -1
        self._paid = -1
        self._owed: list[tuple[Tensor, float]] = []

    def add(self, node: torch.autograd.graph.Node, grad: Tensor, shift: float) -> bool:
        """Leave ``grad`` to ``node``, if that is still to come in this backward pass."""
        task = torch._C._current_graph_task_id()
        if self._paid == task or not torch._C._will_engine_execute_node(node):
            return False
        if self._task != task:  # what a pass that failed has left
            self._task, self._owed = task, []
        self._owed.append((grad, shift))
        return True

    def take(self) -> list[tuple[Tensor, float]]:
        """What is owed in this backward pass."""
        task = torch._C._current_graph_task_id()
        owed = self._owed if self._task == task else []
        self._paid, self._task, self._owed = task, -1, []
        return owed
