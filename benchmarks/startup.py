"""Start-up: importing the library, and gating all coupled groups of a BERT-base.

Each import runs in a process of its own. Beside them: l0-python's import. Wall time is what a user waits for, but on a
busy machine it holds the work of others: CPU time is judged.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time

import torch

import l0hooks
from benchmarks.contenders import PEER, has_peer
from benchmarks.registry import Aim, Panel, Row, Scale, Table, register

Seconds = tuple[float, float]  # wall, CPU


def import_seconds(module: str, repeats: int) -> Seconds:
    """What importing ``module`` adds to importing torch: medians."""
    code = (
        "import time, torch; w, c = time.perf_counter(), time.process_time(); "
        f"import {module}; print(time.perf_counter() - w, time.process_time() - c)"
    )
    run = [sys.executable, "-c", code]
    told = [subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() for _ in range(repeats)]
    return statistics.median(float(wall) for wall, _ in told), statistics.median(float(cpu) for _, cpu in told)


def sparsify_bert(repeats: int, *, small: bool) -> tuple[Seconds, Seconds]:
    """Seconds to sparsify with coupled gates: the first time in this process, and the medians."""
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    times: list[Seconds] = []
    for _ in range(repeats):
        model = BertModel(BertConfig(**(size if small else {}))).eval()
        wall, cpu = time.perf_counter(), time.process_time()
        l0hooks.sparsify(model, "coupled", example_inputs=(torch.randint(30_000, (1, 128)),))
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times[0], (statistics.median(w for w, _ in times), statistics.median(c for _, c in times))


@register("startup", "import l0hooks over torch; sparsify of BERT-base with coupled gates")
def measure(scale: Scale) -> list[Table]:
    """Seconds of both clocks."""
    modules = {"l0hooks": "l0hooks"} | ({PEER: "l0"} if has_peer() else {})
    imports, models = (1, 1) if scale.quick else (9, 5)
    found = {f"import {name}, over torch": import_seconds(module, imports) for name, module in modules.items()}
    aims = [Aim("import l0hooks over torch, CPU seconds", found["import l0hooks, over torch"][1], 0.3)]
    if importlib.util.find_spec("transformers"):
        name = "a small BERT" if scale.quick else "BERT-base"
        first, usual = sparsify_bert(models, small=scale.quick)
        found |= {f"sparsify {name}, coupled, first": first, f"sparsify {name}, coupled, median": usual}
        aims.append(Aim(f"sparsify {name} with coupled gates, the first time, CPU seconds", first[1], 3))
    rows: list[Row] = [{"what": what, "wall s": wall, "CPU s": cpu} for what, (wall, cpu) in found.items()]
    return [Table("Start-up", rows, Panel("bars", ("wall s", "CPU s"), "seconds"), aims)]
