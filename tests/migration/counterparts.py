"""Layers of l0-python with their counterparts: equal weights, equal log-odds, equal temperature."""

import l0
import torch
from conversion import from_page
from torch import nn

from l0hooks import GateSpec, sparsify

SAME = {"rtol": 0, "atol": 1e-6}
from_l0_python = from_page("migration.md", "from_l0_python")

LAYERS = {
    "linear": (lambda **o: l0.L0Linear(6, 5, **o), lambda: nn.Linear(6, 5), "weight", (6,)),
    "no bias": (lambda **o: l0.L0Linear(6, 5, bias=False, **o), lambda: nn.Linear(6, 5, bias=False), "weight", (6,)),
    "conv": (lambda **o: l0.L0Conv2d(3, 4, 3, 2, 1, **o), lambda: nn.Conv2d(3, 4, 3, 2, 1), "weight", (3, 7, 7)),
    "oblong": (lambda **o: l0.L0Conv2d(3, 4, (3, 1), **o), lambda: nn.Conv2d(3, 4, (3, 1)), "weight", (3, 7, 7)),
    "channels": (
        lambda **o: l0.L0Conv2d(3, 4, 3, structured=True, **o),
        lambda: nn.Conv2d(3, 4, 3),
        "output",
        (3, 7, 7),
    ),
    "depthwise": (
        lambda **o: l0.L0DepthwiseConv2d(4, 3, padding=1, **o),
        lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "output",
        (4, 7, 7),
    ),
}


class MLP(nn.Module):
    """``SparseMLP`` of plain layers."""

    def __init__(self, input_dim=784, hidden_dim=256, output_dim=10):
        super().__init__()
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x):
        x = x.flatten(1)
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


@torch.no_grad()
def trained(model):
    """Their model with log-odds on both sides of every limit, and biases that are not zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("qz_logits"):
            spread = torch.linspace(-7, 5, parameter.numel())
            parameter.copy_(spread[torch.randperm(len(spread))].view_as(parameter))
        elif name.endswith("bias"):
            parameter.normal_()
    return model


def pair(case, temperature):
    theirs, ours, granularity, shape = LAYERS[case]
    old, new = trained(theirs(temperature=temperature)), ours()
    sparsify(new, GateSpec(granularity=granularity, temperature=temperature))
    new.load_state_dict(from_l0_python(old.state_dict(), new))
    return old.eval(), new.eval(), torch.randn(5, *shape)
