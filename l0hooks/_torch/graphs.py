"""Exported graphs: the schemas of their operators, and programs as modules."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

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


def export(model: nn.Module, args: tuple[Any, ...], **options: Any) -> torch.export.ExportedProgram:
    """``torch.export.export``, not strict, without the graph of thousands of lines that it prints when it fails.

    Its log is silent, too: the error says the same. Whatever else is written to ``sys.stderr`` comes afterwards.
    """
    written, graph = io.StringIO(), ""
    silent = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    for logger in silent:
        logger.addFilter(_no_record)
    try:
        with contextlib.redirect_stderr(written):
            return torch.export.export(model, args, strict=False, **options)
    except Exception as error:
        graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        for logger in silent:
            logger.removeFilter(_no_record)
        text = written.getvalue()
        sys.stderr.write(text.replace(graph, "") if graph.strip() else text)


def _no_record(record: logging.LogRecord) -> bool:
    return False


def as_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph of a program, without the checks that newer versions of torch add.

    Raises
    ------
    TypeError
        If torch returns no graph.
    """
    checked = "check_guards" in inspect.signature(program.module).parameters  # since torch 2.9
    module = program.module(check_guards=False) if checked else program.module()
    if not isinstance(module, fx.GraphModule):
        raise TypeError("torch.export returned no graph")
    return module


def plain_graph(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph in a class that can be trained, evaluated, copied and pickled, unlike torch.export's own."""
    plain = fx.GraphModule(module, module.graph)
    # torch.export's own class, which cannot trace again; pickles would name it, those of a deepcopy by the graph's
    vars(plain).pop("_tracer_cls", None)
    vars(plain.graph)["_tracer_cls"] = None
    return plain


def take_plain_arguments(module: fx.GraphModule, forward: Callable[..., object]) -> None:
    """Give an exported graph the signature of ``forward``, with its names and defaults, **in place**.

    Left as it is if an argument is nested deeper than a tuple of numbers, or if a class that torch does not know by
    itself holds the outputs.
    """
    info: Any = getattr(getattr(module.graph, "_codegen", None), "pytree_info", None)
    if info is None or not _is_built_in(info.out_spec):
        return
    args, kwargs = _children(info.in_spec)
    given = list(zip(_children(args), inspect.signature(forward).parameters.values(), strict=False))
    named = all(p.kind is p.POSITIONAL_OR_KEYWORD and _is_plain(p.default) and _is_flat(spec) for spec, p in given)
    if kwargs.num_leaves or len(given) < args.num_children or not named:
        return
    module.graph.set_codegen(fx.graph.CodeGen())
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    after, last = iter(places), places[-1] if places else None
    for spec, parameter in given:
        leaves = [next(after) for _ in range(spec.num_leaves)]
        default = () if parameter.default is parameter.empty else (parameter.default,)
        if spec.is_leaf():
            leaves[0].target, leaves[0].args = parameter.name, default
        elif leaves and last is not None:
            last = _put_together(leaves, parameter.name, default, last)
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.args = (info.out_spec.unflatten(list(output.args[0])),)
    module.recompile()


def _put_together(leaves: list[fx.Node], name: str, default: tuple[Any, ...], last: fx.Node) -> fx.Node:
    """One argument in place of its parts, which are taken out of it after ``last``; returns the new last node."""
    graph = leaves[0].graph
    with graph.inserting_before(leaves[0]):
        whole = graph.placeholder(name)
    whole.args = default
    for number, leaf in enumerate(leaves):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (whole, number))
        leaf.replace_all_uses_with(last)
    for leaf in leaves:
        graph.erase_node(leaf)
    return last


def _is_plain(default: object) -> bool:
    return default is inspect.Parameter.empty or isinstance(default, (bool, int, float, str, type(None)))


def _is_flat(spec: Any) -> bool:
    """Whether an input is one value, or a tuple or list of such."""
    return spec.is_leaf() or (spec.type in (tuple, list) and all(one.is_leaf() for one in _children(spec)))


def _children(spec: Any) -> list[Any]:
    named = getattr(spec, "children", None)  # a method since torch 2.10
    return list(spec.children_specs if named is None else named())


def _is_built_in(spec: Any) -> bool:
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(map(_is_built_in, _children(spec)))


def is_random(node: fx.Node) -> bool:
    """Whether the ATen operator that ``node`` calls draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def refuse_unless(graph: fx.Graph, left: Any, test: Any, right: Any, message: str) -> None:
    """Let ``graph`` raise an AssertionError with ``message`` when it runs, unless ``test`` of both sides is true."""
    passed = graph.call_function(test, (left, right))
    graph.call_function(torch._assert, (passed, message))


def linear_size(size: Any) -> tuple[str, int, int] | None:
    """A size a·s + b of an exported graph, as (s, a, b); (``""``, 0, b) for a number, None for other expressions."""
    if isinstance(size, int):
        return "", 0, size
    expression = size.node.expr
    if expression.is_Integer:
        return "", 0, int(expression)
    if len(expression.free_symbols) != 1:
        return None
    (symbol,) = expression.free_symbols
    rest = expression.subs(symbol, 0)
    factor = (expression - rest) / symbol
    simple = factor.is_Integer and rest.is_Integer
    return (str(symbol), int(factor), int(rest)) if simple else None
