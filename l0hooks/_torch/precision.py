"""Run a model's own code in another floating dtype, whatever dtypes the code names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.names import refuse
from l0hooks._torch.trees import tree_map, tree_map_only

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COMPLEX = (torch.complex128, torch.complex64)


def in_precision(dtype: torch.dtype) -> AbstractContextManager[object]:
    """A context in which every operator gives floating-point results of ``dtype``, also where code asks for another.

    Parameters
    ----------
    dtype : torch.float32 or torch.float64
    """
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        refuse("utils._python_dispatch.TorchDispatchMode", "a comparison in float64")

    class Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            def replaced(value: Any) -> Any:
                return converted_dtype(value, dtype) if isinstance(value, torch.dtype) else value

            output = func(*tree_map(replaced, args), **tree_map(replaced, kwargs or {}))
            return tree_map_only(Tensor, lambda t: converted(t, dtype), output)

    mode: AbstractContextManager[object] = Precision()  # type: ignore[no-untyped-call]
    return mode


@torch.no_grad()
def copy_in(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    """A copy with parameters, buffers and other tensors in this dtype; parameters that have it are shared."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        moved = converted(tensor.detach(), dtype)
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(moved, requires_grad=False)
        else:  # the model may write into it
            memo[id(tensor)] = moved if moved.dtype != tensor.dtype else moved.clone()
    return copy.deepcopy(model, memo)


def inputs_in(dtype: torch.dtype, inputs: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Arguments of several calls, with their tensors in this dtype; integers stay."""
    return tree_map_only(Tensor, lambda t: converted(t, dtype), list(inputs))  # type: ignore[no-any-return]


def converted_dtype(old: torch.dtype, floating: torch.dtype) -> torch.dtype:
    """``floating``, or its complex counterpart, in place of a floating or complex dtype; others as they are."""
    if old in _FLOATING:
        return floating
    return floating.to_complex() if old in _COMPLEX else old


def converted(tensor: Tensor, floating: torch.dtype) -> Tensor:
    """A tensor in the dtype that :func:`converted_dtype` gives for its own; itself if that is the same."""
    return tensor.to(converted_dtype(tensor.dtype, floating))
