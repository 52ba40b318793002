"""What a gate costs in evaluation: one forward over the dense one, for layers of several sizes."""

from __future__ import annotations

import math
import time

import torch

from benchmarks.contenders import PEER, evaluation, linears, notes
from benchmarks.registry import Aim, Panel, Row, Scale, Table, register
from benchmarks.timing import ratio, rounds

BATCH = 128
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "gradients recorded": torch.enable_grad}
ASKED_AT = 1024**2


@register("eval", "evaluation forward over dense: under no_grad, inference_mode and with gradients recorded")
def measure(scale: Scale) -> list[Table]:
    """Single layers, then sixteen small ones in a row."""
    rows: list[Row] = []
    aims = []
    sizes = {f"{n:,} weights": [(math.isqrt(n),) * 2] for n in scale.of([4096], [4096, 65536, ASKED_AT, 2048**2])}
    for size, shapes in (sizes | {"16 layers of 64 × 64": [(64, 64)] * 16}).items():
        count = sum(i * o for i, o in shapes)
        repeats = scale.repeats(max(40, min(1000, 200_000_000 // count)))
        for mode, context in MODES.items():
            x = torch.randn(BATCH, shapes[0][0])
            forwards = {name: evaluation(one, x, context) for name, one in linears(shapes).items()}
            seconds = rounds(forwards, repeats=repeats, clock=time.process_time)
            row: Row = {"layer": size, "mode": mode, "dense µs": sorted(seconds["dense"])[repeats // 2] * 1e6}
            row |= {f"{name} / dense": ratio(seconds, name, "dense") for name in seconds if name != "dense"}
            rows.append(row)
            if count == ASKED_AT and mode != "gradients recorded":
                aims.append(Aim(f"{size}, {mode}, over dense", row["l0hooks / dense"], 1.02))
    for row in rows:
        row["layer"] = f"{row['layer']}, {row.pop('mode')}"
    names = ("l0hooks / dense", *([f"{PEER} / dense"] if f"{PEER} / dense" in rows[0] else []))
    panel = Panel("bars", names, "time over dense", reference=1.0)
    return [Table(f"Evaluation, batch {BATCH}: one forward", rows, panel, aims, notes())]
