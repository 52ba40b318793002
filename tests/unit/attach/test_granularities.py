"""Every granularity: which of its gates multiplies which element of a weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from granularity_laws import ConnectionLaws, GranularityLaws, Index, Layer


class TestConnections(ConnectionLaws):
    pass


class TestWeight(GranularityLaws):
    granularity = "weight"

    def shape(self, layer: Layer, weight: torch.Size) -> Index:
        return tuple(weight)

    def gate_of(self, layer: Layer, index: Index) -> Index:
        return index


class TestKernel(GranularityLaws):
    granularity = "kernel"

    def shape(self, layer: Layer, weight: torch.Size) -> Index:
        return tuple(weight[:2])

    def gate_of(self, layer: Layer, index: Index) -> Index:
        return index[:2]


class TestInput(GranularityLaws):
    granularity = "input"

    def shape(self, layer: Layer, weight: torch.Size) -> Index:
        return (layer.inputs,)

    def gate_of(self, layer: Layer, index: Index) -> Index:
        return layer.channels(*index[:2])[1:]


class TestOutput(GranularityLaws):
    granularity = "output"

    def shape(self, layer: Layer, weight: torch.Size) -> Index:
        return (layer.outputs,)

    def gate_of(self, layer: Layer, index: Index) -> Index:
        return layer.channels(*index[:2])[:1]


class Blocks(GranularityLaws):
    """Blocks of output by input channels of one group, in the order of the weight's axes."""

    granularity: ClassVar[tuple[int, int]]

    def block(self, layer: Layer) -> tuple[int, int]:
        rows, cols = self.granularity
        return (cols, rows) if layer.input_first else (rows, cols)

    def shape(self, layer: Layer, weight: torch.Size) -> Index:
        return tuple(n // size for n, size in zip(weight, self.block(layer), strict=False))

    def gate_of(self, layer: Layer, index: Index) -> Index:
        return tuple(n // size for n, size in zip(index, self.block(layer), strict=False))

    def fits(self, layer: Layer) -> bool:
        rows, cols = self.granularity
        return not (layer.outputs // layer.groups % rows or layer.inputs // layer.groups % cols)


class TestBlocks2x1(Blocks):
    granularity = (2, 1)


class TestBlocks1x2(Blocks):
    granularity = (1, 2)


class TestBlocks2x2(Blocks):
    granularity = (2, 2)
