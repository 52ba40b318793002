"""Properties of the gate mathematics over its whole range of parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from l0hooks.gates import hard_concrete as hc
from l0hooks.gates import moments

GRID = 2**20  # noise k / GRID: 1 - noise is exact
ROUNDING = 1e-12

examples = settings(deadline=None, derandomize=True, max_examples=100)


class Constants(NamedTuple):
    """β and the stretch interval."""

    temperature: float
    gamma: float
    zeta: float


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


locations = st.floats(-12, 12)
unit = st.floats(0, 1)
noises = st.integers(1, GRID - 1).map(lambda k: k / GRID)
constants = st.builds(Constants, st.floats(0.05, 2), st.floats(-1, -0.05), st.floats(1.05, 2))
symmetric = st.builds(
    lambda b, d: Constants(b, -d, 1 + d), st.floats(0.05, 2), st.integers(1, 64).map(lambda k: k / 64)
)


@examples
@given(locations, constants, unit, unit)
def test_cdf_is_monotone_between_zero_and_one(location: float, c: Constants, x: float, y: float) -> None:
    low, high = (hc.cdf(number(value), number(location), *c).item() for value in sorted((x, y)))
    assert 0 <= low <= high <= 1


@examples
@given(locations, constants, st.floats(0.001, 0.999))
def test_icdf_inverts_cdf_where_the_probability_is_representable(location: float, c: Constants, x: float) -> None:
    probability = hc.cdf(number(x), number(location), *c)
    slope = hc.log_prob(number(x), number(location), *c).exp().item()
    error = abs(hc.icdf(probability, number(location), *c).item() - x)
    assert error <= 1e-13 + 1e-15 / slope  # half an ulp of the probability, divided by the density


@examples
@given(locations, constants, noises)
def test_cdf_undoes_sample_between_the_atoms(location: float, c: Constants, u: float) -> None:
    gate = hc.sample(number(location), number(u), *c)
    probability = hc.cdf(gate, number(location), *c).item()
    if gate == 0:
        assert probability >= u - ROUNDING
    elif gate == 1:
        assert u >= 1 - hc.prob_one(number(location), *c).item() - ROUNDING
    else:
        assert abs(probability - u) <= 1e-10


@examples
@given(locations, constants)
def test_the_atom_at_zero_and_keep_prob_share_the_probability(location: float, c: Constants) -> None:
    closed = hc.cdf(number(0), number(location), *c).item()
    assert abs(hc.keep_prob(number(location), *c).item() + closed - 1) <= ROUNDING


@examples
@given(locations, constants)
def test_moments_and_probabilities_are_ordered(location: float, c: Constants) -> None:
    """P(z = 1) ≤ E[z²] ≤ E[z] ≤ P(z ≠ 0), because 1[z = 1] ≤ z² ≤ z ≤ 1[z ≠ 0]."""
    one, second, first, kept = (
        function(number(location), *c).item()
        for function in (hc.prob_one, moments.second_moment, moments.mean, hc.keep_prob)
    )
    assert 0 <= one <= second + ROUNDING <= first + 2 * ROUNDING <= kept + 3 * ROUNDING <= 1 + 4 * ROUNDING


@examples
@given(locations, constants)
def test_variance_is_that_of_a_variable_in_the_unit_interval(location: float, c: Constants) -> None:
    mean, variance = moments.mean(number(location), *c).item(), moments.variance(number(location), *c).item()
    assert -ROUNDING <= variance <= mean * (1 - mean) + ROUNDING


@examples
@given(locations, locations, constants, noises)
def test_everything_grows_with_log_alpha(a: float, b: float, c: Constants, u: float) -> None:
    low, high = map(number, sorted((a, b)))
    for function in (hc.keep_prob, hc.prob_one, moments.mean, moments.second_moment, hc.median):
        assert function(low, *c).item() <= function(high, *c).item() + ROUNDING
    assert hc.paper_estimate(low) <= hc.paper_estimate(high)
    assert hc.sample(low, number(u), *c) <= hc.sample(high, number(u), *c)
    assert hc.cdf(number(u), low, *c) >= hc.cdf(number(u), high, *c)


@examples
@given(locations, constants, unit, unit)
def test_sample_grows_with_the_noise_within_the_unit_interval(
    location: float, c: Constants, u: float, v: float
) -> None:
    low, high = (hc.sample(number(location), number(noise), *c).item() for noise in sorted((u, v)))
    assert 0 <= low <= high <= 1


@examples
@given(locations, symmetric, noises)
def test_a_symmetric_stretch_mirrors_the_gate(location: float, c: Constants, u: float) -> None:
    here, there = number(location), number(-location)
    x = number(u)
    pairs = [
        (hc.sample(here, x, *c), 1 - hc.sample(there, 1 - x, *c)),
        (moments.mean(here, *c), 1 - moments.mean(there, *c)),
        (hc.median(here, *c), 1 - hc.median(there, *c)),
        (moments.variance(here, *c), moments.variance(there, *c)),
        (moments.entropy(here, *c), moments.entropy(there, *c)),
        (hc.keep_prob(here, *c), 1 - hc.prob_one(there, *c)),
        (hc.log_prob(x, here, *c), hc.log_prob(1 - x, there, *c)),
    ]
    for ours, mirrored in pairs:
        torch.testing.assert_close(ours, mirrored, rtol=1e-9, atol=1e-10)


@examples
@given(st.floats(1e-6, 1 - 1e-6), constants)
def test_both_starts_are_inverted(start: float, c: Constants) -> None:
    kept = hc.keep_prob(number(hc.log_alpha_from_keep_prob(start, *c)), *c).item()
    mean = moments.mean(number(moments.log_alpha_from_mean(start, *c)), *c).item()
    assert abs(kept - start) <= ROUNDING * start + 1e-15
    assert abs(mean - start) <= ROUNDING * start + 1e-15


@examples
@given(locations, constants)
def test_the_median_is_positive_exactly_where_keep_prob_exceeds_half(location: float, c: Constants) -> None:
    keep_prob = hc.keep_prob(number(location), *c).item()
    if abs(keep_prob - 0.5) > ROUNDING:
        assert (hc.median(number(location), *c).item() > 0) == (keep_prob > 0.5)


@examples
@given(locations, constants, st.floats(0.001, 0.999))
def test_the_density_is_finite_between_the_atoms(location: float, c: Constants, x: float) -> None:
    assert torch.isfinite(hc.log_prob(number(x), number(location), *c))
