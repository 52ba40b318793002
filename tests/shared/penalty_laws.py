"""The laws of every penalty, as an abstract test case. A subclass writes what one gate and one weight cost."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from l0hooks import Gate, iter_gates, penalty, sparsify

# layer, example input, and how often each weight works on one example
LAYERS: dict[str, tuple[Any, Any, int]] = {
    "linear": (lambda: nn.Linear(4, 6), (3, 5, 4), 5),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 5, 7), 3 * 4),
    "grouped": (lambda: nn.Conv2d(8, 4, (3, 1), groups=2), (1, 8, 6, 5), 4 * 5),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), 3 * 3),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 3, groups=2, stride=2), (2, 8, 3, 4), 3 * 4),
    "embedding": (lambda: nn.Embedding(4, 6), None, 0),
}
GRANULARITIES = ["weight", "input", "output", "kernel", (2, 2)]


def keep(log_alpha: Any, temperature: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1) -> float:
    """P(z ≠ 0) of one gate, in plain Python."""
    return 1 / (1 + math.exp(-(float(log_alpha) - temperature * math.log(-gamma / zeta))))


def gate_of_element(layer: nn.Module, granularity: Any, index: Sequence[int]) -> tuple[int, ...]:
    """The gate that multiplies one element of the weight, by the layer's own geometry."""
    first, second, *_ = index
    transposed = isinstance(layer, (nn.ConvTranspose2d, nn.Embedding))
    groups = layer.groups if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else 1
    per_group = layer.weight.shape[0] // groups
    other = first // per_group * layer.weight.shape[1] + second  # number of the channel on the second axis
    output, inner = (other, first) if transposed else (first, other)
    if granularity == "weight":
        return tuple(index)
    if granularity == "kernel":
        return first, second
    if isinstance(granularity, tuple):
        rows, cols = granularity[::-1] if transposed else granularity
        return first // rows, second // cols
    return (output,) if granularity == "output" else (inner,)


class PenaltyLaws(abc.ABC):
    """What holds for every penalty: value, gradient, and which gates it counts."""

    name: ClassVar[str]
    strength: ClassVar[float | tuple[float, ...]] = 1.0
    counts_closed: ClassVar[bool] = False  # weights whatever their gates are

    def of_gate(self, keep_prob: float) -> float:
        """What one gate costs, beside the weights behind it."""
        return 0.0

    def of_element(self, keep_prob: float, weight: float, uses: int) -> float:
        """What one weight costs that is used so often for one example."""
        return 0.0

    def scaled(self, factor: float) -> Any:
        return tuple(factor * s for s in self.strength) if isinstance(self.strength, tuple) else factor * self.strength

    def price(self, model: nn.Module, strength: Any = None) -> Tensor:
        return penalty(model, **{self.name: self.strength if strength is None else strength})

    def gated(self, name: str, granularity: Any) -> tuple[nn.Module, Gate, dict[Any, Any], Tensor, int]:
        """A gated layer with different gates; the gate of each element, the weight, and its uses."""
        make, shape, uses = LAYERS[name]
        layer = make()
        if name == "depthwise" and isinstance(granularity, tuple):
            granularity = (1, 1)
        weight = layer.weight.detach().clone()
        places = itertools.product(*map(range, weight.shape))
        gates = {index: gate_of_element(layer, granularity, index) for index in places}
        model = nn.Sequential(layer)
        example = torch.zeros(2, 3, dtype=torch.long) if shape is None else torch.randn(shape)
        sparsify(model, {"0": granularity}, example_inputs=(example,))
        ((_, gate),) = iter_gates(model)
        with torch.no_grad():
            gate.log_alpha.uniform_(-3, 3)
        return model, gate, gates, weight, uses

    def expected(self, log_alpha: Tensor, gates: dict[Any, Any], weight: Tensor, uses: int) -> float:
        """The sum over gates and elements, one after the other."""
        whole = sum(self.of_gate(keep(a)) for a in log_alpha.flatten())
        return whole + sum(
            self.of_element(keep(log_alpha[gate]), float(weight[index]), uses) for index, gate in gates.items()
        )

    @pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_the_value_is_the_sum_over_the_elements(self, name: str, granularity: Any) -> None:
        model, gate, *rest = self.gated(name, granularity)
        value = self.price(model)
        assert value.item() == pytest.approx(self.expected(gate.log_alpha.detach(), *rest), rel=1e-5, abs=1e-7)
        assert self.price(model, self.scaled(2.5)).item() == pytest.approx(2.5 * value.item(), rel=1e-6)
        assert self.price(model.eval()).item() == value.item()

    @pytest.mark.parametrize(("name", "granularity"), [("linear", "input"), ("grouped", (2, 2)), ("conv", "output")])
    def test_the_gradient_is_the_slope_of_the_value(self, name: str, granularity: Any) -> None:
        model, gate, gates, weight, uses = self.gated(name, granularity)
        self.price(model).backward()
        dense, step = model[0].parametrizations.weight.original, 1e-4
        for tensor, place in ((gate.log_alpha, (0,) * gate.log_alpha.dim()), (dense, (1,) * weight.dim())):
            place = tuple(min(n - 1, at) for n, at in zip(tensor.shape, place, strict=True))
            ends = []
            for sign in (-1, 1):
                moved = [t.detach().double().clone() for t in (gate.log_alpha, weight)]
                moved[tensor is dense][place] += sign * step
                ends.append(self.expected(moved[0], gates, moved[1], uses))
            found = 0.0 if tensor.grad is None else float(tensor.grad[place])
            assert found == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-4, abs=1e-5)

    def test_it_is_a_differentiable_scalar_in_float32(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6).double())
        sparsify(model, "weight", example_inputs=(torch.zeros(1, 4, dtype=torch.float64),))
        value = self.price(model)
        assert value.shape == ()
        assert value.dtype == torch.float32
        value.backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())

    def test_a_closed_gate_costs_nothing(self) -> None:
        model, gate, _, weight, uses = self.gated("linear", "output")
        with torch.no_grad():
            gate.log_alpha.fill_(60.0)[1] = -60.0
        left = [row for number, row in enumerate(weight) if self.counts_closed or number != 1]
        each = sum(self.of_element(1.0, float(w), uses) for w in torch.cat(left))
        assert self.price(model).item() == pytest.approx(each + 5 * self.of_gate(1.0), rel=1e-5)

    def test_strengths_are_named_by_patterns(self) -> None:
        model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 3), "c": Gate(5, init_keep_prob=0.5)})
        for name in "ab":
            shape = (1, model[name].in_features)
            sparsify(model[name], "weight", example_inputs=(torch.zeros(shape),))
        parts = {name: self.price(model[name]).item() for name in "abc"}
        assert self.price(model).item() == pytest.approx(sum(parts.values()), rel=1e-5)
        found = self.price(model, {"a": self.scaled(1.0), "[bc]": self.scaled(10.0)})
        assert found.item() == pytest.approx(parts["a"] + 10 * (parts["b"] + parts["c"]), rel=1e-5)
        assert self.price(model, {"b": self.scaled(3.0)}).item() == pytest.approx(3 * parts["b"], rel=1e-5)

    def test_a_gate_that_stands_alone_has_no_weights_to_count(self) -> None:
        gates = nn.ModuleDict({"few": Gate(4, init_keep_prob=0.75), "more": Gate((2, 5), init_keep_prob=0.25)})
        expected = 4 * self.of_gate(0.75) + 10 * self.of_gate(0.25)
        assert self.price(gates).item() == pytest.approx(expected, rel=1e-5)
