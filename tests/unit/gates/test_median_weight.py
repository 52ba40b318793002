"""Weights times gates without noise: the formula in float64, by Numba's kernels and by torch, and no noise drawn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from philox_oracle import problem
from torch import Tensor, nn

from l0hooks import Budget, GateSpec, iter_gates, param_groups, penalty, sparsify
from l0hooks.errors import L0HooksWarning
from l0hooks.gates.constants import Constants
from l0hooks.gates.expected_count import expected_count
from l0hooks.gates.kernels import loading
from l0hooks.gates.median_weight import median_weight
from l0hooks.gates.noise import GateNoise

pytestmark = pytest.mark.usefixtures("both_ways")
CONSTANTS = [Constants(*c) for c in ((2 / 3, -0.1, 1.1), (0.25, -0.1, 1.1), (1.5, -0.5, 1.3))]
all_constants = pytest.mark.parametrize("constants", CONSTANTS, ids=str)
COUNTS = [1, 7, 255, 256, 4096, 4097, 100_005]


def formula(log_alpha: Tensor, constants: Constants) -> Tensor:
    """The gates in float64."""
    temperature, gamma, zeta = constants
    s = 1 / (1 + torch.exp(-log_alpha.double() / temperature))
    return (gamma + (zeta - gamma) * s).clamp(0, 1)


@all_constants
@pytest.mark.parametrize("count", COUNTS)
def test_product_and_gradients_are_the_formula_s(constants: Constants, count: int) -> None:
    weight, log_alpha, cotangent = problem(count)
    found = [weight.clone().requires_grad_(), log_alpha.clone().requires_grad_()]
    product = median_weight(*found, constants)
    product.backward(cotangent)
    wide = [weight.double().requires_grad_(), log_alpha.double().requires_grad_()]
    exact = wide[0] * formula(wide[1], constants)
    exact.backward(cotangent.double())
    torch.testing.assert_close(product.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0].grad.double(), wide[0].grad, rtol=1e-6, atol=1e-6)
    # at the clamps rounding decides whether there is a slope
    temperature, gamma, zeta = constants
    stretched = gamma + (zeta - gamma) * torch.sigmoid(log_alpha.double() / temperature)
    sure = (stretched.abs() > 1e-6) & ((stretched - 1).abs() > 1e-6)
    assert sure.double().mean() > 0.99
    torch.testing.assert_close(found[1].grad.double()[sure], wide[1].grad[sure], rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    weight, log_alpha, cotangent = problem(5000)
    weight = weight.to(dtype).requires_grad_()
    log_alpha.requires_grad_()
    product = median_weight(weight, log_alpha, CONSTANTS[0])
    product.backward(cotangent.to(dtype))
    expected = weight.detach() * formula(log_alpha.detach(), CONSTANTS[0]).to(dtype)
    tolerance = 2 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    torch.testing.assert_close(product, expected, rtol=tolerance, atol=tolerance)
    assert (weight.grad.dtype, log_alpha.grad.dtype) == (dtype, torch.float32)


def test_weights_that_are_not_contiguous() -> None:
    weight, log_alpha, cotangent = (t.view(50, 100) for t in problem(5000))
    found = median_weight(weight.t(), log_alpha.t(), CONSTANTS[0])
    assert torch.equal(found, median_weight(weight, log_alpha, CONSTANTS[0]).t()) or torch.allclose(
        found, median_weight(weight, log_alpha, CONSTANTS[0]).t(), atol=1e-6
    )
    leaf = weight.clone().requires_grad_()
    median_weight(leaf, log_alpha, CONSTANTS[0]).backward(cotangent.t().contiguous().t())
    expected = cotangent.double() * formula(log_alpha, CONSTANTS[0])
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-6, atol=1e-6)


def test_second_derivatives() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(300, dtype=torch.float64, generator=generator, requires_grad=True)
    # away from the clamps, where there is none
    log_alpha = (torch.rand(300, dtype=torch.float64, generator=generator) * 2.4 - 1.2).requires_grad_()

    def loss(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        value = function(weight, log_alpha).pow(3).sum()
        first = torch.autograd.grad(value, (weight, log_alpha), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (weight, log_alpha))]

    found = loss(lambda w, a: median_weight(w, a, CONSTANTS[0]))
    expected = loss(lambda w, a: w * formula(a, CONSTANTS[0]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("count", [100, 2**15, 100_005])
def test_the_gradient_of_a_count_comes_in_the_same_pass(count: int) -> None:
    _, log_alpha, cotangent = problem(count)
    log_alpha.requires_grad_()
    layer = nn.Linear(1, count, bias=False)
    sparsify(layer, GateSpec(granularity="weight", family="deterministic"))
    (_, gate), *_ = iter_gates(layer)
    with torch.no_grad():
        gate.log_alpha.copy_(log_alpha.view(count, 1))
    (layer.weight * cotangent.view(count, 1)).sum().add(2.5 * gate.expected_l0()).backward()
    together = gate.log_alpha.grad.flatten().clone()
    gate.log_alpha.grad = None
    (layer.weight * cotangent.view(count, 1)).sum().backward()
    (2.5 * gate.expected_l0()).backward()
    torch.testing.assert_close(together, gate.log_alpha.grad.flatten(), rtol=1e-5, atol=1e-6)
    count_alone = expected_count(log_alpha, CONSTANTS[0])
    (slope,) = torch.autograd.grad(count_alone, log_alpha)
    assert slope.abs().max() > 0.2


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-3, 2 / 3, 1e3, 1e37])
def test_extremes_are_no_nan(temperature: float) -> None:
    constants = Constants(temperature, -0.1, 1.1)
    places = [0.0, 1e-30, 5.0, 16.7, 80.0, 1e30, 3e38]
    log_alpha = torch.tensor([sign * x for x in places for sign in (1, -1)] * 40).requires_grad_()
    weight = torch.ones_like(log_alpha).detach().requires_grad_()
    product = median_weight(weight, log_alpha, constants)
    expected = formula(log_alpha.detach(), Constants(max(temperature, 1e-37), -0.1, 1.1))
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)
    product.sum().backward()
    assert weight.grad.isfinite().all()
    assert log_alpha.grad.isfinite().all()


def test_what_is_no_number_stays_none() -> None:
    weight, log_alpha, _ = problem(300)
    log_alpha[3], weight[5] = math.nan, math.nan
    product = median_weight(weight, log_alpha, CONSTANTS[0])
    assert product.isnan().nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("spec", ["weight", "output", "coupled"])
@pytest.mark.parametrize("noise", ["step", "example"])
def test_no_noise_is_drawn(spec: Any, noise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if noise == "example" and spec != "coupled":
        pytest.skip("the layer's own kinds have one mask for the step")
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    x = torch.randn(6, 20)
    sparsify(model, GateSpec(granularity=spec, family="deterministic", noise=noise), example_inputs=(x,))
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha.uniform_(-1, 2)
    for way in ("uniform", "stream", "seed"):
        monkeypatch.setattr(GateNoise, way, lambda *_: pytest.fail("noise was drawn"))
    first, second = model(x), model(x)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model.eval()(x), rtol=1e-5, atol=1e-6)


def test_a_budget_measures_as_it_does_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty steps of a budget with and without compiled sums give the same log-odds, to rounding."""

    def trained() -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 3))
        spec = GateSpec(granularity="weight", family="deterministic")
        sparsify(model, spec, budget=Budget(sparsity=0.8, steps=60))
        optimizer = torch.optim.SGD(param_groups(model, lr=0.05, gate_lr=5.0))
        x, y = torch.randn(64, 40), torch.randint(3, (64,))
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return [gate.log_alpha.detach().clone() for _, gate in iter_gates(model)]

    as_given = trained()
    monkeypatch.setattr(loading, "median_kernels_for", lambda count, device: None)
    for one, other in zip(as_given, trained(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_penalty_trains_gates_without_noise() -> None:
    layer = nn.Linear(64, 64)
    sparsify(layer, GateSpec(granularity="weight", family="deterministic"))
    before = [gate.log_alpha.detach().clone() for _, gate in iter_gates(layer)]
    optimizer = torch.optim.SGD(param_groups(layer, lr=0.1, gate_lr=0.5))
    (layer(torch.randn(8, 64)).square().mean() + penalty(layer, l0=1.0)).backward()
    optimizer.step()
    for then, (_, gate) in zip(before, iter_gates(layer), strict=True):
        assert (gate.log_alpha < then).double().mean() > 0.9


def forget() -> None:
    loading._median_kernels.cache_clear()
    loading.median_kernels_for.cache_clear()


def test_wrong_kernels_are_left_alone_with_one_warning(request: pytest.FixtureRequest) -> None:
    kernels = pytest.importorskip("l0hooks.gates.kernels.cpu_median")
    if "by torch" in request.node.name:
        pytest.skip("without kernels there are none to compare")
    patch = request.getfixturevalue("monkeypatch")
    right = kernels.gated
    patch.setattr(kernels, "gated", lambda *given: right(*given) * 1.001)
    forget()
    try:
        weight, log_alpha, _ = problem(1000)
        wrong = r"(?s)gates on cpu: Numba kernels must.*got: the product with the gates without noise: a difference"
        with pytest.warns(L0HooksWarning, match=wrong):
            found = median_weight(weight, log_alpha, CONSTANTS[0])
        torch.testing.assert_close(
            found.double(), weight.double() * formula(log_alpha, CONSTANTS[0]), rtol=0, atol=1e-5
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            median_weight(weight, log_alpha, CONSTANTS[0])
    finally:
        forget()
