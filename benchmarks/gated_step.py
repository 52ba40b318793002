"""What a gate costs: ``python -m benchmarks.gated_step [--repeats N] [--json FILE]``, on one thread.

Linear(1024, 1024) at batch 128: dense, with l0hooks' gates, and l0-python's L0Linear, each with its own L0 penalty and
all with the same temperature and start. A training step is forward, penalty and backward, without and with an Adam
step on all parameters, the gates' included. Evaluation is one forward, without and with gradients being recorded.

The layers take turns in one loop and the medians of CPU seconds are shown, so that a busy machine is busy for all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import l0
import torch
from torch import nn

import l0hooks
from benchmarks.timing import medians

SIZE, BATCH = 1024, 128
PEER = "l0-python 0.6.2"
STRENGTH, TEMPERATURE, START = 1e-6, 2 / 3, 0.95


def gated(granularity):
    layer = nn.Linear(SIZE, SIZE)
    l0hooks.sparsify(layer, l0hooks.GateSpec(granularity=granularity, temperature=TEMPERATURE, init_mean=START))
    return layer, lambda: l0hooks.penalty(layer, l0=STRENGTH)


def contenders():
    """Name → (layer, its penalty or None)."""
    peer = l0.L0Linear(SIZE, SIZE, temperature=TEMPERATURE, init_sparsity=1 - START)
    return {
        "dense": (nn.Linear(SIZE, SIZE), None),
        "ours, a gate a weight": gated("weight"),
        "ours, a gate an input": gated("input"),
        "ours, a gate an output": gated("output"),
        f"{PEER}, a weight": (peer, lambda: STRENGTH * peer.get_l0_penalty()),
    }


def training_step(layer, penalty, x, *, adam):
    optimizer = torch.optim.Adam(layer.parameters())

    def step():
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        (loss if penalty is None else loss + penalty()).backward()
        if adam:
            optimizer.step()

    return step


def training(repeats, *, adam):
    """Milliseconds a step, nanoseconds a weight over dense, and these over the peer's."""
    x = torch.randn(BATCH, SIZE, requires_grad=True)
    steps = {name: training_step(layer, penalty, x, adam=adam) for name, (layer, penalty) in contenders().items()}
    seconds = medians(steps, repeats=repeats, clock=time.process_time)
    extra = {name: (s - seconds["dense"]) / SIZE**2 * 1e9 for name, s in seconds.items()}
    peer = next(value for name, value in extra.items() if name.startswith(PEER))
    return {
        name: {"ms": s * 1e3, "extra ns/weight": extra[name], "extra / peer's": extra[name] / peer}
        for name, s in seconds.items()
    }


def evaluation(repeats, *, recording):
    """Milliseconds a forward, and these over dense."""
    x = torch.randn(BATCH, SIZE)

    def forward(layer):
        layer.eval()

        def step():
            with torch.set_grad_enabled(recording):
                layer(x)

        return step

    forwards = {name: forward(layer) for name, (layer, _) in contenders().items()}
    seconds = medians(forwards, repeats=repeats, clock=time.process_time)
    return {name: {"ms": s * 1e3, "ratio to dense": s / seconds["dense"]} for name, s in seconds.items()}


def import_seconds(repeats):
    """What importing the library adds to importing torch: wall time, each in a process of its own."""
    code = "import time, torch; t = time.perf_counter(); import l0hooks; print(time.perf_counter() - t)"
    run = [sys.executable, "-c", code]
    return statistics.median(
        float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)
    )


def show(title, table):
    columns = list(next(iter(table.values())))
    width = max(map(len, table))
    print(f"\n{title}\n{'':{width}}" + "".join(f"{column:>18}" for column in columns))
    for name, row in table.items():
        print(f"{name:{width}}" + "".join(f"{row[column]:18.3f}" for column in columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {
        "training step: forward, penalty, backward": training(options.repeats, adam=False),
        "training step: forward, penalty, backward, Adam": training(options.repeats, adam=True),
        "evaluation under no_grad": evaluation(5 * options.repeats, recording=False),
        "evaluation, gradients recorded": evaluation(5 * options.repeats, recording=True),
    }
    for title, table in results.items():
        show(title, table)
    results["import l0hooks, seconds over torch"] = import_seconds(5)
    print(f"\nimport l0hooks: {results['import l0hooks, seconds over torch']:.3f} s over import torch")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
