"""Numba kernels of gates on the CPU: one pass over memory in each direction, noise and all.

They draw the same numbers from a seed as ``kernels.cuda`` does on a GPU: Philox4x32-10, 23 bits a number, u from
2⁻²⁴ to 1 − 2⁻²⁴. A gate that is multiplied with a weight takes one of 65,536 levels, which 16 bits keep for backward:
0, 1, and the middles of 65,534 equal cells in between. So P(z = 0) and P(z = 1) are exact, and z off by at most 2⁻¹⁷.

Loops are short, because a processor has few registers for their constants; what one leaves to the next lies in the
nearest cache. This module is imported when the first gates need it. The first import ever compiles; later ones read
what Numba has stored.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import carray
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import uint32 as u32
from numpy import uint64 as u64
from torch import Tensor

from l0hooks._torch.memory import fresh, fresh_like, has_address, lie_alike
from l0hooks.gates.constants import Constants
from l0hooks.gates.derivatives import inverted
from l0hooks.gates.kernels.threads import EXACT, FLOAT, FLOATS, INT, LEVELS, SHARE, SUMS, WIDE, kernel, share_out

CELLS = 65534
COUNTERS = 1024  # Philox blocks at a time
BLOCK = 4 * COUNTERS  # numbers in them

_LOG2E, _LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
_SHIFT = f32(2**23)  # a float this large is a whole number, its low bits count
_ROUND = f32(1.5 * 2**23)  # the same for negative numbers
_NARROW = f32(1 / CELLS)


@numba.njit(**EXACT)
def _exp2(t: Any) -> Any:
    """2^t, relatively off by at most 3e-7; t is clamped to ±126. The polynomial has the least maximum error (Remez)."""
    t = f32(126) if t > f32(126) else t
    t = f32(-126) if t < f32(-126) else t
    whole = f32(t + _ROUND)
    f = t - (whole - _ROUND)
    scale = i32((whole.view(i32) - i32(0x4B400000 - 127)) << i32(23)).view(f32)
    square = f * f
    high = (f32(0.0013276472) * f + f32(0.0096755410)) * square + (f32(0.055507131) * f + f32(0.24022120))
    return (high * square + (f32(0.69314694) * f + f32(1.0000001))) * scale


@numba.njit(**EXACT)
def _log2(x: Any) -> Any:
    """log₂ x of a normal number, off by at most 3e-7 of itself: exponent, and the same kind of polynomial on ±1/3."""
    bits = f32(x).view(i32)
    exponent = i32((bits - i32(0x3F2AAAAB)) & i32(-0x800000))
    m = i32(bits - exponent).view(f32) - f32(1)
    square = m * m
    fourth = square * square
    low = (f32(-0.36078957) * m + f32(0.48089409)) * square + (f32(-0.72134656) * m + f32(1.4426950))
    high = (f32(-0.22222167) * m + f32(0.20058458)) * square + (f32(-0.23678643) * m + f32(0.28879568))
    return ((f32(0.20825224) * fourth + high) * fourth + low) * m + f32(exponent) * f32(2**-23)


@numba.njit(**EXACT)
def _philox(seed: Any, first: Any, counters: Any, words: Any) -> None:
    """Four words of each of some counters."""
    for i in range(counters):
        counter = u64(first + i)
        a, b, c, d = u32(counter), u32(counter >> u64(32)), u32(0), u32(0)
        key, other = u32(seed), u32(u64(seed) >> u64(32))
        for _ in range(10):
            p, q = u64(a) * u64(0xD2511F53), u64(c) * u64(0xCD9E8D57)
            a, b, c, d = u32(u32(q >> u64(32)) ^ b ^ key), u32(q), u32(u32(p >> u64(32)) ^ d ^ other), u32(p)
            key, other = u32(key + u32(0x9E3779B9)), u32(other + u32(0xBB67AE85))
        words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = a, b, c, d


@numba.njit(**EXACT)
def _uniform(words: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = f32(i32((words[i] >> u32(8)) | u32(1))) * f32(2**-24)


@numba.njit(**EXACT)
def _logistic(words: Any, scale: Any, out: Any) -> None:
    """``scale`` · log₂(u/(1 − u))."""
    for i in range(out.size):
        odd = f32(i32((words[i] >> u32(8)) | u32(1)))  # 2²⁴u
        out[i] = _log2(odd / (f32(2**24) - odd)) * scale


@numba.njit(**EXACT)
def _gate(weight: Any, log_alpha: Any, noise: Any, slope: Any, gamma: Any, width: Any, levels: Any, out: Any) -> None:
    """weight · z; ``noise`` and ``slope`` · log_alpha are in binary units, and negative."""
    wide, low = width * f32(CELLS), gamma * f32(CELLS) + f32(0.5)
    for i in range(out.size):
        level = wide / (f32(1) + _exp2(log_alpha[i] * slope + noise[i])) + low
        level = f32(0) if level < f32(0) else level
        level = f32(CELLS + 1) if level > f32(CELLS + 1) else level
        whole = f32(level + _SHIFT)
        levels[i] = whole.view(i32)
        z = ((whole - _SHIFT) - f32(0.5)) * _NARROW
        z = f32(0) if z < f32(0) else z
        out[i] = weight[i] * (f32(1) if z > f32(1) else z)


@numba.njit(**EXACT)
def _by_weight(grad: Any, levels: Any, out: Any) -> None:
    for i in range(out.size):
        z = (f32(levels[i]) - f32(0.5)) * _NARROW
        z = f32(0) if z < f32(0) else z
        out[i] = grad[i] * (f32(1) if z > f32(1) else z)


@numba.njit(**EXACT)
def _by_location(grad: Any, weight: Any, levels: Any, steepness: Any, gamma: Any, width: Any, out: Any) -> None:
    step, low, slope = _NARROW / width, (f32(-0.5) * _NARROW - gamma) / width, width * steepness
    for i in range(out.size):
        level = i32(levels[i])
        s = f32(level) * step + low
        moved = grad[i] * weight[i] * ((s - s * s) * slope)
        out[i] = moved if (level > i32(0)) & (level <= i32(CELLS)) else f32(0)


@numba.njit(**EXACT)
def _by_count(log_alpha: Any, shift: Any, deferred: Any, out: Any) -> None:
    for i in range(out.size):
        p = f32(1) / (f32(1) + _exp2((shift - log_alpha[i]) * _LOG2E))
        out[i] += deferred * (p - p * p)


@numba.njit(**SUMS)
def _sum(log_alpha: Any, shift: Any) -> Any:
    total = f32(0)
    for i in range(log_alpha.size):
        total += f32(1) / (f32(1) + _exp2((shift - log_alpha[i]) * _LOG2E))
    return total


@kernel(FLOATS, INT, INT, INT, FLOAT)
def _fill(out_: Any, n: Any, seed: Any, start: Any, scale: Any) -> None:
    """Uniform numbers if ``scale`` is 0."""
    out, skip = carray(out_, n), start % 4
    words = np.empty(BLOCK, u32)
    for done in range(0, n + skip, BLOCK):
        low, high = max(done - skip, 0), min(done - skip + BLOCK, n)
        aside = low + skip - done  # numbers of the block that are for none of these elements
        _philox(seed, (start + done) // 4, (aside + high - low + 3) // 4, words)
        if scale == f32(0):
            _uniform(words[aside:], out[low:high])
        else:
            _logistic(words[aside:], scale * _LN2, out[low:high])


@kernel(FLOATS, FLOATS, LEVELS, FLOATS, INT, INT, INT, FLOAT, FLOAT, FLOAT)
def _forward(
    weight_: Any,
    log_alpha_: Any,
    levels_: Any,
    out_: Any,
    n: Any,
    seed: Any,
    start: Any,
    steepness: Any,
    gamma: Any,
    width: Any,
) -> None:
    weight, log_alpha, levels, out = carray(weight_, n), carray(log_alpha_, n), carray(levels_, n), carray(out_, n)
    words, noise, skip = np.empty(BLOCK, u32), np.empty(BLOCK, f32), start % 4
    for done in range(0, n + skip, BLOCK):
        low, high = max(done - skip, 0), min(done - skip + BLOCK, n)
        aside = low + skip - done
        _philox(seed, (start + done) // 4, (aside + high - low + 3) // 4, words)
        _logistic(words[aside:], -steepness, noise[: high - low])
        w, a, k, o = weight[low:high], log_alpha[low:high], levels[low:high], out[low:high]
        _gate(w, a, noise, -steepness * _LOG2E, gamma, width, k, o)


@kernel(FLOATS, FLOATS, FLOATS, LEVELS, FLOATS, FLOATS, INT, INT, INT, *[FLOAT] * 5)
def _backward(
    grad_: Any,
    weight_: Any,
    log_alpha_: Any,
    levels_: Any,
    to_weight_: Any,
    to_location_: Any,
    by_weight: Any,
    by_location: Any,
    n: Any,
    steepness: Any,
    gamma: Any,
    width: Any,
    shift: Any,
    deferred: Any,
) -> None:
    grad, weight, log_alpha, levels = carray(grad_, n), carray(weight_, n), carray(log_alpha_, n), carray(levels_, n)
    to_weight, to_location = carray(to_weight_, n), carray(to_location_, n)
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        g, k = grad[low:high], levels[low:high]
        if by_weight:
            _by_weight(g, k, to_weight[low:high])
        if by_location:
            _by_location(g, weight[low:high], k, steepness, gamma, width, to_location[low:high])
            if deferred != f32(0):
                _by_count(log_alpha[low:high], shift, deferred, to_location[low:high])


@kernel(FLOATS, WIDE, INT, FLOAT)
def _count(log_alpha_: Any, sums_: Any, n: Any, shift: Any) -> None:
    """A sum for each block."""
    log_alpha, sums = carray(log_alpha_, n), carray(sums_, (n + BLOCK - 1) // BLOCK)
    for block in range(sums.size):
        sums[block] = _sum(log_alpha[block * BLOCK : min((block + 1) * BLOCK, n)], shift)


def fill(out: Tensor, seed: int, start: int, scale: float | None = None) -> Tensor:
    """Fill ``out`` with uniform numbers, or with ``scale`` times their logits.

    Parameters
    ----------
    out : Tensor, contiguous, any floating dtype
        Changed in place.
    seed : int, in [-2⁶³, 2⁶⁴)
        Its bits count.
    start : int, >= 0
        Which of the seed's numbers comes first.
    scale : float, not 0, optional

    Returns
    -------
    Tensor
        ``out``.

    Examples
    --------
    >>> together = fill(torch.empty(7), seed=3, start=0)
    >>> apart = [fill(torch.empty(n), seed=3, start=start) for n, start in ((2, 0), (5, 2))]
    >>> torch.equal(torch.cat(apart), together)
    True
    """
    if out.dtype == torch.float64 and scale is not None:
        return fill(out, seed, start).logit_().mul_(scale)
    if out.dtype != torch.float32:
        return out.copy_(fill(torch.empty_like(out, dtype=torch.float32), seed, start, scale))
    address, seed = out.data_ptr(), ctypes.c_int64(seed).value
    share_out(out.numel(), BLOCK, lambda at, n: _fill(address + 4 * at, n, seed, start + at, scale or 0.0), [out])
    return out


def _run(total: int, run: Callable[[int, int], None], memory: Sequence[object]) -> None:
    """Call ``run(first, how many)`` for all elements, or for shares of them in several threads."""
    if total <= SHARE:
        run(0, total)
    else:
        share_out(total, BLOCK, run, memory)


def gated(weight: Tensor, log_alpha: Tensor, seed: int, start: int, constants: Constants) -> tuple[Tensor, Tensor]:
    """``weight * z`` in one pass, and the levels of the gates z.

    Parameters
    ----------
    weight, log_alpha : Tensor, contiguous, float32, of one shape
    seed, start : int
        As in :func:`fill`.
    constants : Constants

    Returns
    -------
    (Tensor, Tensor)
        The product, and uint16 levels k: z = (k − ½)/65534, clamped to [0, 1].

    Examples
    --------
    >>> gated(torch.full((2,), 3.0), torch.tensor([30.0, -30.0]), 7, 0, Constants())
    (tensor([3., 0.]), tensor([65535,     0], dtype=torch.uint16))
    """
    out, levels = fresh_like(weight), fresh(weight.shape, torch.uint16, weight.device)
    memory = weight, log_alpha, levels, out
    w, a, k, o = (t.data_ptr() for t in memory)
    seed = ctypes.c_int64(seed).value  # the same bits
    numbers = inverted(constants)

    def run(at: int, n: int) -> None:
        _forward(w + 4 * at, a + 4 * at, k + 2 * at, o + 4 * at, n, seed, start + at, *numbers)

    _run(weight.numel(), run, memory)
    return out, levels


def fits(weight: Tensor, log_alpha: Tensor) -> bool:
    """Whether the kernels can multiply ``weight`` with gates: plain, contiguous tensors of float32, of one shape.

    Parameters
    ----------
    weight, log_alpha : Tensor

    Returns
    -------
    bool

    Examples
    --------
    >>> fits(torch.ones(2, 3), torch.ones(2, 3)), fits(torch.ones(3, 2).t(), torch.ones(2, 3))
    (True, False)
    """
    return weight.dtype == torch.float32 and lie_alike(weight, log_alpha)


def gates_of(log_alpha: Tensor, drawn: Tensor, constants: Constants) -> Tensor:
    """The gates of their levels.

    Parameters
    ----------
    log_alpha : Tensor
        Not used: the levels say all.
    drawn : Tensor, uint16
        Levels.
    constants : Constants
        Not used.

    Returns
    -------
    Tensor, float32

    Examples
    --------
    >>> gates_of(torch.zeros(3), torch.tensor([0, 16384, 65535], dtype=torch.uint16), Constants())
    tensor([0.0000, 0.2500, 1.0000])
    """
    return ((drawn.float() - 0.5) * float(_NARROW)).clamp(0, 1)


def gated_backward(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    drawn: Tensor,
    constants: Constants,
    deferred: tuple[Tensor | float, float] | None = None,
    *,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the product of :func:`gated`, in one pass.

    Parameters
    ----------
    grad, weight, log_alpha : Tensor, contiguous, float32, of one shape
    drawn : Tensor, uint16
        Levels of the gates.
    constants : Constants
    deferred : (Tensor of shape () or float, float), optional
        c and κ: c · p(1 − p) with p = σ(log_alpha − κ) is added to the gradient of ``log_alpha``.
    wanted : (bool, bool)
        Whether the weight's and log_alpha's are wanted.

    Returns
    -------
    (Tensor or None, Tensor or None)
        Of the weight, and of log_alpha.

    Examples
    --------
    >>> three, logits = torch.full((2,), 3.0), torch.tensor([30.0, -30.0])
    >>> levels = torch.tensor([65535, 0], dtype=torch.uint16)
    >>> gated_backward(torch.ones(2), three, logits, levels, Constants())
    (tensor([1., 0.]), tensor([0., 0.]))
    """
    slopes = tuple(fresh_like(grad) if want else None for want in wanted)
    levels = drawn if has_address(drawn, torch.uint16) else drawn.to(torch.uint16).contiguous()
    memory = grad, weight, log_alpha, levels, *slopes
    g, w, a, k, *to = (0 if t is None else t.data_ptr() for t in memory)
    count, shift = (0.0, 0.0) if deferred is None else (float(deferred[0]), deferred[1])
    numbers = inverted(constants)

    def run(at: int, n: int) -> None:
        outs = (address + 4 * at for address in to)
        _backward(g + 4 * at, w + 4 * at, a + 4 * at, k + 2 * at, *outs, *wanted, n, *numbers, shift, count)

    _run(grad.numel(), run, memory)
    return slopes[0], slopes[1]


def count(log_alpha: Tensor, shift: float) -> Tensor:
    """Σ σ(log_alpha − shift), read once; always added in the same order.

    Parameters
    ----------
    log_alpha : Tensor, contiguous, float32
    shift : float

    Returns
    -------
    Tensor, float32, shape ()

    Examples
    --------
    >>> count(torch.tensor([30.0, -30.0, 1.0]), 1.0)
    tensor(1.5000)
    """
    total = log_alpha.numel()
    sums = np.empty(-(-total // BLOCK))
    a, s = log_alpha.data_ptr(), sums.ctypes.data
    share_out(total, BLOCK, lambda at, n: _count(a + 4 * at, s + 8 * (at // BLOCK), n, shift), (log_alpha, sums))
    return torch.tensor(sums.sum(), dtype=torch.float32, device="cpu")
