"""The fused gated weight against the plain product: values, gradients, memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from l0hooks import iter_gates, penalty, sparsify
from l0hooks._torch.memory import PIECE
from l0hooks.gates import expected_count as counting_module
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates.constants import Constants
from l0hooks.gates.expected_count import expected_count
from l0hooks.gates.sampling import _GatedWeight, sampled

pytestmark = pytest.mark.usefixtures("both_ways")
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


class Given:
    """A stream of given uniform numbers."""

    def __init__(self, noise: Tensor) -> None:
        self.left = noise.flatten()

    def uniform_(self, out: Tensor) -> Tensor:
        taken, self.left = self.left.split([out.numel(), self.left.numel() - out.numel()])
        return out.copy_(taken.view_as(out))

    def logistic_(self, out: Tensor, scale: float) -> Tensor:
        return self.uniform_(out).logit_().mul_(scale)


def fused(weight: Tensor, log_alpha: Tensor, noise: Tensor, *constants: float) -> Tensor:
    given = Given(noise), Constants(*constants)
    gated: Tensor = _GatedWeight.apply(weight, log_alpha, *given)  # type: ignore[no-untyped-call]
    return gated


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
    ours = fused(weight, log_alpha, noise, *constants)
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
    torch.testing.assert_close(plain(weight, log_alpha, noise), fused(weight, log_alpha, noise))


def test_a_transposed_weight() -> None:
    weight, log_alpha, noise, cotangent = problem(torch.float64, torch.float64)
    expected = torch.autograd.grad(plain(weight.t(), log_alpha.t(), noise.t()), (weight, log_alpha), cotangent.t())
    ours = torch.autograd.grad(fused(weight.t(), log_alpha.t(), noise.t()), (weight, log_alpha), cotangent.t())
    torch.testing.assert_close(ours, expected)


@all_constants
def test_first_and_second_gradients(constants: tuple[float, float, float]) -> None:
    weight, log_alpha, noise, _ = problem(torch.float64, torch.float64, (3, 4))

    def product(w: Tensor, a: Tensor) -> Tensor:
        return fused(w, a, noise, *constants)

    assert gradcheck(product, (weight, log_alpha))
    assert gradgradcheck(product, (weight, log_alpha))


@pytest.mark.parametrize("trained", [0, 1], ids=["weight only", "log_alpha only"])
def test_a_frozen_argument_gets_no_gradient(trained: int) -> None:
    weight, log_alpha, noise, cotangent = problem(torch.float64, torch.float64)
    arguments = [weight, log_alpha]
    (expected,) = torch.autograd.grad(plain(weight, log_alpha, noise), arguments[trained], cotangent)
    arguments[1 - trained].requires_grad_(False)
    fused(weight, log_alpha, noise).backward(cotangent)
    assert arguments[1 - trained].grad is None
    torch.testing.assert_close(arguments[trained].grad, expected)


def test_nothing_is_recorded_when_nothing_is_trained() -> None:
    weight, log_alpha, noise, _ = problem(torch.float64, torch.float64)
    assert not fused(weight.detach(), log_alpha.detach(), noise).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_saves_one_array_beyond_the_parameters(dtype: torch.dtype) -> None:
    weight, log_alpha, noise, _ = problem(dtype, torch.float32)
    with packed() as saved:
        fused(weight, log_alpha, noise)
    assert storage_bytes(saved, beyond=(weight, log_alpha)) == log_alpha.numel() * log_alpha.element_size()


def test_the_plain_product_saves_several() -> None:
    """The measure sees what the fused function avoids."""
    weight, log_alpha, noise, _ = problem(torch.float32, torch.float32)
    with packed() as saved:
        plain(weight, log_alpha, noise)
    assert storage_bytes(saved, beyond=(weight, log_alpha)) >= 3 * weight.numel() * weight.element_size()


def test_clamped_gates_pass_no_gradient_to_log_alpha_and_open_ones_all_of_it_to_the_weight() -> None:
    weight, log_alpha, noise, cotangent = problem(torch.float64, torch.float64)
    gates = hc.sample(log_alpha.detach(), noise)
    by_weight, by_alpha = torch.autograd.grad(fused(weight, log_alpha, noise), (weight, log_alpha), cotangent)
    inside = (gates > 0) & (gates < 1)
    assert torch.equal(by_alpha != 0, inside)
    assert not by_weight[gates == 0].any()
    assert torch.equal(by_weight[gates == 1], cotangent[gates == 1])


@pytest.mark.parametrize("location", [-80.0, 0.0, 80.0])
@pytest.mark.parametrize("temperature", [0.01, 2 / 3])
def test_noise_of_exactly_zero_and_one_closes_and_opens(location: float, temperature: float) -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    log_alpha = torch.full((2,), location, requires_grad=True)
    gated = fused(weight, log_alpha, torch.tensor([0.0, 1.0]), temperature)
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
    cotangent = torch.randn(*examples, 16, 24, dtype=dtype)
    expected = hc.sample(log_alpha, noise, *constants)
    ours = sampled(log_alpha, Given(noise), Constants(*constants), *examples)
    torch.testing.assert_close(ours, expected)
    slopes = [torch.autograd.grad(z, log_alpha, cotangent)[0] for z in (ours, expected)]
    torch.testing.assert_close(*slopes)


@all_constants
def test_sampled_gates_have_first_and_second_derivatives(constants: tuple[float, float, float]) -> None:
    log_alpha = torch.randn(4, dtype=torch.float64).requires_grad_()
    noise = torch.rand(3, 4, dtype=torch.float64) * 0.9 + 0.05

    def gates(location: Tensor) -> Tensor:
        return sampled(location, Given(noise), Constants(*constants), 3).square()

    assert gradcheck(gates, (log_alpha,))
    assert gradgradcheck(gates, (log_alpha,))


def test_sampling_saves_the_gates_and_nothing_else() -> None:
    log_alpha = torch.randn(64, 64).requires_grad_()
    with packed() as saved:
        gates = sampled(log_alpha, Given(torch.rand(64, 64)), Constants())
    assert storage_bytes(saved, (log_alpha,)) == gates.nbytes


# --- in pieces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 1e-2)], ids=str)
def test_an_array_of_many_pieces_is_gated_as_a_whole(
    dtype: torch.dtype, tolerance: float, trained: tuple[bool, bool]
) -> None:
    weight, log_alpha, noise, cotangent = problem(dtype, torch.float64, (3, PIECE // 2 + 1, 3))
    arguments = [t.requires_grad_(wanted) for t, wanted in zip((weight, log_alpha), trained, strict=True)]
    wanted = [t for t in arguments if t.requires_grad]
    ours, expected = fused(weight, log_alpha, noise), plain(weight, log_alpha, noise)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    slopes = [torch.autograd.grad(product, wanted, cotangent) for product in (ours, expected)]
    torch.testing.assert_close(*slopes, rtol=tolerance, atol=tolerance)


def test_gates_alone_in_many_pieces() -> None:
    _, log_alpha, noise, cotangent = problem(torch.float64, torch.float64, (2 * PIECE + 5,))
    ours, expected = sampled(log_alpha, Given(noise), Constants()), hc.sample(log_alpha, noise)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(z, log_alpha, cotangent) for z in (ours, expected)))


def test_a_gated_weight_may_be_changed_in_place() -> None:
    weight, log_alpha, noise, _ = problem(torch.float32, torch.float32, (16 * PIECE,))
    product = fused(weight, log_alpha, noise)
    product.mul_(2).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * hc.sample(log_alpha.detach(), noise))


def test_gradients_are_added_where_they_lie() -> None:
    """Memory that autograd may not add to is allocated anew at every step."""
    _, log_alpha, noise, cotangent = problem(torch.float32, torch.float32, (16 * PIECE,))
    addresses: list[int] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, location: Tensor) -> Tensor:
            return location.view_as(location)

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            addresses.append(grad.data_ptr())
            return grad

    watched = Watched.apply(log_alpha)
    gates = sampled(watched, Given(noise), Constants())
    count = expected_count(watched, Constants())
    torch.autograd.backward([gates, count], [cotangent, torch.tensor(1.0)])
    assert log_alpha.grad is not None
    assert addresses == [log_alpha.grad.data_ptr()]


# --- the expected count -----------------------------------------------------------------------------------------------


@all_constants
@pytest.mark.parametrize("shape", [(), (5, 3), (PIECE + 7,)], ids=str)
def test_the_expected_count_is_the_sum_of_keep_probabilities(
    constants: tuple[float, float, float], shape: tuple[int, ...]
) -> None:
    log_alpha = torch.randn(shape, dtype=torch.float64).mul_(3).requires_grad_()
    ours, expected = expected_count(log_alpha, Constants(*constants)), hc.keep_prob(log_alpha, *constants).sum()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(3 * count, log_alpha) for count in (ours, expected)))


def test_the_expected_count_of_a_transposed_array_and_its_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    log_alpha = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    monkeypatch.setattr(counting_module, "LEAST_FUSED", 0)
    assert gradcheck(lambda a: expected_count(a.t(), Constants()), (log_alpha,))
    assert gradgradcheck(lambda a: expected_count(a.t(), Constants()).square(), (log_alpha,))


def test_the_expected_count_saves_nothing() -> None:
    log_alpha = torch.randn(PIECE + 7).requires_grad_()
    with packed() as saved:
        expected_count(log_alpha, Constants())
    assert storage_bytes(saved, (log_alpha,)) == 0


# --- the gradient of a count, computed by the node that samples -------------------------------------------------------

SIDE = 200  # 40,000 gates: above the size from which the count is fused


class Pair(torch.nn.Module):
    """Two gated layers, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(2))
        sparsify(self, "weight")

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.two(self.one(x).tanh()).tanh()
        return self.one(hidden)

    @property
    def gates(self) -> list[torch.nn.Parameter]:
        return [gate.log_alpha for _, gate in iter_gates(self)]


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(0)
    return Pair()


def apart(pair: Pair, seed: int = 1, strength: float = 1.0) -> list[Tensor]:
    """The gradients of a loss and of a penalty, each from a backward pass of its own, added."""
    torch.manual_seed(seed)
    slopes = torch.autograd.grad(loss_of(pair), pair.gates)
    counts = torch.autograd.grad(strength * penalty(pair, l0=1.0), pair.gates)
    return [a + b for a, b in zip(slopes, counts, strict=True)]


def loss_of(pair: Pair) -> Tensor:
    x = torch.randn(3, SIDE, generator=torch.Generator().manual_seed(2))
    return pair(x).square().sum() * 100


def count_dense(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows whenever a count computes an array of its own."""
    calls: list[int] = []
    original = counting_module.count_slope

    def counted(*args: Any, out: Tensor | None = None) -> Tensor:
        if out is not None:
            calls.append(1)
        return original(*args, out=out)

    monkeypatch.setattr(counting_module, "count_slope", counted)
    return calls


def test_a_penalty_in_the_loss_is_left_to_the_gates(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = apart(pair, strength=3.0)
    calls = count_dense(monkeypatch)
    torch.manual_seed(1)
    (loss_of(pair) + 3.0 * penalty(pair, l0=1.0)).backward()
    torch.testing.assert_close([a.grad for a in pair.gates], expected)
    assert not calls


@pytest.mark.parametrize("only_gates", [True, False])
def test_gradients_that_are_asked_for_by_name(pair: Pair, only_gates: bool) -> None:
    expected = apart(pair)
    torch.manual_seed(1)
    loss = loss_of(pair) + penalty(pair, l0=1.0)
    wanted = pair.gates if only_gates else [*pair.gates, *pair.parameters()]
    torch.testing.assert_close(list(torch.autograd.grad(loss, wanted))[:2], expected)


def test_a_penalty_alone_pays_for_itself(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_dense(monkeypatch)
    expected = apart(pair)
    assert len(calls) == 2
    torch.manual_seed(1)
    loss, price = loss_of(pair), penalty(pair, l0=1.0)
    price.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([a.grad for a in pair.gates], expected)


def test_a_penalty_computed_before_the_forward_or_between_two(pair: Pair) -> None:
    pair(torch.randn(2, SIDE))
    expected = [a + b for a, b in zip(apart(pair, 1), apart(pair, 5, 0.0), strict=True)]
    early = penalty(pair, l0=0.5)
    torch.manual_seed(1)
    first = loss_of(pair)
    between = penalty(pair, l0=0.5)
    torch.manual_seed(5)
    (first + early + between + loss_of(pair)).backward()
    torch.testing.assert_close([a.grad for a in pair.gates], expected)


def test_a_graph_that_is_kept_may_go_back_twice(pair: Pair) -> None:
    expected = apart(pair)
    torch.manual_seed(1)
    loss = loss_of(pair) + penalty(pair, l0=1.0)
    for _ in range(2):
        loss.backward(retain_graph=True)
    torch.testing.assert_close([a.grad for a in pair.gates], [2 * slope for slope in expected])


def test_what_a_failed_pass_owed_is_forgotten(pair: Pair) -> None:
    expected = apart(pair)
    torch.manual_seed(1)
    x = torch.randn(3, SIDE, generator=torch.Generator().manual_seed(2))
    outputs = pair(x)

    def fail(grad: Tensor) -> None:
        raise KeyError("once")

    handle = outputs.register_hook(fail)
    loss = outputs.square().sum() * 100 + penalty(pair, l0=1.0)
    with pytest.raises(KeyError, match="once"):
        loss.backward(retain_graph=True)
    handle.remove()
    pair.zero_grad()
    loss.backward()
    torch.testing.assert_close([a.grad for a in pair.gates], expected)


def test_a_graph_of_the_gradients_holds_the_penalty(pair: Pair) -> None:
    expected = apart(pair)
    torch.manual_seed(1)
    slopes = torch.autograd.grad(loss_of(pair) + penalty(pair, l0=1.0), pair.gates, create_graph=True)
    torch.testing.assert_close([s.detach() for s in slopes], expected)
    sum(s.square().sum() for s in slopes).backward()
    assert all(a.grad is not None and a.grad.isfinite().all() for a in pair.gates)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_beside_a_penalty(pair: Pair, reentrant: bool) -> None:
    expected = apart(pair)
    x = torch.randn(3, SIDE, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(1)
    loss = checkpoint(pair, x, use_reentrant=reentrant).square().sum() * 100
    (loss + penalty(pair, l0=1.0)).backward()
    torch.testing.assert_close([a.grad for a in pair.gates], expected)


def test_frozen_gates_owe_nothing(pair: Pair) -> None:
    for location in pair.gates:
        location.requires_grad_(False)
    (loss_of(pair) + penalty(pair, l0=1.0)).backward()
    assert all(location.grad is None for location in pair.gates)


def test_a_copy_does_not_know_the_graph_of_its_original(pair: Pair) -> None:
    loss = loss_of(pair)
    twin = copy.deepcopy(pair)
    (loss + penalty(twin, l0=1.0)).backward()
    for ours, theirs in zip(pair.gates, twin.gates, strict=True):
        p = torch.sigmoid(theirs.detach() - hc.closing_point())
        torch.testing.assert_close(theirs.grad, p * (1 - p))
        assert ours.grad is not None
        assert not torch.equal(ours.grad, theirs.grad)
