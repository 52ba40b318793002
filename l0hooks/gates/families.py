"""The kinds of gate behind one interface: hard concrete, straight-through, stochastic (STG), deterministic."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from l0hooks.errors import InvalidValueError, explain, near_names
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates import moments
from l0hooks.gates.constants import GAMMA, TEMPERATURE, ZETA, check_constants, check_open_unit

FamilyName = Literal["hard_concrete", "straight_through", "stg", "deterministic"]

DEFAULT_MEAN = 0.95  # a pretrained weight loses 5 % on average; a keep probability of 0.95 would cost it 30 %


class Family(Protocol):
    """What a gate needs of its distribution; every method is elementwise in ``log_alpha`` (float32, any shape)."""

    @property
    def default_temperature(self) -> float:
        """Scale of the noise when the user names none."""
        ...

    @property
    def limits(self) -> tuple[float, float]:
        """The range ``log_alpha`` is projected to after an optimiser step."""
        ...

    @property
    def least_open(self) -> float:
        """The least value of a gate that a budget keeps although its median is 0."""
        ...

    def sample(self, log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
        """Training gates for uniform ``noise``, of the shape that the two broadcast to."""
        ...

    def keep_prob(self, log_alpha: Tensor, temperature: float) -> Tensor:
        """P(z ≠ 0)."""
        ...

    def mean(self, log_alpha: Tensor, temperature: float) -> Tensor:
        """E[z]."""
        ...

    def median(self, log_alpha: Tensor, temperature: float) -> Tensor:
        """The gate at noise ½; positive exactly where ``keep_prob`` > ½."""
        ...

    def paper(self, log_alpha: Tensor, temperature: float) -> Tensor:
        """The test-time gate of the family's paper."""
        ...

    def start_mean(self, mean: float, temperature: float) -> float:
        """The ``log_alpha`` with E[z] = ``mean``."""
        ...

    def start_keep_prob(self, probability: float, temperature: float) -> float:
        """The ``log_alpha`` with P(z ≠ 0) = ``probability``."""
        ...


@dataclass(frozen=True)
class HardConcreteFamily:
    """The paper's gate (Louizos, Welling & Kingma, 2018)."""

    gamma: float = GAMMA
    zeta: float = ZETA
    default_temperature: float = TEMPERATURE
    limits: tuple[float, float] = (-10.0, 10.0)
    least_open: float = 0.5

    def sample(self, log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
        return hc.sample(log_alpha, noise, temperature, self.gamma, self.zeta)

    def keep_prob(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return hc.keep_prob(log_alpha, temperature, self.gamma, self.zeta)

    def mean(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return moments.mean(log_alpha, temperature, self.gamma, self.zeta)

    def median(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return hc.median(log_alpha, temperature, self.gamma, self.zeta)

    def paper(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return hc.paper_estimate(log_alpha, self.gamma, self.zeta)

    def start_mean(self, mean: float, temperature: float) -> float:
        return moments.log_alpha_from_mean(mean, temperature, self.gamma, self.zeta)

    def start_keep_prob(self, probability: float, temperature: float) -> float:
        return hc.log_alpha_from_keep_prob(probability, temperature, self.gamma, self.zeta)


@dataclass(frozen=True)
class StraightThroughFamily(HardConcreteFamily):
    """Binary gates 1[z > 0] of the hard concrete; the gradient is that of the stretched, unclamped variable."""

    least_open: float = 1.0

    def sample(self, log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
        soft = torch.sigmoid((torch.logit(noise) + log_alpha) / temperature)
        stretched = self.gamma + (self.zeta - self.gamma) * soft
        return (stretched > 0).to(stretched.dtype) + (stretched - stretched.detach())

    def mean(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return self.keep_prob(log_alpha, temperature)

    def median(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return (super().median(log_alpha, temperature) > 0).to(log_alpha.dtype)

    def paper(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return (super().paper(log_alpha, temperature) > 0).to(log_alpha.dtype)

    def start_mean(self, mean: float, temperature: float) -> float:
        check_open_unit("init_mean", mean)
        return self.start_keep_prob(mean, temperature)


@dataclass(frozen=True)
class DeterministicFamily(HardConcreteFamily):
    """No noise: z is the hard concrete's median; ``keep_prob`` stays its smooth surrogate for penalties."""

    def sample(self, log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
        values: Tensor
        values, _ = torch.broadcast_tensors(self.median(log_alpha, temperature), noise)  # type: ignore[no-untyped-call]
        return values

    def mean(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return self.median(log_alpha, temperature)

    def start_mean(self, mean: float, temperature: float) -> float:
        check_open_unit("init_mean", mean)
        s = (mean - self.gamma) / (self.zeta - self.gamma)
        return temperature * math.log(s / (1 - s))


@dataclass(frozen=True)
class GaussianFamily:
    """STG: z = clamp(μ + σε, 0, 1) with μ stored as ``log_alpha`` and σ as the temperature (Yamada et al., 2020)."""

    default_temperature: float = 0.5
    limits: tuple[float, float] = (-1.5, 2.5)
    least_open: float = 0.5

    def sample(self, log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
        return (log_alpha + temperature * math.sqrt(2) * torch.erfinv(2 * noise - 1)).clamp(0, 1)

    def keep_prob(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return _normal_cdf(log_alpha / temperature)

    def mean(self, log_alpha: Tensor, temperature: float) -> Tensor:
        low, high = -log_alpha / temperature, (1 - log_alpha) / temperature
        inside = _normal_cdf(high) - _normal_cdf(low)
        spread = temperature * (_normal_density(low) - _normal_density(high))
        return (log_alpha * inside + spread + _normal_cdf(-high)).clamp(0, 1)

    def median(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return log_alpha.clamp(0, 1)

    def paper(self, log_alpha: Tensor, temperature: float) -> Tensor:
        return log_alpha.clamp(0, 1)

    def start_mean(self, mean: float, temperature: float) -> float:
        check_open_unit("init_mean", mean)
        low, high = -40 * temperature, 1 + 40 * temperature
        for _ in range(80):
            middle = (low + high) / 2
            below = float(self.mean(torch.tensor(middle, dtype=torch.float64, device="cpu"), temperature)) < mean
            low, high = (middle, high) if below else (low, middle)
        return (low + high) / 2

    def start_keep_prob(self, probability: float, temperature: float) -> float:
        check_open_unit("init_keep_prob", probability)
        return temperature * statistics.NormalDist().inv_cdf(probability)


def _normal_cdf(x: Tensor) -> Tensor:
    probability: Tensor = torch.special.ndtr(x)
    return probability


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def make_family(name: str, gamma: float = GAMMA, zeta: float = ZETA) -> Family:
    """The family called ``name``.

    Raises
    ------
    InvalidValueError
        If there is no such family, or the stretch interval does not contain [0, 1] strictly.
    """
    check_constants("gate", 1.0, gamma, zeta)
    if name == "hard_concrete":
        return HardConcreteFamily(gamma, zeta)
    if name == "straight_through":
        return StraightThroughFamily(gamma, zeta)
    if name == "deterministic":
        return DeterministicFamily(gamma, zeta)
    if name == "stg":
        return GaussianFamily()
    raise InvalidValueError(
        explain("family", "the name must be known.", got=repr(name), hint=near_names(str(name), get_args(FamilyName)))
    )


def initial_log_alpha(
    family: Family, init_mean: float | None, init_keep_prob: float | None, temperature: float
) -> float:
    """The location that the user's start asks for.

    Raises
    ------
    InvalidValueError
        If both are given, or one is outside (0, 1).
    """
    if init_mean is not None and init_keep_prob is not None:
        raise InvalidValueError(
            explain(
                "gate start",
                "a mean and a keep probability cannot be given together.",
                expected="init_mean or init_keep_prob",
                got=f"init_mean={init_mean}, init_keep_prob={init_keep_prob}",
            )
        )
    if init_keep_prob is not None:
        return family.start_keep_prob(init_keep_prob, temperature)
    return family.start_mean(DEFAULT_MEAN if init_mean is None else init_mean, temperature)
