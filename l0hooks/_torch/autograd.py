"""What autograd and torch's tracers are doing now, and what one node of a graph leaves to another.

Each private name is looked up once, on import. Without it the fallback costs speed, or raises an error where the
answer decides which noise a forward gets.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from l0hooks._torch.names import lookup, refuse

_NO_PASS = -1


def _read_flag() -> bool:
    return bool(lookup("fx._symbolic_trace._is_fx_tracing_flag", True))  # without it, as if always: slower


def _no_state() -> object:
    is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
    return is_tracing() or None


def _no_level() -> int | None:
    return None  # torch itself refuses our autograd functions under torch.func then


def _pass_by_node() -> int:
    """0 in a backward pass, -1 outside: without ids of its passes, autograd still knows which node runs."""
    return _NO_PASS if current_node() is None else 0


def _pass_by_callback() -> int:
    """The same by the engine, which takes callbacks only during a backward pass."""
    engine: Any = torch.autograd.Variable._execution_engine
    try:
        engine.queue_callback(_nothing)
    except RuntimeError:
        return _NO_PASS
    return 0


def _nothing() -> None:
    pass


def _unknown_node() -> Any:
    refuse("_C._current_autograd_node", "activation checkpointing of gated layers")


def _count_nodes() -> int:
    with torch.inference_mode(False), torch.enable_grad():
        node: Any = torch.zeros((), device="cpu", requires_grad=True).clone().grad_fn
    return node_number(node) + 1


def _always(_: object) -> bool:
    return True


def _never(_: object) -> bool:
    return False


_tracing_state: Callable[[], object] = lookup("_C._get_tracing_state", _no_state)
# thread-local since torch 2.14, where the old flag is gone
is_fx_traced: Callable[[], bool] = lookup("fx._symbolic_trace.is_fx_symbolic_tracing", _read_flag)
transform_level: Callable[[], int | None] = lookup("_C._functorch.maybe_current_level", _no_level)
_is_legacy_batched: Callable[[Tensor], bool] = lookup("_C._functorch.is_legacy_batchedtensor", _always)
_unwrapped: Callable[[Tensor], Tensor] | None = lookup("_C._functorch.get_unwrapped", None)
_is_tracked: Callable[[Tensor], bool] = lookup("_C._functorch.is_gradtrackingtensor", _never)
_is_batched: Callable[[Tensor], bool] = lookup("_C._functorch.is_batchedtensor", _never)
current_node: Callable[[], Any] = lookup("_C._current_autograd_node", _unknown_node)
next_node_number: Callable[[], int] = lookup("_C._autograd._get_sequence_nr", _count_nodes)
_pass_id: Callable[[], int] | None = lookup("_C._current_graph_task_id", None)
current_pass: Callable[[], int] = _pass_id or (_pass_by_callback if current_node is _unknown_node else _pass_by_node)
_will_run: Callable[[torch.autograd.graph.Node], bool] = lookup("_C._will_engine_execute_node", _never)
_saved_tensor_hooks: Callable[[bool], object] = lookup("_C._autograd._top_saved_tensors_default_hooks", _always)


def node_number(node: Any) -> int:
    """The number of an autograd node: it grows from node to node in the order of the forward."""
    try:
        return int(node._sequence_nr())
    except AttributeError:
        refuse("autograd.graph.Node._sequence_nr", "activation checkpointing of gated layers")


def _forward_level() -> int:
    return torch.autograd.forward_ad._current_level


forward_level: Callable[[], int] = (
    _forward_level if "_current_level" in vars(torch.autograd.forward_ad) else lambda: -1  # torch refuses it then
)


def is_recorded() -> bool:
    """Whether calls of modules are being recorded, by any of torch's tracers."""
    return torch.compiler.is_compiling() or _tracing_state() is not None or is_fx_traced()


def is_traced() -> bool:
    """Whether the plain formulas must run: in a graph being built, under a torch.func transform, in forward mode."""
    building = torch.compiler.is_compiling() or _tracing_state() is not None
    return building or transform_level() is not None or forward_level() >= 0


def wants_plain(grad: Tensor) -> bool:
    """Whether a backward pass must consist of ordinary operations: a graph of it is wanted, or ``grad`` is batched."""
    # the last is what torch.autograd.grad(is_grads_batched=True) hands out
    return torch.is_grad_enabled() or is_traced() or _is_legacy_batched(grad)


def is_batched(tensor: Tensor) -> bool:
    """Whether ``torch.vmap`` has given ``tensor`` another value for each example."""
    # where the inside of a tensor cannot be seen, torch refuses to read one number of a batched one
    while _unwrapped is not None and _is_tracked(tensor):
        tensor = _unwrapped(tensor)
    return _is_batched(tensor)


def is_recorded_once() -> bool:
    """Whether what autograd records now is recorded once and saved as it is: no hook for saved tensors, no backward."""
    return not _saved_tensor_hooks(False) and current_pass() == _NO_PASS


def is_in_backward() -> bool:
    """Whether a backward pass is running."""
    return current_pass() != _NO_PASS


def outside_transforms() -> AbstractContextManager[object]:
    """A context outside the torch.func transforms that are running."""
    try:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    except ImportError:
        refuse("_functorch.pyfunctorch.temporarily_clear_interpreter_stack", "noise under torch.func transforms")
    context: AbstractContextManager[object] = temporarily_clear_interpreter_stack()
    return context


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


class DeferredGradients:
    """Gradients of expected counts, which the node that samples the gates adds to its own in the same pass."""

    def __init__(self) -> None:
        self._pass = _NO_PASS
        self._taken = _NO_PASS
        self._waiting: list[tuple[Tensor, float]] = []

    def add(self, node: torch.autograd.graph.Node, grad: Tensor, shift: float) -> bool:
        """Leave ``grad`` to ``node``, if that is still to come in this backward pass; whether it is."""
        if _pass_id is None:  # one pass cannot be told from the next
            return False
        now = _pass_id()
        if self._taken == now or not _will_run(node):
            return False
        if self._pass != now:  # what a pass that failed has left
            self._pass, self._waiting = now, []
        self._waiting.append((grad, shift))
        return True

    def take(self) -> list[tuple[Tensor, float]]:
        """What waits in this backward pass."""
        now = current_pass()
        waiting = self._waiting if self._pass == now else []
        self._taken, self._pass, self._waiting = now, _NO_PASS, []
        return waiting
