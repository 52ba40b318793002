"""Facts about a node of an exported graph: its operator, arguments and shape, and the module that ran it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from l0hooks._torch.graphs import schema_of


def name_of(node: fx.Node) -> str:
    """The operator's name without its namespace and overload."""
    target, schema = node.target, schema_of(node)
    if schema is not None:
        return str(schema.name.partition("::")[2])
    return target.__name__ if callable(target) else str(target)


_REGIONS = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}  # at which place their graph is given


def region_of(node: fx.Node) -> tuple[fx.GraphModule, list[Any]] | None:
    """The graph of a part of the code that runs in a context of its own, and its arguments; None for other nodes."""
    place = _REGIONS.get(name_of(node)) if node.op == "call_function" else None
    owner = node.graph.owning_module
    if place is None or owner is None:
        return None
    inner: Any = node.args[place]
    region = owner.get_submodule(inner.target)
    return (region, list(node.args[place + 1 :])) if isinstance(region, fx.GraphModule) else None


def every_node(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a graph, each region's own before the node that calls it."""
    for node in graph.nodes:
        region = region_of(node)
        if region is not None:
            yield from every_node(region[0].graph)
        yield node


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen operator by its name in the schema, or its default."""
    schema = schema_of(node)
    if schema is None:
        raise TypeError(f"{node.target} has no schema")
    for position, arg in enumerate(schema.arguments):
        if arg.name == name:
            if position < len(node.args) and not arg.kwarg_only:
                return node.args[position]
            return node.kwargs.get(name, arg.default_value if arg.has_default_value() else None)
    raise KeyError(f"{node.target} has no argument {name!r}")


def first_of(node: fx.Node) -> fx.Node:
    """The first input tensor of a node."""
    return node.all_input_nodes[0]


def shape_of(node: Any) -> torch.Size:
    """The shape of a node's tensor."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def is_static(value: object) -> bool:
    """Whether ``value`` is a tensor, or tensors, whose shape does not depend on data."""
    if isinstance(value, (list, tuple)):
        return all(map(is_static, value))
    return isinstance(value, Tensor) and all(isinstance(n, int) for n in value.shape)


def has_shape(node: fx.Node) -> bool:
    """Whether a node's value is a tensor, or tensors, whose shape does not depend on data."""
    return is_static(node.meta.get("val"))


def is_mutable(node: fx.Node) -> bool:
    """Whether the operator writes into one of its arguments."""
    schema = schema_of(node)
    return schema is not None and bool(schema.is_mutable)


def called_by(node: fx.Node) -> str:
    """The qualified name of the innermost module that ran the operator; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values()]
    return str(names[-1]) if names else ""


def place_of(node: fx.Node) -> str:
    """`` at module``: the innermost module that ran the operator."""
    name = called_by(node)
    return f" at {name}" if name else ""
