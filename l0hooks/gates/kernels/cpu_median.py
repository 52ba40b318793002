"""Numba kernels of gates without noise, z = clamp(γ + (ζ − γ)σ(log_alpha/β), 0, 1), and of the sums a budget measures.

One pass over memory in each direction; nothing is kept for backward, which computes the gates again.

Numba does not see changes of ``_exp2``, which stands in another file: empty its cache after one.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import carray
from numpy import float32 as f32
from torch import Tensor

from l0hooks._torch.memory import fresh_like
from l0hooks.gates.constants import Constants
from l0hooks.gates.derivatives import inverted
from l0hooks.gates.kernels.cpu import _LOG2E, BLOCK, _by_count, _exp2, _run, fits
from l0hooks.gates.kernels.threads import EXACT, FLOAT, FLOATS, INT, SUMS, WIDE, kernel

__all__ = ["fits", "gated", "gated_backward", "measure"]


@numba.njit(**EXACT)
def _median(log_alpha: Any, steepness: Any, gamma: Any, width: Any, out: Any) -> None:
    slope = -steepness * _LOG2E
    for i in range(out.size):
        z = width / (f32(1) + _exp2(log_alpha[i] * slope)) + gamma
        z = f32(0) if z < f32(0) else z
        out[i] = f32(1) if z > f32(1) else z


@numba.njit(**EXACT)
def _product(a: Any, b: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = a[i] * b[i]


@numba.njit(**EXACT)
def _by_location(grad: Any, weight: Any, gates: Any, steepness: Any, gamma: Any, width: Any, out: Any) -> None:
    narrow, slope = f32(1) / width, width * steepness
    for i in range(out.size):
        z = gates[i]
        s = (z - gamma) * narrow
        moved = grad[i] * weight[i] * ((s - s * s) * slope)
        out[i] = moved if (z > f32(0)) & (z < f32(1)) else f32(0)


@numba.njit(**EXACT)
def _slopes(log_alpha: Any, shift: Any, open_share: Any, out: Any) -> None:
    """p = σ(log_alpha + shift), and p(1 − p)."""
    for i in range(out.size):
        p = f32(1) / (f32(1) + _exp2((log_alpha[i] + shift) * -_LOG2E))
        open_share[i] = p
        out[i] = p - p * p


@numba.njit(**SUMS)
def _total(values: Any) -> Any:
    total = f32(0)
    for i in range(values.size):
        total += values[i]
    return total


@kernel(FLOATS, FLOATS, FLOATS, INT, FLOAT, FLOAT, FLOAT)
def _forward(weight_: Any, log_alpha_: Any, out_: Any, n: Any, steepness: Any, gamma: Any, width: Any) -> None:
    weight, log_alpha, out = carray(weight_, n), carray(log_alpha_, n), carray(out_, n)
    gates = np.empty(BLOCK, f32)
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        z = gates[: high - low]
        _median(log_alpha[low:high], steepness, gamma, width, z)
        _product(weight[low:high], z, out[low:high])


@kernel(FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, INT, INT, INT, *[FLOAT] * 5)
def _backward(
    grad_: Any,
    weight_: Any,
    log_alpha_: Any,
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
    grad, weight, log_alpha = carray(grad_, n), carray(weight_, n), carray(log_alpha_, n)
    to_weight, to_location = carray(to_weight_, n), carray(to_location_, n)
    gates = np.empty(BLOCK, f32)
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        g, a, z = grad[low:high], log_alpha[low:high], gates[: high - low]
        _median(a, steepness, gamma, width, z)
        if by_weight:
            _product(g, z, to_weight[low:high])
        if by_location:
            _by_location(g, weight[low:high], z, steepness, gamma, width, to_location[low:high])
            if deferred != f32(0):
                _by_count(a, shift, deferred, to_location[low:high])


@kernel(FLOATS, FLOATS, WIDE, INT, FLOAT)
def _measure(log_alpha_: Any, slopes_: Any, sums_: Any, n: Any, shift: Any) -> None:
    """Two sums for each block."""
    blocks = (n + BLOCK - 1) // BLOCK
    log_alpha, slopes, sums = carray(log_alpha_, n), carray(slopes_, n), carray(sums_, 2 * blocks)
    shares = np.empty(BLOCK, f32)
    for block in range(blocks):
        low, high = block * BLOCK, min((block + 1) * BLOCK, n)
        p, slope = shares[: high - low], slopes[low:high]
        _slopes(log_alpha[low:high], shift, p, slope)
        sums[2 * block] = _total(p)
        sums[2 * block + 1] = _total(slope)


def gated(weight: Tensor, log_alpha: Tensor, constants: Constants) -> Tensor:
    """``weight * z`` in one pass.

    Parameters
    ----------
    weight, log_alpha : Tensor, contiguous, float32, of one shape
    constants : Constants

    Returns
    -------
    Tensor, dtype and shape of ``weight``

    Examples
    --------
    >>> import torch
    >>> gated(torch.full((3,), 2.0), torch.tensor([30.0, -30.0, 0.0]), Constants())
    tensor([2., 0., 1.])
    """
    out = fresh_like(weight)
    memory = weight, log_alpha, out
    w, a, o = (t.data_ptr() for t in memory)
    numbers = inverted(constants)
    _run(weight.numel(), lambda at, n: _forward(w + 4 * at, a + 4 * at, o + 4 * at, n, *numbers), memory)
    return out


def gated_backward(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    constants: Constants,
    deferred: tuple[Tensor | float, float] | None = None,
    *,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the product of :func:`gated`, in one pass.

    Parameters
    ----------
    grad, weight, log_alpha : Tensor, contiguous, float32, of one shape
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
    >>> import torch
    >>> three, logits = torch.full((2,), 3.0), torch.tensor([30.0, -30.0])
    >>> gated_backward(torch.ones(2), three, logits, Constants())
    (tensor([1., 0.]), tensor([0., 0.]))
    """
    gradients = tuple(fresh_like(grad) if want else None for want in wanted)
    memory = grad, weight, log_alpha, *gradients
    g, w, a, *to = (0 if t is None else t.data_ptr() for t in memory)
    count, shift = (0.0, 0.0) if deferred is None else (float(deferred[0]), deferred[1])
    numbers = inverted(constants)

    def run(at: int, n: int) -> None:
        outs = (address + 4 * at for address in to)
        _backward(g + 4 * at, w + 4 * at, a + 4 * at, *outs, *wanted, n, *numbers, shift, count)

    _run(grad.numel(), run, memory)
    return gradients[0], gradients[1]


def measure(log_alpha: Tensor, shift: float, slopes: Tensor) -> tuple[float, float]:
    """Σ p and Σ p(1 − p) with p = σ(log_alpha + shift), read once; always added in the same order.

    Parameters
    ----------
    log_alpha : Tensor, contiguous, float32
    shift : float
    slopes : Tensor, contiguous, float32, as many elements
        Filled with p(1 − p).

    Returns
    -------
    (float, float)

    Examples
    --------
    >>> import torch
    >>> slopes = torch.empty(3)
    >>> measure(torch.tensor([80.0, -80.0, 1.0]), -1.0, slopes)
    (1.5, 0.25)
    >>> slopes[2].item()
    0.25
    """
    sums = np.empty((-(-log_alpha.numel() // BLOCK), 2))
    a, s, o = log_alpha.data_ptr(), slopes.data_ptr(), sums.ctypes.data

    def run(at: int, n: int) -> None:
        _measure(a + 4 * at, s + 4 * at, o + 16 * (at // BLOCK), n, shift)

    _run(log_alpha.numel(), run, (log_alpha, slopes, sums))
    both: list[float] = sums.sum(0).tolist()
    return both[0], both[1]
