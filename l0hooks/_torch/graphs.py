"""Exported graphs: the operators of their nodes, and programs as modules."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx

from l0hooks._torch.names import refuse

_OpOverload = type(torch.ops.aten.add.Tensor)


def schema_of(node: fx.Node) -> Any:
    """The schema of the ATen operator that ``node`` calls: name, arguments, whether it writes; None for functions."""
    target: Any = node.target
    if not isinstance(target, _OpOverload):
        return None
    try:
        return target._schema
    except AttributeError:
        refuse("_ops.OpOverload._schema", "finding channel groups")


def as_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph of a program, without the checks that newer versions of torch put before it.

    Raises
    ------
    TypeError
        If torch gives no graph.
    """
    checked = "check_guards" in inspect.signature(program.module).parameters  # since torch 2.9
    module = program.module(check_guards=False) if checked else program.module()
    if not isinstance(module, fx.GraphModule):
        raise TypeError("torch.export gave no graph")
    return module


def plain_graph(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph in a class that may be trained, evaluated, copied and pickled; torch.export's own may not."""
    plain = fx.GraphModule(module, module.graph)
    vars(plain).pop("_tracer_cls", None)  # a class inside one of torch's functions, that no pickle finds again
    return plain
