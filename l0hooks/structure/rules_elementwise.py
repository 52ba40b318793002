"""Rules for elementwise operators, and for operators that only move elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from l0hooks.structure.fx_nodes import argument, first_of, name_of, shape_of
from l0hooks.structure.references import Reference
from l0hooks.structure.references import moved as moved_reference
from l0hooks.structure.table import rule
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.union_find import along, constant, varies

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
def pointwise(t: Tracer, node: fx.Node) -> Tensor:
    tensors = node.all_input_nodes[:1] if name_of(node) == "type_as" else node.all_input_nodes
    _merge_parameters(t, node, tensors)
    carriers = [source for source in tensors if t.is_derived(source) or not t.classes.is_frozen(t.operand(source))]
    if carriers and all(map(t.is_derived, carriers)):
        t.derived.add(node)
    return t.combine(node, [t.operand(n) for n in tensors], shape_of(node))


def _merge_parameters(t: Tracer, node: fx.Node, tensors: list[fx.Node]) -> None:
    """Along axes where a parameter meets channels that are spread over it, it is cut as a whole or not at all.

    Its elements are merged there, so that the others stay free: the states of each channel in a state space model.
    """
    for source in filter(t.is_derived, tensors):
        labels: Tensor = t.labels(source)
        others = [t.operand(other) for other in tensors if other is not source and not t.is_derived(other)]
        others = [other for other in others if not t.classes.is_frozen(other)]
        for axis in range(1, labels.dim() + 1):
            if any(other.dim() < axis or other.shape[-axis] == 1 for other in others):
                t.merge(node, labels, labels.dim() - axis, "broadcast along a parameter")


@rule("prelu")
def _prelu(t: Tracer, node: fx.Node) -> Tensor:
    """The weight lies along axis 1, not along the last axis."""
    x, weight = t.labels(argument(node, "self")), t.labels(argument(node, "weight"))
    if x.dim() > 1:
        weight = weight.reshape(-1, *[1] * (x.dim() - 2))
    return t.combine(node, [x, weight], shape_of(node))


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def _fresh(t: Tracer, node: fx.Node) -> Tensor:
    return constant(shape_of(node))


@rule("copy_")
def _copy(t: Tracer, node: fx.Node) -> Tensor:
    """What is written into a tensor has the labels of its source; one number for all channels changes no labels."""
    target: Tensor = t.labels(first_of(node))
    source = t.operand(argument(node, "src"))
    roots = t.classes.roots(target)
    first = source.dim() - target.dim()
    moving = [d for d in range(target.dim()) if varies(roots, d)]
    if t.classes.is_frozen(source) and not any(first + d >= 0 and source.shape[first + d] > 1 for d in moving):
        return target
    return source.expand(shape_of(node))


@rule("zero_", "fill_")
def _fill(t: Tracer, node: fx.Node) -> Tensor:
    """The numbers change, and not what they belong to; a number of the model itself that fills others stays."""
    labels: Tensor = t.labels(first_of(node))
    for value in node.all_input_nodes[1:]:
        t.freeze_value(node, value, "written into other channels")
    return labels


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
    return torch.nn.functional.pad(labels, widths).expand(shape_of(node))  # padding belongs to no channel


_MOVEMENT = (
    *("permute", "transpose", "t", "flatten", "unsqueeze", "squeeze", "expand", "expand_as", "slice", "select"),
    *("split", "split_with_sizes", "chunk", "unbind", "unflatten", "movedim", "roll", "flip"),
    *("view", "reshape", "_unsafe_view", "narrow", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("tile", "repeat_interleave", "swapaxes", "mT", "numpy_T", "unfold", "view_as"),
    *("moveaxis", "swapdims", "diagonal", "rot90", "tril", "triu", "reshape_as", "broadcast_to", "tensor_split"),
)
MOVEMENT = frozenset((*_MOVEMENT, "cat", "concat", "stack"))
_REFERRING = ("t", "transpose", "permute", "numpy_T", "squeeze", "unsqueeze")  # may give a weight in another form


@rule(*_MOVEMENT)
def _movement(t: Tracer, node: fx.Node) -> Any:
    """Run the operator itself on the labels, so that each label moves as its element does."""
    name = name_of(node)
    source = node.args[0]
    reference = t.values.get(source) if isinstance(source, fx.Node) else None
    if isinstance(reference, Reference) and name in _REFERRING and len(reference.parameter.shape) > 1:
        return moved_reference(reference, node, shape_of(source))
    if name in ("expand", "expand_as", "broadcast_to"):
        return t.labels(first_of(node)).expand(shape_of(node))
    if name in ("view", "reshape", "_unsafe_view", "view_as", "reshape_as"):
        labels = t.labels(first_of(node)).reshape(shape_of(node))
        t.reshaped.append(labels)
        return labels
    if name in _PICKING:
        _keep_picked(t, node, name)
    args: Any = fx.map_arg(node.args, t.labels)
    kwargs: Any = fx.map_arg(node.kwargs, t.labels)
    moved = node.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(source, fx.Node) and t.is_derived(source):
        t.derived.add(node)
    if isinstance(moved, Tensor) and moved.shape != shape_of(node):
        return t.freeze_all(node, f"moved by {name} in a way that depends on data")
    if name in ("flatten", "unflatten", "pixel_shuffle", "pixel_unshuffle"):
        t.reshaped.append(moved)
    elif name == "channel_shuffle":
        t.reshaped.append(moved.unflatten(1, (-1, argument(node, "groups"))))
    return moved


_PICKING = ("select", "unbind", "unfold", "diagonal", "tril", "triu", "roll")


def _keep_picked(t: Tracer, node: fx.Node, name: str) -> None:
    """Operators that count positions: of what they take one by one, nothing can be removed."""
    labels: Tensor = t.labels(first_of(node))
    why = f"taken by position, by {name}"
    if name in ("select", "unbind"):
        axis = argument(node, "dim") % labels.dim()
        taken = labels.select(axis, argument(node, "index")).unsqueeze(axis) if name == "select" else labels
        whole = any(varies(t.classes.roots(taken), d) for d in range(labels.dim()) if d != axis)
        if varies(t.classes.roots(labels), axis) and not whole and not (name == "unbind" and is_joined_again(node)):
            t.freeze(node, taken, why)
    elif name == "unfold":
        t.flatten(node, labels, [argument(node, "dimension")], why)
    elif name == "roll":
        if not argument(node, "dims"):
            t.flatten(node, labels, range(labels.dim()), why)
    else:
        dims = [argument(node, "dim1"), argument(node, "dim2")] if name == "diagonal" else [-2, -1]
        t.flatten(node, labels, dims, why)


def is_joined_again(node: fx.Node) -> bool:
    """Whether all that ``node`` takes apart is put together again, in order, by one operator."""
    parts = sorted(node.users, key=lambda part: int(part.args[1]))  # type: ignore[arg-type]
    users = {user for part in parts for user in part.users}
    if len(users) != 1 or len(parts) != len(node.meta["val"]):
        return False
    (user,) = users
    return user.op == "call_function" and name_of(user) in _JOINING and list(user.args[0]) == parts  # type: ignore[arg-type]


_JOINING = ("cat", "concat", "stack")


@rule(*_JOINING)
def _join(t: Tracer, node: fx.Node) -> Tensor:
    """What lies side by side must fit: along every other axis the same positions are removed from all of it.

    Tensors that the graph fills with one number fit in any size.
    """
    sources: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    rank = len(shape_of(node))
    dim = argument(node, "dim") % rank
    tensors = [t.labels(source) for source in sources]
    if name_of(node) == "stack":
        tensors = [labels.unsqueeze(dim) for labels in tensors]
    filled = [len(t.uniform.get(source, ())) == len(shape_of(source)) for source in sources]
    given = [labels for labels, any_size in zip(tensors, filled, strict=True) if labels.dim() == rank and not any_size]
    t.reshaped += [_side_by_side(given, dim)] if len(given) > 1 else []
    return _side_by_side([labels for labels in tensors if labels.dim() == rank], dim)


def _side_by_side(tensors: list[Tensor], dim: int) -> Tensor:
    """Labels joined along ``dim``, with stride 0 along axes where all of them have it."""
    shape = list(tensors[0].shape)
    shape[dim] = sum(labels.shape[dim] for labels in tensors)
    for d in range(len(shape)):
        if d != dim and all(labels.stride(d) == 0 for labels in tensors):
            tensors = [labels.narrow(d, 0, 1) for labels in tensors]
    return torch.cat(tensors, dim).expand(shape)


@rule("getitem")
def _getitem(t: Tracer, node: fx.Node) -> Any:
    values = t.values.get(first_of(node))
    key: Any = node.args[1]
    return values[key] if isinstance(values, (list, tuple)) else values
