"""What layers read: their inputs as rows of features, in the order of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from l0hooks.structure.layers import CONVOLUTIONS, is_hugging_face_conv1d


def has_rows(module: nn.Module) -> bool:
    """Whether a layer's output is its weight times rows of its input, and a bias: Linear, Conv and Conv1D of Hugging
    Face, called as they are.

    Examples
    --------
    >>> has_rows(nn.Linear(2, 2)), has_rows(nn.ConvTranspose2d(2, 2, 3))
    (True, False)
    """
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:  # attention reads it without a call
        return False
    plain = any(type(module).forward is kind.forward for kind in (nn.Linear, *CONVOLUTIONS))
    return plain or is_hugging_face_conv1d(module)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer as rows of features: shape (groups, rows, features of a group).

    Parameters
    ----------
    module : nn.Module
        One that :func:`has_rows`.
    x : Tensor

    Examples
    --------
    >>> input_rows(nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.zeros(5, 4, 8, 8)).shape
    torch.Size([2, 320, 18])
    """
    if not isinstance(module, CONVOLUTIONS):
        return x.reshape(1, -1, x.shape[-1])
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:  # a single example
        x = x[None]
    padding = _padding(module)
    if any(padding):
        x = F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    positions, kernel = ("i j k"[: 2 * spatial - 1], "p q r"[: 2 * spatial - 1])
    return rearrange(x, f"n (g c) {positions} {kernel} -> g (n {positions}) (c {kernel})", g=module.groups)


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Before and after each axis, the last axis first."""
    ends: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            ends += [total // 2, total - total // 2]
        else:
            width = 0 if isinstance(module.padding, str) else module.padding[axis]
            ends += [width, width]
    return ends


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """The output of a layer as rows: shape (groups, rows, outputs of a group)."""
    if not isinstance(module, CONVOLUTIONS):
        return y.reshape(1, -1, y.shape[-1])
    if y.dim() == len(module.kernel_size) + 1:
        y = y[None]
    return rearrange(y, "n (g c) ... -> g (n ...) c", g=module.groups)


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or what is laid over it, as (groups, outputs of a group, features of a group).

    Examples
    --------
    >>> as_matrix(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(6, 2, 3, 3)).shape
    torch.Size([2, 3, 18])
    """
    if is_hugging_face_conv1d(module):
        return rearrange(weight, "i o -> 1 o i")
    groups = module.groups if isinstance(module, CONVOLUTIONS) else 1
    return rearrange(weight, "(g o) ... -> g o (...)", g=groups)


def as_weight(module: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`as_matrix`."""
    if is_hugging_face_conv1d(module):
        return rearrange(matrix, "1 o i -> i o")
    return rearrange(matrix, "g o f -> (g o) f").reshape(shape)


@contextmanager
def noting(
    modules: Mapping[str, nn.Module], note: Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``note(name, module, input, output)`` whenever one of ``modules`` has been called.

    What it returns, if not None, takes the place of the output.
    """

    def hook(name: str) -> Callable[..., Tensor | None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            return note(name, module, args[0] if args else next(iter(kwargs.values())), output)

        return after

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
