"""Seconds of ``sparsify`` and ``prune`` against a model's size: eight Linear layers, random weights.

``--large`` adds 10⁹ parameters, where the memory for them is free. l0-python has nothing to compare with: its layers
are built, not attached.
"""

from __future__ import annotations

import gc
import math
import time

import torch
from torch import nn

import l0hooks
from benchmarks.contenders import PEER
from benchmarks.machine import available_gib
from benchmarks.registry import Panel, Row, Scale, Table, register

DEPTH = 8
BYTES = {"weight": 30, "output": 14, "coupled": 18}  # a parameter at the peak: the model, its copy, gates and noise


def seconds(granularity: str, count: int) -> tuple[float, float, float]:
    """Parameters, CPU seconds of ``sparsify`` and of ``prune``, half of the gates closed."""
    width = math.isqrt(count // DEPTH)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(DEPTH))).eval()
    inputs = (torch.randn(2, width),)
    start = time.process_time()
    l0hooks.sparsify(model, granularity, example_inputs=inputs)
    attached = time.process_time()
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            gate.log_alpha.fill_(4.0).view(-1)[::2] = -4.0
    before = time.process_time()
    l0hooks.prune(model, example_inputs=inputs)
    return DEPTH * width**2, attached - start, time.process_time() - before


def on_meta() -> str:
    """What ``sparsify`` says to a model on the meta device."""
    try:
        l0hooks.sparsify(nn.Sequential(nn.Linear(8, 8, device="meta")), "weight")
    except l0hooks.L0HooksError as error:
        return f"on the meta device sparsify refuses: {str(error).splitlines()[0]}"
    return "sparsify works on the meta device"


@register("model_size", "seconds of sparsify and prune against parameters, 10⁵ to 10⁸ (--large: 10⁹)")
def measure(scale: Scale) -> list[Table]:
    """For gates on weights, outputs and coupled groups; the median of several where it takes less than a second."""
    rows: list[Row] = []
    notes = [on_meta(), f"{PEER} cannot gate a model that exists"]
    for count in scale.of([10**5], [10**5, 10**6, 10**7, 10**8], [10**9]):
        for granularity in BYTES:
            if count * BYTES[granularity] / 2**30 > available_gib():
                notes.append(f"{count:.0e} parameters, {granularity}: {BYTES[granularity]} bytes each are not free")
                continue
            times = [seconds(granularity, count) for _ in range(scale.repeats(5) if count < 10**8 else 1)]
            parameters, attach, prune = (sorted(column)[len(times) // 2] for column in zip(*times, strict=True))
            row: Row = {"parameters": float(parameters), "gates": granularity, "sparsify s": attach, "prune s": prune}
            rows.append(row)
            gc.collect()
    panel = Panel("lines", ("sparsify s", "prune s"), "CPU seconds", x="parameters", by="gates", log=True)
    return [Table(f"{DEPTH} Linear layers, batch 2", rows, panel, notes=notes)]
