"""On a GPU: the gated training step of a large Linear layer in bfloat16 autocast and plain bfloat16, over dense."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.contenders import PEER, Contender, has_peer, notes, ours, peers
from benchmarks.registry import Aim, Panel, Row, Scale, Table, register
from benchmarks.timing import ratio, rounds

SIDE, BATCH = 4096, 8192


def missing() -> str | None:
    """Why it cannot run here."""
    return None if torch.cuda.is_available() else "no CUDA device"


def step_of(contender: Contender, x: torch.Tensor, *, autocast: bool) -> Callable[[], None]:
    """Forward, penalty, backward, waited for."""
    model, penalty = contender

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().mean()
        (loss if penalty is None else loss + penalty()).backward()
        torch.cuda.synchronize()

    return step


@register("gpu", "bfloat16 training step of Linear(4096, 4096), batch 8192, on CUDA", missing=missing)
def measure(scale: Scale) -> list[Table]:
    """Weights in bfloat16, then float32 weights under autocast."""
    tables = []
    for title, dtype in {"bfloat16 weights": torch.bfloat16, "float32 weights under autocast": torch.float32}.items():
        x = torch.randn(BATCH, SIDE, device="cuda", dtype=dtype, requires_grad=True)
        layer = {"device": "cuda", "dtype": dtype}
        found = {"dense": Contender(nn.Linear(SIDE, SIDE, **layer)), "l0hooks": ours(nn.Linear(SIDE, SIDE, **layer))}
        if has_peer():
            found[PEER] = peers([(SIDE, SIDE)])
            found[PEER].model.to(**layer)
        steps = {name: step_of(one, x, autocast=dtype == torch.float32) for name, one in found.items()}
        seconds = rounds(steps, repeats=scale.repeats(50), warmup=10, clock=time.perf_counter)
        rows: list[Row] = []
        for name, taken in seconds.items():
            over = ratio(seconds, name, "dense")
            rows.append({"layer": name, "ms": statistics.median(taken) * 1e3, "over dense": over})
        aims = [Aim(f"{title}: over dense", ratio(seconds, "l0hooks", "dense"), 1.15)]
        panel = Panel("bars", ("over dense",), "time over dense", reference=1.0)
        tables.append(Table(f"{torch.cuda.get_device_name()}, {title}", rows, panel, aims, notes()))
    return tables
