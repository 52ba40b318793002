"""HardConcrete as a torch distribution: shapes, draws, densities and validation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from torch import Tensor
from torch.distributions import Distribution, constraints

from l0hooks.errors import InvalidValueError
from l0hooks.gates import moments
from l0hooks.gates.distribution import HardConcrete

SETTINGS = [(0.0, 2 / 3, -0.1, 1.1), (1.5, 0.3, -0.1, 1.1), (-1.0, 1.5, -0.5, 1.2)]
DRAWS = 100_000

all_settings = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def double(log_alpha: float, temperature: float, gamma: float, zeta: float) -> HardConcrete:
    return HardConcrete(torch.tensor(log_alpha, dtype=torch.float64), temperature, gamma, zeta)


def draw(gates: HardConcrete, shape: tuple[int, ...] = (DRAWS,)) -> Tensor:
    torch.manual_seed(0)
    return gates.sample(shape)


# shapes --------------------------------------------------------------------------------------------------------------


def test_is_a_reparametrised_torch_distribution_on_the_unit_interval() -> None:
    gates = HardConcrete(torch.zeros(2))
    assert isinstance(gates, Distribution)
    assert gates.has_rsample
    assert gates.support is constraints.unit_interval


@pytest.mark.parametrize(
    ("log_alpha", "temperature", "batch"),
    [
        (0.0, 0.5, ()),
        (torch.zeros(3), 0.5, (3,)),
        (0.0, torch.ones(3), (3,)),
        (torch.zeros(4), torch.ones(3, 1), (3, 4)),
    ],
    ids=["numbers", "float temperature", "tensor temperature", "broadcast"],
)
def test_the_batch_shape_is_the_broadcast_of_the_parameters(
    log_alpha: Tensor | float, temperature: Tensor | float, batch: tuple[int, ...]
) -> None:
    gates = HardConcrete(log_alpha, temperature)
    assert gates.batch_shape == batch
    assert gates.event_shape == ()
    assert gates.rsample().shape == batch
    assert gates.rsample((2, 5)).shape == (2, 5, *batch)
    for moment in (gates.mean, gates.variance, gates.stddev, gates.median, gates.keep_prob, gates.prob_one):
        assert moment.shape == batch
    assert gates.entropy().shape == batch


def test_a_tensor_temperature_belongs_to_its_own_row() -> None:
    log_alpha, temperature = torch.tensor([-1.0, 0.5]), torch.tensor([[0.3], [1.2]])
    gates = HardConcrete(log_alpha, temperature)
    for row, beta in enumerate((0.3, 1.2)):
        alone = HardConcrete(log_alpha, beta)
        torch.testing.assert_close(gates.mean[row], alone.mean)
        torch.testing.assert_close(gates.entropy()[row], alone.entropy())
        torch.testing.assert_close(gates.log_prob(torch.tensor(0.3))[row], alone.log_prob(torch.tensor(0.3)))


def test_log_prob_and_cdf_broadcast_values_against_the_batch() -> None:
    gates = HardConcrete(torch.tensor([-1.0, 0.0, 2.0]))
    values = torch.tensor([[0.0], [0.4], [1.0], [0.9]])
    for function in (gates.log_prob, gates.cdf, gates.icdf):
        expected = torch.stack([function(value.expand(3)) for value in values])
        torch.testing.assert_close(function(values), expected)


def test_log_prob_of_a_vector_of_draws_from_a_scalar_distribution() -> None:
    gates = HardConcrete(0.3)
    values = torch.tensor([0.0, 0.6])
    expected = torch.stack([gates.log_prob(values[0]), gates.log_prob(values[1])])
    assert torch.equal(gates.log_prob(values), expected)


@pytest.mark.parametrize("validate_args", [True, False])
def test_expand_shares_memory_and_keeps_everything(validate_args: bool) -> None:
    gates = HardConcrete(torch.tensor([-1.0, 2.0]), 0.4, gamma=-0.2, zeta=1.3, validate_args=validate_args)
    wide = gates.expand((5, 2))
    assert type(wide) is HardConcrete
    assert wide.batch_shape == (5, 2)
    assert (wide.gamma, wide.zeta, wide._validate_args) == (-0.2, 1.3, validate_args)
    assert wide.log_alpha.data_ptr() == gates.log_alpha.data_ptr()
    assert wide.temperature.data_ptr() == gates.temperature.data_ptr()
    assert torch.equal(wide.mean, gates.mean.expand(5, 2))


def test_expanded_gates_are_drawn_independently() -> None:
    torch.manual_seed(0)
    first, second = HardConcrete(0.0, temperature=2.0).expand((2,)).rsample()
    assert first != second


def test_a_subclass_must_bring_its_own_expand() -> None:
    class Narrow(HardConcrete):
        def __init__(self) -> None:
            super().__init__(0.0)

    with pytest.raises(NotImplementedError, match="Narrow"):
        Narrow().expand((2,))


# draws ---------------------------------------------------------------------------------------------------------------


@all_settings
def test_draws_follow_the_cdf(settings: tuple[float, ...]) -> None:
    """Kolmogorov-Smirnov with the atoms: the Dvoretzky-Kiefer-Wolfowitz bound at a level of one in a million."""
    log_alpha, beta, gamma, zeta = settings
    draws = draw(double(*settings)).numpy()
    inside = np.linspace(0, 1, 2000, endpoint=False)
    expected = expit(beta * (np.log(inside - gamma) - np.log(zeta - inside)) - log_alpha)
    observed = np.searchsorted(np.sort(draws), inside, side="right") / draws.size
    bound = math.sqrt(math.log(2 / 1e-6) / (2 * draws.size))
    assert np.abs(observed - expected).max() < bound
    assert (draws == 1).mean() == pytest.approx(
        1 - expit(beta * math.log((1 - gamma) / (zeta - 1)) - log_alpha), abs=bound
    )
    assert draws.min() >= 0
    assert draws.max() <= 1


@all_settings
def test_mean_variance_and_probabilities_are_those_of_draws(settings: tuple[float, ...]) -> None:
    gates = double(*settings)
    draws = draw(gates)
    for ours, seen in (
        (gates.mean, draws),
        (gates.variance, (draws - draws.mean()).square()),
        (gates.keep_prob, (draws > 0).double()),
        (gates.prob_one, (draws == 1).double()),
    ):
        assert ours.item() == pytest.approx(seen.mean().item(), abs=5 * seen.std().item() / math.sqrt(DRAWS))
    assert gates.stddev.item() == pytest.approx(gates.variance.sqrt().item())


@all_settings
def test_half_of_the_draws_lie_on_either_side_of_the_median(settings: tuple[float, ...]) -> None:
    gates = double(*settings)
    draws, slack = draw(gates), 5 * 0.5 / math.sqrt(DRAWS)
    assert (draws <= gates.median).double().mean() >= 0.5 - slack
    assert (draws >= gates.median).double().mean() >= 0.5 - slack


@all_settings
def test_entropy_is_the_mean_surprise_of_draws(settings: tuple[float, ...]) -> None:
    gates = double(*settings)
    surprise = -gates.log_prob(draw(gates))
    assert gates.entropy().item() == pytest.approx(
        surprise.mean().item(), abs=5 * surprise.std().item() / math.sqrt(DRAWS)
    )


@all_settings
def test_the_gradient_of_draws_is_on_average_that_of_the_mean(settings: tuple[float, ...]) -> None:
    location, temperature, gamma, zeta = settings
    log_alpha = torch.full((DRAWS,), location, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    (slopes,) = torch.autograd.grad(HardConcrete(log_alpha, temperature, gamma, zeta).rsample().sum(), log_alpha)
    at = torch.tensor(location, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(moments.mean(at, temperature, gamma, zeta), at)
    assert slopes.mean().item() == pytest.approx(expected.item(), abs=5 * slopes.std().item() / math.sqrt(DRAWS))


def test_rsample_reaches_both_parameters_and_sample_neither() -> None:
    log_alpha, temperature = torch.zeros(50, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    gates = HardConcrete(log_alpha, temperature)
    torch.manual_seed(0)
    slopes = torch.autograd.grad(gates.rsample().sum(), (log_alpha, temperature))
    assert all(bool(torch.isfinite(slope).all()) and bool((slope != 0).any()) for slope in slopes)
    assert not gates.sample().requires_grad


def test_the_seed_reproduces_draws() -> None:
    gates = HardConcrete(torch.zeros(20), temperature=2.0)
    torch.manual_seed(3)
    first, other = gates.rsample(), gates.rsample()
    torch.manual_seed(3)
    assert torch.equal(gates.rsample(), first)
    assert not torch.equal(other, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_everything_keeps_the_dtype_of_log_alpha(dtype: torch.dtype) -> None:
    gates = HardConcrete(torch.zeros(3, dtype=dtype))
    value = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)
    results = [gates.rsample(), gates.mean, gates.variance, gates.median, gates.keep_prob, gates.prob_one]
    results += [gates.entropy(), gates.log_prob(value), gates.cdf(value), gates.icdf(value)]
    assert {result.dtype for result in results} == {dtype}
    assert all(bool(torch.isfinite(result).all()) for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_draws_are_float32_draws_rounded(dtype: torch.dtype) -> None:
    """Noise in the half type itself would close open gates far too often."""
    location = torch.full((1000,), 1.5).to(dtype)
    half = HardConcrete(location, 0.5)
    assert torch.equal(draw(half, ()), draw(HardConcrete(location.float(), 0.5), ()).to(dtype))


# densities -----------------------------------------------------------------------------------------------------------


@all_settings
def test_atoms_and_density_integrate_to_one(settings: tuple[float, ...]) -> None:
    gates = double(*settings)

    def density(x: float) -> float:
        return gates.log_prob(torch.tensor(x, dtype=torch.float64)).exp().item()

    assert density(0) == pytest.approx(1 - gates.keep_prob.item())
    assert density(1) == pytest.approx(gates.prob_one.item())
    assert density(0) + quad(density, 0, 1, limit=200)[0] + density(1) == pytest.approx(1, abs=1e-9)


@all_settings
def test_the_density_is_the_slope_of_the_cdf(settings: tuple[float, ...]) -> None:
    gates, step = double(*settings), 1e-6
    x = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    slope = (gates.cdf(x + step) - gates.cdf(x - step)) / (2 * step)
    torch.testing.assert_close(gates.log_prob(x).exp(), slope, rtol=1e-7, atol=0)


@all_settings
def test_icdf_inverts_cdf(settings: tuple[float, ...]) -> None:
    gates = double(*settings)
    x = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(gates.icdf(gates.cdf(x)), x, rtol=1e-9, atol=0)
    assert gates.icdf(torch.tensor(0.5)).item() == pytest.approx(gates.median.item(), abs=1e-7)


# validation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_a_value_outside_the_support_is_refused_when_validating(value: float) -> None:
    gates = HardConcrete(torch.zeros(2), validate_args=True)
    for function in (gates.log_prob, gates.cdf):
        with pytest.raises(ValueError, match="within the support"):
            function(torch.tensor(value))


def test_a_value_of_the_wrong_shape_is_refused_when_validating() -> None:
    with pytest.raises(ValueError, match="not broadcastable"):
        HardConcrete(torch.zeros(2), validate_args=True).log_prob(torch.zeros(3))


def test_a_value_outside_the_support_is_impossible_when_not_validating() -> None:
    gates = HardConcrete(torch.zeros(2), validate_args=False)
    outside = torch.tensor([-0.01, 1.01])
    assert gates.log_prob(outside).tolist() == [-math.inf, -math.inf]
    assert gates.cdf(outside).tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="parameter temperature"):
        HardConcrete(torch.zeros(2), temperature, validate_args=True)


def test_a_location_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter log_alpha"):
        HardConcrete(torch.tensor([0.0, math.nan]), validate_args=True)


@pytest.mark.parametrize(("gamma", "zeta"), [(0.1, 1.1), (0.0, 1.1), (-0.1, 1.0)])
@pytest.mark.parametrize("validate_args", [True, False])
def test_a_stretch_that_does_not_contain_the_unit_interval_is_refused(
    gamma: float, zeta: float, validate_args: bool
) -> None:
    with pytest.raises(InvalidValueError, match=r"HardConcrete: the stretch interval must contain \[0, 1\] strictly"):
        HardConcrete(torch.zeros(2), gamma=gamma, zeta=zeta, validate_args=validate_args)
