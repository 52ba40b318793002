"""Feature gates in front of a network, trained with the expected number of features on a falling schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l0hooks.schedules import Schedule, exponential
from l0hooks.select.gates import FeatureGate
from l0hooks.sklearn.standardised import Floats

_COOL = 0.3  # the temperature at the end
_SETTLE = 0.15  # of the steps, before features begin to go

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
        Adam's, for the network and for the log-odds of the gates.
    """

    steps: int
    batch_size: int
    lr: float
    gate_lr: float


class Networks(nn.Module):
    """Several small networks side by side on the same input, trained together, that share nothing but the gates.

    Parameters
    ----------
    n_features, n_outputs : int
    n_networks : int
    hidden : (int, int)
        Units of the two hidden layers of each.

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
        hidden = F.relu(self.first(x)).view(len(x), self.n_networks, -1).transpose(0, 1)
        hidden = F.relu(torch.baddbmm(self.biases[0], hidden, self.weights[0]))
        return torch.baddbmm(self.biases[1], hidden, self.weights[1]).transpose(0, 1)


def classification_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of class scores (batch, ..., classes), the mean over batch and networks."""
    scores = output.flatten(0, -2)
    return F.cross_entropy(scores, target.repeat_interleave(len(scores) // len(target)))


def regression_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of outputs with one value for each row and network."""
    values = output.flatten(1)
    return F.mse_loss(values, target[:, None].expand_as(values))


def train_gates(
    network: nn.Module, draw: Draw, loss: Loss, k: int, evidence: Floats, training: Training, prior: float
) -> FeatureGate:
    """Gates on the input of ``network`` with exactly ``k`` in their support; both are trained **in place**.

    Every example has noise of its own. The expected number of open gates is exactly what the schedule says at each
    step: half of the features at first, then falling exponentially to k.

    Parameters
    ----------
    network : nn.Module
    draw : callable, Tensor of float64 in [0, 1), shape (batch_size,) -> (Tensor, Tensor)
        Inputs, shape (batch_size, n_features), and targets of random rows.
    loss : callable, (output, target) -> Tensor, shape ()
    k : int, 1 <= k < n_features
    evidence : ndarray of float64, shape (n_features,)
        Log-odds at the start are raised by ``prior`` where it is 3 or more, by a share of that from 0 on.
    training : Training
    prior : float, >= 0

    Returns
    -------
    FeatureGate
        Of n features; its ``chosen()`` refuses gates that are not numbers.

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
        n, k, steps=training.steps, schedule=_settled_then_falling, noise="example", init_keep_prob=start
    )
    features.rule.start_from([torch.tensor(prior * (evidence / 3).clip(0, 1), dtype=torch.float32)])
    features.gate.schedule = exponential(features.gate.temperature, _COOL, training.steps)
    weights = {"params": [p for p in network.parameters() if p.requires_grad], "lr": training.lr, "weight_decay": 1e-4}
    optimizer = torch.optim.Adam([weights, {"params": features.parameters(), "lr": training.gate_lr}])
    network.train()
    for _ in range(training.steps):
        x, target = draw(torch.rand(training.batch_size, dtype=torch.float64))
        optimizer.zero_grad()
        loss(network(features(x)), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return features


def _settled_then_falling(start: float, stop: float, steps: int) -> Schedule:
    settle = int(_SETTLE * steps)
    falling = exponential(start, stop, max(1, steps - settle))
    return lambda step: falling(max(0, step - settle))


def order_of(features: FeatureGate) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Features from the surest to the least sure: those that are chosen first."""
    score = features.gate.log_alpha.detach().double() + 1e6 * features.chosen()
    return np.asarray(score.argsort(descending=True, stable=True).numpy())
