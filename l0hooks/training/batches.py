"""Calibration batches: what a model is called with, one call for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from l0hooks._torch.trees import tree_leaves
from l0hooks.errors import SpecError, explain

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """``model`` called with a batch: a mapping is its keyword arguments, a tuple or list its positional ones.

    Examples
    --------
    >>> call(nn.Identity(), {"input": 3}), call(nn.Identity(), (4,)), call(nn.Identity(), 5)
    (3, 4, 5)
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        return model(*batch)
    return model(batch)


def run(model: nn.Module, batch: Any, loss: Forward | None) -> Any:
    """What ``loss`` makes of a model and a batch; without one, the model's output."""
    return call(model, batch) if loss is None else loss(model, batch)


def check_batches(where: str, batches: Iterable[Any]) -> Sequence[Any]:
    """``batches`` as a sequence that can be read several times.

    Raises
    ------
    SpecError
        If there are none, or a single tensor or mapping was given in place of several.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise SpecError(
            explain(
                where, "batches are a sequence of them.", got=f"one {type(batches).__name__}", hint="batches=[batch]"
            )
        )
    found = batches if isinstance(batches, Sequence) else list(batches)
    if not len(found):
        raise SpecError(explain(where, "there must be at least one batch.", got="none"))
    return found


def floats_of(output: Any) -> Iterator[Tensor]:
    """Every tensor of floating-point numbers in an output."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf
