"""Gates sampled once for all readers of a forward: the same noise and gradients as each for itself."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l0hooks
from l0hooks.gates import shared_sampling
from l0hooks.gates.gate import Gate
from l0hooks.gates.shared_sampling import SharedSampling


class Residual(nn.Module):
    """Two groups, one with three readers; its middle can be checkpointed; two outputs that share the gates alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 2)
        self.rerun: Callable[..., Tensor] | None = None

    def middle(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = self.middle(x) if self.rerun is None else self.rerun(self.middle, x)
        return self.one(x), self.two(x)


def made(noise: str = "step") -> Residual:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 5)
    spec = l0hooks.GateSpec(granularity="coupled", noise=noise, init_keep_prob=0.6)  # type: ignore[arg-type]
    l0hooks.sparsify(model, spec, example_inputs=(x,))
    assert len(list(l0hooks.iter_gates(model))) == 2
    return model.train()


def example() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    one, two = run()
    (one.square().sum() + two.sum()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@contextmanager
def apart() -> Iterator[None]:
    """Every reader samples for itself."""
    original = SharedSampling.sample
    SharedSampling.sample = lambda self, gate, examples=None: gate.sample(examples)  # type: ignore[method-assign]
    try:
        yield
    finally:
        SharedSampling.sample = original  # type: ignore[method-assign]


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many draws of several gates together were made."""
    calls: list[int] = []
    original = shared_sampling._sample

    def sample(gates: list[Gate], *args: object) -> object:
        calls.append(len(gates))
        return original(gates, *args)  # type: ignore[arg-type]

    shared_sampling._sample = sample  # type: ignore[assignment]
    try:
        yield calls
    finally:
        shared_sampling._sample = original


@pytest.mark.parametrize("noise", ["step", "example"])
def test_one_draw_serves_all_readers_and_changes_nothing(noise: str) -> None:
    model, x = made(noise), example()
    with counted() as calls:
        together = gradients(model, lambda: model(x))
    assert calls == [2]
    with apart(), counted() as calls:
        each = gradients(model, lambda: model(x))
    assert calls == []
    torch.testing.assert_close(together, each)


def test_every_forward_draws_anew() -> None:
    model, x = made(), example()
    with counted() as calls:
        first, second = model(x)[0], model(x)[0]
    assert not torch.equal(first, second)
    assert calls == [2, 2]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("noise", ["step", "example"])
def test_a_checkpointed_part_sees_the_noise_of_the_whole(noise: str, reentrant: bool) -> None:
    model, x = made(noise), example()
    expected = gradients(model, lambda: model(x))
    model.rerun = lambda middle, value: checkpoint(middle, value, use_reentrant=reentrant, preserve_rng_state=False)
    torch.testing.assert_close(gradients(model, lambda: model(x)), expected)


def test_saved_tensors_may_be_moved_away() -> None:
    model, x = made(), example()
    expected = gradients(model, lambda: model(x))
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(model, lambda: model(x)), expected)


def test_two_losses_of_one_forward_may_go_back_one_after_the_other() -> None:
    """Where their graphs have nothing but the gates in common, as without gates."""
    model, x = nn.ModuleDict({"a": nn.Linear(5, 6), "b": nn.Linear(6, 2), "c": nn.Linear(6, 2)}), example()

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.parts["a"](x)
            return self.parts["b"](hidden.detach()), self.parts["c"](hidden.detach())

    heads = Heads()
    group = l0hooks.structure.declare_group(heads, outputs="parts.a", inputs=["parts.b", "parts.c"])
    l0hooks.sparsify(heads, "coupled", example_inputs=(x,), groups=[group])
    gate = next(gate for _, gate in l0hooks.iter_gates(heads))
    with counted() as calls:
        one, two = heads(x)
    assert calls == [1]
    one.sum().backward()
    two.sum().backward()
    assert gate.log_alpha.grad is not None


def test_second_derivatives_go_through_a_shared_draw() -> None:
    model, x = made(), example().requires_grad_()
    torch.manual_seed(3)
    (slope,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with apart():
        torch.manual_seed(3)
        (slope,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
        slope.square().sum().backward()
    torch.testing.assert_close(ours, [p.grad for p in model.parameters() if p.grad is not None])


def test_without_gradients_first_then_with_them() -> None:
    model, x = made(), example()

    def rerun(middle: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        with torch.no_grad():
            middle(value)
        return middle(value)

    expected = gradients(model, lambda: model(x))
    model.rerun = rerun
    torch.testing.assert_close(gradients(model, lambda: model(x)), expected)


def test_parameters_that_stand_in_within_a_forward_are_used() -> None:
    model, x = made(), example()
    inner = model.up.named_parameters()
    closed = {name: torch.full_like(v, -10.0) if name.endswith("log_alpha") else v for name, v in inner}

    def rerun(middle: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        middle(value)
        assert torch.equal(torch.func.functional_call(model.up, closed, (value,)), model.up.bias.expand(4, -1))
        return value

    model.rerun = rerun
    model(x)


def test_nothing_of_a_forward_outlives_its_graph() -> None:
    model, x = made(), example()
    outputs = model(x)
    assert next(gate for _, gate in l0hooks.iter_gates(model)).shared is None
    assert alive("_Sample") == 0
    assert alive("_SampledTogetherBackward") == 1
    del outputs
    assert alive("_SampledTogetherBackward") == 0


def alive(name: str) -> int:
    gc.collect()
    return sum(type(thing).__name__ == name for thing in gc.get_objects())


def test_an_interrupted_forward_leaves_no_draw_behind() -> None:
    model, x = made(), example()

    def interrupt(*_: object) -> Tensor:
        raise KeyboardInterrupt

    model.rerun = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.rerun = None
    assert not torch.equal(model(x)[0], model(x)[0])


def test_a_copy_made_after_a_forward_samples_for_itself() -> None:
    model, x = made(), example()
    loss = model(x)[0].sum()
    twin = copy.deepcopy(model)
    loss.backward()
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(twin):
            gate.log_alpha.fill_(-10.0)
    assert torch.equal(twin(x)[0], twin.one.bias.expand(4, -1))
    assert not torch.equal(model(x)[0], model.one.bias.expand(4, -1))


def test_gates_of_several_temperatures_are_drawn_by_kinds() -> None:
    model, x = made(), example()
    (_, first), _ = l0hooks.iter_gates(model)
    first.temperature = 0.3
    with counted() as calls:
        together = gradients(model, lambda: model(x))
    assert calls == [1, 1]
    with apart():
        torch.testing.assert_close(together, gradients(model, lambda: model(x)))


def test_a_finished_budget_is_left_to_the_gates() -> None:
    model, x = made(), example()
    l0hooks.set_budget(model, l0hooks.Budget(keep=6, steps=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[0].sum().backward()
        optimizer.step()
    assert torch.equal(model(x)[0], model(x)[0])
