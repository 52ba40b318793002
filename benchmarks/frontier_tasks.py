"""The tasks of ``benchmarks.frontier``: data, a dense network that has learned it, and one way to train it further."""

from __future__ import annotations

import copy
import gzip
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, make_classification
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from examples.retrofit_digits import make_model
from l0hooks.training import recipe

HOLD = 0.3  # of the steps, after the size is reached
FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
NAMES = ("digits", "synthetic", "lenet300", "lenet5")


def lenet300() -> nn.Sequential:
    """784-300-100-10 (LeCun et al., 1998)."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet5() -> nn.Sequential:
    """LeNet-5-Caffe: 20-50-800-500."""
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def fashion(part: str) -> tuple[Tensor, Tensor]:
    """The images, standardised, and labels of Fashion-MNIST: part "train" (60,000) or "t10k" (10,000).

    Raises
    ------
    SystemExit
        If the package is not installed.
    """
    if not FASHION.exists():
        raise SystemExit(
            "benchmarks.frontier: apt-get install dataset-fashion-mnist, for the tasks lenet300 and lenet5"
        )
    images, labels = (
        gzip.decompress((FASHION / f"{part}-{kind}-ubyte.gz").read_bytes()) for kind in ("images-idx3", "labels-idx1")
    )
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 255
    numbers = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return (torch.from_numpy(pixels) - 0.2860) / 0.3530, torch.from_numpy(numbers)


class Task:
    """Data, a dense network that has learned it, and one way to train it further."""

    def __init__(self, name: str, seed: int, quick: bool) -> None:
        self.name, self.seed = name, seed
        torch.manual_seed(seed)
        if name in ("lenet300", "lenet5"):
            (self.x, self.y), (self.test_x, self.test_y) = fashion("train"), fashion("t10k")
            model, dense, self.epochs, self.batch = {"lenet300": lenet300, "lenet5": lenet5}[name](), 4, 6, 128
        else:
            model, dense, x, y = self._small(name)
            self.x, self.test_x, self.y, self.test_y = train_test_split(
                x, y, test_size=0.3, stratify=y, random_state=seed
            )
        if quick:
            dense, self.epochs = min(dense, 2), min(self.epochs, 3)
        self.steps = self.epochs * math.ceil(len(self.x) / self.batch)
        self.change = recipe(steps=self.steps).budget_steps  # steps in which the size may change
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for x, y in self.batches(dense):
            step(model, optimizer, x, y)
        self.dense = model

    def _small(self, name: str) -> tuple[nn.Module, int, Tensor, Tensor]:
        """A network, its epochs, and data that are drawn here or come with scikit-learn."""
        if name == "digits":
            x, y = load_digits(return_X_y=True)
            self.epochs, self.batch = 30, 64
            x = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
            return make_model(), 12, x, torch.tensor(y)
        x, y = make_classification(
            12_000, 200, n_informative=40, n_redundant=40, n_classes=10, n_clusters_per_class=4, class_sep=2,
            flip_y=0.01, random_state=self.seed,
        )  # fmt: skip
        self.epochs, self.batch = 20, 128
        x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
        model = nn.Sequential(nn.Linear(200, 400), nn.ReLU(), nn.Linear(400, 200), nn.ReLU(), nn.Linear(200, 10))
        return model, 8, x, torch.tensor(y)

    def batches(self, epochs=None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(epochs or self.epochs):
            for rows in torch.randperm(len(self.x)).split(self.batch):
                yield self.x[rows], self.y[rows]

    def start(self):
        """A copy of the dense network, and the same batches for everyone."""
        torch.manual_seed(1000 + self.seed)
        return copy.deepcopy(self.dense).train()

    def rate(self, t):
        """The learning rate's share at a step: constant, then half a cosine."""
        return 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * t / self.steps - 1)))

    @torch.no_grad()
    def accuracy(self, model):
        return (model.eval()(self.test_x).argmax(1) == self.test_y).double().mean().item()


def step(model, optimizer, x, y, extra=None, rate=1.0):
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base", group["lr"]) * (1.0 if group.get("gates") else rate)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    (loss if extra is None else loss + extra()).backward()
    optimizer.step()
