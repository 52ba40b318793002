"""What budgets in time reach in one shot, beside budgets of as many multiply-adds: ResNet-50 and BERT-base.

Random weights, one thread, CPU time. The budget times its models itself; the figures here are fresh readings of the
pruned models, all of one architecture interleaved.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import l0hooks
from benchmarks.pruned import bert, parameters, resnet
from benchmarks.registry import Aim, Row, Scale, Table, register
from benchmarks.timing import ratio, rounds

SPEEDUP = 2.0


def cpu_time(run: Callable[[], object]) -> float:
    """Seconds of one call without those of other programs."""
    start = time.process_time()
    run()
    return time.process_time() - start


def pruned(
    make: Callable[[], nn.Module], inputs: tuple[torch.Tensor, ...], budget: l0hooks.Budget
) -> tuple[nn.Module, float]:
    """The model pruned in one shot, and the seconds of setting the budget."""
    torch.manual_seed(0)
    model = make()
    l0hooks.sparsify(model, "coupled", example_inputs=inputs)
    start = time.perf_counter()
    l0hooks.set_budget(model, budget, example_inputs=inputs)
    seconds = time.perf_counter() - start
    return l0hooks.prune(model, example_inputs=inputs).eval(), seconds


def measured(name: str, make: Callable[[], nn.Module], inputs: tuple[torch.Tensor, ...]) -> tuple[list[Row], list[Aim]]:
    """Rows of one architecture, and how far the speedup is from the one asked for."""
    budgets = {
        f"speedup={SPEEDUP:g}": l0hooks.Budget(speedup=SPEEDUP, steps=0, clock=cpu_time),
        'unit="macs", sparsity=0.5': l0hooks.Budget(sparsity=0.5, unit="macs", steps=0),
    }
    found = {called: pruned(make, inputs, budget) for called, budget in budgets.items()}
    torch.manual_seed(0)
    models = {"dense": make(), **{called: model for called, (model, _) in found.items()}}
    with torch.no_grad():
        calls = {called: functools.partial(model, *inputs) for called, model in models.items()}
        seconds = rounds(calls, repeats=25, clock=time.process_time)
    rows: list[Row] = []
    for called, model in models.items():
        row: Row = {"model": f"{name}: {called}", "ms": statistics.median(seconds[called]) * 1e3}
        row |= {"times faster": ratio(seconds, "dense", called), "parameters": float(parameters(model))}
        rows.append(row | {"seconds to set the budget": found[called][1] if called in found else None})
    off = abs(ratio(seconds, "dense", f"speedup={SPEEDUP:g}") - SPEEDUP)
    return rows, [Aim(f"{name}: the speedup's distance from {SPEEDUP:g}", off, 0.1)]


@register(
    "latency",
    "budgets in time beside budgets of multiply-adds: how many times faster the pruned models are",
    missing=lambda: None if importlib.util.find_spec("transformers") else "transformers is not installed",
    long=True,
)
def measure(scale: Scale) -> list[Table]:
    """ResNet-50 and BERT-base; in a smoke run small ones."""
    torch.set_num_threads(1)
    image, words = torch.randn(1, 3, 224, 224), torch.randint(30_000, (1, 128))
    cases: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
        "ResNet-50, one image": (resnet, image),
        "BERT-base, 128 tokens": (bert, words),
    }
    if scale.quick:
        cases = {
            "BERT, two small layers": (lambda: bert(num_hidden_layers=2, hidden_size=192, intermediate_size=768), words)
        }
    rows: list[Row] = []
    aims: list[Aim] = []
    for name, (make, x) in cases.items():
        more, own = measured(name, make, (x,))
        rows, aims = rows + more, aims + own
    return [Table("One shot to half the time, and to half the multiply-adds", rows, aims=[] if scale.quick else aims)]
