"""Which forward pass is running, and the noise that belongs to it.

One *ticket* (a random 62-bit number) is drawn for each training forward; the noise of every gate is a pure function
of the ticket and the gate's index, so sites that share a gate share its draw, nothing has to be stored between
forward and backward, and a forward that is recomputed under activation checkpointing only needs its ticket again.

A forward is the outermost call of any *door*: the model that was given gates or one of its submodules above a gate.
Recomputation runs inside a backward pass; the autograd node that asked for it was created during the forward that is
repeated, and node sequence numbers only grow, so the ticket wanted is the last one drawn before that node.

All of it also runs inside ``torch.compile(fullgraph=True)``, through two operators that the compiler treats as opaque.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l0hooks._torch.autograd import (
    current_node,
    current_pass,
    is_batched,
    is_in_backward,
    next_node_number,
    node_number,
)
from l0hooks._torch.running import run_eagerly
from l0hooks.errors import StateError, explain
from l0hooks.gates.random import Stream, stream

_MEMORY = 4096  # forwards that can still be recomputed
_GOLDEN = 0x9E3779B97F4A7C15
# Functions whose forward ran a whole region without recording it; only the first repeats the region by itself
_REENTRANT, _COMPILED = "CheckpointFunctionBackward", "CompiledFunctionBackward"
_sources: weakref.WeakValueDictionary[int, NoiseSource] = weakref.WeakValueDictionary()
_keys = itertools.count()


@dataclass(slots=True)
class _Draw:
    door: str
    ticket: int  # thousands of small tensors would split the memory that larger ones leave, and the process grow
    start: int  # number of the next autograd node at the time of the draw
    recorded: bool  # whether autograd was recording the forward
    compiled: bool  # drawn by a compiled graph, after the node that stands for all of it was numbered
    end: int | None = None  # number of the next node after the forward; None while it runs


class NoiseSource:
    """The tickets of one sparsified model, or of one standalone gate.

    Attributes
    ----------
    owner : str or None
        Name of the door whose forward is running.
    ticket : Tensor, int64, shape ()
        The ticket of that forward.
    shared : dict
        What that forward computes once for several places; it ends with the forward.
    """

    def __init__(self) -> None:
        self.owner: str | None = None
        self.shared: dict[object, Any] = {}
        self.ticket = torch.zeros((), dtype=torch.int64, device="cpu")
        self._covers: dict[str, frozenset[str]] = {}
        self._log: deque[_Draw] = deque(maxlen=_MEMORY)
        self._last_replay: tuple[int, int, str] | None = None
        self.key = next(_keys)
        _sources[self.key] = self

    def __deepcopy__(self, memo: dict[int, object]) -> NoiseSource:
        # No graph leads back to a copy, so its log starts empty; the compiled graphs find it by its own key.
        new = NoiseSource()
        new._covers = dict(self._covers)
        return new

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (self._covers,)

    def add_door(self, name: str, above: Iterable[str]) -> Door:
        """A door called ``name``, whose forward may run inside that of the doors ``above``."""
        self._covers[name] = frozenset(above) | {name}
        return Door(self, name)

    def open(self, door: str, *, recorded: bool, compiled: bool = False) -> Tensor:
        """The ticket of a forward that begins at ``door``: a new one, or the old one if the forward is repeated."""
        self.shared.clear()
        if is_in_backward():
            replayed = self._replay(door)
            if replayed is not None:
                return replayed
        ticket = _draw_ticket()
        if not is_batched(ticket):  # vmap's noise for each example, which no gate can draw
            self._log.append(_Draw(door, int(ticket), next_node_number(), recorded, compiled))
        return ticket

    def close(self) -> None:
        """The forward that drew last has ended."""
        self.shared.clear()
        if self._log and self._log[-1].end is None:
            self._log[-1].end = next_node_number()

    def _replay(self, door: str) -> Tensor | None:
        node = current_node()
        draw = self._find(node_number(node), node.name(), door)
        if draw is None:
            if len(self._log) < _MEMORY:
                return None  # never drawn before: a first forward that happens to run in a backward hook
            raise StateError(
                explain(
                    f"noise of {door or 'the model'}",
                    "a recomputed forward must still be remembered.",
                    expected=f"at most {_MEMORY} forwards between a checkpointed forward and its backward",
                    hint="call backward() earlier",
                )
            )
        if draw.door == door:
            self._refuse_twice(node_number(node), door)
            _draw_ticket()  # the forward drew here: keep a preserved RNG state in step
        return torch.tensor(draw.ticket, dtype=torch.int64, device="cpu")

    def _find(self, node: int, name: str, door: str) -> _Draw | None:
        """The draw of the forward that recorded ``node``, or that ran inside it if it is a rerunner's."""
        first_inside: _Draw | None = None
        for draw in reversed(self._log):
            if draw.door not in self._covers[door]:
                continue
            if draw.recorded and draw.start <= node:
                running = draw.end is None or node < draw.end
                return draw if running or first_inside is None else first_inside
            if (name == _REENTRANT and not draw.recorded and draw.start > node) or (
                name == _COMPILED and draw.recorded and draw.compiled and draw.start == node + 1
            ):
                first_inside = draw
        return first_inside

    def _refuse_twice(self, node: int, door: str) -> None:
        """Two forwards of one door in one checkpointed region drew two tickets that cannot be told apart."""
        replay = (current_pass(), node, door)
        if replay == self._last_replay:
            raise StateError(
                explain(
                    f"noise of {door or 'the model'}",
                    "a checkpointed region must hold at most one call of a gated module outside its model's forward.",
                    got="a second call",
                    hint="call the model, or checkpoint each call by itself",
                )
            )
        self._last_replay = replay


def _draw_ticket() -> Tensor:
    return torch.randint(2**62, (), device="cpu")


def _restore(covers: dict[str, frozenset[str]]) -> NoiseSource:
    source = NoiseSource()
    source._covers = covers
    return source


class Door:
    """A module through which a forward can begin; its two hooks mark where the outermost one starts and ends."""

    def __init__(self, source: NoiseSource, name: str) -> None:
        self.source = source
        self.name = name

    def attach(self, module: nn.Module) -> tuple[RemovableHandle, ...]:
        """Hook ``module``, so that a call of it is a forward."""
        before = module.register_forward_pre_hook(self.enter, prepend=True)
        return before, module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """Begin a forward, unless one that began further out is running."""
        source = self.source
        # An owner that enters again was interrupted, or recurses: both want a new draw.
        if module.training and (source.owner is None or source.owner == self.name):
            source.ticket = self._open()
            source.owner = self.name

    def leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """End the forward that began here."""
        if self.source.owner == self.name:
            self.source.owner = None
            if not torch.compiler.is_compiling():
                self.source.close()

    def uniform(self, index: int, like: Tensor) -> Tensor:
        """Uniform noise of gate number ``index`` for the running forward, dtype, shape and device of ``like``.

        Outside every forward each call is a forward of its own. The result is fresh memory.
        """
        if torch.compiler.is_compiling():
            drawn: Tensor = torch.ops.l0hooks.uniform(self._ticket(), index, like.detach())
            return drawn
        return _uniform(self.stream(index, like), like)

    def stream(self, index: int, like: Tensor) -> Stream:
        """The same noise, not drawn yet."""
        return _stream(self._ticket(), index, like)

    def _ticket(self) -> Tensor:
        return self._read() if self.source.owner is None else self.source.ticket

    def _read(self) -> Tensor:
        ticket = self._open()
        if not torch.compiler.is_compiling():
            self.source.close()
        return ticket

    def _open(self) -> Tensor:
        if torch.compiler.is_compiling():
            # The compiler never merges two calls of empty, hence never two forwards.
            recorded = torch.is_grad_enabled()
            ticket: Tensor = torch.ops.l0hooks.open_forward(
                torch.empty(0, device="cpu"), self.source.key, self.name, recorded
            )
            return ticket
        return self.source.open(self.name, recorded=torch.is_grad_enabled())


def _uniform(noise: Stream, like: Tensor) -> Tensor:
    return noise.uniform_(torch.empty_like(like, requires_grad=False, memory_format=torch.contiguous_format))


def _stream(ticket: Tensor, index: int, like: Tensor) -> Stream:
    seed = ((int(ticket) ^ (index * _GOLDEN)) * _GOLDEN) & 0xFFFFFFFFFFFFFFFF
    return stream(seed, like.numel(), like.device)


@torch.library.custom_op("l0hooks::open_forward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _open_forward(unique: Tensor, source: int, door: str, recorded: bool) -> Tensor:
    return _sources[source].open(door, recorded=recorded, compiled=True).clone()


@_open_forward.register_fake
def _(unique: Tensor, source: int, door: str, recorded: bool) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("l0hooks::uniform", mutates_args=())
def _uniform_op(ticket: Tensor, index: int, like: Tensor) -> Tensor:
    return _uniform(_stream(ticket, index, like), like)


@_uniform_op.register_fake
def _(ticket: Tensor, index: int, like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


run_eagerly(Door.enter, Door.leave, Door.uniform, Door.stream, Door._ticket, Door._read, Door._open)
run_eagerly(_uniform, _stream, _draw_ticket, is_batched, is_in_backward, node_number)
run_eagerly(NoiseSource.open, NoiseSource.close, NoiseSource._replay, NoiseSource._find, NoiseSource._refuse_twice)
