"""Which forward pass is running, and the noise that belongs to it.

One seed (a random 62-bit number) is drawn for each training forward. The noise of every gate is a pure function of
that seed and the gate's number: sites that share a gate share its draw, nothing has to be stored between forward and
backward, and a forward that is recomputed under activation checkpointing only needs its seed again.

A forward is the outermost call of any *entry point*: the model that was given gates, or one of its submodules above a
gate. Recomputation runs inside a backward pass. The autograd node that asked for it was created during the forward that
is repeated, and node numbers only grow: the seed wanted is the last one drawn before that node.

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
    entry: str
    seed: int  # no tensor: thousands of small ones would fragment the process's memory
    start: int  # number of the next autograd node at the time of the draw
    recorded: bool  # whether autograd was recording the forward
    compiled: bool  # drawn by a compiled graph, after the node that stands for all of it was numbered
    end: int | None = None  # number of the next node after the forward; None while it runs


class NoiseSource:
    """The seeds of one sparsified model, or of one standalone gate.

    Attributes
    ----------
    owner : str or None
        Name of the entry point whose forward is running.
    seed : Tensor, int64, shape ()
        The seed of that forward.
    shared : dict
        What that forward computes once for several places; it ends with the forward.
    """

    def __init__(self) -> None:
        self.owner: str | None = None
        self.shared: dict[object, Any] = {}
        self.seed = torch.zeros((), dtype=torch.int64, device="cpu")
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

    def add_entry(self, name: str, above: Iterable[str]) -> EntryPoint:
        """An entry point called ``name``, whose forward may run inside that of the entry points ``above``."""
        self._covers[name] = frozenset(above) | {name}
        return EntryPoint(self, name)

    def open(self, entry: str, *, recorded: bool, compiled: bool = False) -> Tensor:
        """The seed of a forward that begins at ``entry``: a new one, or the old one if the forward is repeated."""
        self.shared.clear()
        if is_in_backward():
            replayed = self._replay(entry)
            if replayed is not None:
                return replayed
        seed = _draw_seed()
        if not is_batched(seed):  # vmap's noise for each example, which no gate can draw
            self._log.append(_Draw(entry, int(seed), next_node_number(), recorded, compiled))
        return seed

    def interrupt(self) -> None:
        """No forward is running any longer."""
        self.owner = None
        self.shared.clear()

    def close(self) -> None:
        """The forward that drew last has ended."""
        self.shared.clear()
        if self._log and self._log[-1].end is None:
            self._log[-1].end = next_node_number()

    def _replay(self, entry: str) -> Tensor | None:
        node = current_node()
        draw = self._find(node_number(node), node.name(), entry)
        if draw is None:
            if len(self._log) < _MEMORY:
                return None  # never drawn before: a first forward that happens to run in a backward hook
            raise StateError(
                explain(
                    f"noise of {entry or 'the model'}",
                    "a recomputed forward must still be remembered.",
                    expected=f"at most {_MEMORY} forwards between a checkpointed forward and its backward",
                    hint="call backward() earlier",
                )
            )
        if draw.entry == entry:
            self._refuse_twice(node_number(node), entry)
            _draw_seed()  # the forward drew here: keep a preserved RNG state in step
        return torch.tensor(draw.seed, dtype=torch.int64, device="cpu")

    def _find(self, node: int, name: str, entry: str) -> _Draw | None:
        """The draw of the forward that recorded ``node``, or that ran inside it if it is a rerunner's."""
        first_inside: _Draw | None = None
        for draw in reversed(self._log):
            if draw.entry not in self._covers[entry]:
                continue
            if draw.recorded and draw.start <= node:
                running = draw.end is None or node < draw.end
                return draw if running or first_inside is None else first_inside
            if (name == _REENTRANT and not draw.recorded and draw.start > node) or (
                name == _COMPILED and draw.recorded and draw.compiled and draw.start == node + 1
            ):
                first_inside = draw
        return first_inside

    def _refuse_twice(self, node: int, entry: str) -> None:
        """Two forwards of one entry point in one checkpointed region drew two seeds: which one is wanted?"""
        replay = (current_pass(), node, entry)
        if replay == self._last_replay:
            raise StateError(
                explain(
                    f"noise of {entry or 'the model'}",
                    "a checkpointed region must hold at most one call of a gated module outside its model's forward.",
                    got="a second call",
                    hint="call the model, or checkpoint each call by itself",
                )
            )
        self._last_replay = replay


def _draw_seed() -> Tensor:
    return torch.randint(2**62, (), device="cpu")


def _restore(covers: dict[str, frozenset[str]]) -> NoiseSource:
    source = NoiseSource()
    source._covers = covers
    return source


class EntryPoint:
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
            source.seed = self._open()
            source.owner = self.name

    def leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """End the forward that began here."""
        if self.source.owner == self.name:
            self.source.owner = None
            if not torch.compiler.is_compiling():
                self.source.close()

    def seed(self) -> Tensor:
        """The seed of the running forward; outside every forward each call is a forward of its own."""
        if self.source.owner is not None:
            return self.source.seed
        seed = self._open()
        if not torch.compiler.is_compiling():
            self.source.close()
        return seed

    def _open(self) -> Tensor:
        if torch.compiler.is_compiling():
            # The compiler never merges two calls of empty, hence never two forwards.
            recorded = torch.is_grad_enabled()
            seed: Tensor = torch.ops.l0hooks.open_forward(
                torch.empty(0, device="cpu"), self.source.key, self.name, recorded
            )
            return seed
        return self.source.open(self.name, recorded=torch.is_grad_enabled())


class GateNoise:
    """The noise of one gate: a pure function of the running forward's seed and the gate's number.

    Attributes
    ----------
    source : NoiseSource
    """

    def __init__(self, entry: EntryPoint, number: int) -> None:
        self.source = entry.source
        self._entry = entry
        self._number = number

    def seed(self) -> int:
        """The seed of this gate's noise in the running forward, in [0, 2⁶⁴)."""
        return _mixed(self._entry.seed(), self._number)

    def stream(self, like: Tensor) -> Stream:
        """The noise for the elements of ``like``, to be drawn in pieces."""
        return stream(self.seed(), like.numel(), like.device)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform noise, dtype, shape and device of ``like``, in fresh memory."""
        if torch.compiler.is_compiling():
            drawn: Tensor = torch.ops.l0hooks.uniform(self._entry.seed(), self._number, like.detach())
            return drawn
        return _uniform(self.stream(like), like)


def _uniform(noise: Stream, like: Tensor) -> Tensor:
    return noise.uniform_(torch.empty_like(like, requires_grad=False, memory_format=torch.contiguous_format))


def _mixed(seed: Tensor, number: int) -> int:
    return ((int(seed) ^ (number * _GOLDEN)) * _GOLDEN) & 0xFFFFFFFFFFFFFFFF


@torch.library.custom_op("l0hooks::open_forward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _open_forward(unique: Tensor, source: int, entry: str, recorded: bool) -> Tensor:
    return _sources[source].open(entry, recorded=recorded, compiled=True).clone()


@_open_forward.register_fake
def _(unique: Tensor, source: int, entry: str, recorded: bool) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("l0hooks::uniform", mutates_args=())
def _uniform_op(seed: Tensor, number: int, like: Tensor) -> Tensor:
    return _uniform(stream(_mixed(seed, number), like.numel(), like.device), like)


@_uniform_op.register_fake
def _(seed: Tensor, number: int, like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


run_eagerly(EntryPoint.enter, EntryPoint.leave, EntryPoint.seed, EntryPoint._open)
run_eagerly(GateNoise.seed, GateNoise.stream, GateNoise.uniform)
run_eagerly(_uniform, _mixed, _draw_seed, is_batched, is_in_backward, node_number)
run_eagerly(NoiseSource.open, NoiseSource.close, NoiseSource._replay, NoiseSource._find, NoiseSource._refuse_twice)
