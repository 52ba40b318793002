"""The sizes of inputs that an exported graph is right for, and checks of them inside the graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ConstantArgument

from l0hooks._torch.graphs import linear_size, refuse_unless
from l0hooks._torch.trees import tree_leaves

Place = tuple[int, int]  # an input, counted among the leaves of all inputs, and an axis of it
ITSELF = -1  # in place of an axis: the input is an integer
LEAST_TRACED = 2  # torch.export leaves open whether a size that may vary may be 1


@dataclass(frozen=True)
class FreeSize:
    """A size that may vary.

    Attributes
    ----------
    places : tuple of (place, factor, offset)
        Where it occurs: the size there is factor · n + offset. The first has factor 1 and offset 0.
    least, most : int, int or None
        The range of n.
    """

    places: tuple[tuple[Place, int, int], ...]
    least: int
    most: int | None

    @property
    def first(self) -> Place:
        """Where n itself is a size."""
        return self.places[0][0]


@dataclass(frozen=True)
class Sizes:
    """What the sizes of a graph's inputs must be; of inputs that are integers, the numbers themselves.

    Attributes
    ----------
    fixed : dict from place to int
    free : tuple of FreeSize
    constants : dict from input to value
        What is neither a tensor nor a number that may vary.
    """

    fixed: Mapping[Place, int]
    free: tuple[FreeSize, ...]
    constants: Mapping[int, Any]

    def accept(self, inputs: Sequence[Any]) -> bool:
        """Whether the graph is right for inputs of these sizes."""
        leaves = tree_leaves(tuple(inputs))
        if any(not _same(leaves[n], value) for n, value in self.constants.items()):
            return False
        size_at = functools.partial(_size_at, leaves)
        if any(size_at(place) != size for place, size in self.fixed.items()):
            return False
        for free in self.free:
            size = size_at(free.first)
            if size < free.least or (free.most is not None and size > free.most):
                return False
            if any(size_at(place) != factor * size + offset for place, factor, offset in free.places):
                return False
        return True

    def at_one(self, inputs: Sequence[Any]) -> list[Place]:
        """The places of free sizes that are 1 in these inputs, or may be."""
        leaves = tree_leaves(tuple(inputs))
        return [free.first for free in self.free if free.least == 1 or _size_at(leaves, free.first) == 1]

    def with_least(self, at_one: Sequence[Place]) -> Sizes:
        """The same, but sizes at these places may be 1."""
        return replace(self, free=tuple(replace(f, least=1) if f.first in at_one else f for f in self.free))

    def __str__(self) -> str:
        parts = [
            ("" if free.first[1] == ITSELF else f"axis {free.first[1]} of ")
            + f"input {free.first[0]} from {free.least}"
            + (f" to {free.most}" if free.most is not None else "")
            for free in self.free
        ]
        return ", ".join(parts) or "none"


def _size_at(leaves: Sequence[Any], place: Place) -> int:
    leaf, axis = leaves[place[0]], place[1]
    return int(leaf if axis == ITSELF else leaf.shape[axis])


def _same(value: Any, constant: Any) -> bool:
    return value is None if constant is None else type(value) is type(constant) and bool(value == constant)


def sizes_of(program: torch.export.ExportedProgram) -> Sizes | None:
    """The sizes of a program's inputs; None if some depend on others in a way that cannot be checked."""
    fixed: dict[Place, int] = {}
    constants: dict[int, Any] = {}
    found: dict[str, list[tuple[Place, int, int]]] = {}
    for number, value in enumerate(_inputs(program)):
        sizes = dict(enumerate(value.shape)) if isinstance(value, Tensor) else {ITSELF: value}
        if ITSELF in sizes and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
            constants[number] = value
            continue
        for axis, size in sizes.items():
            linear = linear_size(size)
            if linear is None:
                return None
            symbol, factor, offset = linear
            if symbol:
                found.setdefault(symbol, []).append(((number, axis), factor, offset))
            else:
                fixed[number, axis] = offset
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    free = []
    for symbol, places in found.items():
        places.sort(key=lambda place: place[1:] != (1, 0))
        if places[0][1:] != (1, 0):
            return None
        free.append(FreeSize(tuple(places), int(ranges[symbol].lower), _finite(ranges[symbol].upper)))
    return Sizes(fixed, tuple(free), constants)


def _inputs(program: torch.export.ExportedProgram) -> list[Any]:
    """The values of the inputs while the program was traced, in order: tensors of shapes only, and plain ones."""
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    given = [spec.arg for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    return [arg.value if isinstance(arg, ConstantArgument) else values[arg.name] for arg in given]


def _finite(bound: Any) -> int | None:
    return int(bound) if bound.is_Integer else None


def insert_checks(graph_module: fx.GraphModule, sizes: Sizes) -> None:
    """Let a graph refuse inputs of other sizes, **in place**."""
    graph = graph_module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        anchor = graph.call_function(operator.add, (0, 0))  # taken out again below
    with graph.inserting_before(anchor):
        for number, value in sizes.constants.items():
            # not ``is``: when a pickled graph is read, its inputs are stand-ins, of which only operators are traced
            refuse_unless(graph, inputs[number], operator.eq, value, _message(number, ITSELF, f"{value!r}"))
        for (number, axis), size in sizes.fixed.items():
            refuse_unless(graph, _size(inputs[number], axis), operator.eq, size, _message(number, axis, f"{size}"))
        for free in sizes.free:
            number, axis = free.first
            varying = _size(inputs[number], axis)
            if free.least > 0:
                text = f"at least {free.least}"
                refuse_unless(graph, varying, operator.ge, free.least, _message(number, axis, text))
            if free.most is not None:
                refuse_unless(graph, varying, operator.le, free.most, _message(number, axis, f"at most {free.most}"))
            for (other, place), factor, offset in free.places[1:]:
                scaled = graph.call_function(operator.mul, (varying, factor))
                expected = graph.call_function(operator.add, (scaled, offset))
                text = f"{factor} · (the size of input {number} along axis {axis}) + {offset}"
                refuse_unless(graph, _size(inputs[other], place), operator.eq, expected, _message(other, place, text))
    graph.erase_node(anchor)
    graph_module.recompile()


def _size(source: fx.Node, axis: int) -> fx.Node:
    if axis == ITSELF:
        return source
    return source.graph.call_function(torch.ops.aten.sym_size.int, (source, axis))


def _message(number: int, axis: int, expected: str) -> str:
    has, where = ("a value", "") if axis == ITSELF else ("a size", f" along axis {axis}")
    return (
        f"pruned graph: input {number} has {has} that the graph was not made for.\n"
        f"  expected: {expected}{where}\n"
        "  try: prune(model, example_inputs=...) with inputs of that size; or code that takes sizes from its layers' "
        "outputs, so that no graph is needed"
    )
