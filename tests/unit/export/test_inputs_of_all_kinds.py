"""Inputs whose first axis is no batch, and tuples where a tensor is usual: gated, trained, cut and compared."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from l0hooks import Budget, GateSpec, param_groups, prune, sparsify


class Nodes(nn.Module):
    """Two rounds of messages along an adjacency."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, adjacency):
        x = (adjacency @ self.one(x)).relu()
        return self.out((adjacency @ self.two(x)).relu())


class Image(nn.Module):
    """One image, with or without a batch."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.two(self.one(x).relu()).relu().mean((-1, -2)))


class Stacked(Image):
    def forward(self, images):
        return super().forward(torch.stack(images))


class OneByOne(Image):
    def forward(self, images):
        return [Image.forward(self, image) for image in images]


class FourImages(Image):
    def forward(self, x):
        return super().forward(x).view(4, 3)


class Pair(nn.Module):
    """A tuple in, nested containers out."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, pair):
        x, y = (self.two(self.one(part).relu()) for part in pair)
        return self.out(x), (y.sum(), {"more": self.out(y)})


class Scores(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.sigmoid()


class Routed(Pair):
    """A layer that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.two = Scores(8, 8)

    def forward(self, x):
        scores, weights = self.two(self.one(x).relu())
        return self.out(scores * weights)


class Sum(nn.Linear):
    def forward(self, pair):
        return super().forward(pair[0]) + pair[1]


class Added(Pair):
    """A layer that takes a tuple."""

    def __init__(self):
        super().__init__()
        self.two = Sum(8, 8)

    def forward(self, x):
        x = self.one(x).relu()
        return self.out(self.two((x, x)).relu())


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "nodes and an adjacency": (Nodes, lambda: (images(6, 5), images(6, 6).abs())),
    "one image": (Image, lambda: (images(3, 8, 8),)),
    "a list of images": (Stacked, lambda: ([images(3, 8, 8)] * 2,)),
    "images of several sizes": (OneByOne, lambda: ([images(3, 8, 8), images(3, 6, 7)],)),
    "a batch written down": (FourImages, lambda: (images(4, 3, 8, 8),)),
    "a tuple": (Pair, lambda: ((images(2, 5), images(3, 5)),)),
    "a layer that returns a tuple": (Routed, lambda: (images(2, 5),)),
    "a layer that takes a tuple": (Added, lambda: (images(2, 5),)),
}
SPECS = {
    "coupled": GateSpec(granularity="coupled"),
    "by example": GateSpec(granularity="coupled", noise="example"),
    "output": GateSpec(granularity="output"),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", CASES)
def test_from_gates_to_a_smaller_model(name, spec):
    build, inputs = CASES[name]
    model, examples = build(), inputs()
    sparsify(model, SPECS[spec], example_inputs=examples, budget=Budget(sparsity=0.5, unit="macs", steps=2))
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-3, gate_lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        sum(leaf.square().sum() for leaf in pytree.tree_leaves(model(*examples))).backward()
        optimizer.step()
    small = prune(model, example_inputs=examples)
    if spec != "output":
        assert small.one.weight.shape[0] < 8
    model.eval()
    for got, expected in zip(pytree.tree_leaves(small(*examples)), pytree.tree_leaves(model(*examples)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
