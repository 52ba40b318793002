"""The gate mathematics against oracles written from the paper in NumPy, never from the library."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit, xlogy
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from l0hooks.errors import InvalidValueError
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates import moments
from l0hooks.gates.constants import check_constants

Array = npt.NDArray[np.float64]
Constants = tuple[float, float, float]
Function = Callable[..., Tensor]

PAPER: Constants = (2 / 3, -0.1, 1.1)
CONSTANTS = [PAPER, (0.2, -0.1, 1.1), (2.0, -0.1, 1.1), (1.0, -0.5, 1.2), (0.5, -0.01, 1.01), (1.5, -1.0, 3.0)]
LOCATIONS = (-6.0, -1.0, 0.0, 0.7, 5.0)

all_constants = pytest.mark.parametrize("constants", CONSTANTS, ids=str)
all_locations = pytest.mark.parametrize("log_alpha", LOCATIONS)


def oracle_gate(u: Array, log_alpha: float, beta: float, gamma: float, zeta: float) -> Array:
    """The paper's equations 10 to 12 with the logarithms written out."""
    s = expit((np.log(u) - np.log(1 - u) + log_alpha) / beta)
    return np.minimum(1, np.maximum(0, s * (zeta - gamma) + gamma))


def oracle_cdf(x: float, log_alpha: float, beta: float, gamma: float, zeta: float) -> float:
    """The stretched cdf of the paper's appendix, without the atom at one."""
    return float(expit(beta * (np.log(x - gamma) - np.log(zeta - x)) - log_alpha))


def oracle_density(x: float, log_alpha: float, beta: float, gamma: float, zeta: float) -> float:
    """The binary concrete density in the paper's product form, stretched."""
    s, alpha = (x - gamma) / (zeta - gamma), math.exp(log_alpha)
    numerator = beta * alpha * s ** (-beta - 1) * (1 - s) ** (-beta - 1)
    return numerator / (alpha * s**-beta + (1 - s) ** -beta) ** 2 / (zeta - gamma)


def integral(fn: Callable[[float], float]) -> float:
    return float(quad(fn, 0, 1, points=[0.01, 0.5, 0.99], epsabs=1e-13, epsrel=1e-12, limit=400)[0])


def oracle_entropy(log_alpha: float, *constants: float) -> float:
    zero, one = oracle_cdf(0, log_alpha, *constants), 1 - oracle_cdf(1, log_alpha, *constants)

    def surprise(x: float) -> float:
        density = oracle_density(x, log_alpha, *constants)
        return float(xlogy(density, density))

    return float(-xlogy(zero, zero) - xlogy(one, one)) - integral(surprise)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@all_constants
@all_locations
def test_sample_is_the_papers_formula(log_alpha: float, constants: Constants) -> None:
    u = np.linspace(0.001, 0.999, 999)
    gates = hc.sample(scalar(log_alpha), torch.from_numpy(u), *constants)
    np.testing.assert_allclose(gates.numpy(), oracle_gate(u, log_alpha, *constants), rtol=0, atol=1e-14)


@all_constants
@pytest.mark.parametrize("log_alpha", [-1.0, 0.7])
def test_probabilities_and_moments_are_those_of_drawn_gates(log_alpha: float, constants: Constants) -> None:
    gates = oracle_gate(np.random.default_rng(0).uniform(size=200_000), log_alpha, *constants)
    location = scalar(log_alpha)
    expectations = {
        "keep_prob": (hc.keep_prob(location, *constants), gates != 0),
        "prob_one": (hc.prob_one(location, *constants), gates == 1),
        "cdf": (hc.cdf(scalar(0.3), location, *constants), gates <= 0.3),
        "mean": (moments.mean(location, *constants), gates),
        "second_moment": (moments.second_moment(location, *constants), gates**2),
        "variance": (moments.variance(location, *constants), (gates - gates.mean()) ** 2),
    }
    for name, (ours, draws) in expectations.items():
        error = 5 * draws.std() / math.sqrt(draws.size)
        assert float(ours) == pytest.approx(draws.mean(), abs=error), name


@all_constants
@all_locations
def test_moments_are_the_integrals_of_the_oracle(log_alpha: float, constants: Constants) -> None:
    first = integral(lambda x: 1 - oracle_cdf(x, log_alpha, *constants))
    second = integral(lambda x: 2 * x * (1 - oracle_cdf(x, log_alpha, *constants)))
    location = scalar(log_alpha)
    assert moments.mean(location, *constants).item() == pytest.approx(first, abs=1e-11)
    assert moments.second_moment(location, *constants).item() == pytest.approx(second, abs=1e-11)
    assert moments.variance(location, *constants).item() == pytest.approx(second - first**2, abs=1e-11)


@all_constants
@all_locations
def test_entropy_is_the_integral_of_the_oracle(log_alpha: float, constants: Constants) -> None:
    ours = moments.entropy(scalar(log_alpha), *constants).item()
    assert ours == pytest.approx(oracle_entropy(log_alpha, *constants), abs=1e-9)


@all_constants
@all_locations
def test_log_prob_is_the_papers_density_between_the_atoms(log_alpha: float, constants: Constants) -> None:
    x = [1e-6, 0.1, 0.5, 0.77, 1 - 1e-6]
    expected = [oracle_density(v, log_alpha, *constants) for v in x]
    ours = hc.log_prob(f64(*x), scalar(log_alpha), *constants).exp()
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9)


@all_constants
@all_locations
def test_atoms_and_density_sum_to_one(log_alpha: float, constants: Constants) -> None:
    zero, one = hc.log_prob(f64(0, 1), scalar(log_alpha), *constants).exp().tolist()
    assert zero == pytest.approx(oracle_cdf(0, log_alpha, *constants), rel=1e-12)
    assert one == pytest.approx(1 - oracle_cdf(1, log_alpha, *constants), abs=1e-15)
    between = integral(lambda x: hc.log_prob(scalar(x), scalar(log_alpha), *constants).exp().item())
    assert zero + between + one == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("value", [-1.0, -1e-9, 1 + 1e-9, 2.0])
def test_log_prob_is_minus_infinity_outside_the_unit_interval(value: float) -> None:
    assert hc.log_prob(scalar(value), scalar(0.3)).item() == -math.inf


@all_constants
@all_locations
def test_cdf_is_the_oracles_inside_and_flat_outside(log_alpha: float, constants: Constants) -> None:
    ours = hc.cdf(f64(-0.01, 0, 0.25, 0.999, 1, 1.01), scalar(log_alpha), *constants)
    inside = [oracle_cdf(x, log_alpha, *constants) for x in (0, 0.25, 0.999)]
    np.testing.assert_allclose(ours.numpy(), [0, *inside, 1, 1], rtol=1e-12)


@all_constants
@all_locations
def test_icdf_inverts_cdf_between_the_atoms(log_alpha: float, constants: Constants) -> None:
    x = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    probability = hc.cdf(x, scalar(log_alpha), *constants)
    torch.testing.assert_close(hc.icdf(probability, scalar(log_alpha), *constants), x, rtol=0, atol=1e-9)


@all_constants
def test_icdf_is_flat_on_the_atoms(constants: Constants) -> None:
    location = scalar(0.4)
    low, high = 1 - hc.keep_prob(location, *constants), 1 - hc.prob_one(location, *constants)
    ends = torch.stack([low * 0, low * 0.5, low * 0.999, high + 0.001 * (1 - high), high / high])
    assert hc.icdf(ends, location, *constants).tolist() == [0, 0, 0, 1, 1]


# every function as one of (value or noise, log_alpha, temperature) ---------------------------------------------------

FUNCTIONS: dict[str, Function] = {
    "sample": lambda x, a, t: hc.sample(a, x, t),
    "icdf": hc.icdf,
    "cdf": hc.cdf,
    "log_prob": hc.log_prob,
    "keep_prob": lambda x, a, t: hc.keep_prob(a, t),
    "prob_one": lambda x, a, t: hc.prob_one(a, t),
    "mean": lambda x, a, t: moments.mean(a, t),
    "second_moment": lambda x, a, t: moments.second_moment(a, t),
    "variance": lambda x, a, t: moments.variance(a, t),
    "median": lambda x, a, t: hc.median(a, t),
    "entropy": lambda x, a, t: moments.entropy(a, t),
    "paper_estimate": lambda x, a, t: hc.paper_estimate(a),
}
WITH_TEMPERATURE = [name for name in FUNCTIONS if name != "paper_estimate"]
WITH_VALUE = ["sample", "icdf", "cdf", "log_prob"]
VALUES = f64(0.25, 0.5, 0.625)  # exact in every dtype

all_functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_first_and_second_gradients_in_log_alpha_and_temperature(name: str) -> None:
    inputs = (f64(-0.4, 0.1, 0.8).requires_grad_(), scalar(0.7).requires_grad_())
    assert gradcheck(lambda a, t: FUNCTIONS[name](VALUES, a, t), inputs)
    assert gradgradcheck(lambda a, t: FUNCTIONS[name](VALUES, a, t), inputs)


def test_gradient_of_the_paper_estimate() -> None:
    assert gradcheck(hc.paper_estimate, (f64(-0.4, 0.1, 0.8).requires_grad_(),))


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_gradients_of_the_atoms_log_probability(x: float) -> None:
    inputs = (scalar(0.3).requires_grad_(), scalar(0.7).requires_grad_())
    assert gradcheck(lambda a, t: hc.log_prob(scalar(x), a, t), inputs)


@pytest.mark.parametrize("name", WITH_VALUE)
def test_gradients_in_value_or_noise(name: str) -> None:
    assert gradcheck(lambda x: FUNCTIONS[name](x, scalar(0.1), 0.7), (VALUES.clone().requires_grad_(),))


@pytest.mark.parametrize("u", [1e-4, 1 - 1e-4])
def test_a_clamped_gate_passes_no_gradient(u: float) -> None:
    inputs = [scalar(0.2).requires_grad_(), scalar(u).requires_grad_(), scalar(0.7).requires_grad_()]
    slopes = torch.autograd.grad(hc.sample(*inputs), inputs)
    assert [slope.item() for slope in slopes] == [0, 0, 0]


@all_functions
def test_float32_agrees_with_float64(function: Function) -> None:
    location = torch.linspace(-8, 8, 15, dtype=torch.float64).view(5, 3)
    narrow = function(VALUES.float(), location.float(), 0.5)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), function(VALUES, location, 0.5), rtol=2e-5, atol=1e-6)


@all_functions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_float32_rounded_once(function: Function, dtype: torch.dtype) -> None:
    location, values = torch.linspace(-6, 6, 30).view(10, 3).to(dtype), VALUES.to(dtype)
    temperature = torch.linspace(0.3, 1.3, 10).view(10, 1).to(dtype)
    ours = function(values, location, temperature)
    expected = function(values.float(), location.float(), temperature.float()).to(dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_temperature_by_keyword_is_widened_like_one_by_position(dtype: torch.dtype) -> None:
    location, temperature = torch.linspace(-6, 6, 600).to(dtype), torch.linspace(0.3, 1.3, 600).to(dtype)
    assert torch.equal(hc.keep_prob(location, temperature=temperature), hc.keep_prob(location, temperature))


def test_half_noise_or_temperature_is_widened_when_log_alpha_is_float32() -> None:
    location, other = torch.linspace(-2, 2, 600), torch.linspace(0.3, 0.7, 600).bfloat16()
    assert torch.equal(hc.sample(location, other), hc.sample(location, other.float()))
    assert torch.equal(hc.keep_prob(location, other), hc.keep_prob(location, other.float()))


@all_functions
@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("location", [-80.0, 0.01, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients_stay_finite_at_the_extremes(
    function: Function, location: float, temperature: float, dtype: torch.dtype
) -> None:
    log_alpha = torch.tensor(location, dtype=dtype, requires_grad=True)
    beta = torch.tensor(temperature, dtype=dtype, requires_grad=True)
    for value in (1e-6, 0.5, 1 - 1e-6):
        result = function(torch.tensor(value, dtype=dtype), log_alpha, beta)
        slopes = torch.autograd.grad(result, (log_alpha, beta), materialize_grads=True)
        assert all(bool(torch.isfinite(t)) for t in (result, *slopes))


@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
@pytest.mark.parametrize(
    "name", ["sample", "keep_prob", "prob_one", "mean", "second_moment", "median", "paper_estimate"]
)
def test_extreme_gates_are_certainly_open_or_closed(name: str, temperature: float) -> None:
    closed, opened = FUNCTIONS[name](VALUES[:1].float(), torch.tensor([-80.0, 80.0]), temperature).tolist()
    assert 0 <= closed < 1e-28
    assert opened == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("name", ["variance", "entropy"])
def test_extreme_gates_have_no_spread(name: str, temperature: float) -> None:
    spread = FUNCTIONS[name](VALUES[:1].float(), torch.tensor([-80.0, 80.0]), temperature)
    torch.testing.assert_close(spread, torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 2 / 3, 2.0])
def test_variance_is_never_negative_in_float32(temperature: float) -> None:
    variance = moments.variance(torch.linspace(-20, 20, 4001), temperature)
    assert bool((variance >= 0).all()), f"{int((variance < 0).sum())} of 4001, the least {variance.min():.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("location", [-80.0, 0.0, 80.0])
def test_noise_of_exactly_zero_and_one_closes_and_opens(location: float, dtype: torch.dtype) -> None:
    log_alpha = torch.full((2,), location, dtype=dtype, requires_grad=True)
    gates = hc.sample(log_alpha, torch.tensor([0.0, 1.0], dtype=dtype))
    (slope,) = torch.autograd.grad(gates.sum(), log_alpha)
    assert gates.tolist() == [0, 1]
    assert slope.tolist() == [0, 0]


def test_noise_of_exactly_zero_and_one_leaves_a_learned_temperature_its_gradient() -> None:
    temperature = scalar(0.7).requires_grad_()
    (slope,) = torch.autograd.grad(hc.sample(scalar(0.2), f64(0, 0.4, 1), temperature).sum(), temperature)
    (inside,) = torch.autograd.grad(hc.sample(scalar(0.2), f64(0.4), temperature).sum(), temperature)
    assert slope.item() == pytest.approx(inside.item())


@all_functions
def test_arguments_broadcast(function: Function) -> None:
    values = torch.tensor([0.25, 0.5, 0.625, 0.75])
    log_alpha, temperature = torch.linspace(-2, 2, 3).view(3, 1), torch.tensor([0.5, 0.8]).view(2, 1, 1)
    rows = [
        torch.stack([torch.stack([function(x, a, t) for x in values]) for a in log_alpha[:, 0]])
        for t in temperature.flatten()
    ]
    shaped = function(values, log_alpha, temperature).expand(2, 3, 4)
    torch.testing.assert_close(shaped, torch.stack(rows))


@all_functions
def test_arguments_are_left_untouched(function: Function) -> None:
    arguments = [torch.tensor([0.25, 0.5]), torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.8])]
    before = [argument.clone() for argument in arguments]
    function(*arguments)
    assert all(map(torch.equal, arguments, before))


# starts and test-time gates ------------------------------------------------------------------------------------------


@all_constants
@pytest.mark.parametrize("start", [1e-6, 0.05, 0.5, 0.9, 0.999])
def test_the_start_asked_for_is_the_start_given(start: float, constants: Constants) -> None:
    by_keep_prob = hc.log_alpha_from_keep_prob(start, *constants)
    by_mean = moments.log_alpha_from_mean(start, *constants)
    assert hc.keep_prob(scalar(by_keep_prob), *constants).item() == pytest.approx(start, rel=1e-12)
    assert moments.mean(scalar(by_mean), *constants).item() == pytest.approx(start, rel=1e-12)
    assert 1 - oracle_cdf(0, by_keep_prob, *constants) == pytest.approx(start, rel=1e-9)
    assert integral(lambda x: 1 - oracle_cdf(x, by_mean, *constants)) == pytest.approx(start, abs=1e-10)


def test_the_logit_alone_would_start_at_another_keep_prob() -> None:
    """The known defect: logit(0.5) = 0 keeps 83 % of the gates, and a keep probability is not a mean."""
    assert hc.keep_prob(scalar(0.0)).item() == pytest.approx(0.832, abs=5e-4)
    assert moments.mean(scalar(hc.log_alpha_from_keep_prob(0.9))).item() == pytest.approx(0.63, abs=5e-3)


@all_constants
def test_the_median_is_zero_exactly_where_keep_prob_is_at_most_half(constants: Constants) -> None:
    edge = hc.log_alpha_from_keep_prob(0.5, *constants)
    location = edge + f64(-9, -1, -1e-9, 1e-9, 1, 9)
    closed = [True, True, True, False, False, False]
    assert (hc.median(location, *constants) == 0).tolist() == closed
    assert (hc.keep_prob(location, *constants) <= 0.5).tolist() == closed


@all_constants
@all_locations
def test_the_median_is_the_gate_of_noise_one_half(log_alpha: float, constants: Constants) -> None:
    expected = oracle_gate(np.array([0.5]), log_alpha, *constants)
    assert hc.median(scalar(log_alpha), *constants).item() == pytest.approx(expected.item(), abs=1e-14)


def test_the_paper_estimate_is_zero_exactly_where_keep_prob_is_at_most_31_percent() -> None:
    edge = math.log(0.1 / 1.1)
    assert hc.keep_prob(scalar(edge)).item() == pytest.approx(0.31, abs=5e-4)
    location = edge + f64(-9, -1e-9, 1e-9, 9)
    assert (hc.paper_estimate(location) == 0).tolist() == [True, True, False, False]


@all_locations
def test_the_paper_estimate_is_equation_13(log_alpha: float) -> None:
    expected = min(1, max(0, float(expit(log_alpha)) * 1.2 - 0.1))
    assert hc.paper_estimate(scalar(log_alpha)).item() == pytest.approx(expected, abs=1e-14)


# errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature: float) -> None:
    with pytest.raises(InvalidValueError, match=r"^gates: temperature must be positive\.\n  expected: > 0\n  got: "):
        check_constants("gates", temperature, -0.1, 1.1)


@pytest.mark.parametrize(
    ("gamma", "zeta"), [(0.0, 1.1), (0.1, 1.1), (-0.1, 1.0), (-0.1, 0.9), (-math.inf, 1.1), (-0.1, math.nan)]
)
def test_a_stretch_that_does_not_contain_the_unit_interval_is_refused(gamma: float, zeta: float) -> None:
    with pytest.raises(InvalidValueError, match=rf"contain \[0, 1\] strictly(.|\n)*got: gamma={gamma}, zeta={zeta}"):
        check_constants("gates", 0.5, gamma, zeta)


@all_constants
def test_constants_that_straddle_the_unit_interval_are_accepted(constants: Constants) -> None:
    check_constants("gates", *constants)


@pytest.mark.parametrize("start", [0.0, 1.0, -0.1, 1.1, math.nan])
@pytest.mark.parametrize(
    ("invert", "name"),
    [(hc.log_alpha_from_keep_prob, "init_keep_prob"), (moments.log_alpha_from_mean, "init_mean")],
)
def test_a_start_that_needs_infinite_log_odds_is_refused(
    invert: Callable[[float], float], name: str, start: float
) -> None:
    with pytest.raises(InvalidValueError, match=rf"^{name}: (.|\n)*expected: 0 < {name} < 1\n  got: {start}\n  try: "):
        invert(start)
