"""Large arrays: fresh memory that costs little to touch first, and passes that stay in the cache."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

PIECE = 2**17  # elements: a few arrays of them lie in a processor's cache
_LARGE = 2**20  # bytes
_KEPT = 2**26  # bytes that are kept for the next array of the same size; larger ones lie on huge pages
# forward-mode derivatives that are zero and hold no memory; without the name nothing counts as plain memory
_is_zero: Callable[[Tensor], bool] = vars(torch._C.TensorBase).get("_is_zerotensor", lambda tensor: True)
_free: dict[int, list[npt.NDArray[np.uint8]]] = {}


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory.

    The first touch of a page of 4 KiB costs more than several passes over it, and torch's allocator on the CPU hands
    pages back as soon as they are free. Here 64 MiB are kept, and NumPy asks Linux for pages of 2 MiB.

    Parameters
    ----------
    shape : sequence of int
    dtype : torch.dtype
    device : torch.device

    Returns
    -------
    Tensor, contiguous

    Examples
    --------
    >>> fresh((2, 3), torch.bfloat16, torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    # reshaped by resize_: autograd forbids to change some views in place, and to add to memory that others may see
    return torch.frombuffer(_lend(size), dtype=dtype).resize_(tuple(shape))


def _lend(size: int) -> npt.NDArray[np.uint8]:
    """Memory that comes back when the last tensor that uses it has gone."""
    try:
        block = _free[size].pop()  # without a look first: another thread may take the last one
    except (KeyError, IndexError):
        block = np.empty(size, np.uint8)
    lent = block[:]  # the tensor's storage holds this view alone
    weakref.finalize(lent, _take_back, block).atexit = False
    return lent


def _take_back(block: npt.NDArray[np.uint8]) -> None:
    if block.size > _KEPT // 4:
        return
    kept = list(_free.items())  # the collector may run this function at any time
    if sum(size * len(blocks) for size, blocks in kept) + block.size > _KEPT:
        _free.clear()  # of a model that is no longer trained, perhaps
    _free.setdefault(block.size, []).append(block)


def fresh_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory of the dtype, shape, device and strides of ``tensor``, like :func:`fresh` if contiguous."""
    if tensor.nbytes >= _LARGE and tensor.is_contiguous():
        return fresh(tensor.shape, tensor.dtype, tensor.device)
    return torch.empty_like(tensor)


def has_address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether all of ``tensor`` lies at its ``data_ptr()``, element after element, as ``dtype``.

    Parameters
    ----------
    tensor : Tensor
    dtype : torch.dtype

    Returns
    -------
    bool

    Examples
    --------
    >>> has_address(torch.ones(2, 3)), has_address(torch.ones(2, 3).t()), has_address(torch.ones(2, device="meta"))
    (True, False, False)
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)  # others hold no memory, or that of something else
        and tensor.dtype == dtype
        and tensor.device.type != "meta"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not _is_zero(tensor)
    )


def lie_alike(weight: Tensor, log_alpha: Tensor) -> bool:
    """Whether a kernel can go through a weight and its float32 log-odds side by side.

    Parameters
    ----------
    weight, log_alpha : Tensor

    Returns
    -------
    bool

    Examples
    --------
    >>> lie_alike(torch.ones(2, 3), torch.ones(2, 3)), lie_alike(torch.ones(2), torch.ones(3))
    (True, False)
    """
    alike = weight.shape == log_alpha.shape and weight.device == log_alpha.device
    return alike and has_address(weight, weight.dtype) and has_address(log_alpha)


def pieces(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Corresponding pieces of arrays of one shape, small enough for the cache; whole where strides or device forbid.

    Parameters
    ----------
    first, *others : Tensor or None
        On one device, of one shape. None stays None.

    Yields
    ------
    tuple of views or None

    Examples
    --------
    >>> [piece.numel() for piece, _ in pieces(torch.empty(2, PIECE), None)]
    [131072, 131072]
    """
    arrays = (first, *others)
    if first.numel() <= PIECE or first.device.type != "cpu" or not all(t is None or t.is_contiguous() for t in arrays):
        yield arrays
    else:
        count = -(-first.numel() // PIECE)
        flat = (itertools.repeat(None, count) if t is None else torch.split(t.view(-1), PIECE) for t in arrays)
        yield from zip(*flat, strict=True)
