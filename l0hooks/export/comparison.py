"""What a model computes on examples of more than one size, to hold another model against."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l0hooks._torch.running import OUT_OF_MEMORY, evaluating
from l0hooks._torch.trees import tree_leaves, tree_map, tree_map_only
from l0hooks.attach.copies import run_copy

_DOUBT = 100  # tolerances: a difference above as many is no rounding, one below is computed again in float64


class Comparison:
    """The outputs of a model in evaluation mode: at two batch sizes, and at half the length or size of the examples.

    Other lengths are tried on copies, because some models set their own attributes by what they see. A difference that
    may be rounding is computed again by float64 copies of both models, whose verdict counts.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    example_inputs : sequence
        Positional arguments.
    stays : bool
        Whether ``model`` will be the same at the last comparison; else no difference can be computed again.
    """

    def __init__(self, model: nn.Module, example_inputs: Sequence[Any], *, stays: bool = True) -> None:
        self._model = model if stays else None
        self._in_double: list[Any] | None = None
        self.inputs = list(batches(example_inputs))
        whole, *others = outputs(model, self.inputs)
        self.shorter = list(lengths(model, example_inputs, whole))
        self.expected = [whole, *others, *self._shorter_outputs(model)]
        self.allowed = tolerance(model)

    def wrong(self, model: nn.Module, *, every_size: bool = True) -> str:
        """Empty if ``model`` computes the same, else how it does not; on all inputs, or on those of the first size."""
        try:
            got = self._outputs(model, every_size)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001  # where sizes do not fit, a model's own code can raise anything
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        gap = _largest(self.expected, got)
        if self.allowed < gap <= _DOUBT * self.allowed:
            gap = self._gap_in_double(model, gap, every_size)
        return "" if gap <= self.allowed else f"a difference of {gap:.1e} of the output's scale"  # nor if it is NaN

    def _gap_in_double(self, model: nn.Module, gap: float, every_size: bool) -> float:
        """The difference between float64 copies; ``gap`` if one of them does not run in float64."""
        if self._model is None:
            return gap
        inputs = [*self.inputs, *(self.shorter if every_size else [])]
        try:
            if self._in_double is None:
                self._in_double = _in_double(self._model, [*self.inputs, *self.shorter])
            return _largest(self._in_double, _in_double(model, inputs))
        except OUT_OF_MEMORY:
            raise
        except Exception:  # noqa: BLE001  # code that names a dtype can raise anything
            return gap

    def _outputs(self, model: nn.Module, every_size: bool) -> list[Any]:
        found = outputs(model, self.inputs)
        return found + self._shorter_outputs(model) if every_size else found

    def _shorter_outputs(self, model: nn.Module) -> list[Any]:
        return outputs(run_copy(model), self.shorter) if self.shorter else []


def _in_double(model: nn.Module, inputs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What a float64 copy of ``model`` computes."""
    doubled = [tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, one) for one in inputs]
    return outputs(copy.deepcopy(model).double(), doubled)


def _largest(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest difference of any output; NaN if one is. There may be fewer outputs than expected."""
    largest = 0.0
    for a, b in zip(expected[: len(got)], got, strict=True):
        gap = difference(a, b)
        largest = gap if gap > largest or gap != gap else largest
    return largest


def batches(example_inputs: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """The example inputs, and their first example twice over: two batch sizes, where the arguments allow it."""
    yield tuple(example_inputs)
    tensors = _tensors_in(example_inputs)
    if tensors and all(t.dim() > 0 and len(t) == len(tensors[0]) for t in tensors):
        count = 3 if len(tensors[0]) == 1 else 1

        def resized(value: Any) -> Any:
            return value[:1].repeat(count, *([1] * (value.dim() - 1))) if isinstance(value, Tensor) else value

        yield tree_map(resized, tuple(example_inputs))


def lengths(model: nn.Module, example_inputs: Sequence[Any], whole: Any) -> Iterator[tuple[Any, ...]]:
    """The example inputs at half their sequence length or image size, where ``model`` takes that as the same batch.

    ``whole`` is what it computes for all of them.
    """
    tensors = _tensors_in(example_inputs)
    if not tensors:
        return
    model = run_copy(model)
    first = tensors[0]
    for axes in [(1,), (2,)] if first.dim() < 4 else [tuple(range(2, first.dim()))]:
        if any(axis >= first.dim() or first.shape[axis] < 2 for axis in axes):
            continue
        half = tree_map(functools.partial(_halved, like=first.shape, axes=axes), tuple(example_inputs))
        try:
            (shorter,) = outputs(model, [half])
        except OUT_OF_MEMORY:
            raise
        except Exception:  # noqa: BLE001  # a model of one length, or an axis of features
            continue
        if _batch_of(shorter) == _batch_of(whole):
            yield half


def _halved(value: Any, like: torch.Size, axes: tuple[int, ...]) -> Any:
    """``value`` cut to half its length along those of ``axes`` where it is as long as ``like``."""
    if isinstance(value, Tensor):
        for axis in axes:
            if value.dim() > axis and value.shape[axis] == like[axis]:
                value = value.narrow(axis, 0, like[axis] // 2)
    return value


def _batch_of(output: Any) -> list[tuple[int, int]]:
    return [(t.dim(), len(t)) for t in _tensors_in(output) if t.dim()]


def _tensors_in(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def outputs(model: nn.Module, inputs: Iterable[tuple[Any, ...]]) -> list[Any]:
    """What ``model`` computes in evaluation mode for each of ``inputs``."""
    with evaluating(model):
        return [model(*arguments) for arguments in inputs]


def difference(expected: Any, got: Any) -> float:
    """The largest difference between tensors of two outputs, as a share of the expected tensor's scale.

    Whole numbers count only where there are no others: rounding may move an index.
    """
    largest = 0.0
    wanted, found = ([_as_tensor(v) for v in tree_leaves(output)] for output in (expected, got))
    if len(wanted) != len(found):
        return float("inf")
    real = any(isinstance(a, Tensor) and a.is_floating_point() for a in wanted)
    for a, b in zip(wanted, found, strict=True):
        if not isinstance(a, Tensor):
            continue
        if not isinstance(b, Tensor) or a.shape != b.shape:
            return float("inf")
        if a.is_floating_point() and a.numel():
            scale = max(float(a.nan_to_num(0, 0, 0).abs().max()), torch.finfo(a.dtype).tiny)
            equal = (a == b) | (a.isnan() & b.isnan())  # infinite where both are: masked logits
            error = float(torch.where(equal, 0.0, (a - b).abs()).max()) / scale
            largest = error if error > largest or error != error else largest
        elif not real and bool((a != b).any()):
            return float("inf")
    return largest


def _as_tensor(value: Any) -> Any:
    """Numbers and arrays as tensors; anything else as it is."""
    number = isinstance(value, (int, float, complex, np.generic, np.ndarray))
    return torch.from_numpy(np.array(value)) if number and np.asarray(value).dtype.kind in "bifc" else value


def tolerance(model: nn.Module) -> float:
    """What rounding explains: 100 units in the last place of the model's coarsest floating dtype."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    return 100 * max(torch.finfo(dtype).eps for dtype in dtypes)
