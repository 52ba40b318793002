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
import types
import weakref
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from l0hooks.errors import StateError, explain

_MEMORY = 4096  # forwards that can still be recomputed; a ticket is some 200 bytes
_GOLDEN = 0x9E3779B97F4A7C15
# Functions whose backward repeats a forward that ran inside them, without recording nodes of its own
_RERUNNERS = ("CheckpointFunctionBackward", "CompiledFunctionBackward")
_sources: weakref.WeakValueDictionary[int, NoiseSource] = weakref.WeakValueDictionary()
_keys = itertools.count()


class _Draw(NamedTuple):
    sequence: int  # number of the next autograd node at the time of the draw
    recorded: bool  # whether autograd was recording
    door: str
    ticket: Tensor


class NoiseSource:
    """The tickets of one sparsified model, or of one standalone gate.

    Attributes
    ----------
    owner : str or None
        Name of the door whose forward is running.
    ticket : Tensor, int64, shape ()
        The ticket of that forward.
    """

    def __init__(self) -> None:
        self.owner: str | None = None
        self.ticket = torch.zeros((), dtype=torch.int64)
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

    def open(self, door: str) -> Tensor:
        """The ticket of a forward that begins at ``door``: a new one, or the old one if the forward is repeated."""
        if torch._C._current_graph_task_id() != -1:
            replayed = self._replay(door)
            if replayed is not None:
                return replayed
        ticket = torch.randint(2**62, ())
        sequence, recorded = torch._C._autograd._get_sequence_nr(), torch.is_grad_enabled()
        self._log.append(_Draw(sequence, recorded, door, ticket))
        return ticket

    def _replay(self, door: str) -> Tensor | None:
        node = torch._C._current_autograd_node()
        draw = self._find(node._sequence_nr(), node.name(), door)
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
            self._refuse_twice(node._sequence_nr(), door)
            torch.randint(2**62, ())  # the forward drew here: keep a preserved RNG state in step
        return draw.ticket

    def _find(self, node: int, name: str, door: str) -> _Draw | None:
        inside: _Draw | None = None
        for draw in reversed(self._log):
            if draw.door not in self._covers[door]:
                continue
            if draw.recorded and draw.sequence <= node:
                return inside or draw
            if name in _RERUNNERS and not draw.recorded and draw.sequence == node + 1:
                inside = draw
        return inside

    def _refuse_twice(self, node: int, door: str) -> None:
        """Two forwards of one door in one checkpointed region drew two tickets that cannot be told apart."""
        replay = (torch._C._current_graph_task_id(), node, door)
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


def _restore(covers: dict[str, frozenset[str]]) -> NoiseSource:
    source = NoiseSource()
    source._covers = covers
    return source


class Door:
    """A module through which a forward can begin; its two hooks mark where the outermost one starts and ends."""

    def __init__(self, source: NoiseSource, name: str) -> None:
        self.source = source
        self.name = name

    def attach(self, module: nn.Module) -> None:
        """Hook ``module``, so that a call of it is a forward."""
        module.register_forward_pre_hook(self.enter, prepend=True)
        module.register_forward_hook(self.leave, always_call=True)

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

    def uniform(self, index: int, like: Tensor) -> Tensor:
        """Uniform noise of gate number ``index`` for the running forward, dtype, shape and device of ``like``.

        Outside every forward each call is a forward of its own. The result is fresh memory.
        """
        ticket = self._open() if self.source.owner is None else self.source.ticket
        if torch.compiler.is_compiling():
            drawn: Tensor = torch.ops.l0hooks.uniform(ticket, index, like.detach())
            return drawn
        return _uniform(ticket, index, like)

    def _open(self) -> Tensor:
        if torch.compiler.is_compiling():
            # The compiler never merges two calls of empty, hence never two forwards.
            ticket: Tensor = torch.ops.l0hooks.open_forward(torch.empty(0), self.source.key, self.name)
            return ticket
        return self.source.open(self.name)


def remove_doors(module: nn.Module) -> None:
    """Unhook every door from ``module`` (not from its children)."""
    tables = (module._forward_pre_hooks, module._forward_hooks)
    for table in tables:
        for key in [k for k, hook in table.items() if isinstance(_owner_of(hook), Door)]:
            del table[key]
    module._forward_hooks_always_called = type(module._forward_hooks_always_called)(
        (k, v) for k, v in module._forward_hooks_always_called.items() if k in module._forward_hooks
    )


def _owner_of(hook: object) -> object:
    return hook.__self__ if isinstance(hook, types.MethodType) else None


def _uniform(ticket: Tensor, index: int, like: Tensor) -> Tensor:
    # torch's Mersenne Twister reads the low 32 bits of a seed: hand it the best mixed ones of the product
    seed = ((int(ticket) ^ (index * _GOLDEN)) * _GOLDEN >> 32) & 0xFFFFFFFF
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.empty_like(like, requires_grad=False).uniform_(generator=generator)


@torch.library.custom_op("l0hooks::open_forward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _open_forward(unique: Tensor, source: int, door: str) -> Tensor:
    return _sources[source].open(door).clone()


@_open_forward.register_fake
def _(unique: Tensor, source: int, door: str) -> Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("l0hooks::uniform", mutates_args=())
def _uniform_op(ticket: Tensor, index: int, like: Tensor) -> Tensor:
    return _uniform(ticket, index, like)


@_uniform_op.register_fake
def _(ticket: Tensor, index: int, like: Tensor) -> Tensor:
    return torch.empty_like(like)
