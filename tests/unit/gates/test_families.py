"""Every family of gates behind the one interface."""

from __future__ import annotations

import re
from typing import Any, get_args

import numpy as np
import pytest
import torch
from family_laws import BinaryFamilyLaws, NoisyFamilyLaws, SoftFamilyLaws, slope
from scipy.special import expit, ndtr
from torch import Tensor

from l0hooks.errors import InvalidValueError
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates.families import FamilyName, make_family

STRETCHED = ["hard_concrete", "straight_through", "deterministic"]


def concrete_cdf(x: Any, location: float, temperature: float) -> Any:
    """P(z ≤ x) of the hard concrete at the default stretch interval, x < 1."""
    return expit(temperature * np.log((x + 0.1) / (1.1 - x)) - location)


def stretched(log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The binary concrete variable on (-0.1, 1.1)."""
    return 1.2 * torch.sigmoid((torch.log(noise / (1 - noise)) + log_alpha) / temperature) - 0.1


class TestHardConcrete(NoisyFamilyLaws, SoftFamilyLaws):
    name = "hard_concrete"

    def cdf(self, x: Any, location: float, temperature: float) -> Any:
        return concrete_cdf(x, location, temperature)

    def relaxed(self, log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
        return stretched(log_alpha, noise, temperature).clamp(0, 1)


class TestStraightThrough(NoisyFamilyLaws, BinaryFamilyLaws):
    name = "straight_through"

    def cdf(self, x: Any, location: float, temperature: float) -> Any:
        return concrete_cdf(0.0, location, temperature) + 0 * x

    def relaxed(self, log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
        return stretched(log_alpha, noise, temperature)

    def test_the_papers_gate_is_open_where_that_of_the_hard_concrete_is(self) -> None:
        location = torch.linspace(-3, 3, 61)
        assert torch.equal(self.make().paper(location, 0.5) > 0, hc.paper_estimate(location) > 0)


class TestGaussian(NoisyFamilyLaws, SoftFamilyLaws):
    name = "stg"

    def cdf(self, x: Any, location: float, temperature: float) -> Any:
        return ndtr((x - location) / temperature)

    def test_gates_are_clamped_gaussians_with_unit_slope(self) -> None:
        location = torch.tensor([0.2, 0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
        noise = torch.tensor([0.5, 0.8413447460685429, 0.9999, 1e-4], dtype=torch.float64)  # 0, 1, 3.7, -3.7 deviations
        gates = self.make().sample(location, noise, 0.3)
        assert gates.tolist() == pytest.approx([0.2, 0.8, 1, 0])
        assert slope(gates, location).tolist() == [1, 1, 0, 0]


class TestDeterministic(SoftFamilyLaws):
    """It draws nothing: P(z ≠ 0) is 0 or 1, and its ``keep_prob`` a smooth surrogate for penalties."""

    name = "deterministic"

    def cdf(self, x: Any, location: float, temperature: float) -> Any:
        median = np.clip(1.2 * expit(location / temperature) - 0.1, 0, 1)
        return np.where(np.asarray(x) + 1e-12 < median, 0.0, 1.0)

    def relaxed(self, log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
        return stretched(log_alpha, torch.full_like(noise, 0.5), temperature).clamp(0, 1)

    def test_its_keep_prob_is_that_of_the_hard_concrete(self) -> None:
        location = torch.linspace(-3, 3, 61)
        assert torch.equal(self.make().keep_prob(location, 0.5), make_family("hard_concrete").keep_prob(location, 0.5))


@pytest.mark.parametrize("name", STRETCHED)
def test_the_stretch_interval_is_the_familys(name: str) -> None:
    location = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    keep_prob = make_family(name, gamma=-0.3, zeta=1.5).keep_prob(location, 0.5)
    torch.testing.assert_close(keep_prob, hc.keep_prob(location, 0.5, -0.3, 1.5))


def test_every_family_has_its_laws() -> None:
    tested = {case.name for case in (TestHardConcrete, TestStraightThrough, TestGaussian, TestDeterministic)}
    assert tested == set(get_args(FamilyName))


@pytest.mark.parametrize("name", [*STRETCHED, "stg"])
def test_a_stretch_that_does_not_contain_the_unit_interval_is_refused(name: str) -> None:
    with pytest.raises(InvalidValueError, match=r"gate: the stretch interval must contain \[0, 1\] strictly"):
        make_family(name, gamma=0.1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hardconcrete", "did you mean 'hard_concrete'?"),
        ("straight-through", "did you mean 'straight_through'?"),
        ("xyz", "one of 'hard_concrete', 'straight_through', 'stg', 'deterministic'"),
    ],
)
def test_an_unknown_family_is_refused_with_near_names(name: str, hint: str) -> None:
    message = f"family: the name must be known.\n  got: '{name}'\n  try: {hint}"
    with pytest.raises(InvalidValueError, match=f"^{re.escape(message)}$"):
        make_family(name)
