"""On a GPU: the gated training step of a large Linear layer in bfloat16 autocast and plain bfloat16, over dense."""

from __future__ import annotations

import importlib
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.contenders import PEER, Contender, has_peer, notes, ours, peers, without_kernels
from benchmarks.registry import Aim, Panel, Row, Scale, Table, register
from benchmarks.timing import medians, ratio, rounds
from l0hooks.gates.constants import Constants
from l0hooks.gates.kernels.loading import kernels_on
from l0hooks.gates.sampling import gated_weight

SIDE, BATCH = 4096, 8192
DTYPES = {"bfloat16 weights": torch.bfloat16, "float32 weights under autocast": torch.float32}


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


def kernels_note(device: torch.device) -> str:
    """Whether the kernels were used."""
    if device.type != "cuda" or kernels_on(device) is None:
        return "Triton kernels: not used"
    return f"Triton kernels: used, triton {importlib.import_module('triton').__version__}"


def ideal_bytes(dtype: torch.dtype) -> int:
    """Bytes that gating a weight must move: forward w, log α → w·z; backward both again and g → two gradients."""
    w = dtype.itemsize
    return (w + 4 + w) + (w + 4 + w + w + 4)


def gating_of(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Gating a square weight and both its gradients, nothing else, waited for."""
    weight, cotangent = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    log_alpha = torch.randn(side, side, device=device).requires_grad_()
    weight.requires_grad_()

    def step() -> None:
        gated = gated_weight(weight, log_alpha, random.getrandbits(64), Constants())
        torch.autograd.grad(gated, (weight, log_alpha), cotangent)
        wait(device)

    return step


def copying(device: torch.device, count: int) -> Callable[[], None]:
    """A copy of ``count`` bytes, waited for: twice as many are moved."""
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))

    def step() -> None:
        target.copy_(source)
        wait(device)

    return step


def wait(device: torch.device) -> None:
    """Until the device has done all."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def traffic(scale: Scale, device: torch.device, side: int = SIDE) -> Table:
    """Gating alone, in the bytes that a copy moves in the same time, beside those that must be moved."""
    copied = side * side * 16
    rows: list[Row] = []
    for title, dtype in DTYPES.items():
        step = gating_of(side, dtype, device)
        ways = {"as it runs": step, "torch operations": without_kernels(step)}
        steps = dict(ways)
        steps["copy"] = copying(device, copied)
        seconds = medians(steps, repeats=scale.repeats(50), warmup=5)
        for name in ways:
            moved = seconds[name] / seconds["copy"] * 2 * copied / side**2
            row: Row = {"gating alone": f"{name}, {title}", "ms": seconds[name] * 1e3, "bytes/weight": moved}
            rows.append(row | {"ideal": float(ideal_bytes(dtype)), "over ideal": moved / ideal_bytes(dtype)})
    about = "bytes/weight: what a copy on the same device moves in that time, forward and backward together"
    return Table(f"gating alone, {side} × {side}", rows, notes=[about, kernels_note(device)])


@register("gpu", "bfloat16 training step of Linear(4096, 4096), batch 8192, on CUDA", missing=missing)
def measure(scale: Scale) -> list[Table]:
    """Weights in bfloat16, then float32 weights under autocast; then gating alone."""
    device = torch.device("cuda")
    tables = []
    for title, dtype in DTYPES.items():
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
        told = [*notes(), kernels_note(device)]
        tables.append(Table(f"{torch.cuda.get_device_name()}, {title}", rows, panel, aims, told))
    return [*tables, traffic(scale, device)]
