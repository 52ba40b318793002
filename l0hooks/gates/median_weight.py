"""A weight times gates without noise, in one autograd function that keeps no gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l0hooks._torch.autograd import DeferredGradients, wants_plain
from l0hooks._torch.memory import fresh_like, pieces
from l0hooks.gates.constants import Constants
from l0hooks.gates.derivatives import constant, count_slope, inverted, reattach, slope_of, slope_times
from l0hooks.gates.kernels import loading


class _MedianWeight(torch.autograd.Function):
    """weight · median(log_alpha); saves the two."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_alpha: Tensor, constants: Constants, kernels: Any) -> Tensor:
        ctx.constants, ctx.kernels = constants, kernels
        ctx.deferred = DeferredGradients()
        ctx.save_for_backward(weight, log_alpha)
        if kernels is not None:
            gated: Tensor = kernels.gated(weight, log_alpha, constants)
            return gated
        product = fresh_like(weight)
        for w, location, p in pieces(weight, log_alpha, product):
            torch.mul(w, median_of(location, constants).to(w.dtype), out=p)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_alpha = ctx.saved_tensors
        by_weight, by_location = ctx.needs_input_grad[:2]
        deferred = ctx.deferred.take()
        if wants_plain(grad):
            gates = reattach(median_of(log_alpha.detach(), ctx.constants), log_alpha, ctx.constants)
            to_location = (grad * weight).to(gates.dtype) * slope_of(gates, ctx.constants)
            for count, shift in deferred:
                to_location = to_location + count_slope(log_alpha, shift, count)
            return grad * gates.to(weight.dtype), to_location, None, None
        kernels, wanted = ctx.kernels, (by_weight, by_location)
        grad = grad.contiguous() if kernels is not None and grad.layout == torch.strided else grad
        # hooks on saved tensors may have given them another form
        if kernels is not None and kernels.fits(weight, log_alpha) and kernels.fits(weight, grad):
            first, deferred = (deferred[0], deferred[1:]) if deferred else (None, deferred)
            to_weight, to_location = kernels.gated_backward(
                grad, weight, log_alpha, ctx.constants, first, wanted=wanted
            )
        else:
            to_weight, to_location = _gradients(grad, weight, log_alpha, ctx.constants, wanted)
        if to_location is not None:
            for count, shift in deferred:
                to_location.add_(count_slope(log_alpha, shift, count))
        return to_weight, to_location, None, None


def median_of(log_alpha: Tensor, constants: Constants) -> Tensor:
    """z = clamp(γ + (ζ − γ)σ(log_alpha/β), 0, 1) in fresh memory, without a gradient."""
    steepness, gamma, width = inverted(constants)
    s = torch.mul(log_alpha, steepness).sigmoid_()
    return torch.add(constant(gamma, s.dtype), s, alpha=width, out=s).clamp_(0, 1)


def _gradients(
    grad: Tensor, weight: Tensor, log_alpha: Tensor, constants: Constants, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    to_weight = fresh_like(weight) if wanted[0] else None
    to_location = fresh_like(log_alpha) if wanted[1] else None
    for g, w, location, by_weight, by_location in pieces(grad, weight, log_alpha, to_weight, to_location):
        z = median_of(location, constants)
        if by_weight is not None:
            torch.mul(g, z.to(g.dtype), out=by_weight)
        if by_location is not None:
            slope_times(z, g * w, constants, out=by_location)
    return to_weight, to_location


def median_weight(weight: Tensor, log_alpha: Tensor, constants: Constants) -> Tensor:
    """``weight * median(log_alpha)``, fused: one gate per weight; by Numba's kernels where they can.

    Parameters
    ----------
    weight : Tensor, any floating dtype
    log_alpha : Tensor, float32 or float64, shape of ``weight``
    constants : Constants

    Returns
    -------
    Tensor, dtype and shape of ``weight``

    Examples
    --------
    >>> median_weight(torch.ones(3), torch.tensor([30.0, -30.0, 0.0]), Constants())
    tensor([1.0000, 0.0000, 0.5000])
    """
    kernels: Any = loading.median_kernels_for(weight.numel(), weight.device)
    if kernels is not None and not kernels.fits(weight, log_alpha):
        kernels = None
    gated: Tensor = _MedianWeight.apply(weight, log_alpha, constants, kernels)  # type: ignore[no-untyped-call]
    return gated
