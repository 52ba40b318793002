"""Sampling in one autograd function, alone or with the weight: the plain formula in the fewest passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l0hooks._torch.autograd import DeferredGradients, wants_plain
from l0hooks._torch.memory import fresh, fresh_like, pieces
from l0hooks.gates.constants import Constants
from l0hooks.gates.derivatives import constant, count_slope, inverted, reattach, slope_of, slope_times
from l0hooks.gates.kernels import loading
from l0hooks.gates.protocols import Drawn, Kernels
from l0hooks.gates.random import Stream, stream


class _Sampled(torch.autograd.Function):
    """sample(log_alpha, noise); saves log_alpha and the gates."""

    @staticmethod  # one method, for torch takes 20 µs to call a setup_context
    def forward(ctx: Any, log_alpha: Tensor, noise: Stream, constants: Constants, examples: int | None) -> Tensor:
        shape = log_alpha.shape if examples is None else (examples, *log_alpha.shape)
        gates = fresh(shape, log_alpha.dtype, log_alpha.device)
        for location, z in pieces(log_alpha, gates) if examples is None else [(log_alpha, gates)]:
            draw(z, location, noise, constants)
        ctx.constants = constants
        ctx.save_for_backward(log_alpha, gates)
        return gates

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_alpha, gates = ctx.saved_tensors
        return sampled_backward(log_alpha, gates, grad, ctx.constants), None, None, None


class _GatedWeight(torch.autograd.Function):
    """weight · sample(log_alpha, noise); saves the two and the gates."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_alpha: Tensor, noise: Stream, constants: Constants) -> Tensor:
        gates, product = fresh(log_alpha.shape, log_alpha.dtype, log_alpha.device), fresh_like(weight)
        for w, location, z, p in pieces(weight, log_alpha, gates, product):
            draw(z, location, noise, constants)
            torch.mul(w, z.to(w.dtype), out=p)
        ctx.constants = constants
        ctx.deferred = DeferredGradients()
        ctx.save_for_backward(weight, log_alpha, gates)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_alpha, gates = ctx.saved_tensors
        by_weight, by_location = ctx.needs_input_grad[:2]
        deferred = ctx.deferred.take()
        if wants_plain(grad):  # let z depend on log_alpha again
            gates = reattach(gates, log_alpha, ctx.constants)
            grad_location = (grad * weight).to(gates.dtype) * slope_of(gates, ctx.constants)
            return grad * gates.to(weight.dtype), grad_location, None, None
        grad_weight = fresh_like(weight) if by_weight else None
        grad_location = fresh_like(gates) if by_location else None
        for g, w, location, z, to_weight, to_location in pieces(
            grad, weight, log_alpha, gates, grad_weight, grad_location
        ):
            if to_weight is not None:
                torch.mul(g, z.to(g.dtype), out=to_weight)
            if to_location is not None:
                slope_times(z, g * w, ctx.constants, out=to_location)
                for count, shift in deferred:
                    to_location.add_(count_slope(location, shift, count))
        return grad_weight, grad_location, None, None


class _GatedByKernels(torch.autograd.Function):
    """weight · sample(log_alpha, noise); saves the two, and the levels if the kernels keep any."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log_alpha: Tensor, seed: int, constants: Constants, kernels: Kernels
    ) -> Tensor:
        product, drawn = kernels.gated(weight, log_alpha, seed, 0, constants)
        ctx.drawn = None if isinstance(drawn, Tensor) else drawn
        ctx.constants, ctx.kernels = constants, kernels
        ctx.deferred = DeferredGradients()
        ctx.save_for_backward(weight, log_alpha, *([drawn] if isinstance(drawn, Tensor) else []))
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_alpha, *levels = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        drawn: Drawn = levels[0] if levels else ctx.drawn
        deferred = ctx.deferred.take()
        grad = grad.contiguous() if grad.layout == torch.strided else grad
        # hooks on saved tensors may have given them another form
        if wants_plain(grad) or not (kernels.fits(weight, log_alpha) and kernels.fits(weight, grad)):
            gates = reattach(kernels.gates_of(log_alpha.detach(), drawn, ctx.constants), log_alpha, ctx.constants)
            by_location = (grad * weight).to(gates.dtype) * slope_of(gates, ctx.constants)
            for count, shift in deferred:
                by_location = by_location + count_slope(log_alpha, shift, count)
            return grad * gates.to(weight.dtype), by_location, None, None, None
        to_weight, to_location = kernels.gated_backward(
            grad,
            weight,
            log_alpha,
            drawn,
            ctx.constants,
            deferred[0] if deferred else None,
            wanted=ctx.needs_input_grad[:2],
        )
        if to_location is not None:
            for count, shift in deferred[1:]:
                to_location.add_(count_slope(log_alpha, shift, count))
        return to_weight, to_location, None, None, None


class _HeldWeight(torch.autograd.Function):
    """weight · constant gates, and a gradient of zero for their log-odds."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_alpha: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(gates)
        return torch.mul(weight, gates.to(weight.dtype), out=fresh_like(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gates,) = ctx.saved_tensors
        none = fresh_like(gates).zero_() if ctx.needs_input_grad[1] else None
        if wants_plain(grad):
            return grad * gates.to(grad.dtype), none, None
        return torch.mul(grad, gates.to(grad.dtype), out=fresh_like(grad)), none, None


def draw(gates: Tensor, log_alpha: Tensor, noise: Stream, constants: Constants) -> None:
    """Fill ``gates`` with a sample."""
    steep, gamma, width = inverted(constants)
    s = noise.logistic_(gates, steep).add_(log_alpha, alpha=steep).sigmoid_()
    # one pass, where mul_ and add_ are two
    torch.add(constant(gamma, s.dtype), s, alpha=width, out=s).clamp_(0, 1)


def sampled_backward(log_alpha: Tensor, gates: Tensor, grad: Tensor, constants: Constants) -> Tensor:
    if wants_plain(grad):
        gates = reattach(gates.detach(), log_alpha, constants)
        slope = slope_of(gates, constants) * grad
    else:
        slope = fresh_like(gates)
        for z, g, s in pieces(gates, grad, slope):
            slope_times(z, g, constants, out=s)
    return slope.sum_to_size(log_alpha.shape)


def sampled(log_alpha: Tensor, noise: Stream, constants: Constants, examples: int | None = None) -> Tensor:
    """``sample(log_alpha, noise)``, fused.

    Parameters
    ----------
    log_alpha : Tensor, float32 or float64
    noise : Stream
    constants : Constants
    examples : int, optional
        How many independent samples; they become the first axis.

    Returns
    -------
    Tensor, dtype and shape of ``log_alpha``, ``examples`` in front if given

    Examples
    --------
    >>> noise = stream(0, 6, torch.device("cpu"))
    >>> sampled(torch.tensor([30.0, -30.0]), noise, Constants(), examples=3)[0]
    tensor([1., 0.])
    """
    gates: Tensor = _Sampled.apply(log_alpha, noise, constants, examples)  # type: ignore[no-untyped-call]
    return gates


def gated_weight(weight: Tensor, log_alpha: Tensor, seed: int, constants: Constants) -> Tensor:
    """``weight * sample(log_alpha, noise)``, fused: one gate per weight; by Triton's kernels or Numba's where they can.

    Parameters
    ----------
    weight : Tensor, any floating dtype
    log_alpha : Tensor, float32 or float64, shape of ``weight``
    seed : int, in [0, 2⁶⁴)
        Of the noise.
    constants : Constants

    Returns
    -------
    Tensor, dtype and shape of ``weight``

    Examples
    --------
    >>> gated_weight(torch.ones(2), torch.tensor([30.0, -30.0]), 0, Constants())
    tensor([1., 0.])
    """
    kernels: Any = loading.kernels_for(weight.numel(), weight.device)
    gated: Tensor
    if kernels is not None and kernels.fits(weight, log_alpha):
        gated = _GatedByKernels.apply(weight, log_alpha, seed, constants, kernels)  # type: ignore[no-untyped-call]
    else:
        noise = stream(seed, weight.numel(), weight.device)
        gated = _GatedWeight.apply(weight, log_alpha, noise, constants)  # type: ignore[no-untyped-call]
    return gated


def held_weight(weight: Tensor, log_alpha: Tensor, gates: Tensor) -> Tensor:
    """``weight * gates`` for gates that no longer move: the gradient of ``log_alpha`` is zero, not missing.

    Parameters
    ----------
    weight : Tensor, any floating dtype
    log_alpha, gates : Tensor, float32, shape of ``weight``

    Returns
    -------
    Tensor, dtype and shape of ``weight``

    Examples
    --------
    >>> held_weight(torch.ones(2), torch.zeros(2), torch.tensor([0.0, 0.5]))
    tensor([0.0000, 0.5000])
    """
    held: Tensor = _HeldWeight.apply(weight, log_alpha, gates)  # type: ignore[no-untyped-call]
    return held
