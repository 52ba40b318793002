"""The laws of every family of gates, as abstract test cases. A subclass writes how it is made and its distribution."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from l0hooks import Gate
from l0hooks.errors import InvalidValueError
from l0hooks.gates.families import Family, FamilyName, make_family

LOCATIONS = (-1.4, -0.3, 0.2, 0.9, 2.0)
TEMPERATURES = (0.3, 0.8)
DRAWS = 100_000

all_locations = pytest.mark.parametrize("location", LOCATIONS)
all_temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def slope(gates: Tensor, log_alpha: Tensor) -> Tensor:
    return torch.autograd.grad(gates.sum(), log_alpha)[0]


class FamilyLaws(abc.ABC):
    """What holds for every family, also where it draws nothing."""

    name: ClassVar[FamilyName]

    def make(self) -> Family:
        return make_family(self.name)

    @abc.abstractmethod
    def cdf(self, x: Any, location: float, temperature: float) -> Any:
        """P(z ≤ x) for x in [0, 1), without the library's formulas."""

    def relaxed(self, log_alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
        """The variable whose derivative a sample has: by default the sample itself."""
        return self.make().sample(log_alpha, noise, temperature)

    def draws(self, location: float, temperature: float) -> Tensor:
        noise = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0))
        return self.make().sample(torch.full((DRAWS,), location), noise, temperature).double()

    @all_temperatures
    @all_locations
    def test_samples_follow_the_distribution(self, location: float, temperature: float) -> None:
        noise = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # a sample grows with its noise
        gates = self.make().sample(torch.full((4000,), location, dtype=torch.float64), noise, temperature).numpy()
        assert gates.min() >= 0
        assert gates.max() <= 1
        x = np.linspace(0, 0.999, 50)
        share = np.searchsorted(gates, x + 1e-12, side="right") / 4000
        np.testing.assert_allclose(share, self.cdf(x, location, temperature), rtol=0, atol=1 / 4000)

    def test_a_sample_has_the_shape_that_gates_and_noise_broadcast_to(self) -> None:
        sample = self.make().sample(torch.zeros(4), torch.rand(3, 4), 0.5)
        assert sample.shape == (3, 4)

    @all_temperatures
    @all_locations
    def test_the_mean_is_the_integral_of_the_distribution(self, location: float, temperature: float) -> None:
        expected = quad(lambda x: 1 - self.cdf(x, location, temperature), 0, 1, limit=200, epsabs=1e-10)[0]
        assert self.make().mean(number(location), temperature).item() == pytest.approx(expected, abs=1e-8)

    @all_temperatures
    @all_locations
    def test_the_mean_is_the_average_draw(self, location: float, temperature: float) -> None:
        gates = self.draws(location, temperature)
        mean = self.make().mean(torch.tensor(location), temperature).item()
        assert mean == pytest.approx(gates.mean().item(), abs=5 * float(gates.std()) / math.sqrt(DRAWS) + 1e-6)

    @all_temperatures
    @all_locations
    def test_the_derivative_of_a_sample_is_that_at_equal_noise(self, location: float, temperature: float) -> None:
        noise = torch.linspace(0.02, 0.98, 41, dtype=torch.float64)
        log_alpha = torch.full((41,), location, dtype=torch.float64, requires_grad=True)
        found = slope(self.make().sample(log_alpha, noise, temperature), log_alpha)
        low, high = (self.relaxed(log_alpha.detach() + step, noise, temperature) for step in (-1e-6, 1e-6))
        torch.testing.assert_close(found, (high - low) / 2e-6, rtol=1e-6, atol=1e-7)

    @all_temperatures
    def test_the_median_is_the_gate_at_noise_one_half(self, temperature: float) -> None:
        location = torch.linspace(-3, 3, 25, dtype=torch.float64) + 0.01  # no jump of a binary gate on the grid
        at_half = self.make().sample(location, torch.full_like(location, 0.5), temperature)
        torch.testing.assert_close(self.make().median(location, temperature), at_half)

    @all_temperatures
    def test_the_median_is_positive_exactly_where_keep_prob_exceeds_half(self, temperature: float) -> None:
        family = self.make()
        edge = family.start_keep_prob(0.5, temperature)
        location = edge + torch.tensor([-5, -0.1, -1e-9, 1e-9, 0.1, 5], dtype=torch.float64)
        opened = [False, False, False, True, True, True]
        assert (family.median(location, temperature) > 0).tolist() == opened
        assert (family.keep_prob(location, temperature) > 0.5).tolist() == opened

    @pytest.mark.parametrize("estimator", ["median", "paper", "mean"])
    def test_a_gate_stays_exactly_where_its_evaluated_value_is_not_zero(self, estimator: Any) -> None:
        for temperature in (*TEMPERATURES, 1.5):
            gate = Gate(601, family=self.name, estimator=estimator, temperature=temperature).eval()
            with torch.no_grad():
                gate.log_alpha.copy_(torch.linspace(-5, 5, 601))
            assert 0 < int(gate.support().sum()) < 601
            assert torch.equal(gate.support(), gate() > 0)

    @all_temperatures
    @pytest.mark.parametrize("start", [0.01, 0.3, 0.5, 0.9, 0.99])
    def test_the_start_asked_for_is_the_start_given(self, temperature: float, start: float) -> None:
        family = self.make()
        by_mean = number(family.start_mean(start, temperature))
        by_keep_prob = number(family.start_keep_prob(start, temperature))
        assert family.mean(by_mean, temperature).item() == pytest.approx(start, rel=1e-9)
        assert family.keep_prob(by_keep_prob, temperature).item() == pytest.approx(start, rel=1e-9)

    @pytest.mark.parametrize("start", [0.01, 0.5, 0.99])
    def test_starts_at_the_default_temperature_survive_the_projection(self, start: float) -> None:
        family = self.make()
        low, high = family.limits
        assert low < family.start_mean(start, family.default_temperature) < high
        assert low < family.start_keep_prob(start, family.default_temperature) < high

    @pytest.mark.parametrize("start", [0.0, 1.0, -0.5, math.nan])
    def test_a_start_at_the_ends_is_refused_by_its_name(self, start: float) -> None:
        for name, function in (("init_mean", self.make().start_mean), ("init_keep_prob", self.make().start_keep_prob)):
            with pytest.raises(InvalidValueError, match=f"^{name}: the start must lie strictly between 0 and 1"):
                function(start, 0.5)

    @pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
    def test_probabilities_means_and_test_time_gates_grow_within_the_unit_interval(self, temperature: float) -> None:
        family = self.make()
        location = torch.linspace(*family.limits, 501)
        for function in (family.keep_prob, family.mean, family.median, family.paper):
            values = function(location, temperature)
            assert float(values.min()) >= 0
            assert float(values.max()) <= 1
            assert float(values.diff().min()) >= -1e-6

    def test_keep_prob_pulls_on_every_gate(self) -> None:
        family = self.make()
        location = torch.linspace(*family.limits, 25, dtype=torch.float64, requires_grad=True)
        assert bool((slope(family.keep_prob(location, family.default_temperature), location) > 0).all())

    @pytest.mark.parametrize("location", [-1.5, 0.4, 2.5])
    def test_noise_of_exactly_zero_and_one_is_harmless(self, location: float) -> None:
        log_alpha = torch.full((2,), location, requires_grad=True)
        gates = self.make().sample(log_alpha, torch.tensor([0.0, 1.0]), 0.5)
        assert bool(torch.isfinite(slope(gates, log_alpha)).all())


class NoisyFamilyLaws(FamilyLaws):
    """What holds where gates are random."""

    @all_temperatures
    @all_locations
    def test_keep_prob_is_one_less_the_atom_at_zero(self, location: float, temperature: float) -> None:
        keep_prob = self.make().keep_prob(number(location), temperature).item()
        assert keep_prob == pytest.approx(1 - float(self.cdf(0.0, location, temperature)), abs=1e-12)

    @all_temperatures
    @all_locations
    def test_keep_prob_is_the_share_of_draws_that_are_not_zero(self, location: float, temperature: float) -> None:
        kept = float((self.draws(location, temperature) != 0).double().mean())
        keep_prob = self.make().keep_prob(torch.tensor(location), temperature).item()
        error = 5 * math.sqrt(keep_prob * (1 - keep_prob) / DRAWS) + 5 / DRAWS
        assert keep_prob == pytest.approx(kept, abs=error)

    @pytest.mark.parametrize("location", [-1.5, 0.4, 2.5])
    def test_the_ends_of_the_noise_are_the_ends_of_the_gate(self, location: float) -> None:
        noise = torch.tensor([0.0, 1.0])
        assert self.make().sample(torch.full((2,), location), noise, 0.5).tolist() == [0, 1]


class SoftFamilyLaws(FamilyLaws):
    """What holds where gates take every value between 0 and 1."""

    def test_the_gradient_flows_exactly_where_the_gate_is_not_clamped(self) -> None:
        location = torch.linspace(-2, 2.5, 91, dtype=torch.float64, requires_grad=True)
        noise = torch.rand(91, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gates = self.make().sample(location, noise, 0.5)
        inside = (gates > 0) & (gates < 1)
        assert 0 < int(inside.sum()) < 91
        assert torch.equal(slope(gates, location) != 0, inside)


class BinaryFamilyLaws(FamilyLaws):
    """What holds where gates are 0 or 1."""

    def test_samples_and_test_time_gates_are_binary(self) -> None:
        location = torch.linspace(-3, 3, 61)
        noise = torch.rand(61, generator=torch.Generator().manual_seed(0))
        family = self.make()
        for gates in (
            family.sample(location, noise, 0.5), family.median(location, 0.5), family.paper(location, 0.5),
        ):  # fmt: skip
            assert set(gates.tolist()) == {0, 1}

    def test_the_gradient_flows_everywhere(self) -> None:
        location = torch.linspace(-3, 3, 61, requires_grad=True)
        noise = torch.rand(61, generator=torch.Generator().manual_seed(0))
        assert bool((slope(self.make().sample(location, noise, 0.5), location) > 0).all())
