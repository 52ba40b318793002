"""What one node of an exported graph is: its operator, its arguments, its shape, and the module that ran it."""

from __future__ import annotations

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


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen operator by its name in the schema, its default if it was not given."""
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
    """The first tensor that goes into a node."""
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
    """Whether a node's value is a tensor, or tensors, of known shape."""
    return is_static(node.meta.get("val"))


def is_mutable(node: fx.Node) -> bool:
    """Whether the operator writes into one of its arguments."""
    schema = schema_of(node)
    return schema is not None and bool(schema.is_mutable)


def place_of(node: fx.Node) -> str:
    """`` at module``: the innermost module that ran the operator."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values() if path]
    return f" at {names[-1]}" if names else ""
