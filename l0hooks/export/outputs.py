"""The numbers in a model's outputs, whatever classes hold them, and how far two outputs are apart."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l0hooks._torch.running import evaluating
from l0hooks._torch.trees import tree_leaves
from l0hooks.errors import StateError, explain

_PLAIN = (str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.layout, torch.Size, type, slice, range)
_WITHOUT_NUMBERS = (nn.Module, torch.Generator, types.ModuleType, types.FunctionType, types.MethodType)
_EXACT_ROUNDING = 1e-3  # of the float32 rounding error: what float64 may differ by
_EXACT_SCALE = 1e-6  # of the scale: the same, where float32 rounds chaotically
_EXACT_FLOOR = 1e-13  # of the scale: rounding in float64 where float32 happens to be exact
_LARGEST_SCALE = 1e6  # larger numbers, such as masked logits, are the scale of themselves alone


def outputs_of(
    model: nn.Module, inputs: Sequence[tuple[Any, ...]], context: AbstractContextManager[object] | None = None
) -> list[list[Any]]:
    """The leaves of what ``model`` computes in evaluation mode, and in ``context``, for each of ``inputs``.

    Raises
    ------
    StateError
        If an output can hold numbers that cannot be found.
    """
    found = []
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with evaluating(model):
        for arguments in inputs:
            with torch.random.fork_rng(gpus), context or nullcontext():  # each time from the same random state
                output = model(*arguments)
            found.append(list(leaves(output)))
    return found


def leaves(output: Any) -> Iterator[Any]:
    """The tensors of an output; its numbers and arrays as tensors; and plain values such as strings.

    Containers are taken apart, objects of classes that torch does not know by their attributes.

    Raises
    ------
    StateError
        If an object has no attributes and is no plain value.
    """
    yield from _leaves(output, set(), inside=False)


def _leaves(output: Any, seen: set[int], *, inside: bool) -> Iterator[Any]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield _dense(leaf)
        elif isinstance(leaf, (bool, int, float, complex, np.generic, np.ndarray)):
            array = np.asarray(leaf)
            yield torch.from_numpy(array.copy()) if array.dtype.kind in "biufc" else str(array.tolist())
        elif isinstance(leaf, _PLAIN):
            yield leaf
        elif not (inside and isinstance(leaf, _WITHOUT_NUMBERS)) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield type(leaf)
            yield from _leaves(_parts(leaf), seen, inside=True)


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor.clone() if tensor.layout is torch.strided else tensor.to_dense()  # the model may write into it again


def _parts(value: object) -> list[Any]:
    """The attributes of an object, or the elements of a set or view, in a fixed order."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return [[key, part] for key, part in value.items()]
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()) if name in dir(value)]
    attributes = getattr(value, "__dict__", None)
    if isinstance(value, _WITHOUT_NUMBERS) or callable(value) or (attributes is None and not slots):
        raise StateError(
            explain(
                "prune",
                "every output of the model must be something that can be compared.",
                expected="tensors, arrays, numbers, strings, and containers or objects that hold them",
                got=f"an output of type {type(value).__name__}",
                hint="a forward method that returns tensors, for the time of pruning",
            )
        )
    return [[name, part] for name, part in (attributes or {}).items()] + [[n, getattr(value, n)] for n in slots]


def has_numbers(found: Sequence[list[Any]]) -> bool:
    """Whether any output holds a finite number."""
    return any(isinstance(leaf, Tensor) and bool(leaf.isfinite().any()) for one in found for leaf in one)


def finite_share(one: Sequence[Any]) -> float:
    """The share of the numbers in one output that are finite; 0 if there are none."""
    tensors = [leaf for leaf in one if isinstance(leaf, Tensor)]
    count = sum(t.numel() for t in tensors)
    return sum(int(t.isfinite().sum()) for t in tensors) / count if count else 0.0


def largest(measure: Callable[..., float], *outputs: Sequence[Sequence[Any]]) -> float:
    """The largest ``measure`` over outputs for the same inputs, NaN if one is; there may be fewer of the last."""
    found = 0.0
    count = len(outputs[-1])
    for together in zip(*(some[:count] for some in outputs), strict=True):
        gap = measure(*together)
        found = gap if gap > found or gap != gap else found
    return found


def difference(expected: Sequence[Any], got: Sequence[Any], *, integers: bool = True) -> float:
    """The largest difference of two outputs, as a share of the scale: the largest number along the last axis.

    Numbers that agree count for the scale no further than the middle of their tensor, because a masked logit of −1e9
    would hide all others.

    Parameters
    ----------
    expected, got : sequence
        Leaves of two outputs.
    integers : bool
        Whether integers and booleans must agree; they need not while rounding may change an index.
    """

    def measure(a: Tensor, b: Tensor) -> float:
        wrong = _unequal(a, b)
        size = a.abs().nan_to_num(0, 0, 0)
        scale = torch.maximum(_row(torch.where(wrong, size, 0)), size.median().clamp(max=_LARGEST_SCALE))
        return _worst(wrong, (a - b).abs(), scale)

    return _each(measure, expected, got, integers=integers)


def allowances(expected: Sequence[Any], rounded: Sequence[Any]) -> list[Tensor | None]:
    """By how much each number of a float64 output may change by rounding in float64.

    Parameters
    ----------
    expected : sequence
        Leaves of an output in float64.
    rounded : sequence
        Of the same model in float32. Its error says how far rounding is amplified at each place.
    """
    comparable = len(rounded) == len(expected)
    return [_allowance(a, rounded[n] if comparable else None) for n, a in enumerate(expected)]


def _allowance(a: Any, rounded: Any) -> Tensor | None:
    if not isinstance(a, Tensor) or not _is_real(a) or not a.numel():
        return None
    size = a.abs().nan_to_num(0, 0, 0)
    scale = torch.maximum(_row(size), size.median()).clamp(max=_LARGEST_SCALE).maximum(size)
    allowed = _EXACT_SCALE * scale
    if isinstance(rounded, Tensor) and rounded.shape == a.shape:
        error = (rounded.to(a.dtype) - a).abs().nan_to_num(torch.inf, torch.inf, torch.inf)
        allowed = torch.minimum(_EXACT_ROUNDING * error, allowed)
    return allowed + _EXACT_FLOOR * scale


def excess(expected: Sequence[Any], allowed: Sequence[Tensor | None], got: Sequence[Any]) -> float:
    """The largest difference of two float64 outputs, in units of :func:`allowances`; more than 1 is no rounding."""
    limits = iter([limit for limit in allowed if limit is not None])
    return _each(lambda a, b: _worst(_unequal(a, b), (a - b).abs(), next(limits)), expected, got, integers=True)


def _each(
    measure: Callable[[Tensor, Tensor], float], expected: Sequence[Any], got: Sequence[Any], *, integers: bool
) -> float:
    """The largest measure over pairs of leaves; infinite where they are of other kinds, shapes or plain values."""
    if len(expected) != len(got):
        return float("inf")
    found = 0.0
    for a, b in zip(expected, got, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
                return float("inf")
        elif a.shape != b.shape or _is_real(a) != _is_real(b):
            return float("inf")
        elif not _is_real(a):
            if integers and bool((a != b).any()):
                return float("inf")
        elif a.numel():
            gap = measure(_in_double(a), _in_double(b))
            found = gap if gap > found or gap != gap else found
    return found


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    return (a != b) & ~(a.isnan() & b.isnan())  # masked logits are infinite in both


def _row(size: Tensor) -> Tensor:
    return size.amax(-1, keepdim=True) if size.dim() else size


def _worst(wrong: Tensor, gap: Tensor, allowed: Tensor) -> float:
    return float(torch.where(wrong, gap / allowed.clamp(min=torch.finfo(torch.float64).tiny), 0.0).max())
