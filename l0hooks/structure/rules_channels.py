"""Rules for layers and operators that compute across channels: they read, mix, normalise or reduce them."""

from __future__ import annotations

from typing import Any

from einops import rearrange, repeat
from torch import Tensor, fx

from l0hooks.structure.fx_nodes import argument, first_of, name_of, shape_of
from l0hooks.structure.rules_elementwise import pointwise
from l0hooks.structure.table import RULES, rule
from l0hooks.structure.tracer import Tracer
from l0hooks.structure.union_find import along, compress, constant, varies

__all__ = ["RULES"]  # importing this module fills the table

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
    """Only whole groups can be removed: the inputs, outputs and kernels of a group are one class."""
    by_group = rearrange(inputs, "(group channel) -> group channel", group=groups)
    t.unite(node, by_group, by_group[:, :1])
    kernel = rearrange(first, "(group channel) -> group channel", group=groups)
    t.unite(node, kernel, by_group[:, :1])
    t.classes.freeze(second, "counts the channels inside a group")
    if transposed:
        return repeat(by_group[:, 0], "group -> (group channel)", channel=second.numel())
    return first


@rule("embedding")
def _embedding(t: Tracer, node: fx.Node) -> Tensor:
    weight = argument(node, "weight")
    if not t.is_weight(weight):
        return t.freeze_all(node, "an embedding whose table is computed")
    return along(_columns(t, node, weight, argument(node, "indices")), -1, shape_of(node))


def _columns(t: Tracer, node: fx.Node, weight: fx.Node, *indices: fx.Node) -> Tensor:
    """The channels of a table whose rows are looked up, and stay."""
    rows, columns = t.axes(weight)
    t.freeze_indices(node, *indices)
    t.classes.freeze(rows, "rows of an embedding: one for each token")
    return columns


@rule("embedding_bag")
def _embedding_bag(t: Tracer, node: fx.Node) -> Any:
    """The sums of rows come first; then what says which rows they are of."""
    weight = argument(node, "weight")
    if not t.is_weight(weight):
        return t.freeze_all(node, "an embedding whose table is computed")
    columns = _columns(t, node, weight, *(source for source in node.all_input_nodes if source is not weight))
    sums, *others = node.meta["val"]
    return [along(columns, -1, sums.shape), *(constant(value.shape) for value in others)]


@rule("scaled_dot_product_attention")
def _attention(t: Tracer, node: fx.Node) -> Tensor:
    """Only whole heads can be removed: the channels of q, k and v are merged within each head."""
    query, key, value = (argument(node, n) for n in ("query", "key", "value"))
    mask, out = argument(node, "attn_mask"), shape_of(node)
    if len(out) < 4:
        return t.freeze_all(node, "attention without an axis of heads")
    heads = [t.collapse(n, -3) for n in (query, key, value)]
    shared = min(len(h) for h in heads)  # the number of key heads, each shared by several query heads
    heads = [rearrange(h, "(key_head head) -> key_head head", key_head=shared) for h in heads]
    for h in heads:
        t.unite(node, heads[0][:, :1], h)
    found = along(rearrange(heads[0], "key_head head -> (key_head head)"), -3, out)
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
    return _tied(t, node, vector, "weight", "bias", "running_mean", "running_var")


@rule("group_norm")
def _group_norm(t: Tracer, node: fx.Node) -> Tensor:
    vector = t.collapse(argument(node, "input"), 1)
    by_group = rearrange(vector, "(group channel) -> group channel", group=argument(node, "num_groups"))
    t.merge(node, by_group, 1, "normalised together by group_norm")
    return _tied(t, node, vector, "weight", "bias")


def _tied(t: Tracer, node: fx.Node, vector: Tensor, *names: str) -> Tensor:
    """Labels of the channels along axis 1, merged with those of the parameters ``names``, one number per channel."""
    for name in names:
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
    if isinstance(value, (list, tuple)):  # values and their indices
        return [labels.reshape(part.shape) for part in value]
    return labels.reshape(value.shape)


@rule("max", "min")
def _extreme(t: Tracer, node: fx.Node) -> Any:
    """An elementwise result of two tensors, or a reduction over axes."""
    of_two = len(node.args) > 1 and isinstance(node.args[1], fx.Node)
    return pointwise(t, node) if of_two else _reduction(t, node)


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
