"""The Hard Concrete distribution as a ``torch.distributions.Distribution``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all

from l0hooks.gates import hard_concrete as hc
from l0hooks.gates import moments
from l0hooks.gates.constants import GAMMA, HALF_DTYPES, TEMPERATURE, ZETA, check_constants

_SCALAR = torch.Size()


class HardConcrete(Distribution):
    r"""The Hard Concrete distribution on [0, 1], with atoms at both ends.

    Parameters
    ----------
    log_alpha : Tensor of any shape and floating dtype, or float
        Location, in log-odds; its broadcast with ``temperature`` is the batch shape.
    temperature : Tensor of a shape that broadcasts, or float, > 0
        β.
    gamma, zeta : float, gamma < 0, zeta > 1
        Stretch interval.
    validate_args : bool, optional
        As in :class:`torch.distributions.Distribution`.

    Raises
    ------
    InvalidValueError
        If the constants do not straddle [0, 1].
    ValueError
        If ``validate_args`` finds parameters outside their range.

    Examples
    --------
    >>> gates = HardConcrete(torch.zeros(3), temperature=2 / 3)
    >>> gates.batch_shape, gates.mean
    (torch.Size([3]), tensor([0.5000, 0.5000, 0.5000]))
    >>> gates.rsample((2,)).shape
    torch.Size([2, 3])

    References
    ----------
    Louizos, Welling & Kingma (2018), section 2.2.
    """

    # Distribution declares these as properties or instance variables, torch's own subclasses as class attributes
    arg_constraints = {"log_alpha": constraints.real, "temperature": constraints.positive}  # noqa: RUF012
    support = constraints.unit_interval
    has_rsample = True

    def __init__(
        self,
        log_alpha: Tensor | float,
        temperature: Tensor | float = TEMPERATURE,
        gamma: float = GAMMA,
        zeta: float = ZETA,
        validate_args: bool | None = None,
    ) -> None:
        check_constants("HardConcrete", 1.0, gamma, zeta)
        self.log_alpha, self.temperature = broadcast_all(log_alpha, temperature)
        self.gamma, self.zeta = gamma, zeta
        super().__init__(self.log_alpha.shape, validate_args=validate_args)

    @property
    def _settings(self) -> tuple[Tensor, Tensor, float, float]:
        return self.log_alpha, self.temperature, self.gamma, self.zeta

    def expand(self, batch_shape: Any, _instance: Any = None) -> HardConcrete:
        """The same distribution with its parameters expanded to ``batch_shape``, without a copy."""
        new: HardConcrete = self._get_checked_instance(HardConcrete, _instance)  # type: ignore[no-untyped-call]
        shape = torch.Size(batch_shape)
        new.log_alpha, new.temperature = self.log_alpha.expand(shape), self.temperature.expand(shape)
        new.gamma, new.zeta = self.gamma, self.zeta
        super(HardConcrete, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """E[z]."""
        return moments.mean(*self._settings)

    @property
    def variance(self) -> Tensor:
        """Var[z]."""
        return moments.variance(*self._settings)

    @property
    def median(self) -> Tensor:
        """The gate at u = ½."""
        return hc.median(*self._settings)

    @property
    def keep_prob(self) -> Tensor:
        """P(z ≠ 0)."""
        return hc.keep_prob(*self._settings)

    @property
    def prob_one(self) -> Tensor:
        """P(z = 1)."""
        return hc.prob_one(*self._settings)

    def rsample(self, sample_shape: Any = _SCALAR) -> Tensor:
        """Gates of shape ``sample_shape + batch_shape``, differentiable in the parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        wide = torch.float32 if self.log_alpha.dtype in HALF_DTYPES else self.log_alpha.dtype
        noise = torch.rand(shape, dtype=wide, device=self.log_alpha.device)
        return hc.sample(self.log_alpha.expand(shape), noise, *self._settings[1:])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of an atom, log-density elsewhere."""
        if self._validate_args:
            self._validate_sample(value)
        value, log_alpha = torch.broadcast_tensors(value, self.log_alpha)  # type: ignore[no-untyped-call]
        return hc.log_prob(value, log_alpha, *self._settings[1:])

    def cdf(self, value: Tensor) -> Tensor:
        """P(z ≤ value)."""
        if self._validate_args:
            self._validate_sample(value)
        return hc.cdf(value, *self._settings)

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at probability ``value``."""
        return hc.icdf(value, *self._settings)

    def entropy(self) -> Tensor:
        """Entropy in nats of the mixed distribution."""
        return moments.entropy(*self._settings)
