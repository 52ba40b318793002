"""A step of an optimiser reaches the gates that it moves, all of them, and no others."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0hooks import Gate, iter_gates, sparsify


class ReadsTwice(nn.Module):
    """Reads one gated weight before and after something else happens in its forward."""

    def __init__(self, between: Callable[[], object]) -> None:
        super().__init__()
        self.layer, self.between = nn.Linear(30, 20), between

    def forward(self) -> tuple[Tensor, Tensor]:
        first = self.layer.weight
        self.between()
        return first, self.layer.weight


def step_of_another() -> None:
    other = nn.Linear(3, 3)
    sparsify(other, "weight")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def in_a_thread() -> None:
    thread = threading.Thread(target=step_of_another)
    thread.start()
    thread.join()


@pytest.mark.parametrize("between", [step_of_another, in_a_thread])
def test_a_step_of_another_optimiser_leaves_a_running_forward_its_noise(between: Callable[[], object]) -> None:
    model = ReadsTwice(between)
    sparsify(model, "weight")
    first, second = model()
    assert torch.equal(first, second)
    assert not torch.equal(first, model()[0])


def test_an_interrupted_forward_is_over_after_a_step_of_its_own_optimiser() -> None:
    model = nn.Sequential(nn.Linear(30, 20))
    sparsify(model, "weight")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (_, gate), *_ = iter_gates(model)
    gate.noise_source.source.owner = "a forward that never ended"
    stuck = model[0].weight
    assert torch.equal(stuck, model[0].weight)
    optimizer.step()
    assert not torch.equal(model[0].weight, model[0].weight)


def beyond_the_limits(gate: Gate) -> bool:
    return bool((gate.log_alpha > gate.limits[1]).any())


@torch.no_grad()
def push(gate: Gate) -> None:
    gate.log_alpha.fill_(gate.limits[1] + 100)


def held(gate: Gate, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step brings the gate back into its limits."""
    push(gate)
    optimizer.step()
    return not beyond_the_limits(gate)


def test_gates_that_an_optimiser_does_not_hold_are_left_alone() -> None:
    mine, others = Gate(3), Gate(3)
    optimizer = torch.optim.SGD([mine.log_alpha], lr=0.1)
    assert held(mine, optimizer)
    assert not held(others, optimizer)


def added(gate: Gate, optimizer: torch.optim.Optimizer) -> Gate:
    optimizer.add_param_group({"params": [gate.log_alpha]})
    return gate


def put_in_place(gate: Gate, optimizer: torch.optim.Optimizer) -> Gate:
    optimizer.param_groups[0]["params"] = [gate.log_alpha]
    return gate


def put_among(gate: Gate, optimizer: torch.optim.Optimizer) -> Gate:
    optimizer.param_groups[0]["params"][0] = gate.log_alpha
    return gate


def new_parameter(gate: Gate, optimizer: torch.optim.Optimizer) -> Gate:
    gate.log_alpha = optimizer.param_groups[0]["params"][0]
    return gate


def assigned(gate: Gate, optimizer: torch.optim.Optimizer) -> Gate:
    state = {"log_alpha": torch.zeros(3), "_extra_state": gate.get_extra_state()}
    gate.load_state_dict(state, assign=True)
    optimizer.param_groups[0]["params"] = [gate.log_alpha]
    return gate


def copied(gate: Gate, optimizer: torch.optim.Optimizer) -> Gate:
    twin = copy.deepcopy(gate)
    optimizer.param_groups[0]["params"] = [twin.log_alpha]
    return twin


@pytest.mark.parametrize("change", [added, put_in_place, put_among, new_parameter, assigned, copied])
def test_a_gate_that_an_optimiser_comes_to_hold_is_found(change: Callable[..., Gate]) -> None:
    gate = Gate(3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    assert not held(gate, optimizer)
    assert held(change(gate, optimizer), optimizer)


def test_a_gate_that_an_optimiser_no_longer_holds_is_left_alone() -> None:
    gate = Gate(3)
    optimizer = torch.optim.SGD([gate.log_alpha], lr=0.1)
    assert held(gate, optimizer)
    gate.log_alpha = nn.Parameter(torch.zeros(3))
    assert not held(gate, optimizer)


def test_gates_made_in_another_thread_do_not_disturb_a_step() -> None:
    stop, made = threading.Event(), []

    def make() -> None:
        while not stop.is_set():
            made.append(Gate(2))

    thread = threading.Thread(target=make)
    thread.start()
    failures: list[Any] = []
    try:
        for _ in range(60):
            optimizer = torch.optim.SGD([Gate(2).log_alpha], lr=0.1)
            optimizer.step()
    except RuntimeError as error:
        failures.append(error)
    finally:
        stop.set()
        thread.join()
    assert not failures


def test_an_optimiser_keeps_no_gate_alive() -> None:
    gate = Gate(3)
    optimizer = torch.optim.SGD([gate.log_alpha, nn.Parameter(torch.zeros(2))], lr=0.1)
    optimizer.step()
    watched = weakref.ref(gate)
    del gate
    gc.collect()
    assert watched() is None
    optimizer.step()
