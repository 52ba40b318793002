"""Large arrays: memory that is reused, and passes over pieces that fit the cache."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

PIECE = 2**17  # elements; a few arrays of this length fit a processor's cache
_MIN_REUSED = 2**20  # bytes; torch allocates smaller arrays
_MAX_RETAINED = 2**26  # bytes of free blocks that are retained; larger arrays use huge pages
# true for zero derivatives of forward mode, which have no memory; if it is missing, for all tensors
_is_zero: Callable[[Tensor], bool] = vars(torch._C.TensorBase).get("_is_zerotensor", lambda tensor: True)
_free: dict[int, list[npt.NDArray[np.uint8]]] = {}


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory.

    The first access to a page of 4 KiB costs more than several passes over it, and torch's allocator on the CPU
    returns pages as soon as they are free. This function retains 64 MiB, and NumPy asks Linux for pages of 2 MiB.

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
    if device.type != "cpu" or size < _MIN_REUSED:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    # resize_, not view: autograd forbids some changes in place of views and of memory that others may use
    return torch.frombuffer(_reused_block(size), dtype=dtype).resize_(tuple(shape))


def _reused_block(size: int) -> npt.NDArray[np.uint8]:
    """A block of memory that is returned when the last tensor that uses it is deleted."""
    try:
        block = _free[size].pop()  # not tested first: another thread may take the last one
    except (KeyError, IndexError):
        block = np.empty(size, np.uint8)
    lent = block[:]  # only the tensor's storage holds this view
    weakref.finalize(lent, _return_block, block).atexit = False
    return lent


def _return_block(block: npt.NDArray[np.uint8]) -> None:
    if block.size > _MAX_RETAINED // 4:
        return
    kept = list(_free.items())  # a copy: garbage collection may call this function at any time
    if sum(size * len(blocks) for size, blocks in kept) + block.size > _MAX_RETAINED:
        _free.clear()  # perhaps of a model that is no longer trained
    _free.setdefault(block.size, []).append(block)


def fresh_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory of the dtype, shape, device and strides of ``tensor``, like :func:`fresh` if contiguous."""
    if tensor.nbytes >= _MIN_REUSED and tensor.is_contiguous():
        return fresh(tensor.shape, tensor.dtype, tensor.device)
    return torch.empty_like(tensor)


def has_address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether all elements of ``tensor`` are stored at its ``data_ptr()``, contiguous and as ``dtype``.

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
        type(tensor) in (Tensor, nn.Parameter)  # subclasses have no memory or use that of another tensor
        and tensor.dtype == dtype
        and tensor.device.type != "meta"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not _is_zero(tensor)
    )


def lie_alike(weight: Tensor, log_alpha: Tensor) -> bool:
    """Whether a kernel can process a weight and its float32 log-odds element by element.

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
    """Corresponding pieces of arrays of one shape that fit the cache; whole arrays if strides or device forbid that.

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


def has_room(count: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``count`` numbers of ``dtype`` fit into what is free on ``device``; true where that is not known."""
    size = count * dtype.itemsize
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch's allocator, unused
        return size <= torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines() if device.type == "cpu" else []
    except OSError:  # no Linux
        return True
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return not available or size <= available[0]
