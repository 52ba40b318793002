"""One table: how labels flow through each operator of an exported graph.

A rule gets the tracer and the graph's node and returns the labels of the node's value. What no rule covers is frozen,
which is always safe: its channels simply cannot be removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from l0hooks.structure.labels import along, compress, constant, varies

if TYPE_CHECKING:
    from l0hooks.structure.trace import Tracer

Rule = Callable[["Tracer", fx.Node], Any]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen operators called so, without overload names."""

    def add(function: Rule) -> Rule:
        for name in operators:
            RULES[name] = function
        return function

    return add


def name_of(node: fx.Node) -> str:
    """The operator's name without its namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return target.__name__ if callable(target) else str(target)


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen operator by its name in the schema, its default if it was not given."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise TypeError(f"{node.target} has no schema")
    for position, arg in enumerate(target._schema.arguments):
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


# --- reading: Linear and convolutions -------------------------------------------------------------------------------


@rule("linear")
def _linear(t: Tracer, node: fx.Node) -> Tensor:
    x, weight, bias = (argument(node, n) for n in ("input", "weight", "bias"))
    if len(shape_of(weight)) != 2:
        return t.freeze_all(node, "a product with a vector")
    if t.is_weight(weight):
        out = _read(t, node, x, weight, out_axis=0)
    else:
        out = _contract(t, node, t.labels(x), t.labels(weight).transpose(-1, -2))
    return _with_bias(t, node, out, bias)


@rule("addmm", "mm", "matmul", "bmm", "baddbmm")
def _matmul(t: Tracer, node: fx.Node) -> Tensor:
    operands: list[Any] = [None, *node.args]
    bias, x, y = operands[1:4] if "add" in name_of(node) else operands[:3]
    if t.is_weight(y) and len(shape_of(y)) == 2:
        out = _read(t, node, x, y, out_axis=1)
    elif t.is_weight(x) and len(shape_of(x)) == 2 and len(shape_of(y)) > 1 and not varies(t.roots(y), -1):
        rows, columns = t.axes(x)
        t.read(node, x, columns, t.collapse(y, -2))
        out = along(rows, -2, shape_of(node))
    elif min(len(shape_of(x)), len(shape_of(y))) < 2:
        out = t.freeze_all(node, "a product with a vector")
    else:
        out = _contract(t, node, t.labels(x), t.labels(y))
    return _with_bias(t, node, out, bias)


def _read(t: Tracer, node: fx.Node, x: fx.Node, weight: fx.Node, out_axis: int) -> Tensor:
    axes = t.axes(weight)
    t.read(node, weight, axes[1 - out_axis], t.collapse(x, -1))
    return along(axes[out_axis], -1, shape_of(node))


def _with_bias(t: Tracer, node: fx.Node, out: Tensor, bias: Any) -> Tensor:
    if t.is_weight(bias) and len(shape_of(bias)) == 1:
        t.unite(node, t.labels(bias), out)
    elif isinstance(bias, fx.Node):
        return t.combine(node, [out, t.labels(bias)], shape_of(node))
    return out


def _contract(t: Tracer, node: fx.Node, a: Tensor, b: Tensor) -> Tensor:
    """A product of two activations: batch axes couple, the contracted axis freezes."""
    out = shape_of(node)
    t.flatten(node, a, [-1], "contracted in a product of two activations")
    t.flatten(node, b, [-2], "contracted in a product of two activations")
    parts = [compress(labels, t.classes.roots(labels)) for labels in (a, b)]
    parts = [p.narrow(axis, 0, 1) for p, axis in zip(parts, (-1, -2), strict=True)]
    parts = [p.reshape((1,) * (len(out) - p.dim()) + tuple(p.shape)) for p in parts]
    batch = range(len(out) - 2)
    t.freeze_broadcast(node, parts, batch)
    for p, free in zip(parts, (-2, -1), strict=True):
        if any(varies(t.classes.roots(p), d) for d in batch):
            t.flatten(node, p, [free], "mixed within a head")
    found = t.combine(node, parts, out)
    if any(varies(t.classes.roots(found), d) for d in batch):
        t.heads.append(found)
    return found


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _convolution(t: Tracer, node: fx.Node) -> Tensor:
    x, weight, bias = argument(node, "input"), argument(node, "weight"), argument(node, "bias")
    groups = argument(node, "groups")
    name = name_of(node)
    transposed = "transpose" in name or (name == "convolution" and argument(node, "transposed"))
    channel = len(shape_of(node)) - len(shape_of(weight)) + 1
    if not t.is_weight(weight):
        return t.freeze_all(node, "a convolution whose kernel is computed")
    first, second, *kernel = t.axes(weight)
    for axis in kernel:
        t.classes.freeze(axis, "positions of a kernel")
    inputs = t.collapse(x, channel)
    outputs, ins = (second, first) if transposed else (first, second)
    if groups == 1:
        t.read(node, weight, ins, inputs)
    else:
        outputs = _grouped(t, node, groups, inputs, first, second, transposed=transposed)
    if isinstance(bias, fx.Node):
        t.unite(node, t.labels(bias), outputs)
    return along(outputs, channel, shape_of(node))


def _grouped(
    t: Tracer, node: fx.Node, groups: int, inputs: Tensor, first: Tensor, second: Tensor, *, transposed: bool
) -> Tensor:
    """Whole groups only: a group's inputs, outputs and its part of the kernel are one class."""
    by_group = inputs.reshape(groups, -1)
    t.unite(node, by_group, by_group[:, :1])
    kernel = first.reshape(groups, -1)
    t.unite(node, kernel, by_group[:, :1])
    t.classes.freeze(second, "counts the channels inside a group")
    if transposed:
        return by_group[:, :1].expand(groups, second.numel()).reshape(-1)
    return first


@rule("embedding")
def _embedding(t: Tracer, node: fx.Node) -> Tensor:
    weight = argument(node, "weight")
    if not t.is_weight(weight):
        return t.freeze_all(node, "an embedding whose table is computed")
    rows, columns = t.axes(weight)
    t.freeze_indices(node, argument(node, "indices"))
    t.classes.freeze(rows, "rows of an embedding: one for each token")
    return along(columns, -1, shape_of(node))


@rule("scaled_dot_product_attention")
def _attention(t: Tracer, node: fx.Node) -> Tensor:
    """Heads are what is left of the channels: q, k and v are merged within each head."""
    query, key, value = (argument(node, n) for n in ("query", "key", "value"))
    mask, out = argument(node, "attn_mask"), shape_of(node)
    if len(out) < 4:
        return t.freeze_all(node, "attention without an axis of heads")
    heads = [t.collapse(n, -3) for n in (query, key, value)]
    few = min(len(h) for h in heads)
    heads = [h.reshape(few, -1) for h in heads]
    for h in heads:
        t.unite(node, heads[0][:, :1], h)
    found = along(heads[0].reshape(-1), -3, out)
    t.heads.append(found)
    if isinstance(mask, fx.Node):
        labels = t.operand(mask)
        t.flatten(node, labels, [-2, -1], "a mask of attention")
        found = t.combine(node, [found, labels.narrow(-2, 0, 1).narrow(-1, 0, 1)], out)
    return found


# --- normalisation and reductions ------------------------------------------------------------------------------------


@rule("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm")
def _batch_norm(t: Tracer, node: fx.Node) -> Tensor:
    vector = t.collapse(argument(node, "input"), 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        parameter = argument(node, name)
        if isinstance(parameter, fx.Node):
            t.unite(node, t.labels(parameter), vector)
    return along(vector, 1, shape_of(node))


@rule("group_norm")
def _group_norm(t: Tracer, node: fx.Node) -> Tensor:
    vector = t.collapse(argument(node, "input"), 1)
    t.merge(node, vector.reshape(argument(node, "num_groups"), -1), 1, "normalised together by group_norm")
    for name in ("weight", "bias"):
        parameter = argument(node, name)
        if isinstance(parameter, fx.Node):
            t.unite(node, t.labels(parameter), vector)
    return along(vector, 1, shape_of(node))


@rule("layer_norm", "rms_norm")
def _layer_norm(t: Tracer, node: fx.Node) -> Tensor:
    x = argument(node, "input")
    last = [-1 - d for d in range(len(argument(node, "normalized_shape")))]
    t.flatten(node, t.labels(x), last, f"residual stream of {name_of(node)}")
    tensors = [x, *(argument(node, n) for n in ("weight", "bias") if n == "weight" or name_of(node) == "layer_norm")]
    return t.combine(node, [t.labels(n) for n in tensors if isinstance(n, fx.Node)], shape_of(node))


@rule("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "prod", "norm", "linalg_vector_norm")
def _reduction(t: Tracer, node: fx.Node) -> Any:
    labels: Tensor = t.labels(first_of(node))
    try:
        dims = argument(node, "dim")
    except KeyError:
        dims = None
    axes = list(range(labels.dim())) if dims in (None, []) else [d % labels.dim() for d in _as_list(dims)]
    t.flatten(node, labels, axes, f"reduced by {name_of(node)}")
    for d in axes:
        labels = labels.narrow(d, 0, 1)
    value = node.meta["val"]
    if isinstance(value, (list, tuple)):  # the numbers, and where they stood
        return [labels.reshape(part.shape) for part in value]
    return labels.reshape(value.shape)


@rule("softmax", "_softmax", "log_softmax", "cumsum")
def _within_axis(t: Tracer, node: fx.Node) -> Tensor:
    labels: Tensor = t.labels(first_of(node))
    axis = argument(node, "dim") % labels.dim()
    t.flatten(node, labels, [axis], f"mixed by {name_of(node)}")
    return labels


@rule("glu")
def _glu(t: Tracer, node: fx.Node) -> Tensor:
    value, gate = t.labels(first_of(node)).chunk(2, argument(node, "dim"))
    return t.combine(node, [value, gate], shape_of(node))


def _as_list(value: object) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]  # type: ignore[list-item]


# --- elementwise, spatial and movement -------------------------------------------------------------------------------

FILLED = frozenset(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"))
_POINTWISE = (
    *("relu", "relu_", "gelu", "silu", "silu_", "tanh", "relu6", "hardtanh", "hardtanh_", "sigmoid", "sigmoid_"),
    *("hardswish", "hardswish_", "hardsigmoid", "mish", "elu", "elu_", "celu", "selu", "leaky_relu", "leaky_relu_"),
    *("softplus", "exp", "log", "log1p", "sqrt", "rsqrt", "abs", "neg", "erf", "sin", "cos", "square", "reciprocal"),
    *("clamp", "clamp_", "clamp_min", "dropout", "dropout_", "feature_dropout", "alpha_dropout", "clone", "contiguous"),
    *("alias", "to", "_to_copy", "detach", "detach_", "type_as", "lift_fresh_copy", "softsign", "logsigmoid"),
    *("add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "pow", "maximum", "minimum", "where"),
    *("multiply", "divide", "true_divide", "subtract", "negative", "absolute", "floor_divide", "special_expit"),
    *("addcmul", "lerp", "_prelu_kernel", "masked_fill", "masked_fill_", "threshold", "sign", "remainder"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "bitwise_not", "__and__", "__or__", "floor"),
    *("zeros_like", "ones_like", "full_like", "expm1", "tanh_", "exp_", "clamp_max", "nan_to_num", "hardshrink"),
    *("fmod", "atan2", "isnan", "isfinite", "logical_or", "round", "ceil", "trunc"),
)
POINTWISE = frozenset(_POINTWISE)


@rule(*_POINTWISE)
def _pointwise(t: Tracer, node: fx.Node) -> Tensor:
    tensors = node.all_input_nodes[:1] if name_of(node) == "type_as" else node.all_input_nodes
    return t.combine(node, [t.operand(n) for n in tensors], shape_of(node))


@rule("max", "min")
def _extreme(t: Tracer, node: fx.Node) -> Any:
    """Of two tensors, or over axes."""
    of_two = len(node.args) > 1 and isinstance(node.args[1], fx.Node)
    return _pointwise(t, node) if of_two else _reduction(t, node)


@rule("prelu")
def _prelu(t: Tracer, node: fx.Node) -> Tensor:
    """Its weight lies along axis 1, not along the last one."""
    x, weight = t.labels(argument(node, "self")), t.labels(argument(node, "weight"))
    if x.dim() > 1:
        weight = weight.reshape(-1, *[1] * (x.dim() - 2))
    return t.combine(node, [x, weight], shape_of(node))


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def _fresh(t: Tracer, node: fx.Node) -> Tensor:
    return constant(shape_of(node))


@rule("view_as_complex", "view_as_real")
def _complex(t: Tracer, node: fx.Node) -> Tensor:
    labels: Tensor = t.labels(first_of(node))
    if name_of(node) == "view_as_real":
        return labels.unsqueeze(-1).expand(shape_of(node))
    t.unite(node, labels, labels.narrow(-1, 0, 1))
    return labels.select(-1, 0)


@rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d"),
    *(
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_linear1d",
        "_adaptive_avg_pool2d",
        "max_pool2d_with_indices",
    ),
    *("upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact2d"),
)
def _spatial(t: Tracer, node: fx.Node) -> Any:
    x = node.all_input_nodes[0]
    value = node.meta["val"]
    out = value[0].shape if isinstance(value, (tuple, list)) else value.shape
    spatial = {"1": 1, "2": 2, "3": 3}[next(c for c in reversed(name_of(node)) if c in "123")]
    vector = t.collapse(x, -1 - spatial)
    labels = along(vector, -1 - spatial, out)
    return [labels] * len(value) if isinstance(value, (tuple, list)) else labels


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d")
def _pad(t: Tracer, node: fx.Node) -> Tensor:
    name, x = name_of(node), node.all_input_nodes[0]
    labels, widths = t.compressed(x), list(argument(node, "pad" if name in ("pad", "constant_pad_nd") else "padding"))
    zeros = name == "constant_pad_nd" or (name == "pad" and argument(node, "mode") == "constant")
    for i in range(0, len(widths), 2):
        axis = labels.dim() - 1 - i // 2
        if any(widths[i : i + 2]) and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
        if labels.size(axis) == 1:
            widths[i : i + 2] = 0, 0
    if any(widths) and not zeros:
        return t.freeze_all(node, "channels that are padded")
    return torch.nn.functional.pad(labels, widths).expand(shape_of(node))  # what is padded belongs to no channel


@rule("index", "gather", "index_select", "take_along_dim")
def _index(t: Tracer, node: fx.Node) -> Tensor:
    x, out = node.all_input_nodes[0], shape_of(node)
    if name_of(node) != "index":
        axis = argument(node, "dim") % len(shape_of(x))
        used = [axis]
    else:
        indices = argument(node, "indices")
        used = [d for d, i in enumerate(indices) if i is not None]
    t.freeze_indices(node, *node.all_input_nodes[1:])
    labels = t.labels(x)
    for d in used:
        t.merge(node, labels, d, f"looked up by {name_of(node)}")
    labels = t.compressed(x)
    rest = [d for d in range(labels.dim()) if d not in used]
    if not any(varies(labels, d) for d in rest):
        return constant(out, int(labels.reshape(-1)[0])) if labels.numel() else constant(out)
    if name_of(node) == "index" and used != list(range(used[0], used[-1] + 1)):
        return t.freeze_all(node, "indexed along separate axes")
    before = [d for d in rest if d < used[0]]
    after = len(rest) - len(before)
    middle = len(out) - len(before) - after
    for d in used:
        labels = labels.narrow(d, 0, 1)
    kept = labels.reshape([labels.shape[d] for d in rest])
    view = [*kept.shape[: len(before)], *([1] * middle), *kept.shape[len(before) :]]
    return kept.reshape(view).expand(out)


_MOVEMENT = (
    *("permute", "transpose", "t", "flatten", "unsqueeze", "squeeze", "expand", "expand_as", "slice", "select"),
    *("split", "split_with_sizes", "chunk", "unbind", "unflatten", "cat", "concat", "stack", "movedim", "roll", "flip"),
    *("view", "reshape", "_unsafe_view", "narrow", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("tile", "repeat_interleave", "swapaxes", "mT", "numpy_T", "unfold", "view_as"),
    *("moveaxis", "swapdims", "diagonal", "rot90", "tril", "triu"),
)


@rule(*_MOVEMENT)
def _movement(t: Tracer, node: fx.Node) -> Any:
    """Run the operator itself on the labels: the index map comes for free."""
    name = name_of(node)
    source = node.args[0]
    if isinstance(source, fx.Node) and t.is_weight(source) and name in ("t", "transpose", "permute", "numpy_T"):
        return t.permute_weight(node, source)
    if name in ("expand", "expand_as"):
        return t.labels(first_of(node)).expand(shape_of(node))
    if name in ("view", "reshape", "_unsafe_view", "view_as"):
        labels = t.labels(first_of(node)).reshape(shape_of(node))
        t.reshaped.append(labels)
        return labels
    args: Any = fx.map_arg(node.args, t.labels)
    kwargs: Any = fx.map_arg(node.kwargs, t.labels)
    moved = node.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(moved, Tensor) and moved.shape != shape_of(node):
        return t.freeze_all(node, f"moved by {name} as data says")
    if name in ("flatten", "unflatten", "pixel_shuffle", "pixel_unshuffle"):
        t.reshaped.append(moved)
    return moved


@rule("getitem")
def _getitem(t: Tracer, node: fx.Node) -> Any:
    values = t.values.get(first_of(node))
    key: Any = node.args[1]
    return values[key] if isinstance(values, (list, tuple)) else values
