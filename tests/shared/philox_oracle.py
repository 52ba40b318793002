"""Philox4x32-10 in NumPy, and gated weights to try kernels on.

Salmon, Moraes, Dror & Shaw (2011), Parallel random numbers: as easy as 1, 2, 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]


def philox(counter: list[Words], key: tuple[int, int]) -> list[Words]:
    """Philox4x32-10 of arrays of four 32-bit words, in 64-bit integers."""
    mask = np.uint64(0xFFFFFFFF)
    x = [word & mask for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        one, two = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [(two >> np.uint64(32)) ^ x[1] ^ k[0], two & mask, (one >> np.uint64(32)) ^ x[3] ^ k[1], one & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return x


def expected_uniforms(seed: int, start: int, count: int) -> Tensor:
    """What the kernels should draw, float64."""
    first = start // 4
    blocks = np.arange(first, (start + count + 3) // 4, dtype=np.uint64)
    none = np.zeros_like(blocks)
    key = seed % 2**64
    words = philox([blocks & np.uint64(2**32 - 1), blocks >> np.uint64(32), none, none], (key % 2**32, key >> 32))
    bits = np.stack(words, 1).reshape(-1)[start - 4 * first :][:count]
    return torch.from_numpy(((bits >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23)


def problem(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, log-odds and a cotangent."""
    generator = torch.Generator().manual_seed(0)
    weight, location, cotangent = (torch.randn(count, generator=generator) for _ in range(3))
    return weight.to(dtype), location * 2, cotangent.to(dtype)
