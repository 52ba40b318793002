"""The fused gated weight against the plain product: values, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from l0hooks import hard_concrete as hc
from l0hooks.fused import gated_weight, sampled

CONSTANTS = [(2 / 3, -0.1, 1.1), (0.25, -0.1, 1.1), (1.5, -0.5, 1.3)]
# dtypes of the weight and of the gates, and the tolerance the weight's dtype allows
DTYPES = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.float32, 1e-2),
    (torch.float16, torch.float32, 2e-3),
    (torch.float32, torch.float64, 1e-5),
]

all_constants = pytest.mark.parametrize("constants", CONSTANTS, ids=str)


def problem(dtype: torch.dtype, gate_dtype: torch.dtype, shape: tuple[int, ...] = (16, 24)) -> tuple[Tensor, ...]:
    """A weight, log_alpha, noise and cotangent; about a third of the gates clamped."""
    generator = torch.Generator().manual_seed(0)
    weight, location, cotangent = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    noise = torch.rand(shape, generator=generator, dtype=gate_dtype)
    return (
        weight.to(dtype).requires_grad_(),
        location.to(gate_dtype).requires_grad_(),
        noise,
        cotangent.to(dtype),
    )


def plain(weight: Tensor, log_alpha: Tensor, noise: Tensor, *constants: float) -> Tensor:
    return weight * hc.sample(log_alpha, noise, *constants).to(weight.dtype)


@contextmanager
def packed() -> Iterator[list[Tensor]]:
    """What autograd saves inside the block."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def storage_bytes(tensors: list[Tensor], beyond: tuple[Tensor, ...]) -> int:
    """Bytes of the distinct storages of ``tensors`` that ``beyond`` does not own."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in beyond}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for pointer, size in sizes.items() if pointer not in owned)


@all_constants
@pytest.mark.parametrize(("dtype", "gate_dtype", "tolerance"), DTYPES, ids=str)
def test_value_and_gradients_are_those_of_the_plain_product(
    dtype: torch.dtype, gate_dtype: torch.dtype, tolerance: float, constants: tuple[float, float, float]
) -> None:
    weight, log_alpha, noise, cotangent = problem(dtype, gate_dtype)
    expected = plain(weight, log_alpha, noise, *constants)
    expected_slopes = torch.autograd.grad(expected, (weight, log_alpha), cotangent)
    ours = gated_weight(weight, log_alpha, noise, *constants)
    slopes = torch.autograd.grad(ours, (weight, log_alpha), cotangent)
    assert (ours.dtype, slopes[0].dtype, slopes[1].dtype) == (dtype, dtype, gate_dtype)
    for got, want in zip((ours, *slopes), (expected, *expected_slopes), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_the_problem_has_gates_of_every_kind() -> None:
    _, log_alpha, noise, _ = problem(torch.float64, torch.float64)
    gates = hc.sample(log_alpha, noise)
    assert 0 < int((gates == 0).sum()) < gates.numel() // 2
    assert 0 < int((gates == 1).sum()) < gates.numel() // 2


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2, 2)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    weight, log_alpha, noise, _ = problem(torch.float64, torch.float64, shape)
    torch.testing.assert_close(plain(weight, log_alpha, noise), gated_weight(weight, log_alpha, noise.clone()))


def test_a_transposed_weight() -> None:
    weight, log_alpha, noise, cotangent = problem(torch.float64, torch.float64)
    expected = torch.autograd.grad(plain(weight.t(), log_alpha.t(), noise.t()), (weight, log_alpha), cotangent.t())
    ours = torch.autograd.grad(gated_weight(weight.t(), log_alpha.t(), noise.t()), (weight, log_alpha), cotangent.t())
    torch.testing.assert_close(ours, expected)


@all_constants
def test_first_and_second_gradients(constants: tuple[float, float, float]) -> None:
    weight, log_alpha, noise, _ = problem(torch.float64, torch.float64, (3, 4))

    def fused(w: Tensor, a: Tensor) -> Tensor:
        return gated_weight(w, a, noise.clone(), *constants)

    assert gradcheck(fused, (weight, log_alpha))
    assert gradgradcheck(fused, (weight, log_alpha))


@pytest.mark.parametrize("trained", [0, 1], ids=["weight only", "log_alpha only"])
def test_a_frozen_argument_gets_no_gradient(trained: int) -> None:
    weight, log_alpha, noise, cotangent = problem(torch.float64, torch.float64)
    arguments = [weight, log_alpha]
    (expected,) = torch.autograd.grad(plain(weight, log_alpha, noise), arguments[trained], cotangent)
    arguments[1 - trained].requires_grad_(False)
    gated_weight(weight, log_alpha, noise).backward(cotangent)
    assert arguments[1 - trained].grad is None
    torch.testing.assert_close(arguments[trained].grad, expected)


def test_nothing_is_recorded_when_nothing_is_trained() -> None:
    weight, log_alpha, noise, _ = problem(torch.float64, torch.float64)
    assert not gated_weight(weight.detach(), log_alpha.detach(), noise).requires_grad


def test_torch_func_grad_agrees_with_autograd() -> None:
    weight, log_alpha, noise, cotangent = problem(torch.float64, torch.float64)
    expected = torch.autograd.grad(plain(weight, log_alpha, noise), (weight, log_alpha), cotangent)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return (gated_weight(w, a, noise.clone()) * cotangent).sum()

    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(weight.detach(), log_alpha.detach()), expected)


def test_torch_func_grad_twice_agrees_with_the_plain_product() -> None:
    weight, log_alpha, noise, cotangent = (t.detach() for t in problem(torch.float64, torch.float64, (5,)))

    def curvature(product: Callable[..., Tensor]) -> Tensor:
        def loss(a: Tensor) -> Tensor:
            return ((product(weight, a, noise.clone()) - cotangent) ** 2).sum()

        return torch.func.grad(lambda a: torch.func.grad(loss)(a).sum())(log_alpha)

    torch.testing.assert_close(curvature(gated_weight), curvature(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_saves_one_array_beyond_the_parameters(dtype: torch.dtype) -> None:
    weight, log_alpha, noise, _ = problem(dtype, torch.float32)
    with packed() as saved:
        gated_weight(weight, log_alpha, noise)
    assert storage_bytes(saved, beyond=(weight, log_alpha)) == log_alpha.numel() * log_alpha.element_size()


def test_the_plain_product_saves_several() -> None:
    """The measure sees what the fused function avoids."""
    weight, log_alpha, noise, _ = problem(torch.float32, torch.float32)
    with packed() as saved:
        plain(weight, log_alpha, noise)
    assert storage_bytes(saved, beyond=(weight, log_alpha)) >= 3 * weight.numel() * weight.element_size()


def test_the_gates_take_the_place_of_the_noise() -> None:
    weight, log_alpha, noise, _ = problem(torch.float32, torch.float32)
    gates = hc.sample(log_alpha.detach(), noise)
    with packed() as saved:
        gated_weight(weight, log_alpha, noise)
    torch.testing.assert_close(noise, gates)
    assert storage_bytes(saved, beyond=(weight, log_alpha, noise)) == 0


def test_clamped_gates_pass_no_gradient_to_log_alpha_and_open_ones_all_of_it_to_the_weight() -> None:
    weight, log_alpha, noise, cotangent = problem(torch.float64, torch.float64)
    gates = hc.sample(log_alpha.detach(), noise)
    by_weight, by_alpha = torch.autograd.grad(gated_weight(weight, log_alpha, noise), (weight, log_alpha), cotangent)
    inside = (gates > 0) & (gates < 1)
    assert torch.equal(by_alpha != 0, inside)
    assert not by_weight[gates == 0].any()
    assert torch.equal(by_weight[gates == 1], cotangent[gates == 1])


@pytest.mark.parametrize("location", [-80.0, 0.0, 80.0])
@pytest.mark.parametrize("temperature", [0.01, 2 / 3])
def test_noise_of_exactly_zero_and_one_closes_and_opens(location: float, temperature: float) -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    log_alpha = torch.full((2,), location, requires_grad=True)
    gated = gated_weight(weight, log_alpha, torch.tensor([0.0, 1.0]), temperature)
    by_weight, by_alpha = torch.autograd.grad(gated.sum(), (weight, log_alpha), create_graph=True)
    (curvature,) = torch.autograd.grad(by_weight.sum() + by_alpha.sum(), log_alpha)
    assert gated.tolist() == [0, 3]
    assert by_weight.tolist() == [0, 1]
    assert by_alpha.tolist() == curvature.tolist() == [0, 0]


# --- gates alone ------------------------------------------------------------------------------------------------------


@all_constants
@pytest.mark.parametrize("examples", [(), (5,)], ids=["one draw", "one for each example"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_gates_and_their_gradients_are_those_of_the_formula(
    constants: tuple[float, float, float], examples: tuple[int, ...], dtype: torch.dtype
) -> None:
    log_alpha = torch.randn(16, 24, dtype=dtype).requires_grad_()
    noise = torch.rand(*examples, 16, 24, dtype=dtype)
    before, cotangent = noise.clone(), torch.randn(*examples, 16, 24, dtype=dtype)
    expected = hc.sample(log_alpha, noise, *constants)
    ours = sampled(log_alpha, noise, *constants)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(noise, before)
    slopes = [torch.autograd.grad(z, log_alpha, cotangent)[0] for z in (ours, expected)]
    torch.testing.assert_close(*slopes)


@all_constants
def test_sampled_gates_have_first_and_second_derivatives(constants: tuple[float, float, float]) -> None:
    log_alpha = torch.randn(4, dtype=torch.float64).requires_grad_()
    noise = torch.rand(3, 4, dtype=torch.float64) * 0.9 + 0.05

    def gates(location: Tensor) -> Tensor:
        return sampled(location, noise, *constants).square()

    assert gradcheck(gates, (log_alpha,))
    assert gradgradcheck(gates, (log_alpha,))


def test_sampling_saves_the_gates_and_nothing_else() -> None:
    log_alpha = torch.randn(64, 64).requires_grad_()
    with packed() as saved:
        gates = sampled(log_alpha, torch.rand(64, 64))
    assert storage_bytes(saved, (log_alpha,)) == gates.nbytes
