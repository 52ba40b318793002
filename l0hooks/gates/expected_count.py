"""The expected number of open gates, with its gradient in the pass of the node that samples them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from l0hooks._torch.autograd import wants_plain
from l0hooks._torch.memory import fresh_like, has_address, pieces
from l0hooks.gates.derivatives import count_slope
from l0hooks.gates.hard_concrete import closing_point, keep_prob
from l0hooks.gates.kernels import loading

LEAST_FUSED = 2**15  # gates; for fewer, calling a Python function costs more than the memory it saves


class _ExpectedCount(torch.autograd.Function):
    """Σ σ(log_alpha − shift); saves log_alpha alone: computing p again costs less than memory for it."""

    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, shift: float, sampler: weakref.ref[Any] | None) -> Tensor:
        ctx.shift, ctx.sampler = shift, sampler
        ctx.save_for_backward(log_alpha)
        kernels = loading.kernels_on(log_alpha.device)
        if kernels is not None and has_address(log_alpha):
            total: Tensor = kernels.count(log_alpha, shift)
            return total
        return torch.stack([torch.sub(location, shift).sigmoid_().sum() for (location,) in pieces(log_alpha)]).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (log_alpha,) = ctx.saved_tensors
        if wants_plain(grad):
            p = torch.sigmoid(log_alpha - ctx.shift)
            return grad * p * (1 - p), None, None
        node = None if ctx.sampler is None else ctx.sampler()
        if node is not None and node.deferred.add(node, grad, ctx.shift):
            return None, None, None
        slope = fresh_like(log_alpha)
        for location, out in pieces(log_alpha, slope):
            count_slope(location, ctx.shift, grad, out=out)
        return slope, None, None


def expected_count(
    log_alpha: Tensor, constants: tuple[float, float, float], sampler: weakref.ref[Any] | None = None
) -> Tensor:
    """``keep_prob(log_alpha).sum()``, fused; its gradient is computed in the pass of the node that samples the gates.

    Parameters
    ----------
    log_alpha : Tensor, float32 or float64
    constants : (float, float, float)
        β, γ and ζ.
    sampler : weak reference to an autograd node, optional
        The node that multiplied a weight with these gates; used only if it runs in the same backward pass.

    Returns
    -------
    Tensor, dtype of ``log_alpha``, shape ()

    Examples
    --------
    >>> expected_count(torch.tensor([30.0, -30.0]), (2 / 3, -0.1, 1.1))
    tensor(1.)
    """
    if log_alpha.numel() < LEAST_FUSED:
        return keep_prob(log_alpha, *constants).sum()
    count: Tensor = _ExpectedCount.apply(log_alpha, closing_point(*constants), sampler)  # type: ignore[no-untyped-call]
    return count
