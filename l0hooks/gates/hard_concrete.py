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

import torch
import torch.nn.functional as F
from torch import Tensor

from l0hooks.gates.constants import GAMMA, HALF_DTYPES, TEMPERATURE, ZETA, check_open_unit

P = ParamSpec("P")


def _wide(value: object) -> Any:
    """Half-precision tensors in float32, everything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF_DTYPES else value


def full_precision(fn: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """A function that computes half-precision tensors in float32 and returns the dtype of its first argument.

    Parameters
    ----------
    fn : function of a Tensor of any floating dtype and shape, and of further arguments

    Returns
    -------
    function

    Examples
    --------
    >>> full_precision(torch.sigmoid)(torch.zeros(1, dtype=torch.float16)).dtype
    torch.float16
    """

    @functools.wraps(fn)
    def wrapper(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        call: Callable[..., Tensor] = fn
        result = call(_wide(first), *map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return result.to(first.dtype) if first.dtype in HALF_DTYPES else result

    return wrapper


def logit_bounds(gamma: float, zeta: float) -> tuple[float, float]:
    """The logits of s(0) and s(1), where s(x) = (x − γ)/(ζ − γ).

    Examples
    --------
    >>> [round(bound, 4) for bound in logit_bounds(GAMMA, ZETA)]
    [-2.3979, 2.3979]
    """
    return math.log(-gamma / zeta), math.log((1 - gamma) / (zeta - 1))


@full_precision
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


@full_precision
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


@full_precision
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


@full_precision
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
    return torch.sigmoid(log_alpha - temperature * logit_bounds(gamma, zeta)[0])


def closing_point(temperature: float = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA) -> float:
    r"""The log-odds \(\beta\ln(-\gamma/\zeta)\) at which a gate is closed half of the time.

    Examples
    --------
    >>> round(closing_point(), 4)
    -1.5986
    """
    return temperature * logit_bounds(gamma, zeta)[0]


@full_precision
def prob_one(
    log_alpha: Tensor, temperature: float | Tensor = TEMPERATURE, gamma: float = GAMMA, zeta: float = ZETA
) -> Tensor:
    r"""P(z = 1) \(= \sigma(\log\alpha - \beta\ln((1-\gamma)/(\zeta-1)))\).

    Examples
    --------
    >>> prob_one(torch.tensor(0.0))
    tensor(0.1682)
    """
    return torch.sigmoid(log_alpha - temperature * logit_bounds(gamma, zeta)[1])


@full_precision
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


@full_precision
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


@full_precision
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
    low, high = logit_bounds(gamma, zeta)
    t = (value.clamp(0, 1) - gamma) / (zeta - gamma)
    v = temperature * torch.logit(t) - log_alpha
    log_temperature = torch.log(torch.as_tensor(temperature, dtype=value.dtype, device=value.device))
    jacobian = log_temperature - math.log(zeta - gamma) - torch.log(t) - torch.log1p(-t)
    inside = jacobian + F.logsigmoid(v) + F.logsigmoid(-v)
    at_zero = F.logsigmoid(temperature * low - log_alpha)
    at_one = F.logsigmoid(log_alpha - temperature * high)
    result = torch.where(value <= 0, at_zero, torch.where(value >= 1, at_one, inside))
    return torch.where((value < 0) | (value > 1), -math.inf, result)


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
    return math.log(probability / (1 - probability)) + temperature * logit_bounds(gamma, zeta)[0]
