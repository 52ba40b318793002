"""Make a trained network ten times sparser without losing accuracy, in an ordinary training loop.

A small residual CNN is trained on scikit-learn's 8×8 digits. Then it gets one gate per weight, trains on under an L0
penalty until most gates have closed, is pruned to a plain torch model, and fine-tuned with its zeros held. Written to
``--output``: ``pruned.pt`` (state dict), ``pruned.onnx``, ``report.json`` and ``report.png``. About half a minute:

    pip install "l0hooks[examples]"
    python examples/retrofit_digits.py --seed 0
"""

import argparse
import json
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import l0hooks
from l0hooks import schedules


class Block(nn.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.skip(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def make_model():
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4 * 4, 10))
    blocks = {"block1": Block(16, 16), "block2": Block(16, 32, 2), "block3": Block(32, 32)}
    return nn.Sequential(OrderedDict(stem=stem, **blocks, head=head))


def load_data(seed):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    parts = train_test_split(images, torch.tensor(labels), test_size=0.25, stratify=labels, random_state=seed)
    return DataLoader(TensorDataset(parts[0], parts[2]), batch_size=64, shuffle=True), (parts[1], parts[3])


@torch.no_grad()
def accuracy(model, test):
    images, labels = test
    predicted = model.eval()(images).argmax(1)
    model.train()
    return (predicted == labels).double().mean().item()


def train(model, loader, lr, progress):
    """An ordinary loop: what comes before the gates, and after them."""
    optimizer = torch.optim.Adam(model.parameters())
    rates = OneCycleLR(optimizer, lr, total_steps=len(progress) * len(loader))
    for _ in progress:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            rates.step()


def train_gated(model, loader, test, progress):
    """The same loop with gates: another set of parameter groups, one more term in the loss, a temperature to set."""
    steps, gates = len(progress) * len(loader), l0hooks.summary(model).gates
    strength = schedules.linear(0, 15 / gates, max(1, steps // 3))
    temperature = schedules.linear(2 / 3, 1 / 3, steps)
    optimizer = torch.optim.Adam(l0hooks.param_groups(model, lr=1e-3, gate_lr=0.1))
    history, step = [], 0
    for _ in progress:
        for x, y in loader:
            l0hooks.set_temperature(model, temperature(step))
            loss = F.cross_entropy(model(x), y) + l0hooks.penalty(model, l0=strength(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        history.append((l0hooks.summary(model).sparsity, accuracy(model, test)))
        progress.set_postfix(sparsity=f"{history[-1][0]:.1%}", accuracy=f"{history[-1][1]:.1%}")
    return history


def keep_zeros(model):
    """Mask the gradients of weights that are zero, so that fine-tuning leaves them so."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.register_hook((parameter != 0).mul)


def plot(history, dense, report, path):
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sparsity, accuracies = zip(*history, strict=True)
    left.plot(sparsity, accuracies, "o-", ms=4, label="gated, each epoch")
    left.plot(report["sparsity"], report["accuracy"], "*", ms=14, color="C3", label="pruned and fine-tuned")
    left.axhline(dense, color="gray", ls="--", label="dense")
    left.set(xlabel="sparsity of the gated weights", ylabel="test accuracy", xlim=(-0.02, 1))
    left.xaxis.set_major_formatter("{x:.0%}")
    left.legend(loc="lower left")
    rows = report["layers"]["rows"][::-1]
    names = [row["name"] for row in rows]
    right.barh(names, [row["parameters"] for row in rows], color="0.85", label="dense")
    bars = right.barh(names, [row["parameters_kept"] for row in rows], color="C0", label="kept")
    right.bar_label(bars, [f" {1 - row['sparsity']:.1%}" for row in rows])
    right.set(xlabel="weights of each layer (logarithmic), and the share kept", xscale="log")
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def run(seed, output, epochs, quiet):
    start = time.perf_counter()
    torch.set_num_threads(1)  # so small a network only waits for its threads
    torch.manual_seed(seed)
    loader, test = load_data(seed)
    bar = partial(tqdm, disable=quiet)
    model = make_model()
    train(model, loader, 5e-3, bar(range(epochs), desc="pretrain"))
    dense = accuracy(model, test)

    l0hooks.sparsify(model, "weight", example_inputs=(test[0][:1],))
    history = train_gated(model, loader, test, bar(range(epochs + epochs // 2), desc="gated"))
    pruned, layers = l0hooks.prune(model, example_inputs=(test[0],), return_report=True)
    keep_zeros(pruned)
    train(pruned, loader, 5e-3, bar(range(max(1, epochs // 2)), desc="fine-tune"))

    pruned.eval()
    report = {"seed": seed, "dense_accuracy": dense, "accuracy": accuracy(pruned, test), "sparsity": layers.sparsity}
    report |= {"seconds": time.perf_counter() - start, "layers": layers.to_dict()}
    output.mkdir(parents=True, exist_ok=True)
    torch.save(pruned.eval().state_dict(), output / "pruned.pt")
    torch.onnx.export(pruned, (test[0][:2],), output / "pruned.onnx", dynamo=True, verbose=False)
    (output / "report.json").write_text(json.dumps(report, indent=1))
    plot(history, dense, report, output / "report.png")
    print(layers)
    print(f"accuracy {dense:.2%} dense, {report['accuracy']:.2%} pruned; {report['sparsity']:.1%} sparse; {output}/")
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=24, help="of pretraining; gates train half as long again")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "retrofit_digits")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    run(options.seed, options.output, options.epochs, options.quiet)
