"""Cut attention heads and neurons out of a vision transformer: less than half is left of it, at the same accuracy.

A small ViT from ``transformers``, with random weights, is trained on scikit-learn's 8×8 digits. Then every head and
every hidden neuron gets a gate under a budget of 45 % of the model's parameters, the same loop runs on, and ``prune``
returns a plain, smaller ViT. ``--output`` gets ``pruned.pt``, ``report.json`` and ``report.png``.
About a minute, after ``pip install "l0hooks[examples]" transformers``.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import trange
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer

import l0hooks

BODY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
IMAGE = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10, "initializer_range": 0.1}


def load_data(seed):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    parts = train_test_split(images, torch.tensor(labels), test_size=0.25, stratify=labels, random_state=seed)
    return DataLoader(TensorDataset(parts[0], parts[2]), batch_size=64, shuffle=True), (parts[1], parts[3])


def train(model, loader, groups, epochs):
    """An ordinary loop."""
    optimizer, steps = torch.optim.AdamW(groups), len(epochs) * len(loader)
    rates = OneCycleLR(optimizer, [group["lr"] for group in groups], steps, pct_start=0.2)
    model.train()
    for _ in epochs:
        for x, y in loader:
            loss = F.cross_entropy(model(x).logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()


@torch.no_grad()
def measure(model, images, labels):
    """The size of a model, its multiply-adds for one image, and the share of images it recognises."""
    accuracy = (model.eval()(images).logits.argmax(1) == labels).double().mean().item()
    with FlopCounterMode(display=False) as counter:
        model(images[:1])
    layers = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, ViTLayer)]
    found = {"parameters": sum(p.numel() for p in model.parameters()), "encoder_parameters": sum(layers)}
    return {**found, "layers": layers, "macs": counter.get_total_flops() // 2, "accuracy": accuracy}


def latencies(models, x):
    """Median milliseconds of each model on one thread, taken in turns."""
    timers = [Timer("model(x)", globals={"model": m.eval(), "x": x}, num_threads=1) for m in models]
    rounds = [[timer.timeit(10).mean for timer in timers] for _ in range(25)]
    return [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]


def plot(report, path):
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for shift, name in ((-0.2, "dense"), (0.2, "pruned")):
        bars = axes.bar([i + shift for i in range(4)], report[name]["layers"], 0.4, label=name)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    axes.set(xlabel="encoder layer", ylabel="parameters", xticks=range(4), title="A ViT, dense and pruned")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main(seed, epochs, quiet, output):
    torch.set_num_threads(1)  # so small a network only waits for its threads
    torch.manual_seed(seed)
    loader, test = load_data(seed)
    dense = ViTForImageClassification(ViTConfig(**BODY, **IMAGE))
    train(dense, loader, [{"params": dense.parameters(), "lr": 1.5e-3}], trange(epochs, desc="dense", disable=quiet))
    model, example = copy.deepcopy(dense), (test[0][:2],)
    spec = l0hooks.GateSpec(granularity="coupled", kinds=("head", "neuron"))
    longer = epochs + epochs // 3
    budget = l0hooks.Budget(sparsity=0.55, unit="params", steps=max(1, 2 * longer * len(loader) // 3))
    l0hooks.sparsify(model, spec, example_inputs=example, budget=budget)
    both = l0hooks.param_groups(model, lr=1e-3, gate_lr=0.1)
    train(model, loader, both, trange(longer, desc="gated", disable=quiet))
    small = l0hooks.prune(model, example_inputs=example)  # compared with the gated model: the outputs are the same
    report = {"seed": seed, "dense": measure(dense, *test), "pruned": measure(small, *test)}
    report["dense"]["milliseconds"], report["pruned"]["milliseconds"] = latencies((dense, small), test[0][:1])
    output.mkdir(parents=True, exist_ok=True)
    torch.save(small.state_dict(), output / "pruned.pt")
    (output / "report.json").write_text(json.dumps(report, indent=2))
    plot(report, output / "report.png")
    if not quiet:
        print(*(f"{name:20}{before} → {report['pruned'][name]}" for name, before in report["dense"].items()), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=25, help="of the dense and of the gated phase (default: 25)")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "shrink_transformer")
    main(**vars(parser.parse_args()))
