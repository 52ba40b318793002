"""How well coupled groups shrink: exactness beside Torch-Pruning, and what tracing costs.

pip install "l0hooks[dev]" && pip install --no-deps "torch-pruning==1.6.*"
python -m benchmarks.shrink --json shrink.json                 # both parts, one thread, a few minutes
python -m benchmarks.shrink --parts tracing                    # one of them
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

import l0hooks
from benchmarks.pruned import CLOSED, bert, parameters, resnet

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoo"))
from structure_models import HUGGING_FACE, ZOO
from structure_oracle import TOLERANCE, close, gap, outputs, positions

PATIENCE = 20  # seconds


# --- the zoo, beside Torch-Pruning ------------------------------------------------------------------------------------


def with_ours(entry):
    """Gate every group, close about a third of each, prune; compared with the gated model in evaluation."""
    model, inputs = entry.make(), entry.inputs()
    before = parameters(model)
    try:
        l0hooks.sparsify(model, "coupled", example_inputs=inputs)
    except l0hooks.L0HooksError as error:
        return {"result": "refused", "why": first_line(error)}
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            closed = torch.randperm(gate.log_alpha.numel())[: third(gate.log_alpha.numel())]
            gate.log_alpha.uniform_(-0.2, 3.0)[closed] = CLOSED
    try:
        small = l0hooks.prune(model, example_inputs=inputs)
    except l0hooks.L0HooksError as error:
        return {"result": "refused", "why": first_line(error)}
    worst = gap(outputs(model.eval(), inputs), outputs(small.eval(), inputs))
    return {"result": verdict(worst), "gap": worst, "removed": 1 - parameters(small) / before}


def with_torch_pruning(entry):
    """Zero the columns that read a third of our members, let Torch-Pruning cut exactly these out of their writers.

    Its own dependency graph says what has to go with them; the outputs must not change. Heads are left alone, for
    there it expects its user to correct ``num_heads`` by hand.
    """
    import torch_pruning

    model, inputs = entry.make(), entry.inputs()
    before, chosen = parameters(model), []
    for group in l0hooks.channel_groups(model, inputs):
        if group.kind != "head" and group.readers:
            chosen.append((group, torch.randperm(group.size)[: third(group.size)]))
    close(model, chosen)
    expected = outputs(model, inputs)
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=inputs, forward_fn=lambda m, x: m(*x), output_transform=leaves, verbose=False
    )
    doomed = _doomed(model, chosen, graph)
    if not doomed:
        return {"result": "nothing asked"}
    alive = {module: np.arange(graph.get_pruner_of_module(module).get_out_channels(module)) for module in doomed}
    for module, goes in doomed.items():
        indices = np.flatnonzero(np.isin(alive[module], list(goes))).tolist()
        if not indices:
            continue
        group = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, indices)
        group.prune()
        for dependency, removed in group:
            layer = dependency.target.module
            if layer in alive and graph.is_out_channel_pruning_fn(dependency.handler):
                alive[layer] = alive[layer][~np.isin(np.arange(len(alive[layer])), removed)]
    worst = gap(expected, outputs(model, inputs))
    return {"result": verdict(worst), "gap": worst, "removed": 1 - parameters(model) / before}


def _doomed(model, chosen, graph):
    """The output channels of each layer that Torch-Pruning knows how to cut."""
    doomed = {}
    for group, members in chosen:
        for site in group.writers:
            module = model.get_submodule(site.module)
            axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd | nn.Embedding) else 0
            if site.axis == axis and module in graph.module2node and site.names[0].endswith(".weight"):
                doomed.setdefault(module, set()).update(positions(site, members).tolist())
    return doomed


def leaves(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def third(size):
    return min(max(1, round(size / 3)), size - 1)


def verdict(worst):
    return "exact" if worst <= TOLERANCE else "inexact"


def first_line(error):
    return (str(error).splitlines() or [""])[0][:160]


def attempt(function, entry):
    """What ``function`` finds; an error of whatever kind, or more than ``PATIENCE`` seconds, is a crash."""

    def stop(*_):
        raise TimeoutError(f"no end after {PATIENCE} s")

    torch.manual_seed(1)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        return function(entry)
    except Exception as error:  # noqa: BLE001  # it is the finding
        return {"result": "crash", "why": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def zoo():
    print("zoo: about a third of every group. l0hooks: gated model against pruned. Torch-Pruning: the same members'")
    print("read columns set to zero, these channels (not heads) cut by its dependency graph, outputs before and after")
    found = {}
    for name, entry in {**ZOO, **HUGGING_FACE}.items():
        row = {"l0hooks": attempt(with_ours, entry), "Torch-Pruning": attempt(with_torch_pruning, entry)}
        found[name] = row
        print(f"{name:24}" + "   ".join(f"{tool} {_cell(cell)}" for tool, cell in row.items()), flush=True)
    counts = {
        tool: dict(Counter(row[tool]["result"] for row in found.values())) for tool in ("l0hooks", "Torch-Pruning")
    }
    print(counts)
    return {"models": found, "counts": counts}


def _cell(cell):
    removed = f"{cell['removed']:5.1%} removed" if "removed" in cell else cell.get("why", "")[:60]
    return f"{cell['result']:8} {removed:14}"


# --- tracing ---------------------------------------------------------------------------------------------------------


def tracing():
    from transformers import ViTConfig, ViTModel

    print("tracing: channel_groups(), the export included, best of 3 after a warm-up on a small model")
    l0hooks.channel_groups(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), (torch.randn(2, 2),))
    cases = {
        "ResNet-50": (resnet(), torch.randn(1, 3, 224, 224)),
        "BERT-base": (bert(), torch.randint(30_000, (1, 128))),
        "ViT-base@224": (ViTModel(ViTConfig()), torch.randn(1, 3, 224, 224)),
    }
    found = {}
    for name, (model, x) in cases.items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            groups = l0hooks.channel_groups(model, (x,))
            times.append(time.perf_counter() - start)
        found[name] = {"first": times[0], "best": min(times), "groups": len(groups)}
        print(f"{name}: first {times[0]:.2f} s, best {min(times):.2f} s, {len(groups)} groups", flush=True)
    return found


PARTS = {"zoo": zoo, "tracing": tracing}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = {part: PARTS[part]() for part in options.parts}
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, **found}, indent=2))


if __name__ == "__main__":
    main()
