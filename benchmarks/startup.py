"""Start-up: importing the library, and gating all coupled groups of a BERT-base.

Each import runs in a process of its own. Beside them: l0-python's import.
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


def import_seconds(module: str, repeats: int) -> float:
    """What importing ``module`` adds to importing torch: median wall time."""
    code = f"import time, torch; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    run = [sys.executable, "-c", code]
    times = (float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(repeats))
    return statistics.median(times)


def sparsify_bert(repeats: int, *, small: bool) -> tuple[float, float]:
    """Seconds to sparsify with coupled gates: the first time in this process, and the median."""
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    times = []
    for _ in range(repeats):
        model = BertModel(BertConfig(**(size if small else {}))).eval()
        start = time.perf_counter()
        l0hooks.sparsify(model, "coupled", example_inputs=(torch.randint(30_000, (1, 128)),))
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times)


@register("startup", "import l0hooks over torch; sparsify of BERT-base with coupled gates")
def measure(scale: Scale) -> list[Table]:
    """Seconds of wall time."""
    modules = {"l0hooks": "l0hooks"} | ({PEER: "l0"} if has_peer() else {})
    found = {f"import {name}, over torch": import_seconds(module, scale.repeats(9)) for name, module in modules.items()}
    aims = [Aim("import l0hooks, seconds over torch", found["import l0hooks, over torch"], 0.3)]
    if importlib.util.find_spec("transformers"):
        name = "a small BERT" if scale.quick else "BERT-base"
        first, usual = sparsify_bert(scale.repeats(5), small=scale.quick)
        found |= {f"sparsify {name}, coupled, first": first, f"sparsify {name}, coupled, median": usual}
        aims.append(Aim(f"sparsify {name} with coupled gates, first, seconds", first, 3))
    rows: list[Row] = [{"what": what, "seconds": seconds} for what, seconds in found.items()]
    return [Table("Start-up, wall time", rows, Panel("bars", ("seconds",), "seconds"), aims)]
