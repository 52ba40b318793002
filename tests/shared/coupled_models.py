"""Small models with coupled channels, their groups, and what tests read off their gates."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0hooks import iter_gates
from l0hooks.attach.walk import iter_gated
from l0hooks.structure import channel_groups


class Branched(nn.Module):
    """A stem that two convolutions read, joined by concatenation, then neurons."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 3, padding=1)
        self.hidden, self.head = nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = torch.cat([self.left(x), F.relu(self.right(x))], 1).mean((2, 3))
        return self.head(torch.tanh(self.hidden(x)))


class Attentive(nn.Module):
    """Heads, neurons, and a convolution before them."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv1d(2, 8, 1)
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = self.patch(x).transpose(1, 2)
        q, k, v = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.down(F.relu(self.up(x)))


class Residual(nn.Module):
    """A convolution that writes the channels it reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.block(torch.sigmoid(x)))


def mlp(*sizes, activation=nn.ReLU):
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


MODELS = {
    "mlp": (lambda: mlp(5, 6, 4, 3), lambda: torch.randn(3, 5)),
    "branched": (Branched, lambda: torch.randn(2, 3, 5, 5)),
    "attentive": (Attentive, lambda: torch.randn(2, 2, 4)),
    "residual": (Residual, lambda: torch.randn(2, 2, 4)),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 6, 2, groups=2),
            nn.ReLU(), nn.Conv2d(6, 2, 1),
        ),
        lambda: torch.randn(2, 3, 5, 5),
    ),
}  # fmt: skip


models = pytest.mark.parametrize("name", MODELS)


@functools.cache
def coupled_groups(name):
    """The groups of a model, traced once a process: exporting a model takes most of the time of a test."""
    with torch.random.fork_rng():  # the first test that asks sees the same random numbers as the next
        return tuple(channel_groups(MODELS[name][0](), (MODELS[name][1](),)))


@functools.cache
def perceptron_groups(*sizes):
    """Those of a perceptron."""
    with torch.random.fork_rng():
        return tuple(channel_groups(mlp(*sizes), (torch.randn(2, sizes[0]),)))


def gates_of(model):
    return [gate for _, gate in iter_gates(model)]


@torch.no_grad()
def set_support(model, supports):
    for one, support in zip(iter_gated(model), supports, strict=True):
        one.gate.log_alpha.copy_(torch.where(torch.as_tensor(support), 40.0, -40.0))


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def fingerprint(model):
    """Everything that a failed call must leave unchanged."""
    hooks = [{k: dict(v) for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)} for m in model.modules()]
    return (
        [(name, type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()],
        [(name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters()],
        [(name, id(b), b._version) for name, b in model.named_buffers()],
        hooks,
    )
