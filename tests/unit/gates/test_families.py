"""Every family of gates behind the one interface."""

from __future__ import annotations

import math
import re
from typing import get_args

import pytest
import torch
from scipy.special import expit
from torch import Tensor

from l0hooks.errors import InvalidValueError
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates.families import Family, FamilyName, make_family

NAMES = get_args(FamilyName)
# the deterministic family draws nothing: P(z ≠ 0) is 0 or 1, and its keep_prob is a smooth surrogate for penalties
NOISY = [name for name in NAMES if name != "deterministic"]
LOCATIONS = (-1.4, -0.3, 0.2, 0.9, 2.0)
TEMPERATURES = (0.3, 0.8)
DRAWS = 100_000

all_families = pytest.mark.parametrize("name", NAMES)
noisy_families = pytest.mark.parametrize("name", NOISY)
all_locations = pytest.mark.parametrize("location", LOCATIONS)
all_temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)


def draws(family: Family, location: float, temperature: float) -> Tensor:
    noise = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0))
    return family.sample(torch.full((DRAWS,), location), noise, temperature).double()


def standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(values.numel())


def slope(gates: Tensor, log_alpha: Tensor) -> Tensor:
    return torch.autograd.grad(gates.sum(), log_alpha)[0]


@all_temperatures
@all_locations
@noisy_families
def test_keep_prob_is_the_share_of_draws_that_are_not_zero(name: str, location: float, temperature: float) -> None:
    family = make_family(name)
    kept = (draws(family, location, temperature) != 0).double()
    keep_prob = family.keep_prob(torch.tensor(location), temperature).item()
    assert keep_prob == pytest.approx(
        kept.mean().item(), abs=5 * math.sqrt(keep_prob * (1 - keep_prob) / DRAWS) + 5 / DRAWS
    )


@all_temperatures
@all_locations
@all_families
def test_mean_is_the_average_draw(name: str, location: float, temperature: float) -> None:
    family = make_family(name)
    gates = draws(family, location, temperature)
    mean = family.mean(torch.tensor(location), temperature).item()
    assert mean == pytest.approx(gates.mean().item(), abs=5 * standard_error(gates) + 1e-6)


@all_temperatures
@all_families
def test_the_median_is_the_gate_at_noise_one_half(name: str, temperature: float) -> None:
    family = make_family(name)
    location = torch.linspace(-3, 3, 25, dtype=torch.float64) + 0.01  # no jump of a binary gate on the grid
    at_half = family.sample(location, torch.full_like(location, 0.5), temperature)
    torch.testing.assert_close(family.median(location, temperature), at_half)


@all_temperatures
@all_families
def test_the_median_is_positive_exactly_where_keep_prob_exceeds_half(name: str, temperature: float) -> None:
    family = make_family(name)
    edge = family.start_keep_prob(0.5, temperature)
    location = edge + torch.tensor([-5, -0.1, -1e-9, 1e-9, 0.1, 5], dtype=torch.float64)
    opened = [False, False, False, True, True, True]
    assert (family.median(location, temperature) > 0).tolist() == opened
    assert (family.keep_prob(location, temperature) > 0.5).tolist() == opened


@all_temperatures
@all_families
@pytest.mark.parametrize("start", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_the_start_asked_for_is_the_start_given(name: str, temperature: float, start: float) -> None:
    family = make_family(name)
    by_mean = torch.tensor(family.start_mean(start, temperature), dtype=torch.float64)
    by_keep_prob = torch.tensor(family.start_keep_prob(start, temperature), dtype=torch.float64)
    assert family.mean(by_mean, temperature).item() == pytest.approx(start, rel=1e-9)
    assert family.keep_prob(by_keep_prob, temperature).item() == pytest.approx(start, rel=1e-9)


@all_families
@pytest.mark.parametrize("start", [0.01, 0.5, 0.99])
def test_starts_at_the_default_temperature_survive_the_projection(name: str, start: float) -> None:
    family = make_family(name)
    low, high = family.limits
    assert low < family.start_mean(start, family.default_temperature) < high
    assert low < family.start_keep_prob(start, family.default_temperature) < high


@all_families
@pytest.mark.parametrize("start", [0.0, 1.0, -0.5, math.nan])
def test_a_start_at_the_ends_is_refused(name: str, start: float) -> None:
    family = make_family(name)
    with pytest.raises(InvalidValueError, match="strictly between 0 and 1"):
        family.start_mean(start, 0.5)
    with pytest.raises(InvalidValueError, match="init_keep_prob: the start must lie strictly between 0 and 1"):
        family.start_keep_prob(start, 0.5)


@noisy_families
def test_an_init_mean_that_is_refused_is_called_init_mean(name: str) -> None:
    with pytest.raises(InvalidValueError, match=r"^init_mean: "):
        make_family(name).start_mean(1.0, 0.5)


@all_families
@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_probabilities_means_and_test_time_gates_lie_in_the_unit_interval(name: str, temperature: float) -> None:
    family = make_family(name)
    location = torch.linspace(*family.limits, 501)
    functions = (family.keep_prob, family.mean, family.median, family.paper)
    for values in (function(location, temperature) for function in functions):
        assert float(values.min()) >= 0
        assert float(values.max()) <= 1
        assert float(values.diff().min()) >= -1e-6  # monotone


@all_families
def test_keep_prob_pulls_on_every_gate(name: str) -> None:
    family = make_family(name)
    location = torch.linspace(*family.limits, 25, dtype=torch.float64, requires_grad=True)
    assert bool((slope(family.keep_prob(location, family.default_temperature), location) > 0).all())


@all_families
@pytest.mark.parametrize("location", [-1.5, 0.4, 2.5])
def test_noise_of_exactly_zero_and_one_is_harmless(name: str, location: float) -> None:
    log_alpha = torch.full((2,), location, requires_grad=True)
    gates = make_family(name).sample(log_alpha, torch.tensor([0.0, 1.0]), 0.5)
    assert bool(torch.isfinite(slope(gates, log_alpha)).all())
    if name != "deterministic":
        assert gates.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["hard_concrete", "stg", "deterministic"])
def test_the_gradient_flows_exactly_where_the_gate_is_not_clamped(name: str) -> None:
    location = torch.linspace(-2, 2.5, 91, dtype=torch.float64, requires_grad=True)
    noise = torch.rand(91, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = make_family(name).sample(location, noise, 0.5)
    inside = (gates > 0) & (gates < 1)
    assert 0 < int(inside.sum()) < 91
    assert torch.equal(slope(gates, location) != 0, inside)


def test_straight_through_gates_are_binary_with_the_gradient_of_the_stretched_variable() -> None:
    location = torch.linspace(-3, 3, 61, requires_grad=True)
    noise = torch.rand(61, generator=torch.Generator().manual_seed(0))
    gates = make_family("straight_through").sample(location, noise, 0.5)
    s = torch.from_numpy(expit((torch.logit(noise) + location.detach()).numpy() / 0.5))
    assert torch.equal(gates.detach(), (1.2 * s - 0.1 > 0).float())
    assert set(gates.tolist()) == {0, 1}
    slopes = slope(gates, location)
    torch.testing.assert_close(slopes, 1.2 * s * (1 - s) / 0.5)
    assert bool((slopes > 0).all())


def test_straight_through_test_time_gates_are_binary() -> None:
    family, location = make_family("straight_through"), torch.linspace(-3, 3, 61)
    for gates in (family.median(location, 0.5), family.paper(location, 0.5)):
        assert set(gates.tolist()) == {0, 1}
    assert torch.equal(family.paper(location, 0.5) > 0, hc.paper_estimate(location) > 0)


def test_deterministic_gates_ignore_the_noise() -> None:
    family, location = make_family("deterministic"), torch.linspace(-1, 1, 9)
    noise = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    for row in noise:
        assert torch.equal(family.sample(location, row, 0.5), hc.median(location, 0.5))


def test_stg_gates_are_clamped_gaussians_with_unit_slope() -> None:
    location = torch.tensor([0.2, 0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.5, 0.8413447460685429, 0.9999, 1e-4], dtype=torch.float64)  # 0, 1, 3.7 and -3.7 deviations
    gates = make_family("stg").sample(location, noise, 0.3)
    assert gates.tolist() == pytest.approx([0.2, 0.8, 1, 0])
    assert slope(gates, location).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("name", ["hard_concrete", "straight_through", "deterministic"])
def test_the_stretch_interval_is_the_familys(name: str) -> None:
    location = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    keep_prob = make_family(name, gamma=-0.3, zeta=1.5).keep_prob(location, 0.5)
    torch.testing.assert_close(keep_prob, hc.keep_prob(location, 0.5, -0.3, 1.5))


@all_families
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
