"""Numbers that are shown not to depend on a model's inputs are the same for all inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l0hooks._torch.trees import tree_leaves, tree_map
from l0hooks.structure.dependence import follow

CLOSED = [1, 4]


class Between(nn.Module):
    """A layer of which two outputs are constant, something behind it, and the result."""

    def __init__(self, run, layer, *parts):
        super().__init__()
        self.run, self.layer, self.parts = run, layer, nn.ModuleList(parts)
        with torch.no_grad():
            layer.weight[CLOSED] = 0

    def forward(self, *inputs):
        return self.run(self.layer, *self.parts, *inputs)


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def masks_of(model, inputs):
    """The masks of all values in the graph of ``model``, by their place in it."""
    model.eval()
    with torch.no_grad():
        program = torch.export.export(model, inputs, strict=False)
        found = {}
        for _, known in follow(program, inputs):
            found |= {node.name: (tree_map(copied, one.value), one.depends) for node, one in known.items()}
    return found


def check(model, inputs, *others):
    """What is called constant in the graph is so for other inputs; the mask of the last value with closed channels."""
    found = masks_of(model, inputs)
    for other in others:
        again = masks_of(model, other)
        for name, (value, depends) in found.items():
            for a, b, mask in zip(*map(tree_leaves, (value, again[name][0], depends)), strict=True):
                if mask is not None:
                    assert torch.equal(torch.where(mask, 0, a), torch.where(mask, 0, b)), name
    return found


def linear(size=6, of=4):
    return nn.Linear(of, size)


def conv(size=6, of=3):
    return nn.Conv2d(of, size, 3, padding=1)


def narrow(x):
    y = x.clone()
    y[..., :3] = y[..., 1:4]
    return y


def in_place(layer, x):
    y = layer(x)
    z = y[:, 2:]
    z.mul_(x.sum())
    return y.relu() + 1


FLAT = {
    "relu": lambda layer, x: layer(x).relu() * 2,
    "where": lambda layer, x: torch.where(layer(x) > 0, layer(x), 0) * 2,
    "compared": lambda layer, x: layer(x) * (x.sum(-1, keepdim=True) > 0),
    "thresholded": lambda layer, x: layer((x > 0.5).float()),
    "softmax": lambda layer, x: layer(x).softmax(-1),
    "softmax of examples": lambda layer, x: layer(x).softmax(0),
    "sum": lambda layer, x: layer(x).sum(0, keepdim=True) * 2,
    "mean": lambda layer, x: layer(x).mean(0, keepdim=True) * 2,
    "largest": lambda layer, x: layer(x).max(0)[0] * 2,
    "moved": lambda layer, x: torch.cat([layer(x).flip(1), layer(x).t().reshape(x.shape[0], -1)], 1) * 2,
    "split": lambda layer, x: torch.cat(layer(x).chunk(3, 1)[::-1], 1) * 2,
    "sorted": lambda layer, x: layer(x).sort(-1)[0] * 2,
    "indexed": lambda layer, x: layer(x)[:, [0, 1, 4, 4]] * 2,
    "indexed by input": lambda layer, x: layer(x)[(x[:, 0] > 0).long()] * 2,
    "in place": in_place,
    "copied": lambda layer, x: narrow(layer(x)) * 2,
    "product": lambda layer, x: layer(x).t() @ layer(x) * 2,
    "normed": lambda layer, x: F.layer_norm(layer(x), (6,)) * 2,
    "grouped": lambda layer, x: F.group_norm(layer(x), 3) * 2,
    "cumulative": lambda layer, x: layer(x).cumsum(1) * 2,
    "drawn": lambda layer, x: F.dropout(layer(x), 0.5, True) * 2,
}
IMAGES = {
    "pooled": lambda layer, x: F.max_pool2d(layer(x), 2) * 2,
    "averaged": lambda layer, x: F.adaptive_avg_pool2d(layer(x), 1) * 2,
    "padded": lambda layer, x: F.pad(layer(x), (1, 1, 1, 1), "reflect") * 2,
    "padded with zeros": lambda layer, x: F.pad(layer(x), (1, 2)) * 2,
    "resized": lambda layer, x: F.interpolate(layer(x), scale_factor=2.0, mode="bilinear") * 2,
    "grouped image": lambda layer, x: F.group_norm(layer(x), 2) * 2,
    "instances": lambda layer, x: F.instance_norm(layer(x)) * 2,
    "attention": lambda layer, x: F.scaled_dot_product_attention(layer(x), layer(x), layer(x)) * 2,
}


@pytest.mark.parametrize("name", FLAT)
def test_constants_of_rows_stay_for_other_inputs(name):
    torch.manual_seed(0)
    check(Between(FLAT[name], linear()), (torch.randn(3, 4),), *[(torch.randn(3, 4) * 10**n,) for n in range(-2, 4)])


@pytest.mark.parametrize("name", IMAGES)
def test_constants_of_images_stay_for_other_inputs(name):
    torch.manual_seed(0)
    shape = 2, 3, 6, 6
    check(Between(IMAGES[name], conv()), (torch.randn(shape),), *[(torch.randn(shape) * 10**n,) for n in range(-2, 4)])


@pytest.mark.parametrize("name", ["relu", "where", "mean", "largest", "in place"])
def test_closed_channels_are_found_constant(name):
    found = masks_of(Between(FLAT[name], linear()), (torch.randn(3, 4),))
    _, mask = found["relu" if "relu" in found else next(n for n in ("where", "mean", "getitem", "max_1") if n in found)]
    constant = [] if name == "in place" else CLOSED
    assert [i for i in range(6) if not mask[..., i].any()] == constant


@pytest.mark.parametrize("name", ["pooled", "averaged", "resized"])
def test_closed_channels_of_images_are_found_constant(name):
    found = masks_of(Between(IMAGES[name], conv()), (torch.randn(2, 3, 6, 6),))
    _, mask = next(one for node, one in found.items() if "pool" in node or "upsample" in node)
    assert [i for i in range(6) if not mask[:, i].any()] == CLOSED


def test_positions_are_no_constants():
    """With one position, what is looked up by position or cut from a table is the same everywhere."""

    def run(layer, table, x):
        positions = torch.arange(x.shape[1])
        return layer(x) * 0 + table(positions) + table.weight[: x.shape[1]] + positions[:, None]

    found = masks_of(Between(run, linear(), nn.Embedding(9, 6)), (torch.randn(2, 1, 4),))
    assert all(bool(mask.all()) for name, (_, mask) in found.items() if name in ("embedding", "slice_1", "arange"))


def test_neither_the_model_nor_its_inputs_are_written_into():
    def run(layer, x):
        return layer(x.add_(1)).mul_(layer.seen.add_(1))

    model = Between(run, linear())
    model.layer.register_buffer("seen", torch.zeros(1))
    x = torch.zeros(2, 4)
    with torch.no_grad():
        program = torch.export.export(model.eval(), (x,), strict=False)
        before = x.clone(), model.layer.seen.clone()
        assert len(list(follow(program, (x,)))) > 2
    assert torch.equal(x, before[0])
    assert torch.equal(model.layer.seen, before[1])
