"""What attacks on the fast drawing of gates found: each failed once."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import l0hooks
from l0hooks._torch import memory
from l0hooks._torch.memory import PIECE, fresh
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates.gate import Gate
from l0hooks.gates.noise import _uniform_op
from l0hooks.gates.random import LEAST_FOR_PACKED, stream
from l0hooks.gates.shared_sampling import SharedSampling

pytestmark = pytest.mark.usefixtures("both_ways")
CPU = torch.device("cpu")


def coupled(*widths: int, noise: str = "step") -> nn.Sequential:
    """Linear layers of these widths; every hidden one is a group of gates."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*layers)
    spec = l0hooks.GateSpec(granularity="coupled", noise=noise, init_mean=0.5)  # type: ignore[arg-type]
    l0hooks.sparsify(model, spec, example_inputs=(torch.randn(2, widths[0]),))
    return model.train()


def gates_of(model: nn.Module) -> list[Gate]:
    return [gate for _, gate in l0hooks.iter_gates(model)]


def test_coupled_gates_that_fill_more_than_one_piece_of_the_cache() -> None:
    model, x = coupled(2, PIECE + 8, 1), torch.randn(3, 2)
    (gate,), reader = gates_of(model), model[1]
    torch.manual_seed(1)
    y = model(x)
    y.sum().backward()
    torch.manual_seed(1)
    uniform = gate.noise()  # outside a forward: the same ticket
    z = hc.sample(gate.log_alpha.detach(), uniform)
    plain = nn.functional.linear(model[0](x), reader.parametrizations.weight.original * z, reader.bias)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-3)
    assert gate.log_alpha.grad is not None


@pytest.mark.parametrize("noise", ["step", "example"])
def test_an_empty_batch(noise: str) -> None:
    model = coupled(4, 6, 5, noise=noise)
    y = model(torch.randn(0, 4))
    y.sum().backward()
    assert y.shape == (0, 5)
    assert not any(gate.log_alpha.grad.any() for gate in gates_of(model))  # type: ignore[union-attr]


@pytest.mark.parametrize("noise", ["step", "example"])
def test_gates_that_a_part_of_a_model_does_not_read_get_no_gradient(noise: str) -> None:
    """A gradient of zero, where None is due, lets an optimiser with momentum move them."""
    model = coupled(4, 6, 7, 5, 2, noise=noise)
    first, *others = gates_of(model)
    model[1](torch.randn(3, 6)).sum().backward()
    assert first.log_alpha.grad is not None
    assert first.log_alpha.grad.any()
    assert [gate.log_alpha.grad for gate in others] == [None, None]


def test_gates_of_two_dtypes_keep_theirs_and_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = coupled(4, 6, 7, 2)
    first, _ = gates_of(model)
    first.log_alpha = nn.Parameter(first.log_alpha.detach().double())
    pairs: list[tuple[Tensor, Tensor]] = []
    together = SharedSampling.sample

    def both(self: SharedSampling, gate: Gate, examples: int | None = None) -> Tensor:
        pairs.append((together(self, gate, examples), gate.sample(examples)))
        return pairs[-1][0]

    monkeypatch.setattr(SharedSampling, "sample", both)
    model(torch.randn(3, 4))
    assert [ours.dtype for ours, _ in pairs] == [torch.float64, torch.float32]
    for ours, alone in pairs:
        torch.testing.assert_close(ours, alone)


# --- derivatives of derivatives of other kinds ------------------------------------------------------------------------


def weights(size: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(size, 4)
    l0hooks.sparsify(model, l0hooks.GateSpec(init_mean=0.5))
    return model.train()


def held() -> nn.Module:
    model = weights(6)
    l0hooks.set_budget(model, l0hooks.Budget(keep=5, steps=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "weights": lambda: with_output(weights(6)),
    "many weights": lambda: with_output(weights(LEAST_FOR_PACKED // 4 + 3)),
    "held weights": lambda: with_output(held()),
    "coupled": lambda: with_output(coupled(6, 7, 5)),
    "coupled, by example": lambda: with_output(coupled(6, 7, 5, noise="example")),
    "a gate": lambda: (gate := Gate(9, init_mean=0.5), gate()),
    "expected count": lambda: (gate := Gate(LEAST_FOR_PACKED), gate.expected_l0()[None]),
}


def with_output(model: nn.Module) -> tuple[nn.Module, Tensor]:
    size = next(site.weight.shape[1] for site in iter_sites(model)) if isinstance(model, nn.Linear) else 6
    return model, model(torch.randn(3, size))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batched", ["is_grads_batched", "vmap"])
def test_a_batch_of_gradients_at_once(case: str, batched: str) -> None:
    model, y = CASES[case]()
    parameters = [
        p for p in model.parameters() if p.grad_fn is None and torch.autograd.grad(y.sum(), p, **KEEP)[0] is not None
    ]
    cotangents = torch.randn(3, *y.shape)
    each = [torch.autograd.grad(y, parameters, v, retain_graph=True) for v in cotangents]
    if batched == "vmap":
        at_once: Any = torch.func.vmap(lambda v: torch.autograd.grad(y, parameters, v, retain_graph=True))(cotangents)
    else:
        at_once = torch.autograd.grad(y, parameters, cotangents, is_grads_batched=True)
    torch.testing.assert_close(at_once, tuple(map(torch.stack, zip(*each, strict=True))))


KEEP: dict[str, Any] = {"retain_graph": True, "allow_unused": True}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for some derivatives
@pytest.mark.parametrize("ask", [Gate.sample, Gate.expected_l0], ids=["sample", "expected count"])
def test_forward_mode(ask: Callable[[Gate], Tensor]) -> None:
    gate = Gate(LEAST_FOR_PACKED, init_mean=0.5)
    torch.manual_seed(0)
    y = ask(gate)
    (slope,) = torch.autograd.grad(y.sum(), gate.log_alpha)
    location = gate.log_alpha.detach()
    del gate.log_alpha
    with forward_ad.dual_level():
        gate.log_alpha = forward_ad.make_dual(location, torch.ones_like(location))  # type: ignore[assignment]
        torch.manual_seed(0)
        tangent = forward_ad.unpack_dual(ask(gate)).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent.sum(), slope.sum(), rtol=1e-4, atol=1e-4)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_numbers_in_half_precision_lie_between_zero_and_one(dtype: torch.dtype) -> None:
    """65,535 levels do not fit into a float16."""
    drawn = stream(3, 1 << 20, CPU).uniform_(torch.empty(1 << 20, dtype=dtype))
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1
    wide = stream(3, 1 << 20, CPU).uniform_(torch.empty(1 << 20))
    assert torch.equal(drawn, wide.to(dtype))


@pytest.mark.parametrize("shape", [(3, 5), (LEAST_FOR_PACKED // 8, 9)])
def test_the_compiler_is_told_the_strides_of_the_noise(shape: tuple[int, int]) -> None:
    for like in (torch.empty(shape).t(), torch.empty(shape[0], 1).expand(shape)):
        torch.library.opcheck(_uniform_op, (torch.tensor(3), 0, like))


@pytest.mark.parametrize("size", [10, LEAST_FOR_PACKED])
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-44])
def test_a_temperature_near_zero_gives_binary_gates(size: int, temperature: float) -> None:
    """1/β is then beyond what a float32 holds."""
    gate = Gate(size, init_mean=0.5, temperature=temperature)
    z = gate()
    z.sum().backward()
    assert gate.log_alpha.grad is not None
    assert gate.log_alpha.grad.isfinite().all()
    if temperature < 1e-3:
        assert set(z.tolist()) == {0, 1}


def test_another_thread_may_take_the_last_block() -> None:
    class Taken(list[Any]):
        """A list that another thread empties between a look and a pop."""

        def __bool__(self) -> bool:
            return True

    size = 4 * (2**19 + 128)
    memory._free[size] = Taken()
    try:
        assert fresh((size // 4,), torch.float32, CPU).nbytes == size
    finally:
        memory._free.pop(size, None)


def test_a_forward_leaves_no_tensor_behind() -> None:
    """One small tensor for each, kept for recomputation, split the heap: the process grew by half a megabyte a step."""
    model, x = weights(6), torch.randn(2, 6)

    def alive_after(steps: int) -> int:
        for _ in range(steps):
            model(x).sum().backward()
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    assert alive_after(1) == alive_after(20)
