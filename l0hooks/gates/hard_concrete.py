r"""Hard Concrete mathematics as pure tensor functions: the one place where the gate formula stands.

A Hard Concrete gate is a logistic variable, squashed, stretched to \((\gamma, \zeta)\) and clamped to
[0, 1] (Louizos, Welling & Kingma, 2018, arXiv:1712.01312):

\[ z = \min(1, \max(0, \gamma + (\zeta - \gamma)\,
          \sigma((\operatorname{logit} u + \log\alpha) / \beta))) \]

Every function takes ``log_alpha`` (any floating dtype, any shape, log-odds), ``temperature`` β > 0 (a float, or a
tensor that broadcasts) and the stretch interval ``gamma`` < 0 < 1 < ``zeta``, and returns a tensor of the dtype of its
first argument and of the shape that its arguments broadcast to. All are elementwise, differentiable and free of side
effects; float16 and bfloat16 are computed in float32 and returned in their own dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l0hooks.errors import InvalidValueError, explain

TEMPERATURE, GAMMA, ZETA = 2 / 3, -0.1, 1.1
HALF_DTYPES = (torch.float16, torch.bfloat16)
_NODES = 32  # errors at the default stretch: 7e-16 for β ≤ 2, 1e-12 at 3, 4e-8 at 5; a narrower stretch costs some

P = ParamSpec("P")


def check_constants(where: str, temperature: float, gamma: float, zeta: float) -> None:
    """Refuse constants for which the stretched variable does not straddle [0, 1].

    Parameters
    ----------
    where : str
        What the message begins with.
    temperature, gamma, zeta : float

    Raises
    ------
    InvalidValueError
        Unless ``temperature`` is positive and finite, ``gamma`` < 0 and ``zeta`` > 1.

    Examples
    --------
    >>> check_constants("gate", 0.5, GAMMA, ZETA)
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidValueError(explain(where, "temperature must be positive.", expected="> 0", got=temperature))
    if not (math.isfinite(gamma) and math.isfinite(zeta) and gamma < 0 and zeta > 1):
        raise InvalidValueError(
            explain(
                where,
                "the stretch interval must contain [0, 1] strictly.",
                expected="gamma < 0 and zeta > 1",
                got=f"gamma={gamma}, zeta={zeta}",
                hint="the paper's gamma=-0.1, zeta=1.1",
            )
        )


def check_open_unit(where: str, value: float) -> None:
    """Refuse a start that would need infinite log-odds.

    Parameters
    ----------
    where : str
        Name of the argument.
    value : float

    Raises
    ------
    InvalidValueError
        Unless 0 < ``value`` < 1.

    Examples
    --------
    >>> check_open_unit("init_mean", 0.95)
    """
    if not 0 < value < 1:
        raise InvalidValueError(
            explain(
                where,
                "the start must lie strictly between 0 and 1: the ends need infinite log-odds.",
                expected=f"0 < {where} < 1",
                got=value,
                hint="0.999 for gates that start open",
            )
        )


def _wide(value: object) -> Any:
    """Half-precision tensors in float32, everything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF_DTYPES else value


def _full_precision(fn: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Compute half-precision tensors in float32 and return the first argument's dtype."""

    @functools.wraps(fn)
    def wrapper(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        call: Callable[..., Tensor] = fn
        result = call(_wide(first), *map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return result.to(first.dtype) if first.dtype in HALF_DTYPES else result

    return wrapper


def _logit_bounds(gamma: float, zeta: float) -> tuple[float, float]:
    """The logits of s(0) and s(1), where s(x) = (x − γ)/(ζ − γ)."""
    return math.log(-gamma / zeta), math.log((1 - gamma) / (zeta - 1))


@functools.lru_cache(maxsize=32)
def _quadrature(gamma: float, zeta: float) -> tuple[tuple[float, float, float], ...]:
    """Gauss–Legendre nodes (logit s, x, weight of dx) over x in [0, 1], placed in y = logit s.

    In y the integrands are analytic within |Im y| < π/max(1, β), in x a narrow stretch
    brings the logarithm's singularity close to the interval.
    """
    low, high = _logit_bounds(gamma, zeta)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    y = (high - low) / 2 * nodes + (high + low) / 2
    s = 1 / (1 + np.exp(-y))
    x = gamma + (zeta - gamma) * s
    dx = (high - low) / 2 * weights * (zeta - gamma) * s * (1 - s)
    return tuple(zip(y.tolist(), x.tolist(), dx.tolist(), strict=True))


@_full_precision
def sample(
    log_alpha: Tensor,
    noise: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Tensor:
    r"""Gates for given uniform noise: the inverse cdf at ``noise``.

    \[ z = \min(1, \max(0, \gamma + (\zeta-\gamma)\,\sigma((\operatorname{logit} u+\log\alpha)/\beta))) \]

    Parameters
    ----------
    log_alpha : Tensor, any floating dtype and shape
        Location, in log-odds.
    noise : Tensor, broadcastable with ``log_alpha``, in [0, 1]
        Uniform random numbers u; the ends 0 and 1 give the gates 0 and 1.
    temperature : float, or Tensor that broadcasts with ``log_alpha``, > 0
        β.
    gamma, zeta : float, gamma < 0, zeta > 1
        Stretch interval.

    Returns
    -------
    Tensor, dtype of ``log_alpha``, in [0, 1]

    Examples
    --------
    >>> sample(torch.tensor([-9.0, 0.0, 9.0]), torch.tensor(0.5))
    tensor([0.0000, 0.5000, 1.0000])

    References
    ----------
    Louizos, Welling & Kingma (2018), equations 10 to 12.
    """
    # finite, or noise of exactly 0 or 1 gives a learned temperature the gradient 0 * inf
    s = torch.sigmoid((torch.logit(noise).clamp(-1e9, 1e9) + log_alpha) / temperature)
    return (gamma + (zeta - gamma) * s).clamp(0, 1)


@_full_precision
def cdf(
    value: Tensor,
    log_alpha: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Tensor:
    r"""P(z ≤ value): \(\sigma(\beta\operatorname{logit} s(x) - \log\alpha)\) on [0, 1), 0 below and 1 from 1 on.

    Parameters
    ----------
    value : Tensor, broadcastable with ``log_alpha``
        x.

    Examples
    --------
    >>> cdf(torch.tensor([-0.1, 0.0, 0.5, 1.0]), torch.tensor(0.0))
    tensor([0.0000, 0.1682, 0.5000, 1.0000])

    References
    ----------
    Louizos, Welling & Kingma (2018), appendix A.
    """
    s = (value.clamp(0, 1) - gamma) / (zeta - gamma)
    inside = torch.sigmoid(temperature * torch.logit(s) - log_alpha)
    return torch.where(value < 0, 0.0, torch.where(value >= 1, 1.0, inside))


@_full_precision
def icdf(
    probability: Tensor,
    log_alpha: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Tensor:
    """The quantile function; 0 and 1 are reached on whole intervals, because the gate has atoms there.

    Parameters
    ----------
    probability : Tensor, broadcastable with ``log_alpha``, in [0, 1]

    Examples
    --------
    >>> icdf(torch.tensor([0.1, 0.5, 0.9]), torch.tensor(0.0))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return sample(log_alpha, probability, temperature, gamma, zeta)


@_full_precision
def keep_prob(
    log_alpha: Tensor, temperature: float | Tensor = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> Tensor:
    r"""P(z ≠ 0) \(= \sigma(\log\alpha - \beta\ln(-\gamma/\zeta))\), the gate's share of the expected L0 norm.

    Examples
    --------
    >>> keep_prob(torch.tensor(0.0))
    tensor(0.8318)

    References
    ----------
    Louizos, Welling & Kingma (2018), equation 12.
    """
    return torch.sigmoid(log_alpha - temperature * _logit_bounds(gamma, zeta)[0])


def closing_point(temperature: float = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA) -> float:
    r"""The log-odds \(\beta\ln(-\gamma/\zeta)\) at which a gate is closed half of the time.

    Examples
    --------
    >>> round(closing_point(), 4)
    -1.5986
    """
    return temperature * _logit_bounds(gamma, zeta)[0]


@_full_precision
def prob_one(
    log_alpha: Tensor, temperature: float | Tensor = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> Tensor:
    r"""P(z = 1) \(= \sigma(\log\alpha - \beta\ln((1-\gamma)/(\zeta-1)))\).

    Examples
    --------
    >>> prob_one(torch.tensor(0.0))
    tensor(0.1682)
    """
    return torch.sigmoid(log_alpha - temperature * _logit_bounds(gamma, zeta)[1])


@_full_precision
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


@_full_precision
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


@_full_precision
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


@_full_precision
def median(
    log_alpha: Tensor, temperature: float | Tensor = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> Tensor:
    r"""The median gate, stretched \(\sigma(\log\alpha/\beta)\): 0 if and only if ``keep_prob`` ≤ ½.

    Examples
    --------
    >>> median(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (gamma + (zeta - gamma) * torch.sigmoid(log_alpha / temperature)).clamp(0, 1)


@_full_precision
def paper_estimate(log_alpha: Tensor, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    r"""The paper's test-time gate, stretched \(\sigma(\log\alpha)\) without the temperature.

    Examples
    --------
    >>> paper_estimate(torch.tensor([-3.0, 0.0, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])

    References
    ----------
    Louizos, Welling & Kingma (2018), equation 13.
    """
    return (gamma + (zeta - gamma) * torch.sigmoid(log_alpha)).clamp(0, 1)


@_full_precision
def log_prob(
    value: Tensor,
    log_alpha: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Tensor:
    r"""Log-probability of the atoms at 0 and 1, log-density in between, −∞ outside [0, 1].

    With t = s(x) and v = β·logit t − logα, the density inside is
    \(\log\beta - \log(\zeta-\gamma) - \log t - \log(1-t) + \log\sigma(v) + \log\sigma(-v)\).

    Parameters
    ----------
    value : Tensor, broadcastable with ``log_alpha``
        z.

    Examples
    --------
    >>> log_prob(torch.tensor([0.0, 0.5, 1.0]), torch.tensor(0.0)).exp()
    tensor([0.1682, 0.5556, 0.1682])
    """
    low, high = _logit_bounds(gamma, zeta)
    t = (value.clamp(0, 1) - gamma) / (zeta - gamma)
    v = temperature * torch.logit(t) - log_alpha
    log_temperature = torch.log(torch.as_tensor(temperature, dtype=value.dtype, device=value.device))
    jacobian = log_temperature - math.log(zeta - gamma) - torch.log(t) - torch.log1p(-t)
    inside = jacobian + F.logsigmoid(v) + F.logsigmoid(-v)
    at_zero = F.logsigmoid(temperature * low - log_alpha)
    at_one = F.logsigmoid(log_alpha - temperature * high)
    result = torch.where(value <= 0, at_zero, torch.where(value >= 1, at_one, inside))
    return torch.where((value < 0) | (value > 1), -math.inf, result)


@_full_precision
def entropy(
    log_alpha: Tensor, temperature: float | Tensor = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> Tensor:
    r"""Entropy \(-\sum_{a\in\{0,1\}} P_a\ln P_a - \int_0^1 f\ln f\,dx\), in nats, of the mixed distribution.

    Examples
    --------
    >>> entropy(torch.tensor(0.0))
    tensor(0.8618)
    """
    low, high = _logit_bounds(gamma, zeta)
    at_zero, at_one = temperature * low - log_alpha, log_alpha - temperature * high
    total = -torch.sigmoid(at_zero) * F.logsigmoid(at_zero) - torch.sigmoid(at_one) * F.logsigmoid(at_one)
    for _, x, dx in _quadrature(gamma, zeta):
        log_density = log_prob(torch.full_like(total, x), log_alpha, temperature, gamma, zeta)
        total = total - dx * log_density.exp() * log_density
    return total


def log_alpha_from_keep_prob(
    probability: float, temperature: float = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> float:
    r"""The location with P(z ≠ 0) = ``probability``: \(\operatorname{logit} p + \beta\ln(-\gamma/\zeta)\).

    Parameters
    ----------
    probability : float in (0, 1)

    Returns
    -------
    float

    Raises
    ------
    InvalidValueError
        Unless 0 < ``probability`` < 1: the ends would need infinite log-odds.

    Examples
    --------
    >>> keep_prob(torch.tensor(log_alpha_from_keep_prob(0.5)))
    tensor(0.5000)
    """
    check_open_unit("init_keep_prob", probability)
    return math.log(probability / (1 - probability)) + temperature * _logit_bounds(gamma, zeta)[0]


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
    bounds = _logit_bounds(gamma, zeta)
    slack = 40.0 + temperature * max(map(abs, bounds))
    low, high = -slack, slack
    for _ in range(80):
        middle = (low + high) / 2
        below = float(mean(torch.tensor(middle, dtype=torch.float64, device="cpu"), temperature, gamma, zeta)) < value
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2
