"""Random numbers that are a pure function of a seed, handed out piece by piece: uniform, or logistic."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from l0hooks._torch.autograd import outside_transforms, transform_level
from l0hooks._torch.memory import has_address
from l0hooks.gates.kernels import loading

LEAST_FOR_PACKED = 2**15  # numbers; Packed is slow to seed and fast to run
_LEVELS = 2**16
_WORD = 2**64 - 1


class Stream(Protocol):
    """Independent random numbers; each call goes on where the last one ended."""

    def uniform_(self, out: Tensor) -> Tensor:
        """Fill ``out`` (contiguous, any floating dtype) with uniform numbers in [0, 1]."""
        ...

    def logistic_(self, out: Tensor, scale: float) -> Tensor:
        """Fill ``out`` with ``scale · logit u`` of uniform numbers u."""
        ...


def stream(seed: int, count: int, device: torch.device) -> Stream:
    """The random numbers of a seed.

    Parameters
    ----------
    seed : int, in [0, 2⁶⁴)
    count : int
        How many will be asked for; on the CPU many are drawn in another way than few. Kernels draw all of them on a
        GPU that Triton can use, and many of them on the CPU if Numba is installed.
    device : torch.device
        Of the tensors that will be filled.

    Returns
    -------
    Stream

    Examples
    --------
    >>> stream(7, 4, torch.device("cpu")).uniform_(torch.empty(4)).equal(
    ...     stream(7, 4, torch.device("cpu")).uniform_(torch.empty(4))
    ... )
    True
    """
    kernels = loading.kernels_for(count, device)
    if kernels is not None:
        return Philox(seed, kernels)
    return Packed(seed) if device.type == "cpu" and count >= LEAST_FOR_PACKED else Native(seed, device)


class Native:
    """torch's own generator: 24 bits for each float32, 53 for each float64."""

    def __init__(self, seed: int, device: torch.device) -> None:
        # torch's Mersenne Twister reads the low 32 bits of a seed; the high ones are the best mixed
        self._generator = torch.Generator(device=device).manual_seed(seed >> 32)

    def uniform_(self, out: Tensor) -> Tensor:
        return out.uniform_(generator=self._generator)

    def logistic_(self, out: Tensor, scale: float) -> Tensor:
        return self.uniform_(out).logit_().mul_(scale)


class Packed:
    """Four numbers of 16 bits from each word of SFC64: (r + ½)/2¹⁶, their logits from a table.

    Probabilities of a gate are off by at most 2⁻¹⁷. Without Numba, a training step of a gated 1024 × 1024 layer takes
    1.1 to 1.2 times as long with :class:`Native` in its place.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.SFC64(seed))

    def _bits(self, count: int) -> Tensor:
        words = self._generator.integers(0, _WORD, size=-(-count // 4), dtype=np.uint64, endpoint=True)
        return torch.from_numpy(words.view(np.uint16)[:count])

    def uniform_(self, out: Tensor) -> Tensor:
        wide = out if out.dtype.itemsize > 2 else torch.empty_like(out, dtype=torch.float32)  # 65535.5 in float16: ∞
        wide.view(-1).copy_(self._bits(out.numel()))
        wide.add_(0.5).div_(_LEVELS)
        return wide if wide is out else out.copy_(wide)

    def logistic_(self, out: Tensor, scale: float) -> Tensor:
        index = self._bits(out.numel()).to(torch.int32)
        torch.index_select(_logits(scale, out.dtype), 0, index, out=out.view(-1))
        return out


class Philox:
    """Philox4x32-10, keyed by the seed, through Triton's or Numba's kernels: 23 bits a number, (r + ½)/2²³."""

    def __init__(self, seed: int, kernels: ModuleType) -> None:
        self._kernels = kernels
        self._seed = seed
        self._next = 0

    def uniform_(self, out: Tensor) -> Tensor:
        return self._fill(out, None)

    def logistic_(self, out: Tensor, scale: float) -> Tensor:
        return self._fill(out, scale)

    def _fill(self, out: Tensor, scale: float | None) -> Tensor:
        seed, start = self._seed, self._next
        self._next += out.numel()
        if has_address(out, out.dtype) and transform_level() is None:
            self._kernels.fill(out, seed, start, scale)
            return out
        with outside_transforms():  # a kernel writes to memory, not to what torch.func wraps around it
            drawn = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            self._kernels.fill(drawn, seed, start, scale)
        return out.copy_(drawn)


@functools.lru_cache(maxsize=4)
def _logits(scale: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        levels = torch.arange(_LEVELS, dtype=torch.float64, device="cpu")
        return torch.logit((levels + 0.5) / _LEVELS).mul_(scale).to(dtype)
