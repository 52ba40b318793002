"""Sampling in one autograd function, alone or with the weight: the plain formula in the fewest passes over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l0hooks._torch.autograd import DeferredGradients, wants_plain
from l0hooks._torch.memory import fresh, fresh_like, pieces
from l0hooks.gates.derivatives import count_slope, number, reattach, slope_of, slope_times, steepness
from l0hooks.gates.hard_concrete import GAMMA, TEMPERATURE, ZETA
from l0hooks.gates.random import Philox, Stream


class Constants(NamedTuple):
    """β, γ and ζ."""

    temperature: float = TEMPERATURE
    gamma: float = GAMMA
    zeta: float = ZETA


class _Sampled(torch.autograd.Function):
    """sample(log_alpha, noise); saves the gates only."""

    @staticmethod  # one method, for torch takes 20 µs to call a setup_context
    def forward(ctx: Any, log_alpha: Tensor, noise: Stream, constants: Constants, examples: int | None) -> Tensor:
        shape = log_alpha.shape if examples is None else (examples, *log_alpha.shape)
        gates = fresh(shape, log_alpha.dtype, log_alpha.device)
        for location, z in pieces(log_alpha, gates) if examples is None else [(log_alpha, gates)]:
            _draw(z, location, noise, constants)
        ctx.constants = constants
        ctx.save_for_backward(log_alpha, gates)
        return gates

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_alpha, gates = ctx.saved_tensors
        return _sampled_backward(log_alpha, gates, grad, ctx.constants), None, None, None


class _SampledTogether(torch.autograd.Function):
    """The same for several log-odds, each of one axis, one after the other; no gradient for gates nobody has read."""

    @staticmethod
    def forward(
        ctx: Any, noise: Stream, constants: Constants, examples: int | None, *log_alphas: Tensor
    ) -> tuple[Tensor, ...]:
        together = torch.cat(log_alphas)
        shape = together.shape if examples is None else (examples, *together.shape)
        gates = fresh(shape, together.dtype, together.device)
        _draw(gates, together, noise, constants)
        ctx.set_materialize_grads(False)
        ctx.constants = constants
        ctx.kept = gates, log_alphas  # saved tensors are gone after the first backward pass
        return torch.split(gates.detach(), [len(location) for location in log_alphas], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, log_alphas = ctx.kept
        sizes = [len(location) for location in log_alphas]
        shares = zip(grads, torch.split(gates, sizes, -1), strict=True)
        grad = torch.cat([torch.zeros_like(z) if g is None else g for g, z in shares], -1)
        slopes = torch.split(_sampled_backward(torch.cat(log_alphas), gates, grad, ctx.constants), sizes)
        return None, None, None, *(None if g is None else slope for g, slope in zip(grads, slopes, strict=True))


class _GatedWeight(torch.autograd.Function):
    """weight · sample(log_alpha, noise); saves the weight and the gates only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_alpha: Tensor, noise: Stream, constants: Constants) -> Tensor:
        gates, product = fresh(log_alpha.shape, log_alpha.dtype, log_alpha.device), fresh_like(weight)
        for w, location, z, p in pieces(weight, log_alpha, gates, product):
            _draw(z, location, noise, constants)
            torch.mul(w, z.to(w.dtype), out=p)
        ctx.constants = constants
        ctx.deferred = DeferredGradients()
        ctx.save_for_backward(weight, log_alpha, gates)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_alpha, gates = ctx.saved_tensors
        by_weight, by_location = ctx.needs_input_grad[:2]
        owed = ctx.deferred.take()
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
                for count, shift in owed:
                    to_location.add_(count_slope(location, shift, count))
        return grad_weight, grad_location, None, None


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


def _draw(gates: Tensor, log_alpha: Tensor, noise: Stream, constants: Constants) -> None:
    """Fill ``gates`` with a sample."""
    temperature, gamma, zeta = constants
    steep = steepness(temperature)
    s = noise.logistic_(gates, steep).add_(log_alpha, alpha=steep).sigmoid_()
    torch.add(number(gamma, s), s, alpha=zeta - gamma, out=s).clamp_(0, 1)  # one pass, where mul_ and add_ are two


def _sampled_backward(log_alpha: Tensor, gates: Tensor, grad: Tensor, constants: Constants) -> Tensor:
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
    >>> from l0hooks.gates.random import stream
    >>> noise = stream(0, 6, torch.device("cpu"))
    >>> sampled(torch.tensor([30.0, -30.0]), noise, Constants(), examples=3)[0]
    tensor([1., 0.])
    """
    gates: Tensor = _Sampled.apply(log_alpha, noise, constants, examples)  # type: ignore[no-untyped-call]
    return gates


def sampled_together(
    log_alphas: Sequence[Tensor], noise: Stream, constants: Constants, examples: int | None = None
) -> tuple[Tensor, ...]:
    """``sampled`` for several log-odds, in one node of the graph.

    Outputs with backward passes of their own may come from it: what it keeps stays until the graph goes. Log-odds
    whose gates nobody has read get no gradient.

    Parameters
    ----------
    log_alphas : sequence of Tensor, each of one axis, of one dtype
    noise : Stream
        For all of them, one after the other along the last axis.
    constants : Constants
    examples : int, optional

    Returns
    -------
    tuple of Tensor, one for each of ``log_alphas``

    Examples
    --------
    >>> from l0hooks.gates.random import stream
    >>> noise = stream(0, 3, torch.device("cpu"))
    >>> sampled_together([torch.tensor([30.0, -30.0]), torch.tensor([30.0])], noise, Constants())
    (tensor([1., 0.]), tensor([1.]))
    """
    gates: tuple[Tensor, ...] = _SampledTogether.apply(  # type: ignore[no-untyped-call]
        noise, constants, examples, *log_alphas
    )
    return gates


def gated_weight(weight: Tensor, log_alpha: Tensor, noise: Stream, constants: Constants) -> Tensor:
    """``weight * sample(log_alpha, noise)``, fused: one gate per weight; by Triton's kernels or Numba's where they can.

    Parameters
    ----------
    weight : Tensor, any floating dtype
    log_alpha : Tensor, float32 or float64, shape of ``weight``
    noise : Stream
    constants : Constants

    Returns
    -------
    Tensor, dtype and shape of ``weight``

    Examples
    --------
    >>> from l0hooks.gates.random import stream
    >>> noise = stream(0, 2, torch.device("cpu"))
    >>> gated_weight(torch.ones(2), torch.tensor([30.0, -30.0]), noise, Constants())
    tensor([1., 0.])
    """
    if isinstance(noise, Philox):
        if noise.keeps_levels:
            from l0hooks.gates.kernels.autograd import fits  # needs numba
            from l0hooks.gates.kernels.autograd import levelled as by_kernels
        else:
            from l0hooks.gates.kernels.autograd_cuda import fits  # needs triton
            from l0hooks.gates.kernels.autograd_cuda import recomputed as by_kernels
        if fits(weight, log_alpha):
            return by_kernels(weight, log_alpha, noise.take(weight.numel()), constants)
    gated: Tensor = _GatedWeight.apply(weight, log_alpha, noise, constants)  # type: ignore[no-untyped-call]
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
