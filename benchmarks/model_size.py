"""Seconds of ``sparsify`` and ``prune`` against a model's size: eight Linear layers, random weights.

``--large`` adds 4·10⁸ and 10⁹ parameters; what does not fit into the memory that is free is left out. On the meta
device, where a model takes no memory, ``sparsify`` goes up to 10⁹ always. l0-python has nothing to compare with: its
layers are built, not attached.
"""

from __future__ import annotations

import gc
import math
import statistics
import time

import torch
from torch import nn

import l0hooks
from benchmarks.contenders import PEER
from benchmarks.machine import available_gib
from benchmarks.registry import Panel, Row, Scale, Table, register

DEPTH = 8
BYTES = {
    "weight": (9, 13),
    "output": (5, 17),
    "coupled": (6, 10),
}  # a parameter at the peak: sparsify, prune; found by trial
SPARE = 3  # GiB that are left to others
MOST = 11  # GiB that are taken, even if more are free


def build(count: int, device: str) -> tuple[nn.Sequential, tuple[torch.Tensor, ...], int]:
    """A model of about ``count`` weights, example inputs, and the number of weights."""
    width = math.isqrt(count // DEPTH)
    with torch.device(device):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(DEPTH))).eval()
    return model, (torch.randn(2, width),), DEPTH * width**2


def on_meta(granularity: str, count: int) -> tuple[float, float]:
    """Parameters, and CPU seconds of ``sparsify`` on the meta device."""
    model, inputs, parameters = build(count, "meta")
    start = time.process_time()
    l0hooks.sparsify(model, granularity, example_inputs=inputs)
    return parameters, time.process_time() - start


def seconds(granularity: str, count: int, *, prune: bool) -> tuple[float, float, float]:
    """Parameters, CPU seconds of ``sparsify`` and, half of the gates closed, of ``prune`` (NaN if not asked for)."""
    model, inputs, parameters = build(count, "cpu")
    start = time.process_time()
    l0hooks.sparsify(model, granularity, example_inputs=inputs)
    attached = time.process_time()
    if not prune:
        return parameters, attached - start, math.nan
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            gate.log_alpha.fill_(4.0).view(-1)[::2] = -4.0
    before = time.process_time()
    l0hooks.prune(model, example_inputs=inputs)
    return parameters, attached - start, time.process_time() - before


def with_data(scale: Scale) -> Table:
    """Models whose weights lie in memory."""
    rows: list[Row] = []
    notes = [f"{PEER} cannot gate a model that exists"]
    for count in scale.of([10**5], [10**5, 10**6, 10**7, 10**8], [4 * 10**8, 10**9]):
        for granularity in BYTES:
            gc.collect()
            free = min(available_gib() - SPARE, MOST)
            attaching, pruning = (count * size / 2**30 for size in BYTES[granularity])
            if pruning > free:
                notes.append(
                    f"{count:.0e} parameters, {granularity}: prune needs {pruning:.0f} GiB, of {free:.0f} at the most"
                )
            if attaching > free:
                notes.append(f"{count:.0e} parameters, {granularity}: sparsify needs {attaching:.0f} GiB")
                continue
            repeats = scale.repeats(5) if count < 10**8 else 1
            times = [seconds(granularity, count, prune=pruning <= free) for _ in range(repeats)]
            parameters, attach, cut = (statistics.median(column) for column in zip(*times, strict=True))
            row: Row = {"parameters": float(parameters), "gates": granularity, "sparsify s": attach}
            rows.append(row | {"prune s": None if math.isnan(cut) else cut})
    panel = Panel("lines", ("sparsify s", "prune s"), "CPU seconds", x="parameters", by="gates", log="xy")
    return Table(f"{DEPTH} Linear layers, batch 2", rows, panel, notes=notes)


def without_data(scale: Scale) -> Table:
    """The same models on the meta device."""
    rows: list[Row] = []
    for count in scale.of([10**6], [10**6, 10**7, 10**8, 10**9]):
        row: Row = {"parameters": 0.0}
        for granularity in BYTES:
            times = [on_meta(granularity, count) for _ in range(scale.repeats(5))]
            parameters, row[f"{granularity} s"] = (statistics.median(column) for column in zip(*times, strict=True))
            row["parameters"] = float(parameters)
        rows.append(row)
    return Table("sparsify on the meta device, CPU seconds by the kind of gates", rows)


@register("model_size", "seconds of sparsify and prune against parameters, 10⁵ to 10⁸ (--large: 10⁹)")
def measure(scale: Scale) -> list[Table]:
    """For gates on weights, outputs and coupled groups; the median of several where it takes less than a second."""
    return [with_data(scale), without_data(scale)]
