"""Memory of a training step: what autograd keeps for backward, and the peak beyond what is held before.

Counted exactly: saved tensors by ``saved_tensors_hooks`` (each storage once, parameters and inputs left out), the peak
from the allocator's events in torch's profiler, to which the memory that l0hooks allocates itself is handed back for
this measurement. Per weight of a Linear layer at batch 8; gradients start as None, no
optimiser. "Held" is what the layer's parameters and buffers take.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import PEER, Contender, linears, notes
from benchmarks.registry import Aim, Panel, Row, Scale, Table, register
from l0hooks._torch import memory

BATCH = 8


def loss_of(contender: Contender, x: Tensor) -> Tensor:
    """Forward and penalty."""
    loss = contender.model(x).square().mean()
    return loss if contender.penalty is None else loss + contender.penalty()


def held_bytes(contender: Contender) -> int:
    """Parameters and buffers."""
    tensors = itertools.chain(contender.model.parameters(), contender.model.buffers())
    return sum(t.numel() * t.element_size() for t in tensors)


def saved_bytes(contender: Contender, x: Tensor) -> int:
    """What autograd keeps between forward and backward, beyond parameters, buffers and the input."""
    own = {t.untyped_storage().data_ptr() for t in (x, *contender.model.parameters(), *contender.model.buffers())}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # alive to the end, or an address could come twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.append(tensor)
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(contender, x)
    loss.backward()
    contender.model.zero_grad()
    return sum(saved.values())


def peak_bytes(contender: Contender, x: Tensor) -> int:
    """The most that is allocated at once in a step."""
    contender.model.zero_grad()
    usual, memory._MIN_REUSED = memory._MIN_REUSED, sys.maxsize
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss_of(contender, x).backward()
    finally:
        memory._MIN_REUSED = usual
    contender.model.zero_grad()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@register("memory", "bytes a weight in a training step: held, saved for backward, peak")
def measure(scale: Scale) -> list[Table]:
    """A layer at a time; the overheads over dense."""
    (side,) = scale.of([128], [2048])
    x, count = torch.randn(BATCH, side), side**2
    rows: list[Row] = []
    for name, contender in linears([(side, side)]).items():
        loss_of(contender, x).backward()  # the first step sets things up
        contender.model.zero_grad()
        rows.append(
            {
                "layer": name,
                "held B/weight": held_bytes(contender) / count,
                "saved B/weight": saved_bytes(contender, x) / count,
                "peak B/weight": peak_bytes(contender, x) / count,
            }
        )
    for row in rows:
        row["peak over dense"] = row["peak B/weight"] - rows[0]["peak B/weight"]
    by = {row["layer"]: row for row in rows}
    weight = 4
    extra_saved = by["l0hooks"]["saved B/weight"] - by["dense"]["saved B/weight"]
    aims = [Aim("saved by gating, in bytes of the weight", extra_saved / weight, 2)]
    if PEER in by:
        over = by["l0hooks"]["peak over dense"] / by[PEER]["peak over dense"]
        aims.append(Aim("peak over dense, over l0-python's", over, 1 / 2))
    panel = Panel("bars", ("held B/weight", "saved B/weight", "peak B/weight"), "bytes a weight")
    return [Table(f"Linear({side}, {side}), float32, batch {BATCH}", rows, panel, aims, notes())]
