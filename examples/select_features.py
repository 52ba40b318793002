"""Choose exactly k features while an ordinary torch module learns to use them.

A small network on scikit-learn's breast cancer data (569 tumours, 30 measurements) has a ``FeatureGate`` in front. One
loop trains both. After 60 % of its steps exactly ``--keep`` measurements are left, and the remaining steps train on
these. The result is compared with the same network on all measurements, and on as many random ones, and written to
``report.json`` in ``--output``.

    pip install "l0hooks[examples]"
    python examples/select_features.py --keep 5
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

import l0hooks


class Network(nn.Module):
    """Any torch module: the gate is one more layer of it."""

    def __init__(self, features, gate=None):
        super().__init__()
        self.gate = gate or nn.Identity()
        self.layers = nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.layers(self.gate(x)).squeeze(-1)


def load_data(seed):
    frame = load_breast_cancer(as_frame=True)
    x = torch.tensor(frame.data.to_numpy(), dtype=torch.float32)
    y = torch.tensor(frame.target.to_numpy(), dtype=torch.float32)
    train, test, y_train, y_test = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    mean, spread = train.mean(0), train.std(0)
    return (train - mean) / spread, (test - mean) / spread, y_train, y_test, list(frame.data.columns)


def fit(model, x, y, steps, progress):
    """Full batches; the gates learn ten times as fast as the weights."""
    optimizer = torch.optim.Adam(l0hooks.param_groups(model, lr=5e-3, gate_lr=5e-2, weight_decay=1e-3))
    for _ in progress(range(steps), leave=False):
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, x, y):
    return ((model(x) > 0) == (y > 0.5)).double().mean().item()


def run(options):
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    steps = 60 if options.quick else 1000
    train, test, y_train, y_test, names = load_data(options.seed)

    def progress(steps, **keywords):
        return tqdm(steps, disable=options.quiet, **keywords)

    gate = l0hooks.FeatureGate(
        len(names), options.keep, feature_names=names, steps=int(0.6 * steps), noise="example", init_keep_prob=0.5
    )
    gated = fit(Network(len(names), gate), train, y_train, steps, progress)
    chosen, indices = gate.select(test)

    report = {"seed": options.seed, "keep": options.keep, "features": gate.feature_names_out()}
    report["gated"] = accuracy(gated, test, y_test)
    every = fit(Network(len(names)), train, y_train, steps, progress)
    report["all"] = accuracy(every, test, y_test)
    again = fit(Network(options.keep), train[:, indices], y_train, steps, progress)
    report["chosen, trained again"] = accuracy(again, chosen, y_test)
    draws = []
    for _ in range(2 if options.quick else 10):
        columns = torch.randperm(len(names))[: options.keep]
        model = fit(Network(options.keep), train[:, columns], y_train, steps, progress)
        draws.append(accuracy(model, test[:, columns], y_test))
    report["random"] = statistics.mean(draws)

    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(report, indent=1))
    print(f"kept {options.keep} of {len(names)}: {', '.join(report['features'])}")
    scores = {name: report[name] for name in ("all", "gated", "chosen, trained again", "random")}
    print("accuracy: " + ", ".join(f"{value:.1%} {name}" for name, value in scores.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=int, default=5, help="features that stay")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "select_features")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    run(parser.parse_args())
