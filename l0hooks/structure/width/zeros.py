"""Whether zeros in a stream stay zero, operator by operator: a closed channel must be zero wherever it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, fx

from l0hooks.structure.fx_nodes import argument, every_node, name_of, place_of, region_of
from l0hooks.structure.rules_elementwise import MOVEMENT
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.union_find import squeeze_constant

READING = frozenset((
    *("linear", "addmm", "mm", "matmul", "bmm", "convolution", "conv1d", "conv2d", "conv3d", "embedding"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
))  # fmt: skip
_OF_ONE = frozenset((
    *("relu", "relu_", "gelu", "silu", "silu_", "tanh", "tanh_", "abs", "absolute", "neg", "negative", "erf", "sin"),
    *("square", "sqrt", "sign", "floor", "ceil", "round", "trunc", "hardswish", "hardswish_", "mish", "elu", "elu_"),
    *("celu", "selu", "leaky_relu", "leaky_relu_", "relu6", "softsign", "expm1", "log1p", "hardshrink", "atan2"),
    *("dropout", "dropout_", "feature_dropout", "clone", "contiguous", "alias", "to", "_to_copy", "detach"),
    *("detach_", "type_as", "lift_fresh_copy", "zeros_like", "nan_to_num", "_prelu_kernel", "prelu"),
    *("sum", "mean", "amax", "amin", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d"),
    *("avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "_adaptive_avg_pool2d"),
    *("max_pool2d_with_indices", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "cumsum"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d"),
    *("_upsample_nearest_exact2d", "getitem", "index", "gather", "index_select", "take_along_dim"),
))  # fmt: skip
_SUMS = frozenset(("add", "add_", "sub", "sub_", "rsub", "subtract", "maximum", "minimum"))
_JOINED = frozenset(("cat", "concat", "stack"))
_PRODUCTS = frozenset(("mul", "mul_", "multiply"))
_QUOTIENTS = frozenset(("div", "div_", "divide", "true_divide", "floor_divide", "fmod", "remainder"))


class Stream:
    """Which values of a graph hold channels of a stream.

    Parameters
    ----------
    tracer : Tracer
    roots : array of int64
        The classes of the channels.
    """

    def __init__(self, tracer: Tracer, roots: npt.NDArray[Any]) -> None:
        self._tracer = tracer
        self._mine = torch.zeros(len(tracer.classes), dtype=torch.bool, device="cpu")
        self._mine[torch.from_numpy(roots)] = True

    def is_in(self, node: object) -> bool:
        """Whether the value of ``node`` holds such channels; a mask does not, whose numbers are no activations."""
        if not isinstance(node, fx.Node) or node not in self._tracer.values:
            return False
        found = node.meta.get("val")
        if isinstance(found, Tensor) and found.dtype == torch.bool:
            return False
        value: Any = self._tracer.values[node]
        parts: Sequence[Any]
        if self._tracer.is_weight(node):
            parameter = value.parameter
            parts = [*parameter.axes, *([] if parameter.elements is None else [parameter.elements])]
        else:
            parts = value if isinstance(value, (list, tuple)) else [value]
        return any(isinstance(part, Tensor) and self._holds(part) for part in parts)

    def _holds(self, labels: Tensor) -> bool:
        return bool(self._mine[self._tracer.classes.roots(squeeze_constant(labels))].any())


def not_zero(stream: Stream, nodes: Iterable[fx.Node], norms: AbstractSet[fx.Node]) -> str:
    """Where channels that are zero would not stay zero; empty if nowhere.

    Parameters
    ----------
    stream : Stream
    nodes : iterable of fx.Node
        All operators of the graph.
    norms : set of fx.Node
        The operators of the norms that read the stream.
    """
    for node in nodes:
        if node.op != "call_function" or node in norms or region_of(node) is not None or not stream.is_in(node):
            continue
        if not _stays_zero(stream, node):
            return f"{name_of(node)} turns what is zero into something else{place_of(node)}"
    return ""


def operators(programs: Iterable[torch.export.ExportedProgram]) -> list[fx.Node]:
    """The operators of several programs, those of their regions among them."""
    return [node for program in programs for node in every_node(program.graph)]


def _stays_zero(stream: Stream, node: fx.Node) -> bool:
    name = name_of(node)
    if name in READING:
        return True
    check = _CHECKS.get(name)
    if check is not None:
        return check(stream, node)
    return (name in _OF_ONE or name in MOVEMENT) and stream.is_in(node.all_input_nodes[0])


def _sum(stream: Stream, node: fx.Node) -> bool:
    return all(stream.is_in(one) for one in node.args[:2])


def _joined(stream: Stream, node: fx.Node) -> bool:
    return all(map(stream.is_in, node.all_input_nodes))


def _product(stream: Stream, node: fx.Node) -> bool:
    return any(map(stream.is_in, node.args))


def _quotient(stream: Stream, node: fx.Node) -> bool:
    return stream.is_in(node.args[0]) and not stream.is_in(node.args[1])


def _power(stream: Stream, node: fx.Node) -> bool:
    exponent = node.args[1]
    return stream.is_in(node.args[0]) and isinstance(exponent, (int, float)) and exponent > 0


def _between(stream: Stream, node: fx.Node) -> bool:
    names = ("min_val", "max_val") if "tanh" in name_of(node) else ("min", "max")
    low, high = (argument(node, one) for one in names)
    known = all(one is None or isinstance(one, (int, float)) for one in (low, high))
    return known and (low is None or low <= 0) and (high is None or high >= 0)


def _masked(stream: Stream, node: fx.Node) -> bool:
    return stream.is_in(node.args[0]) and bool(node.args[2] == 0)


def _where(stream: Stream, node: fx.Node) -> bool:
    return len(node.args) == 3 and all(stream.is_in(one) or one == 0 for one in node.args[1:])


def _padded(stream: Stream, node: fx.Node) -> bool:
    return not argument(node, "value")


_Check = Callable[[Stream, fx.Node], bool]
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_JOINED, _joined),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_QUOTIENTS, _quotient),
    **dict.fromkeys(("clamp", "clamp_", "hardtanh", "hardtanh_"), _between),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    "pow": _power,
    "where": _where,
}
