"""Make a trained network ten to twenty times sparser without losing accuracy, in an ordinary training loop.

A small residual CNN is trained on scikit-learn's 8×8 digits. Then it gets one gate per weight and a budget: 95 % of the
gated weights are to go. The same loop trains on; the budget is reached after 60 % of the steps, the rest trains what
stays. Written to ``--output``: ``pruned.pt`` (state dict), ``pruned.onnx`` (any batch size; checked), ``report.json``,
``history.csv``, ``report.png`` and ``layers.png``. About half a minute:

    pip install "l0hooks[examples]"
    python examples/retrofit_digits.py --seed 0
"""

import argparse
import json
import logging
import time
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import l0hooks


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
    right = model.eval()(test[0]).argmax(1) == test[1]
    model.train()
    return right.double().mean().item()


def train(model, optimizer, loader, progress, after_epoch=dict):
    """An ordinary loop, before the gates and with them."""
    rates = CosineAnnealingLR(optimizer, len(progress) * len(loader))
    for _ in progress:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            rates.step()
        progress.set_postfix(after_epoch())


def export_onnx(model, images, path):
    """A file for batches of any size; another runtime must compute the same. Two warnings of torch do not matter."""
    import onnxruntime  # in the extra "examples"

    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    registration.addFilter(lambda record: "torchvision is not installed" not in record.getMessage())
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.* is deprecated", FutureWarning)
    torch.onnx.export(model, (images[:2],), path, dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for inputs in (images[:1], images):
        (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(outputs), model(inputs), rtol=1e-4, atol=1e-4)


def run(options):
    start, output = time.perf_counter(), options.output
    torch.set_num_threads(1)  # so small a network only waits for its threads
    torch.manual_seed(options.seed)
    loader, test = load_data(options.seed)
    bar = partial(tqdm, disable=options.quiet)
    model = make_model()
    train(model, torch.optim.Adam(model.parameters(), lr=2e-3), loader, bar(range(options.epochs), desc="dense"))
    dense = accuracy(model, test)

    epochs = 2 * options.epochs
    budget = l0hooks.Budget(sparsity=options.sparsity, steps=max(1, int(0.6 * epochs * len(loader))))
    l0hooks.sparsify(model, "weight", budget=budget, example_inputs=(test[0][:1],))
    tracker = l0hooks.Tracker(model, unit="gates")

    def track():
        tracker.log(step=(len(tracker.rows) + 1) * len(loader), accuracy=accuracy(model, test))
        return {"sparsity": f"{l0hooks.summary(model).sparsity:.1%}", "accuracy": f"{tracker.rows[-1]['accuracy']:.1%}"}

    optimizer = torch.optim.Adam(l0hooks.param_groups(model, lr=2e-3, gate_lr=0.1))
    train(model, optimizer, loader, bar(range(epochs), desc="gated"), track)

    pruned, layers = l0hooks.prune(model.eval(), example_inputs=(test[0],), return_report=True)
    report = {"seed": options.seed, "dense_accuracy": dense, "accuracy": accuracy(pruned, test)}
    report |= {"sparsity": layers.sparsity, "seconds": time.perf_counter() - start, "layers": layers.to_dict()}
    output.mkdir(parents=True, exist_ok=True)
    torch.save(pruned.eval().state_dict(), output / "pruned.pt")
    export_onnx(pruned, test[0], output / "pruned.onnx")
    (output / "report.json").write_text(json.dumps(report, indent=1))
    tracker.to_csv(output / "history.csv")
    tracker.plot(output / "report.png")
    l0hooks.plots.sparsity_plot(layers).savefig(output / "layers.png", dpi=120)
    print(layers)
    print(f"accuracy {dense:.2%} dense, {report['accuracy']:.2%} pruned; {report['sparsity']:.1%} sparse; {output}/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20, help="of the dense training; twice as many follow with gates")
    parser.add_argument("--sparsity", type=float, default=0.95, help="of the gated weights")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "retrofit_digits")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    run(parser.parse_args())
