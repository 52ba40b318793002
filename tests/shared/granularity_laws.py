"""The laws of every shape of gates, as an abstract test case. A subclass writes which gate multiplies what."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from l0hooks import Gate, iter_gates, penalty, prune, sparsify
from l0hooks.attach.spec import Shorthand
from l0hooks.attach.walk import iter_gated
from l0hooks.training.cost import size_of

Index = tuple[int, ...]


class Layer(NamedTuple):
    """A layer, the shape of an example, and the axes of its weight: which one counts the inputs, and how many groups.

    The first axis of the weight counts the channels of all groups, the second those of one.
    """

    make: Callable[[], nn.Module]
    example: Index
    inputs: int
    outputs: int
    groups: int = 1
    input_first: bool = False

    def batch(self) -> Tensor:
        if self.example == (3,):
            return torch.arange(self.inputs)[:, None].expand(-1, 3).contiguous()  # tokens
        return torch.randn(2, *self.example)

    def channels(self, first: int, second: int) -> tuple[int, int]:
        """The output and the input channel that a place on the first two axes of the weight connects."""
        sides = (self.inputs, self.outputs) if self.input_first else (self.outputs, self.inputs)
        other = first // (sides[0] // self.groups) * (sides[1] // self.groups) + second
        return (other, first) if self.input_first else (first, other)


LAYERS = {
    "linear": Layer(lambda: nn.Linear(6, 4), (6,), 6, 4),
    "conv1d": Layer(lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 5), 4, 6),
    "conv2d": Layer(lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (4, 5, 5), 4, 6),
    "conv3d": Layer(lambda: nn.Conv3d(2, 4, 2, dilation=2), (2, 4, 4, 4), 2, 4),
    "conv1d_grouped": Layer(lambda: nn.Conv1d(8, 4, 3, groups=2), (8, 5), 8, 4, 2),
    "conv2d_grouped": Layer(lambda: nn.Conv2d(6, 12, 3, groups=3), (6, 4, 4), 6, 12, 3),
    "conv3d_grouped": Layer(lambda: nn.Conv3d(4, 8, 2, groups=2), (4, 3, 3, 3), 4, 8, 2),
    "depthwise": Layer(lambda: nn.Conv1d(4, 4, 3, groups=4), (4, 5), 4, 4, 4),
    "depthwise_twofold": Layer(lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 4, 4), 4, 8, 4),
    "transposed1d": Layer(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 3), 4, 6, 1, True),
    "transposed2d": Layer(lambda: nn.ConvTranspose2d(4, 6, (2, 3)), (4, 3, 3), 4, 6, 1, True),
    "transposed3d": Layer(lambda: nn.ConvTranspose3d(2, 4, 2), (2, 3, 3, 3), 2, 4, 1, True),
    "transposed1d_grouped": Layer(lambda: nn.ConvTranspose1d(8, 4, 3, groups=2), (8, 3), 8, 4, 2, True),
    "transposed2d_grouped": Layer(lambda: nn.ConvTranspose2d(6, 12, 3, groups=3), (6, 3, 3), 6, 12, 3, True),
    "transposed3d_grouped": Layer(lambda: nn.ConvTranspose3d(4, 8, 2, groups=2), (4, 2, 2, 2), 4, 8, 2, True),
    "transposed_depthwise": Layer(lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (4, 3, 3), 4, 4, 4, True),
    "hf_conv1d": Layer(lambda: Conv1D(4, 6), (6,), 6, 4, 1, True),
    "embedding": Layer(lambda: nn.Embedding(6, 4), (3,), 6, 4, 1, True),
    "embedding_bag": Layer(lambda: nn.EmbeddingBag(6, 4, mode="sum"), (3,), 6, 4, 1, True),
}


def elements(weight: Tensor) -> Iterator[Index]:
    return itertools.product(*map(range, weight.shape))


class GranularityLaws(abc.ABC):
    """What holds for every shape of gates on every layer that it fits."""

    granularity: ClassVar[Shorthand]

    @abc.abstractmethod
    def shape(self, layer: Layer, weight: torch.Size) -> Index:
        """The shape of the array of gates."""

    @abc.abstractmethod
    def gate_of(self, layer: Layer, index: Index) -> Index:
        """The gate that multiplies the weight's element ``index``."""

    def fits(self, layer: Layer) -> bool:
        return True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test runs on the layers that the gates fit."""
        metafunc.parametrize("name", [name for name, layer in LAYERS.items() if self.fits(layer)])

    def gated(self, name: str) -> tuple[Layer, nn.Sequential, Gate, Tensor]:
        """A gated layer in a model, in evaluation, with different log-odds; and its weight before."""
        layer = LAYERS[name]
        model = nn.Sequential(layer.make()).eval()
        weight = model[0].weight.detach().clone()
        sparsify(model, {"0": self.granularity}, example_inputs=(layer.batch(),))
        ((_, gate),) = iter_gates(model)
        with torch.no_grad():
            gate.log_alpha.uniform_(-1.0, 2.0)
        return layer, model, gate, weight

    def mask(self, layer: Layer, values: Tensor, weight: Tensor) -> Tensor:
        """One value for each element of the weight, element by element."""
        dense = torch.empty_like(weight)
        for index in elements(weight):
            dense[index] = values[self.gate_of(layer, index)]
        return dense

    @torch.no_grad()
    def test_the_evaluated_weight_is_the_weight_times_a_dense_mask(self, name: str) -> None:
        layer, model, gate, weight = self.gated(name)
        assert gate.log_alpha.shape == self.shape(layer, weight.shape)
        assert {self.gate_of(layer, index) for index in elements(weight)} == set(elements(gate.log_alpha))
        z = (1.2 * torch.sigmoid(1.5 * gate.log_alpha) - 0.1).clamp(0, 1)
        torch.testing.assert_close(model[0].weight, weight * self.mask(layer, z, weight))

    @torch.no_grad()
    def test_one_closed_gate_closes_exactly_its_block(self, name: str) -> None:
        layer, model, gate, weight = self.gated(name)
        places = list(elements(gate.log_alpha))
        numbers = self.mask(layer, torch.arange(len(places)).view(gate.log_alpha.shape).float(), weight)
        for number in range(0, len(places), max(1, len(places) // 8)):
            gate.log_alpha.fill_(30.0)[places[number]] = -30.0
            assert torch.equal(model[0].weight, torch.where(numbers == number, 0.0, weight))
            assert torch.nonzero(~gate.support()).tolist() == [list(places[number])]

    def test_a_sample_has_one_value_for_each_gate(self, name: str) -> None:
        layer, model, gate, weight = self.gated(name)
        with torch.no_grad():
            gate.log_alpha.fill_(0.0)
        ratio = model.train()[0].weight.detach() / weight
        values = torch.full(gate.log_alpha.shape, torch.nan)
        for index in elements(weight):
            values[self.gate_of(layer, index)] = ratio[index]
        torch.testing.assert_close(ratio, self.mask(layer, values, weight), rtol=1e-4, atol=1e-6)
        assert gate.log_alpha.numel() == 1 or values.unique().numel() > 1

    def test_gradients_of_the_gates_are_sums_over_their_blocks(self, name: str) -> None:
        layer, model, gate, weight = self.gated(name)
        probe = torch.randn_like(weight)
        (model[0].weight * probe).sum().backward()
        location = gate.log_alpha.detach().clone().requires_grad_()
        z = (1.2 * torch.sigmoid(1.5 * location) - 0.1).clamp(0, 1)
        (self.mask(layer, z, weight) * weight * probe).sum().backward()
        torch.testing.assert_close(gate.log_alpha.grad, location.grad, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("unit", ["params", "macs"])
    def test_the_costs_of_the_gates_sum_to_the_layers(self, name: str, unit: str) -> None:
        layer, model, gate, weight = self.gated(name)
        batch = layer.batch()
        if unit == "macs" and batch.dtype == torch.long:
            whole = 0.0  # a table is looked up
        else:
            whole = float(weight.numel() if unit == "params" else multiply_adds(layer, model, weight))
        every = list(iter_gated(model))
        size = size_of(model, every, every, unit, (batch,), whole=False)  # type: ignore[arg-type]
        assert size.linear.tolist() == pytest.approx([whole / gate.log_alpha.numel()])
        assert size.whole == pytest.approx(whole)
        with torch.no_grad():
            gate.log_alpha.fill_(60.0)
        cost = penalty(model, **{unit: 1.0})
        assert cost.item() == pytest.approx(whole)

    @torch.no_grad()
    def test_a_pruned_model_computes_what_the_gated_one_evaluates(self, name: str) -> None:
        layer, model, gate, weight = self.gated(name)
        batch = layer.batch()
        expected = model(batch)
        pruned = prune(model)
        assert torch.equal(pruned(batch), expected)
        assert torch.equal(model(batch), expected)
        closed = self.mask(layer, gate.support().float(), weight) == 0
        assert torch.equal(pruned[0].weight == 0, closed)


def multiply_adds(layer: Layer, model: nn.Sequential, weight: Tensor) -> int:
    """Of one example, by the definition: each position of the smaller side of a convolution uses every weight once."""
    batch = layer.batch()
    side = batch if layer.input_first and len(layer.example) > 1 else model(batch)
    return weight.numel() * side[0, 0].numel() if side.dim() > 2 else weight.numel()


class ConnectionLaws:
    """Which element of a weight connects which channels: what the laws above build upon, checked on the layers."""

    @pytest.mark.parametrize("name", LAYERS)
    @torch.no_grad()
    def test_an_element_connects_one_input_with_one_output(self, name: str) -> None:
        layer = LAYERS[name]
        module = layer.make()
        if layer.batch().dtype == torch.long:
            alone = torch.arange(layer.inputs)[:, None]
        else:
            alone = torch.zeros(layer.inputs, *layer.example)
            for channel in range(layer.inputs):
                alone[channel, channel] = torch.rand(layer.example[1:]) + 0.5
        weight = module.weight
        assert weight.shape[:2].numel() == layer.inputs * layer.outputs // layer.groups
        for first, second in itertools.product(*map(range, weight.shape[:2])):
            weight.zero_()[first, second] = 1.0
            if module.__dict__["_parameters"].get("bias") is not None:
                module.bias.zero_()
            answers = module(alone).reshape(layer.inputs, layer.outputs, -1).any(-1)
            output, channel = layer.channels(first, second)
            assert answers.nonzero().tolist() == [[channel, output]]
