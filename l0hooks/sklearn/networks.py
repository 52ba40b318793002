"""Feature gates in front of a network, trained while the expected number of features falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from l0hooks.schedules import Schedule, exponential
from l0hooks.select.gates import FeatureGate
from l0hooks.sklearn.standardised import Floats

_FINAL_TEMPERATURE = 0.3
_WARM_UP_SHARE = 0.15  # of the steps, before the number of features begins to fall
_SURE_EVIDENCE = 3.0  # evidence (a p-value of 0.001) that gives a gate the whole prior
_WEIGHT_DECAY = 1e-4  # of the network

Loss = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How gates and network are trained.

    Parameters
    ----------
    steps : int, >= 1
    batch_size : int, >= 1
    lr, gate_lr : float, > 0
        Adam's learning rates for the network and for the log-odds of the gates.
    """

    steps: int
    batch_size: int
    lr: float
    gate_lr: float


class Networks(nn.Module):
    """Several small networks on the same input; they are trained together and share only the gates.

    Parameters
    ----------
    n_features, n_outputs : int
    n_networks : int
    hidden : (int, int)
        The units of each network's two hidden layers.

    Examples
    --------
    >>> Networks(5, 3, 4, (8, 6))(torch.zeros(2, 5)).shape  # (batch, networks, outputs)
    torch.Size([2, 4, 3])
    """

    def __init__(
        self, n_features: int, n_outputs: int, n_networks: int = 4, hidden: tuple[int, int] = (32, 16)
    ) -> None:
        super().__init__()
        self.n_networks = n_networks
        self.first = nn.Linear(n_features, n_networks * hidden[0])
        sizes = [(*hidden,), (hidden[1], n_outputs)]
        self.weights = nn.ParameterList(
            (2 * torch.rand(n_networks, rows, columns) - 1) / math.sqrt(rows) for rows, columns in sizes
        )
        self.biases = nn.ParameterList(torch.zeros(n_networks, 1, columns) for _, columns in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape (batch, networks, outputs)."""
        hidden = F.relu(self.first(x))
        hidden = rearrange(hidden, "batch (network unit) -> network batch unit", network=self.n_networks)
        hidden = F.relu(torch.baddbmm(self.biases[0], hidden, self.weights[0]))
        return torch.baddbmm(self.biases[1], hidden, self.weights[1]).transpose(0, 1)


def classification_loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy of class scores, shape (batch, classes) or (batch, networks, classes)."""
    scores = output.flatten(0, -2)
    return F.cross_entropy(scores, target.repeat_interleave(len(scores) // len(target)))


def regression_loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of outputs, shape (batch,), (batch, 1) or (batch, networks, 1)."""
    values = output.flatten(1)
    return F.mse_loss(values, target[:, None].expand_as(values))


def train_gates(
    network: nn.Module, draw: Draw, loss: Loss, k: int, evidence: Floats, training: Training, prior: float
) -> FeatureGate:
    """Train gates on the input of ``network`` together with the network, which changes **in place**.

    Every example has its own noise. The expected number of open gates is exactly on schedule at each step: half of the
    features at first, then it falls exponentially to k.

    Parameters
    ----------
    network : nn.Module
    draw : callable, Tensor of float64 in [0, 1), shape (batch_size,) -> (Tensor, Tensor)
        Inputs, shape (batch_size, n_features), and targets of random rows.
    loss : callable, (output, target) -> Tensor, shape ()
    k : int, 1 <= k < n_features
    evidence : ndarray of float64, shape (n_features,)
        The log-odds start higher by ``prior`` where it is 3 or more, and by a proportional part between 0 and 3.
    training : Training
    prior : float, >= 0

    Returns
    -------
    FeatureGate
        With exactly ``k`` of n features in its support; its ``chosen()`` raises if a gate is NaN.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> def draw(uniform):
    ...     x = torch.randn(len(uniform), 4)
    ...     return x, x[:, 2].abs()
    >>> how = Training(steps=200, batch_size=64, lr=0.01, gate_lr=0.05)
    >>> train_gates(Networks(4, 1), draw, regression_loss, 1, np.zeros(4), how, 2.0).chosen()
    tensor([False, False,  True, False])
    """
    n = len(evidence)
    start = max(0.5, (k + 1) / (n + 1))
    features = FeatureGate(
        n, k, steps=training.steps, schedule=_constant_then_falling, noise="example", init_keep_prob=start
    )
    features.rule.start_from([torch.tensor(prior * (evidence / _SURE_EVIDENCE).clip(0, 1), dtype=torch.float32)])
    features.gate.schedule = exponential(features.gate.temperature, _FINAL_TEMPERATURE, training.steps)
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        [
            {"params": weights, "lr": training.lr, "weight_decay": _WEIGHT_DECAY},
            {"params": features.parameters(), "lr": training.gate_lr},
        ]
    )
    network.train()
    for _ in range(training.steps):
        x, target = draw(torch.rand(training.batch_size, dtype=torch.float64))
        optimizer.zero_grad()
        loss(network(features(x)), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return features


def _constant_then_falling(start: float, stop: float, steps: int) -> Schedule:
    warm_up = int(_WARM_UP_SHARE * steps)
    falling = exponential(start, stop, max(1, steps - warm_up))
    return lambda step: falling(max(0, step - warm_up))


def order_of(features: FeatureGate) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The features in order of their log-odds, the largest first; chosen ones come before all others."""
    score = features.gate.log_alpha.detach().double() + 1e6 * features.chosen()
    return np.asarray(score.argsort(descending=True, stable=True).numpy())
