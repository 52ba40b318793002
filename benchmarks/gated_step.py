"""What a gate costs: ``python -m benchmarks.gated_step [--json FILE]``, one thread.

A training step is forward, penalty and backward of Linear(1024, 1024) at batch 128, without an optimiser; dense, ours
and l0-python's are timed in turns in the same loop, so that a noisy machine is noisy for all. Medians.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import l0
import torch
from torch import nn

import l0hooks
from benchmarks.timing import medians

SIZE, BATCH = 1024, 128


def gated(granularity):
    layer = nn.Linear(SIZE, SIZE)
    l0hooks.sparsify(layer, granularity)
    return layer, lambda: l0hooks.penalty(layer, l0=1e-6)


def contenders():
    """Name → (layer, function that gives its penalty or None)."""
    peer = l0.L0Linear(SIZE, SIZE)
    return {
        "dense": (nn.Linear(SIZE, SIZE), None),
        "ours": gated("weight"),
        "ours, input gates": gated("input"),
        "ours, output gates": gated("output"),
        "l0-python 0.6.2": (peer, lambda: 1e-6 * peer.get_l0_penalty()),
    }


def training_step(layer, penalty, x):
    def step():
        for parameter in layer.parameters():
            parameter.grad = None
        loss = layer(x).square().mean()
        (loss if penalty is None else loss + penalty()).backward()

    return step


def training(repeats):
    x = torch.randn(BATCH, SIZE, requires_grad=True)
    steps = {name: training_step(layer, penalty, x) for name, (layer, penalty) in contenders().items()}
    seconds = medians(steps, repeats=repeats)
    extra = {name: (s - seconds["dense"]) / SIZE**2 * 1e9 for name, s in seconds.items()}
    return {
        name: {
            "ms": s * 1e3,
            "extra_ns_per_weight": extra[name],
            "extra_vs_peer": extra[name] / extra["l0-python 0.6.2"],
        }
        for name, s in seconds.items()
    }


def evaluation(repeats, *, recording):
    x = torch.randn(BATCH, SIZE)

    def forward(layer):
        layer.eval()

        def step():
            with torch.set_grad_enabled(recording):
                layer(x)

        return step

    seconds = medians({name: forward(layer) for name, (layer, _) in contenders().items()}, repeats=repeats)
    return {name: {"ms": s * 1e3, "ratio_to_dense": s / seconds["dense"]} for name, s in seconds.items()}


def import_seconds(repeats):
    """What importing the library adds to importing torch, in processes of their own."""
    code = "import time, torch; t = time.perf_counter(); import l0hooks; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return sorted(times)[len(times) // 2]


def show(title, table):
    columns = list(next(iter(table.values())))
    print(f"\n{title}\n{'':22}" + "".join(f"{column:>22}" for column in columns))
    for name, row in table.items():
        print(f"{name:22}" + "".join(f"{row[column]:22.3f}" for column in columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {
        "training": training(options.repeats),
        "evaluation, no_grad": evaluation(options.repeats, recording=False),
        "evaluation, recording gradients": evaluation(options.repeats, recording=True),
    }
    for title, table in results.items():
        show(title, table)
    results["import"] = {"seconds over torch": import_seconds(3)}
    print(f"\nimport l0hooks: {results['import']['seconds over torch']:.3f} s over torch")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
