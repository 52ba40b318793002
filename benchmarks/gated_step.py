"""What a gate costs: ``python -m benchmarks gated_step``, or alone with ``python -m benchmarks.gated_step``.

Linear(1024, 1024) at batch 128: dense, with l0hooks' gates, and l0-python's L0Linear, each with its own L0 penalty and
all with the same temperature and start. A training step is forward, penalty and backward, without and with an Adam
step on all parameters, the gates' included.

The layers take turns in one loop and the medians of CPU seconds are shown, so that a busy machine is busy for all.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time

import torch
from torch import nn

from benchmarks.contenders import (
    PEER,
    Contender,
    has_kernels,
    has_peer,
    notes,
    ours,
    peers,
    training_step,
    without_kernels,
)
from benchmarks.registry import Aim, Panel, Row, Scale, Table, register
from benchmarks.report import show
from benchmarks.timing import extra, rounds

SIZE, BATCH = 1024, 128
WEIGHT = "l0hooks, a gate a weight"


def contenders() -> dict[str, Contender]:
    """Name → layer."""
    found = {"dense": Contender(nn.Linear(SIZE, SIZE)), WEIGHT: ours(nn.Linear(SIZE, SIZE))}
    for granularity in ("input", "output"):
        found[f"l0hooks, a gate an {granularity}"] = ours(nn.Linear(SIZE, SIZE), granularity)
    return found | ({PEER: peers([(SIZE, SIZE)])} if has_peer() else {})


def training(repeats: int, *, adam: bool) -> Table:
    """Milliseconds a step, nanoseconds a weight over dense, and these over the peer's."""
    x = torch.randn(BATCH, SIZE, requires_grad=True)
    steps = {name: training_step(contender, x, adam=adam) for name, contender in contenders().items()}
    if has_kernels():
        steps[f"{WEIGHT}, without Numba"] = without_kernels(training_step(ours(nn.Linear(SIZE, SIZE)), x, adam=adam))
    rows, over = compared(rounds(steps, repeats=repeats, clock=time.process_time))
    title = "Training step: forward, penalty, backward" + (", Adam" if adam else "")
    aims = [Aim("extra of a gate a weight over l0-python's", over[WEIGHT] / over[PEER], 1 / 4)] if PEER in over else []
    return Table(title, rows, Panel("bars", ("extra ns/weight",), "extra ns a weight"), [] if adam else aims, notes())


def compared(seconds: dict[str, list[float]]) -> tuple[list[Row], dict[str, float]]:
    """A row for each layer, and its nanoseconds a weight over dense."""
    over = {name: extra(seconds, name, "dense") / SIZE**2 * 1e9 for name in seconds}
    rows: list[Row] = []
    for name, taken in seconds.items():
        ms = statistics.median(taken) * 1e3
        row: Row = {"layer": name, "ms": ms, "over dense": ms / rows[0]["ms"] if rows else 1.0}
        rows.append(
            row
            | {"extra ns/weight": over[name]}
            | ({"extra / peer's": over[name] / over[PEER]} if PEER in over else {})
        )
    return rows, over


@register("gated_step", "training step of Linear(1024, 1024), batch 128: gates by weight, input, output")
def measure(scale: Scale) -> list[Table]:
    """Without and with Adam."""
    return [training(scale.repeats(60), adam=adam) for adam in (False, True)]


def no_compiler() -> str | None:
    """Why torch.compile cannot run here."""
    return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "there is no C++ compiler"


@register(
    "compiled", "the same step under torch.compile: dense, gates by weight, l0-python's layer", missing=no_compiler
)
def measure_compiled(scale: Scale) -> list[Table]:
    """The model compiled, its penalty not."""
    x = torch.randn(BATCH, SIZE, requires_grad=True)
    steps = {}
    for name, (model, penalty) in contenders().items():
        if name in (("dense", WEIGHT) if scale.quick else ("dense", WEIGHT, PEER)):
            steps[name] = training_step(Contender(torch.compile(model), penalty), x)
    rows, _ = compared(rounds(steps, repeats=scale.repeats(40), clock=time.process_time))
    panel = Panel("bars", ("extra ns/weight",), "extra ns a weight")
    return [Table("Training step under torch.compile: forward, penalty, backward", rows, panel, notes=notes())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for table in measure(Scale()):
        show(table)


if __name__ == "__main__":
    main()
