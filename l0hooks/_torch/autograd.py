"""The present state of autograd and of torch's tracers, and gradients that one node of a graph passes to another.

Each private name is looked up once, on import. If it is missing, a fallback is slower, or raises an error where the
noise of a forward depends on the answer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from l0hooks._torch.attributes import without_modes
from l0hooks._torch.names import lookup, refuse

_NO_PASS = -1  # the id of the backward pass while none is running


def _read_flag() -> bool:
    # if it is missing, assume tracing, which is slower
    return bool(lookup("fx._symbolic_trace._is_fx_tracing_flag", True))


def _no_state() -> object:
    is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
    return is_tracing() or None


def _no_level() -> int | None:
    return None  # torch itself then raises an error for our autograd functions under torch.func


def _pass_by_node() -> int:
    """0 in a backward pass, -1 outside, from the node that autograd runs; such passes have no ids."""
    return _NO_PASS if current_node() is None else 0


def _pass_by_callback() -> int:
    """0 in a backward pass, -1 outside, from the engine, which accepts callbacks only during a pass."""
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


# without the name, torch raises an error for our autograd functions in forward mode
forward_level: Callable[[], int] = _forward_level if "_current_level" in vars(torch.autograd.forward_ad) else lambda: -1


def is_recorded() -> bool:
    """Whether calls of modules are being recorded, by any of torch's tracers."""
    return torch.compiler.is_compiling() or _tracing_state() is not None or is_fx_traced()


def is_traced() -> bool:
    """Whether the plain formulas must run: in a graph being built, under a torch.func transform, in forward mode."""
    building = torch.compiler.is_compiling() or _tracing_state() is not None
    return building or transform_level() is not None or forward_level() >= 0


def wants_plain(grad: Tensor) -> bool:
    """Whether a backward pass must consist of ordinary operations: a graph of it is wanted, or ``grad`` is batched."""
    # torch.autograd.grad(is_grads_batched=True) passes legacy batched tensors
    return torch.is_grad_enabled() or is_traced() or _is_legacy_batched(grad)


def is_batched(tensor: Tensor) -> bool:
    """Whether ``torch.vmap`` has given ``tensor`` another value for each example."""
    # if wrappers cannot be removed, torch raises an error when a number of a batched tensor is read
    while _unwrapped is not None and _is_tracked(tensor):
        tensor = _unwrapped(tensor)
    return _is_batched(tensor)


def is_recorded_once() -> bool:
    """Whether autograd records once and saves tensors as they are: no saved-tensor hooks, no backward pass."""
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


@contextmanager
def apart() -> Iterator[None]:
    """A context that no running transform, mode or graph of torch's reaches, for computations of the library's own."""
    with ExitStack() as stack:
        if transform_level() is not None:
            stack.enter_context(outside_transforms())
        stack.enter_context(without_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


class LastSample:
    """The autograd node of a gate's last sample while its graph exists; copies of the gate start without one."""

    def __init__(self) -> None:
        self._node: weakref.ref[Any] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return LastSample, ()

    def __deepcopy__(self, memo: dict[int, object]) -> LastSample:
        return LastSample()

    @property
    def node(self) -> weakref.ref[Any] | None:
        """A weak reference to the node, or None."""
        return self._node

    def note(self, gated: Tensor) -> None:
        """Remember the node of ``gated``, the last sample."""
        self._node = None if gated.grad_fn is None else weakref.ref(gated.grad_fn)


class DeferredGradients:
    """Gradients of expected counts, which the node that samples the gates adds to its own in the same backward pass."""

    def __init__(self) -> None:
        self._pass = _NO_PASS
        self._last_taken = _NO_PASS
        self._gradients: list[tuple[Tensor, float]] = []

    def add(self, node: torch.autograd.graph.Node, grad: Tensor, shift: float) -> bool:
        """Pass ``grad`` to ``node`` if that will still run in this backward pass. Returns whether it will."""
        if _pass_id is None:  # without ids one pass cannot be distinguished from the next
            return False
        now = _pass_id()
        if self._last_taken == now or not _will_run(node):
            return False
        if self._pass != now:  # discards gradients of a pass that failed
            self._pass, self._gradients = now, []
        self._gradients.append((grad, shift))
        return True

    def take(self) -> list[tuple[Tensor, float]]:
        """Remove and return the gradients that were added in this backward pass."""
        now = current_pass()
        gradients = self._gradients if self._pass == now else []
        self._last_taken, self._pass, self._gradients = now, _NO_PASS, []
        return gradients
