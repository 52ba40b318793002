"""How well coupled groups shrink: exactness beside Torch-Pruning, and what cutting, training and tracing cost.

pip install "l0hooks[dev]" && pip install --no-deps "torch-pruning==1.6.*"
python -m benchmarks.shrink --json shrink.json                 # all parts, one thread, a few minutes
python -m benchmarks.shrink --parts zoo tracing                # some of them
"""

from __future__ import annotations

import argparse
import copy
import functools
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
from benchmarks.timing import medians

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoo"))
from structure_models import HUGGING_FACE, ZOO
from structure_oracle import TOLERANCE, close, gap, outputs, positions

CLOSED, OPEN = -4.0, 4.0
PATIENCE = 20  # seconds


# --- the zoo, beside Torch-Pruning ------------------------------------------------------------------------------------


def parameters(model):
    return sum(p.numel() for p in model.parameters())


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


# --- speed ------------------------------------------------------------------------------------------------------------


def resnet(**options):
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(**options)).eval()


def bert(**options):
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**options)).eval()


def half_resnet():
    """ResNet-50 with every width halved, by its configuration."""
    return resnet(embedding_size=32, hidden_sizes=[128, 256, 512, 1024])


def half_bert(config_of):
    """BERT-base with half the heads, hidden neurons and pooled features, its layers put in by hand."""
    model = bert(intermediate_size=1536)
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.key, attention.value = (nn.Linear(768, 384) for _ in range(3))
        attention.num_attention_heads, attention.all_head_size = 6, 384
        layer.attention.output.dense = nn.Linear(384, 768)
    if config_of.pooler is not None:
        model.pooler.dense = nn.Linear(768, config_of.pooler.dense.out_features)
    return model.eval()


def every_second(model, inputs):
    """The model pruned with every second member of each group closed."""
    gated = copy.deepcopy(model)
    l0hooks.sparsify(gated, "coupled", example_inputs=inputs)
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(gated):
            gate.log_alpha.fill_(OPEN)[::2] = CLOSED
    return l0hooks.prune(gated, example_inputs=inputs).eval()


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@torch.no_grad()
def speed():
    print("speed: every second member closed; against the same shapes built by hand (fresh weights), and dense")
    found = {}
    image, words = (torch.randn(1, 3, 224, 224),), (torch.randint(30_000, (1, 128)),)
    for name, dense, inputs, by_hand in (
        ("ResNet-50", resnet(), image, lambda _: half_resnet()),
        ("BERT-base", bert(), words, half_bert),
    ):
        pruned = every_second(dense, inputs)
        hand = by_hand(pruned)
        same = shapes(pruned) == shapes(hand)
        models = {"dense": dense, "pruned": pruned, "hand": hand}
        ms = medians({key: functools.partial(m, *inputs) for key, m in models.items()}, repeats=25)
        found[name] = {
            "milliseconds": {key: 1e3 * value for key, value in ms.items()},
            "parameters": {key: parameters(m) for key, m in models.items()},
            "same_shapes": same,
            "pruned_over_hand": ms["pruned"] / ms["hand"],
            "speed_up": ms["dense"] / ms["pruned"],
        }
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    return found


def training():
    """A step of SGD on a ResNet-18-like network, dense and with coupled gates."""
    print("training: ResNet-18-like, 16 images of 64 x 64, forward + backward + SGD; over dense")
    x, y = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
    steps = {}
    for name in ("dense", "step", "example"):
        torch.manual_seed(0)
        model = resnet(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10).train()
        if name != "dense":
            spec = l0hooks.GateSpec(granularity="coupled", noise=name)
            l0hooks.sparsify(model, spec, example_inputs=(x[:2],))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        steps[name] = functools.partial(_train_step, model, optimizer, x, y)
    ms = medians(steps, repeats=40, clock=time.process_time)
    ratios = {f"{name}_over_dense": ms[name] / ms["dense"] for name in ("step", "example")}
    found = {"milliseconds": {key: 1e3 * value for key, value in ms.items()}, **ratios}
    print(json.dumps(found), flush=True)
    return found


def _train_step(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x).logits, y).backward()
    optimizer.step()


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


PARTS = {"zoo": zoo, "speed": speed, "training": training, "tracing": tracing}


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
