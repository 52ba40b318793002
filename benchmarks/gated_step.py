"""What a gate costs: ``python -m benchmarks gated_step``, or alone with ``python -m benchmarks.gated_step``.

Linear(1024, 1024) at batch 128: dense, with l0hooks' gates, and l0-python's L0Linear, each with its own L0 penalty and
all with the same temperature and start. A training step is forward, penalty and backward, without and with an Adam
step on all parameters, the gates' included.

The layers take turns in one loop and the medians of CPU seconds are shown, so that a busy machine is busy for all.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from benchmarks.contenders import PEER, Contender, has_peer, notes, ours, peers, training_step
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
    seconds = rounds(steps, repeats=repeats, clock=time.process_time)
    over = {name: extra(seconds, name, "dense") / SIZE**2 * 1e9 for name in steps}
    rows: list[Row] = []
    for name, taken in seconds.items():
        ms = statistics.median(taken) * 1e3
        row: Row = {"layer": name, "ms": ms, "over dense": ms / rows[0]["ms"] if rows else 1.0}
        rows.append(
            row
            | {"extra ns/weight": over[name]}
            | ({"extra / peer's": over[name] / over[PEER]} if PEER in over else {})
        )
    title = "Training step: forward, penalty, backward" + (", Adam" if adam else "")
    aims = [Aim("extra of a gate a weight over l0-python's", over[WEIGHT] / over[PEER], 1 / 4)] if PEER in over else []
    return Table(title, rows, Panel("bars", ("extra ns/weight",), "extra ns a weight"), [] if adam else aims, notes())


@register("gated_step", "training step of Linear(1024, 1024), batch 128: gates by weight, input, output")
def measure(scale: Scale) -> list[Table]:
    """Without and with Adam."""
    return [training(scale.repeats(60), adam=adam) for adam in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for table in measure(Scale()):
        show(table)


if __name__ == "__main__":
    main()
