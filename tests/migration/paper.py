"""The paper's equations and AMLab's use of them in plain NumPy, float64; nothing here knows l0hooks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3


def logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def gate_at(u: Any, log_alpha: Any, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA) -> Any:
    """Equations 10 and 11: the gate that uniform noise u makes."""
    s = logistic((np.log(u) - np.log1p(-np.asarray(u)) + log_alpha) / beta)
    return np.clip(s * (zeta - gamma) + gamma, 0, 1)


def keep_prob(log_alpha: Any, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA) -> Any:
    """1 − u₀, u₀ the noise below which the gate is 0; by bisection of ``gate_at``, not by equation 12."""
    log_alpha = np.asarray(log_alpha, np.float64)
    low, high = np.zeros_like(log_alpha), np.ones_like(log_alpha)
    for _ in range(60):
        middle = (low + high) / 2
        closed = gate_at(middle, log_alpha, beta, gamma, zeta) == 0
        low, high = np.where(closed, middle, low), np.where(closed, high, middle)
    return 1 - low


def mean(log_alpha: Any, beta: float = BETA) -> Any:
    """E[z] over a fine grid of noise."""
    u = (np.arange(200_000) + 0.5) / 200_000
    return np.array([gate_at(u, one, beta).mean() for one in np.ravel(log_alpha)]).reshape(np.shape(log_alpha))


def at_test_time(log_alpha: Any) -> Any:
    """Equation 13, which does not know β."""
    return np.clip(logistic(log_alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


def expected(cost: Any, keep: Any) -> float:
    """E of ``cost(open)`` over independent gates, by all 2ⁿ states."""
    total = 0.0
    for state in itertools.product([0, 1], repeat=len(keep)):
        chances = np.where(state, keep, 1 - np.asarray(keep))
        total += float(np.prod(chances)) * cost(np.array(state))
    return total


def dense(x: Any, weights: Any, bias: Any, log_alpha: Any) -> Any:
    """``L0Dense`` in evaluation: gates on the inputs, ``weights`` input by output."""
    return (x * at_test_time(log_alpha)) @ weights + bias


def convolution(x: Any, weights: Any, bias: Any) -> Any:
    """Stride 1, no padding, by the sum it is."""
    rows, columns = weights.shape[2:]
    height, width = x.shape[2] - rows + 1, x.shape[3] - columns + 1
    y = np.zeros((len(x), len(weights), height, width))
    for i, j in itertools.product(range(rows), range(columns)):
        y += np.einsum("nchw,oc->nohw", x[:, :, i : i + height, j : j + width], weights[:, :, i, j])
    return y + np.asarray(bias)[:, None, None]


def gated_convolution(x: Any, weights: Any, bias: Any, log_alpha: Any) -> Any:
    """``L0Conv2d`` in evaluation: gates on the feature maps, after the bias."""
    return convolution(x, weights, bias) * at_test_time(log_alpha)[:, None, None]
