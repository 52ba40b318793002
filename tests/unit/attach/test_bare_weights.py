"""Gates on parameters that belong to no layer of torch: stacked experts, bare matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l0hooks
from l0hooks.errors import SpecError, UnsupportedModuleError


class Experts(nn.Module):
    """Stacked weights that its own code multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 4))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("beh,eho->bo", torch.einsum("bi,eoi->beo", x, self.up), self.down.mT) * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(5, 6), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.first(x))


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("granularity", ["weight", "output", (2, 2)])
def test_gates_lie_over_each_expert_and_fold_into_its_weights(granularity: Any) -> None:
    model = Model()
    report = l0hooks.sparsify(model, {"experts": granularity}, example_inputs=(X,))
    shapes = {"weight": [(3, 4, 6), (3, 6, 4)], "output": [(3,), (3,)], (2, 2): [(3, 2, 3), (3, 3, 2)]}[granularity]
    gates = [gate for _, gate in l0hooks.iter_gates(model)]
    assert [tuple(gate.log_alpha.shape) for gate in gates] == shapes
    assert report.parameters == 2 * 72
    dense = model.experts.parametrizations.up.original.detach().clone()
    with torch.no_grad():
        for gate in gates:
            gate.log_alpha.fill_(14.0)
            gate.log_alpha[1] = -5.0
    model.eval()
    assert torch.equal(model.experts.up[0], dense[0])
    assert not model.experts.up[1].any()
    small = l0hooks.prune(model, example_inputs=(X,))
    assert torch.equal(small(X), model(X))
    assert type(small.experts) is Experts


def test_one_block_multiplies_one_block() -> None:
    model = Model()
    l0hooks.sparsify(model, {"experts": (2, 2)})
    gate = model.experts.parametrizations.up[0].gate
    with torch.no_grad():
        gate.log_alpha.fill_(14.0)
        gate.log_alpha[2, 1, 0] = -5.0
    changed = (model.eval().experts.up == 0).nonzero()
    assert changed.tolist() == [[2, 2, 0], [2, 2, 1], [2, 3, 0], [2, 3, 1]]


def test_gates_train() -> None:
    model = Model()
    l0hooks.sparsify(model, {"exp*": "output"}, budget=l0hooks.Budget(keep=4, steps=2))
    optimizer = torch.optim.SGD(l0hooks.param_groups(model, lr=1e-3, gate_lr=0.1))
    for _ in range(3):
        model(X).square().mean().backward()
        assert all(gate.log_alpha.grad is not None for _, gate in l0hooks.iter_gates(model))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(int(gate.support().sum()) for _, gate in l0hooks.iter_gates(model)) == 4


def test_a_pattern_that_means_layers_leaves_other_parameters_alone() -> None:
    model = Model()
    report = l0hooks.sparsify(model, {"*": "weight"})
    assert [row.name for row in report.rows] == ["first"]
    assert report.ungated == ("experts (Experts)",)


@pytest.mark.parametrize("granularity", ["input", "kernel"])
def test_axes_that_nothing_names_are_refused(granularity: str) -> None:
    model = Model()
    with pytest.raises(SpecError, match="nothing says which axis is read"):
        l0hooks.sparsify(model, {"experts": granularity})
    assert not list(l0hooks.iter_gates(model))


def test_blocks_must_divide_the_last_two_axes() -> None:
    with pytest.raises(SpecError, match="block sizes must divide the last two axes") as caught:
        l0hooks.sparsify(Model(), {"experts": (3, 5)})
    assert "rows dividing 4, cols dividing 6" in str(caught.value)


def test_a_module_with_vectors_alone_is_still_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match="gates attach to the weights of"):
        l0hooks.sparsify(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), {"1": "weight"})
