r"""Moments of a Hard Concrete gate, and its entropy, by Gauss–Legendre quadrature.

Arguments and results are those of :mod:`l0hooks.gates.hard_concrete`.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l0hooks.gates.constants import GAMMA, TEMPERATURE, ZETA, check_open_unit
from l0hooks.gates.hard_concrete import full_precision, log_prob, logit_bounds

_NODES = 32  # errors at the default stretch: 7e-16 for β ≤ 2, 1e-12 at 3, 4e-8 at 5; a narrower stretch costs some


@functools.lru_cache(maxsize=32)
def _quadrature(gamma: float, zeta: float) -> tuple[tuple[float, float, float], ...]:
    """Gauss–Legendre nodes (logit s, x, weight of dx) over x in [0, 1], placed in y = logit s.

    In y the integrands are analytic within |Im y| < π/max(1, β), in x a narrow stretch
    brings the logarithm's singularity close to the interval.
    """
    low, high = logit_bounds(gamma, zeta)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    y = (high - low) / 2 * nodes + (high + low) / 2
    s = 1 / (1 + np.exp(-y))
    x = gamma + (zeta - gamma) * s
    dx = (high - low) / 2 * weights * (zeta - gamma) * s * (1 - s)
    return tuple(zip(y.tolist(), x.tolist(), dx.tolist(), strict=True))


@full_precision
def mean(
    log_alpha: Tensor, temperature: float | Tensor = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> Tensor:
    r"""E[z] \(= \int_0^1 (1 - F(x))\,dx\) by Gauss–Legendre quadrature, exact to rounding for β ≤ 2 at γ = −0.1.

    Examples
    --------
    >>> mean(torch.tensor([-3.0, 0.0, 3.0]))
    tensor([0.0604, 0.5000, 0.9396])
    """
    total = torch.zeros_like(log_alpha)
    for y, _, dx in _quadrature(gamma, zeta):
        total = total + dx * torch.sigmoid(log_alpha - temperature * y)
    return total


@full_precision
def second_moment(
    log_alpha: Tensor, temperature: float | Tensor = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> Tensor:
    r"""E[z²] \(= \int_0^1 2x(1 - F(x))\,dx\) by the same quadrature.

    Examples
    --------
    >>> second_moment(torch.tensor(0.0))
    tensor(0.3980)
    """
    total = torch.zeros_like(log_alpha)
    for y, x, dx in _quadrature(gamma, zeta):
        total = total + 2 * x * dx * torch.sigmoid(log_alpha - temperature * y)
    return total


@full_precision
def variance(
    log_alpha: Tensor, temperature: float | Tensor = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> Tensor:
    """Var[z] = E[z²] − E[z]².

    Examples
    --------
    >>> variance(torch.tensor(0.0))
    tensor(0.1480)
    """
    # of 1 − z where z is mostly 1: a difference of two small numbers, never negative by rounding
    mirrored = (log_alpha > 0).to(log_alpha.dtype)
    first, second = torch.zeros_like(log_alpha), torch.zeros_like(log_alpha)
    for y, x, dx in _quadrature(gamma, zeta):
        tail = dx * torch.sigmoid((1 - 2 * mirrored) * (log_alpha - temperature * y))
        first, second = first + tail, second + 2 * (x + (1 - 2 * x) * mirrored) * tail
    return second - first.square()


@full_precision
def entropy(
    log_alpha: Tensor, temperature: float | Tensor = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> Tensor:
    r"""Entropy \(-\sum_{a\in\{0,1\}} P_a\ln P_a - \int_0^1 f\ln f\,dx\), in nats, of the mixed distribution.

    Examples
    --------
    >>> entropy(torch.tensor(0.0))
    tensor(0.8618)
    """
    low, high = logit_bounds(gamma, zeta)
    at_zero, at_one = temperature * low - log_alpha, log_alpha - temperature * high
    total = -torch.sigmoid(at_zero) * F.logsigmoid(at_zero) - torch.sigmoid(at_one) * F.logsigmoid(at_one)
    for _, x, dx in _quadrature(gamma, zeta):
        log_density = log_prob(torch.full_like(total, x), log_alpha, temperature, gamma, zeta)
        total = total - dx * log_density.exp() * log_density
    return total


@functools.lru_cache(maxsize=64)  # the bisection takes some 15 ms
def log_alpha_from_mean(
    value: float, temperature: float = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> float:
    """The location with E[z] = ``value``, by bisection of :func:`mean` in float64.

    Parameters
    ----------
    value : float in (0, 1)

    Returns
    -------
    float

    Raises
    ------
    InvalidValueError
        Unless 0 < ``value`` < 1.

    Examples
    --------
    >>> round(float(mean(torch.tensor(log_alpha_from_mean(0.9)))), 4)
    0.9
    """
    check_open_unit("init_mean", value)
    bounds = logit_bounds(gamma, zeta)
    slack = 40.0 + temperature * max(map(abs, bounds))
    low, high = -slack, slack
    for _ in range(80):
        middle = (low + high) / 2
        below = float(mean(torch.tensor(middle, dtype=torch.float64, device="cpu"), temperature, gamma, zeta)) < value
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2
