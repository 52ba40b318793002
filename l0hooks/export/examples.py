"""Inputs on which two models are compared: the examples, noise like them, other batch sizes and lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from l0hooks._torch.running import OUT_OF_MEMORY
from l0hooks._torch.trees import tree_leaves, tree_map
from l0hooks.export.outputs import finite_share, outputs_of

Case = tuple[tuple[Any, ...], list[Any]]  # arguments, and the leaves of the output for them
_SEED = 20180101


def batches(example_inputs: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """The example inputs; then their first example alone, or three times if it is the only one.

    The second only if all tensors have the same first axis.
    """
    yield tuple(example_inputs)
    tensors = tensors_in(example_inputs)
    if tensors and all(t.dim() > 0 and len(t) == len(tensors[0]) > 0 for t in tensors):
        count = 3 if len(tensors[0]) == 1 else 1

        def resized(value: Any) -> Any:
            return repeat(value[:1], "1 ... -> count ...", count=count) if isinstance(value, Tensor) else value

        yield tree_map(resized, tuple(example_inputs))


def lengths(model: nn.Module, example_inputs: Sequence[Any], whole: Sequence[Any]) -> Iterator[Case]:
    """The example inputs at half their sequence length or image size, if ``model`` takes these as the same examples.

    ``whole`` are the leaves of its output for the inputs at full length.
    """
    for half in _halves(example_inputs):
        shorter = attempt(model, half)
        if shorter is not None and _batch_of(shorter) == _batch_of(whole):
            yield half, shorter


def smaller(model: nn.Module, example_inputs: Sequence[Any], whole: Sequence[Any]) -> Iterator[Case]:
    """The first of the examples at half its length or image size; at its own, if ``model`` takes no half.

    At most one case; none if there is one example that cannot be halved. ``whole`` are the leaves of its output for all
    examples.
    """
    given = tuple(example_inputs)
    *_, one = batches(given)
    count = len(tensors_in(given)[0]) if one is not given else 0
    if count == 1:  # in ``one`` it is three times
        one = given
    alone = [(axes, 1 if length == count else length) for axes, length in _batch_of(whole)]
    for smaller_inputs in (*_halves(one), *([one] if count > 1 else [])):
        found = attempt(model, smaller_inputs)
        if found is not None and _batch_of(found) == alone:
            yield smaller_inputs, found
            return


def telling(example_inputs: Sequence[Any]) -> bool:
    """Whether the numbers of the examples differ: zeros, or ones, say little about a model.

    Examples
    --------
    >>> telling((torch.zeros(2, 3),)), telling((torch.arange(3.0), torch.ones(3, dtype=torch.bool)))
    (False, True)
    """
    tensors = [t for t in tensors_in(example_inputs) if t.layout is torch.strided and not t.is_quantized]
    vary = [(bool(t.isfinite().any() and (t != t.flatten()[0]).any()), t.is_floating_point()) for t in tensors]
    floating = [varies for varies, real in vary if real]
    return all(floating) if floating else any(varies for varies, _ in vary)


def _halves(example_inputs: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """The example inputs at half their length, or half their image size."""
    tensors = tensors_in(example_inputs)
    first = tensors[0] if tensors else torch.zeros(())
    for axes in [(1,), (2,)] if first.dim() < 4 else [tuple(range(2, first.dim()))]:
        if all(axis < first.dim() and first.shape[axis] >= 2 for axis in axes):
            yield tree_map(functools.partial(_halved, like=first.shape, axes=axes), tuple(example_inputs))


def _halved(value: Any, like: torch.Size, axes: tuple[int, ...]) -> Any:
    """``value`` at half its length along each of ``axes`` on which it is as long as ``like``."""
    if isinstance(value, Tensor):
        for axis in axes:
            if value.dim() > axis and value.shape[axis] == like[axis]:
                value = value.narrow(axis, 0, like[axis] // 2)
    return value


def _batch_of(output: Sequence[Any]) -> list[tuple[int, int]]:
    return [(t.dim(), len(t)) for t in output if isinstance(t, Tensor) and t.dim()]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def attempt(model: nn.Module, arguments: tuple[Any, ...]) -> list[Any] | None:
    """The leaves of the output for these arguments; None if the model does not take them."""
    try:
        return outputs_of(model, [arguments])[0]
    except OUT_OF_MEMORY:
        raise
    except Exception:  # noqa: BLE001  # a model's own code can raise anything for inputs that it does not take
        return None


def noise_like(model: nn.Module, example_inputs: Sequence[Any], whole: Sequence[Any]) -> Case | None:
    """Random inputs of the examples' shapes, dtypes and ranges, with the outputs; None if ``model`` takes none.

    Examples may be zeros, or all alike, and then say little about a model. Floating-point numbers get the examples'
    mean and deviation, whole numbers lie between the examples' smallest and largest. If the model does not take such
    inputs, or finds few finite numbers for them, whole numbers stay, and then negative numbers are avoided. ``whole``
    are the leaves of its output for the examples.
    """
    for kinds in ((_number, _whole_number), (_number, None), (_positive, None), (None, _whole_number)):
        generator = torch.Generator().manual_seed(_SEED)
        noise = tree_map(functools.partial(_noise, kinds=kinds, generator=generator), tuple(example_inputs))
        found = attempt(model, noise)
        if found is not None and finite_share(found) >= min(finite_share(whole), 0.5):
            return tuple(noise), found
    return None


_Draw = Callable[[Tensor, torch.Generator], Tensor]


def _noise(value: Any, kinds: tuple[_Draw | None, _Draw | None], generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or value.is_quantized or value.layout is not torch.strided or not value.numel():
        return value
    draw = kinds[0] if value.is_floating_point() or value.is_complex() else kinds[1]
    return value if draw is None else draw(value.detach().cpu(), generator).to(value)


def _number(value: Tensor, generator: torch.Generator) -> Tensor:
    if value.is_complex():
        return torch.view_as_complex(_number(torch.view_as_real(value.resolve_conj()), generator))
    finite = value[value.isfinite()].double()
    mean = float(finite.mean()) if finite.numel() else 0.0
    deviation = float(finite.std()) if finite.numel() > 1 else 0.0
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return (mean + (deviation or 1.0) * noise).where(~value.isinf(), value)  # infinite: a mask


def _positive(value: Tensor, generator: torch.Generator) -> Tensor:
    return _number(value, generator).abs()


def _whole_number(value: Tensor, generator: torch.Generator) -> Tensor:
    low, high = int(value.min()), int(value.max())
    if low == high:  # a mask of ones, or token 0
        low, high = (0, 1) if low == 0 else (low - 1, low)
    return torch.randint(low, high + 1, value.shape, generator=generator, dtype=torch.int64)
