"""Triton kernels of per-weight gates on CUDA: their noise is drawn where it is used, and drawn again in backward.

Random number ``i`` of a seed is lane ``i % 4`` of Philox4x32-10 at the 64-bit counter ``i // 4``, the seed its key.
23 of its 32 bits are used: u = (r + ½)/2²³, from 2⁻²⁴ to 1 − 2⁻²⁴, all exact in float32 and logit u finite, so that
probabilities of a gate are off by at most 2⁻²⁴. Neither the size of an array nor that of a block changes a number.

This module is imported when the first gates need it. With ``TRITON_INTERPRET=1`` it runs on the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0hooks._torch.memory import lie_alike
from l0hooks.gates.constants import Constants
from l0hooks.gates.derivatives import inverted

COUNTERS = 256  # Philox blocks of a program, four elements each: one for each of its threads
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # fused where it is written: both passes round a gate alike
SUMMED = 4096  # elements of a program that adds up
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_VARYING = ["seed", "first"]  # must not be compiled in: each forward has new ones


@triton.jit
def _uniform(seed: tl.tensor, first: tl.tensor, counters: tl.constexpr) -> tl.tensor:
    """The uniform numbers of this program: four of each counter, one after the other."""
    counter = first + tl.program_id(0).to(tl.int64) * counters + tl.arange(0, counters)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    # the counter's four words by name: what randint4x makes of 64 bits has changed between versions of Triton
    a, b, c, d = tl.philox(seed, low, high, low * 0, low * 0)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    odd = ((bits >> 8) | 1).to(tl.int32)  # 2r + 1
    return odd.to(tl.float32) * (1.0 / 16777216)


@triton.jit
def _logit2(u: tl.tensor) -> tl.tensor:
    """log₂(u/(1 − u)); 1 − u is exact."""
    return tl.log2(u / (1 - u))


@triton.jit
def _elements(counters: tl.constexpr, skip: tl.constexpr) -> tl.tensor:
    """Which elements the numbers of this program are for; the first ``skip`` numbers of all are for none."""
    return tl.program_id(0).to(tl.int64) * (4 * counters) + tl.arange(0, 4 * counters) - skip


@triton.jit
def _squash(u: tl.tensor, location: tl.tensor, steepness: tl.tensor) -> tl.tensor:
    """σ((logit u + location) · steepness)."""
    shifted = tl.fma(_logit2(u), _LN2, location)
    return 1 / (1 + tl.exp2(shifted * steepness * -_LOG2E))


@triton.jit
def _stretch(s: tl.tensor, gamma: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Clamp γ + (ζ − γ)s to [0, 1]; NaN stays NaN."""
    z = tl.fma(s, width, gamma)
    z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(z, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=_VARYING)
def fill_kernel(
    out: tl.tensor,
    n: tl.tensor,
    seed: tl.tensor,
    first: tl.tensor,
    scale: tl.tensor,
    skip: tl.constexpr,
    logistic: tl.constexpr,
    counters: tl.constexpr,
) -> None:
    """Uniform numbers, or ``scale`` times their logits."""
    value = _uniform(seed, first, counters)
    if logistic:
        value = _logit2(value) * (scale * _LN2)
    i = _elements(counters, skip)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=(i >= 0) & (i < n))


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    weight: tl.tensor,
    log_alpha: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    seed: tl.tensor,
    first: tl.tensor,
    steepness: tl.tensor,
    gamma: tl.tensor,
    width: tl.tensor,
    skip: tl.constexpr,
    counters: tl.constexpr,
) -> None:
    """out = weight · z, or the gates z alone if there is no weight."""
    i = _elements(counters, skip)
    mask = (i >= 0) & (i < n)
    location = tl.load(log_alpha + i, mask=mask, other=0.0)
    z = _stretch(_squash(_uniform(seed, first, counters), location, steepness), gamma, width)
    if weight is not None:
        w = tl.load(weight + i, mask=mask, other=0.0)
        z = w.to(tl.float32) * z.to(w.dtype).to(tl.float32)  # one rounding, as the plain product of two halves has
    tl.store(out + i, z.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def backward_kernel(
    grad: tl.tensor,
    weight: tl.tensor,
    log_alpha: tl.tensor,
    grad_weight: tl.tensor,
    grad_log_alpha: tl.tensor,
    deferred: tl.tensor,
    n: tl.tensor,
    seed: tl.tensor,
    first: tl.tensor,
    steepness: tl.tensor,
    gamma: tl.tensor,
    width: tl.tensor,
    shift: tl.tensor,
    skip: tl.constexpr,
    counters: tl.constexpr,
) -> None:
    """Both gradients of weight · z, each if it is wanted; ``deferred`` · p(1 − p) more, p = σ(log_alpha − shift)."""
    i = _elements(counters, skip)
    mask = (i >= 0) & (i < n)
    location = tl.load(log_alpha + i, mask=mask, other=0.0)
    s = _squash(_uniform(seed, first, counters), location, steepness)
    z = _stretch(s, gamma, width)
    g = tl.load(grad + i, mask=mask, other=0.0)
    if grad_weight is not None:
        by_weight = g.to(tl.float32) * z.to(g.dtype).to(tl.float32)
        tl.store(grad_weight + i, by_weight.to(grad_weight.dtype.element_ty), mask=mask)
    if grad_log_alpha is not None:
        w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
        slope = s * (1 - s) * width * steepness
        total = tl.where((z <= 0) | (z >= 1), 0.0, g.to(tl.float32) * w * slope)
        if deferred is not None:
            e = tl.exp2(-tl.abs(location - shift) * _LOG2E)
            total += tl.load(deferred).to(tl.float32) * (e / ((1 + e) * (1 + e)))
        tl.store(grad_log_alpha + i, total, mask=mask)


@triton.jit
def count_kernel(log_alpha: tl.tensor, out: tl.tensor, n: tl.tensor, shift: tl.tensor, summed: tl.constexpr) -> None:
    """The sum of σ(log_alpha − shift) over the elements of this program."""
    i = tl.program_id(0).to(tl.int64) * summed + tl.arange(0, summed)
    location = tl.load(log_alpha + i, mask=i < n, other=-float("inf"))
    tl.store(out + tl.program_id(0), tl.sum(1 / (1 + tl.exp2((shift - location) * _LOG2E))))


def fill(out: Tensor, seed: int, start: int, scale: float | None = None) -> Tensor:
    """Fill ``out`` with uniform numbers, or with ``scale`` times their logits.

    Parameters
    ----------
    out : Tensor, contiguous, float16, bfloat16, float32 or float64
        Changed in place; numbers are made in float32.
    seed : int, in [-2⁶³, 2⁶⁴)
        Its bits count.
    start : int, >= 0
        Which of the seed's numbers comes first.
    scale : float, optional

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
    noise, scales = (ctypes.c_int64(seed).value, start), (1.0 if scale is None else scale,)
    return _launch(fill_kernel, out, (out,), noise, scales, logistic=scale is not None)


def fits(weight: Tensor, log_alpha: Tensor) -> bool:
    """Whether the kernels can multiply ``weight`` with gates: plain, contiguous tensors of one shape, float64 excepted.

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
    return weight.dtype in _WEIGHTS and lie_alike(weight, log_alpha)


def gated(
    weight: Tensor | None, log_alpha: Tensor, seed: int, start: int, constants: Constants
) -> tuple[Tensor, tuple[int, int]]:
    """``weight * sample(log_alpha, noise)`` in one pass that keeps no gates; the gates alone without a weight.

    Parameters
    ----------
    weight : Tensor, contiguous, float16, bfloat16 or float32, or None
    log_alpha : Tensor, contiguous, float32, shape of ``weight``
    seed, start : int
        As in :func:`fill`.
    constants : Constants

    Returns
    -------
    Tensor, dtype and shape of ``weight``, or of ``log_alpha``
    (int, int)
        The seed as an int64 and ``start``, from which the gates can be computed again.

    Examples
    --------
    >>> gated(torch.full((2,), 3.0), torch.tensor([30.0, -30.0]), 7, 0, Constants())[0]
    tensor([3., 0.])
    """
    out = torch.empty_like(log_alpha if weight is None else weight, requires_grad=False)
    tensors = weight, log_alpha, out
    noise = ctypes.c_int64(seed).value, start  # one type for all seeds, so one compilation
    return _launch(forward_kernel, out, tensors, noise, inverted(constants)), noise


def gates_of(log_alpha: Tensor, drawn: tuple[int, int], constants: Constants) -> Tensor:
    """The gates of one draw again.

    Parameters
    ----------
    log_alpha : Tensor, float32
    drawn : (int, int)
        As :func:`gated` returned it.
    constants : Constants

    Returns
    -------
    Tensor, float32, shape of ``log_alpha``

    Examples
    --------
    >>> gates_of(torch.tensor([30.0, -30.0]), (7, 0), Constants())
    tensor([1., 0.])
    """
    again: Tensor = torch.ops.l0hooks.philox_gates(log_alpha, *drawn, constants)  # an operator: vmap can batch it
    return again


@torch.library.custom_op("l0hooks::philox_gates", mutates_args=())
def _gates_op(log_alpha: Tensor, seed: int, start: int, constants: Sequence[float]) -> Tensor:
    return gated(None, log_alpha, seed, start, Constants(*constants))[0]


@_gates_op.register_fake
def _(log_alpha: Tensor, seed: int, start: int, constants: Sequence[float]) -> Tensor:
    return torch.empty_like(log_alpha)


def gated_backward(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    drawn: tuple[int, int],
    constants: Constants,
    deferred: tuple[Tensor, float] | None = None,
    *,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of :func:`gated` in one pass, its gates computed again.

    Parameters
    ----------
    grad : Tensor, contiguous, dtype and shape of ``weight``
    weight, log_alpha, constants
        As in :func:`gated`.
    drawn : (int, int)
        As :func:`gated` returned it.
    deferred : (Tensor of shape (), float), optional
        c and κ: c · p(1 − p) with p = σ(log_alpha − κ) is added to the gradient of ``log_alpha``.
    wanted : (bool, bool)
        Whether the weight's and log_alpha's are wanted.

    Returns
    -------
    (Tensor or None, Tensor or None)
        Of the weight, in its dtype, and of log_alpha, in float32.

    Examples
    --------
    >>> three, logits = torch.full((2,), 3.0), torch.tensor([30.0, -30.0])
    >>> gated_backward(torch.ones(2), three, logits, (7, 0), Constants())
    (tensor([1., 0.]), tensor([0., 0.]))
    """
    slopes = tuple(
        torch.empty_like(of, requires_grad=False) if want else None
        for of, want in zip((weight, log_alpha), wanted, strict=True)
    )
    if any(wanted):
        count, shift = (None, 0.0) if deferred is None else deferred
        tensors = (grad, weight, log_alpha, *slopes, count)
        _launch(backward_kernel, grad, tensors, drawn, (*inverted(constants), shift))
    return slopes[0], slopes[1]


def count(log_alpha: Tensor, shift: float) -> Tensor:
    """Σ σ(log_alpha − shift), read once; always added in the same order.

    Parameters
    ----------
    log_alpha : Tensor, contiguous, float32, not empty
    shift : float

    Returns
    -------
    Tensor, float32, shape ()

    Examples
    --------
    >>> count(torch.tensor([30.0, -30.0, 1.0]), 1.0)
    tensor(1.5000)
    """
    sums = log_alpha.new_empty(triton.cdiv(log_alpha.numel(), SUMMED), requires_grad=False)
    with _on(log_alpha.device):
        count_kernel[(len(sums),)](log_alpha, sums, log_alpha.numel(), shift, summed=SUMMED, **OPTIONS)
    return sums.sum()


def _launch(
    kernel: Any,
    like: Tensor,
    tensors: tuple[Tensor | None, ...],
    noise: tuple[int, int],
    numbers: tuple[float, ...],
    **settings: bool,
) -> Tensor:
    """Run ``kernel`` over the elements of ``like``, and return that."""
    (seed, start), n = noise, like.numel()
    skip = start % 4
    if n:
        grid = (triton.cdiv(n + skip, 4 * COUNTERS),)
        with _on(like.device):
            kernel[grid](*tensors, n, seed, start // 4, *numbers, skip=skip, counters=COUNTERS, **settings, **OPTIONS)
    return like


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
