"""How a gate's cost grows: with the weights of one layer, and with the number of small layers.

One layer of n × n weights at batch 32; a training step is forward, penalty and backward. The extra nanoseconds a
weight are those over the dense layer. ``--large`` adds 10⁸ weights (8 GB). Layers of 16 × 16 show what a gate costs
however small it is.
"""

from __future__ import annotations

import gc
import math
import statistics
import time

import torch

from benchmarks.contenders import PEER, linears, notes, training_step
from benchmarks.machine import available_gib
from benchmarks.registry import Aim, Panel, Row, Scale, Table, register
from benchmarks.timing import extra, ratio, rounds

BATCH, SMALL = 32, 16
ASKED = {1_000_000: 1 / 4, 16_000_000: 1 / 3}
BYTES = 80  # a weight, of all contenders together


def of_layers(shapes: list[tuple[int, int]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of the contenders' training steps."""
    x = torch.randn(BATCH, shapes[0][0])
    steps = {name: training_step(contender, x) for name, contender in linears(shapes).items()}
    return rounds(steps, repeats=repeats, warmup=3 if repeats > 7 else 1, clock=time.process_time)


def over_dense(seconds: dict[str, list[float]], unit: float, called: str) -> Row:
    """Times, extra over dense in ``unit`` seconds, and ours over the peer's."""
    row: Row = {f"{name} ms": statistics.median(taken) * 1e3 for name, taken in seconds.items()}
    row["l0hooks / dense"] = ratio(seconds, "l0hooks", "dense")
    ours = extra(seconds, "l0hooks", "dense")
    row[f"l0hooks {called}"] = ours / unit
    if PEER in seconds:
        peer = extra(seconds, PEER, "dense")
        row |= {f"{PEER} {called}": peer / unit, "extra / peer's": ours / peer}
    return row


@register("scaling", "extra of the gated training step against a layer's weights, 10⁴ to 1.6·10⁷ (--large: 10⁸)")
def weights(scale: Scale) -> list[Table]:
    """One layer, larger and larger."""
    rows: list[Row] = []
    aims, missing = [], notes()
    for count in scale.of([10**4, 10**5], [10**4, 10**5, 10**6, 4 * 10**6, 16 * 10**6], [10**8]):
        if count * BYTES / 2**30 > available_gib():
            missing.append(f"{count:.1e} weights: too little memory is free")
            continue
        repeats = scale.repeats(max(5, min(200, 120_000_000 // count)))
        side = math.isqrt(count)
        row = over_dense(of_layers([(side, side)], repeats), side**2 * 1e-9, "extra ns/weight")
        rows.append({"weights": float(side**2), "rounds": float(repeats)} | row)
        if count in ASKED and "extra / peer's" in row:
            aims.append(Aim(f"extra over l0-python's, {count:.1e} weights", row["extra / peer's"], ASKED[count]))
        gc.collect()
    names = tuple(name for name in (rows[0] if rows else {}) if name.endswith("extra ns/weight"))
    panel = Panel("lines", names, "extra ns a weight", x="weights", log="x")
    return [Table(f"One layer, batch {BATCH}: training step over dense", rows, panel, aims, missing)]


@register("layers", "extra of the gated training step against the number of small gated layers, 1 to 64")
def layers(scale: Scale) -> list[Table]:
    """More and more small layers."""
    rows: list[Row] = []
    for count in scale.of([1, 4], [1, 2, 4, 8, 16, 32, 64]):
        seconds = of_layers([(SMALL, SMALL)] * count, scale.repeats(max(30, 600 // count)))
        rows.append({"layers": float(count)} | over_dense(seconds, count * 1e-6, "extra µs/gate"))
    names = tuple(name for name in rows[0] if name.endswith("extra µs/gate"))
    panel = Panel("lines", names, "extra µs a gated layer", x="layers", log="x")
    return [Table(f"Layers of {SMALL} × {SMALL} in a row, batch {BATCH}: training step", rows, panel, notes=notes())]
