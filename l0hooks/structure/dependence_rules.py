"""How dependence on the model's inputs passes through operators.

A rule takes a node and what is known of its inputs. It returns the mask of the result, or a bool for all of it. It may
say that a number depends on the inputs where it does not, never the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, fx

from l0hooks._torch.graphs import schema_of
from l0hooks.structure.fx_nodes import argument, first_of, name_of, shape_of
from l0hooks.structure.rules_elementwise import POINTWISE


@dataclass
class Known:
    """A value in the graph.

    Attributes
    ----------
    value : Any
        A tensor, or several in lists or tuples; anything else has no mask.
    depends : Any
        Masks of the same structure: bool, true where a number can depend on the model's inputs.
    pure : bool
        Whether it is made of parameters and constants alone. Of such, a part may be another part at another length.
    """

    value: Any
    depends: Any
    pure: bool = False


KnownInputs = Mapping[fx.Node, Known]
DependenceRule = Callable[[fx.Node, KnownInputs], Any]
DEPENDENCE: dict[str, DependenceRule] = {}

_FILLED = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
_MOVEMENT = (
    *("permute", "transpose", "t", "flatten", "unsqueeze", "squeeze", "expand", "expand_as", "slice", "select"),
    *("split", "split_with_sizes", "chunk", "unbind", "unflatten", "cat", "concat", "stack", "movedim", "flip"),
    *("view", "reshape", "_unsafe_view", "narrow", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("tile", "swapaxes", "mT", "numpy_T", "view_as", "reshape_as", "moveaxis", "swapdims"),
)
_RESHAPING = ("permute", "transpose", "t", "flatten", "unsqueeze", "squeeze", "expand", "unflatten", "view", "reshape")
DROPOUT = frozenset(("dropout", "dropout_", "feature_dropout", "alpha_dropout"))
PURE = POINTWISE | frozenset((*_RESHAPING, "_unsafe_view", "zeros", "ones", "full", "scalar_tensor", *_FILLED))


def _rule(*operators: str) -> Callable[[DependenceRule], DependenceRule]:
    def add(function: DependenceRule) -> DependenceRule:
        for name in operators:
            DEPENDENCE[name] = function
        return function

    return add


def _mask(node: object, known: KnownInputs) -> Tensor:
    mask: Tensor = known[node].depends  # type: ignore[index]
    return mask


@_rule(*(POINTWISE - DROPOUT))
def _pointwise(node: fx.Node, known: KnownInputs) -> Tensor:
    result = torch.zeros(shape_of(node), dtype=torch.bool, device=_mask(first_of(node), known).device)
    for source in node.all_input_nodes[:1] if name_of(node) == "type_as" else node.all_input_nodes:
        result |= _mask(source, known)
    return result


@_rule(*DROPOUT)
def _dropout(node: fx.Node, known: KnownInputs) -> Tensor | bool:
    return True if argument(node, "train") else _mask(first_of(node), known)


@_rule("prelu")
def _prelu(node: fx.Node, known: KnownInputs) -> Tensor | bool:
    x, weight = node.all_input_nodes
    return True if _mask(weight, known).any() else _mask(x, known)


@_rule(*_FILLED)
def _filled(node: fx.Node, known: KnownInputs) -> bool:
    return False


@_rule(*_MOVEMENT)
def _movement(node: fx.Node, known: KnownInputs) -> Any:
    """The operator itself moves the mask as it moves the numbers."""
    if name_of(node) in ("view", "_unsafe_view"):  # a mask may have other strides
        return _mask(first_of(node), known).reshape(shape_of(node))
    args: Any = fx.map_arg(node.args, lambda source: _mask(source, known))
    kwargs: Any = fx.map_arg(node.kwargs, lambda source: _mask(source, known))
    return node.target(*args, **kwargs)  # type: ignore[operator]


@_rule("pad", "constant_pad_nd", *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in "123"))
def _pad(node: fx.Node, known: KnownInputs) -> Tensor:
    """Along padded axes, every place may hold the number of another, or the padding."""
    mask = _mask(first_of(node), known)
    widths = node.args[1]
    return _along(mask, range(-(len(widths) // 2), 0), keep=True).expand(shape_of(node))  # type: ignore[arg-type]


@_rule("getitem")
def _getitem(node: fx.Node, known: KnownInputs) -> Any:
    key: Any = node.args[1]
    return known[first_of(node)].depends[key]


_FACTORS = {"addmm": ("mat1", "mat2"), "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "matmul": ("self", "other")}


@_rule("linear", *_FACTORS, *(f"conv{n}d" for n in "123"), *(f"conv_transpose{n}d" for n in "123"))
def _product(node: fx.Node, known: KnownInputs) -> Tensor:
    """A sum of products: zeros that do not depend on the inputs stop what is multiplied with them."""
    name = name_of(node)
    a, b = (argument(node, part) for part in _FACTORS.get(name, ("input", "weight")))
    bias = argument(node, "self") if name == "addmm" else None if name in _FACTORS else argument(node, "bias")

    def run(left: Tensor, right: Tensor) -> Tensor:
        if name in _FACTORS:
            return left.float() @ right.float()
        found: Tensor = node.target(left.float(), right.float(), None, *node.args[3:])  # type: ignore[operator]
        return found

    result = run(_mask(a, known), _counts(b, known)) + run(_counts(a, known), _mask(b, known)) > 0.5
    if bias is None:
        return result
    axes = known[b].value.dim() - 2 if name.startswith("conv") else 0
    return result | _mask(bias, known).reshape(*known[bias].value.shape, *[1] * axes)


def _counts(node: fx.Node, known: KnownInputs) -> Tensor:
    """Where a factor may be another number than zero."""
    counts: Tensor = (known[node].value != 0) | _mask(node, known)
    return counts


@_rule("embedding")
def _embedding(node: fx.Node, known: KnownInputs) -> Tensor | bool:
    """A feature that is the same in all rows does not depend on which rows are looked up."""
    table = node.all_input_nodes[0]
    weight = known[table].value
    if _mask(table, known).any():
        return True
    differs: Tensor = (weight != weight[:1]).any(0)
    return differs.expand(shape_of(node))


@_rule("batch_norm")
def _batch_norm(node: fx.Node, known: KnownInputs) -> Tensor | bool:
    x, *others = node.all_input_nodes
    if argument(node, "training") or any(bool(_mask(other, known).any()) for other in others):
        return True
    return _mask(x, known)


@_rule("layer_norm", "rms_norm")
def _layer_norm(node: fx.Node, known: KnownInputs) -> Tensor:
    count = len(argument(node, "normalized_shape"))
    return _along(_pooled(node, known), range(-count, 0), keep=True).expand(shape_of(node))


@_rule("group_norm")
def _group_norm(node: fx.Node, known: KnownInputs) -> Tensor:
    mask = _pooled(node, known)
    grouped = rearrange(mask, "n (group channel) ... -> n group (channel ...)", group=int(argument(node, "num_groups")))
    return _along(grouped, [2], keep=True).expand(grouped.shape).reshape(mask.shape)


@_rule("instance_norm")
def _instance_norm(node: fx.Node, known: KnownInputs) -> Tensor:
    mask = _pooled(node, known)
    return _along(mask, range(2, mask.dim()), keep=True).expand(mask.shape)


def _pooled(node: fx.Node, known: KnownInputs) -> Tensor:
    """The mask of what is normalised; all true if a scale or shift depends on inputs."""
    x, *others = node.all_input_nodes
    some = any(bool(_mask(other, known).any()) for other in others)
    return torch.ones_like(_mask(x, known)) if some else _mask(x, known)


@_rule("mean", "amax", "amin", "max", "min", "any", "all")
def _reduction(node: fx.Node, known: KnownInputs) -> Any:
    """What is equal at all positions stays, however many there are; a sum does not."""
    mask = _mask(first_of(node), known)
    names = [arg.name for arg in schema_of(node).arguments]
    if len(node.all_input_nodes) > 1 or "dim" not in names:
        return bool(mask.any()) or any(bool(_mask(source, known).any()) for source in node.all_input_nodes)
    dims = argument(node, "dim")
    keep = bool(argument(node, "keepdim"))
    found = _along(mask, [dims] if isinstance(dims, int) else dims or range(mask.dim()), keep=keep)
    return [found, torch.ones_like(found)] if isinstance(node.meta["val"], (tuple, list)) else found  # and indices


@_rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def _softmax(node: fx.Node, known: KnownInputs) -> Tensor:
    mask = _mask(first_of(node), known)
    return _along(mask, [int(argument(node, "dim"))], keep=True).expand(mask.shape)


@_rule(
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in "123"),
    *("_adaptive_avg_pool2d", "max_pool2d_with_indices", "upsample_nearest1d", "upsample_nearest2d"),
    *("upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d"),
)
def _spatial(node: fx.Node, known: KnownInputs) -> Any:
    mask = _mask(first_of(node), known)
    value = node.meta["val"]
    axes = int(next(c for c in reversed(name_of(node)) if c in "123"))
    pooled = _along(mask, range(-axes, 0), keep=True)
    parts = list(value) if isinstance(value, (tuple, list)) else [value]
    found = [pooled.expand(part.shape) for part in parts]
    return [found[0], *map(torch.ones_like, found[1:])] if isinstance(value, (tuple, list)) else found[0]


def _along(mask: Tensor, dims: Sequence[int], *, keep: bool) -> Tensor:
    """Whether any number along ``dims`` depends on inputs."""
    return mask.any(dim=tuple(dims), keepdim=keep) if len(dims) else mask
