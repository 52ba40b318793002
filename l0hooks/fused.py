"""Sampling in one autograd function, alone or with the weight: the plain formula in the fewest passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l0hooks.hard_concrete import GAMMA, TEMPERATURE, ZETA


def is_traced() -> bool:
    """Whether the plain formulas must run: in a graph being built, or under a torch.func transform."""
    building = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return building or torch._C._functorch.maybe_current_level() is not None


def _overwrite(logits: Tensor, log_alpha: Tensor, temperature: float, gamma: float, zeta: float) -> Tensor:
    """The gates, in the memory of the noise's ``logits``."""
    gates = logits.add_(log_alpha).mul_(1 / temperature).sigmoid_()
    return gates.mul_(zeta - gamma).add_(gamma).clamp_(0, 1)


class _Sampled(torch.autograd.Function):
    """sample(log_alpha, noise); saves the gates only."""

    @staticmethod  # one method, for torch takes 20 µs to call a setup_context
    def forward(ctx: Any, log_alpha: Tensor, noise: Tensor, temperature: float, gamma: float, zeta: float) -> Tensor:
        gates = _overwrite(noise.logit(), log_alpha, temperature, gamma, zeta)
        ctx.constants = temperature, gamma, zeta
        ctx.save_for_backward(log_alpha, gates)
        return gates

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_alpha, gates = ctx.saved_tensors
        if torch.is_grad_enabled():
            gates = _reattach(gates.detach(), log_alpha, *ctx.constants)
            slope = _slope(gates, *ctx.constants) * grad
        else:
            slope = _slope_times(gates, grad, *ctx.constants)
        return slope.sum_to_size(log_alpha.shape), None, None, None, None


class _GatedWeight(torch.autograd.Function):
    """weight · sample(log_alpha, noise); saves the weight and the gates only."""

    @staticmethod
    def forward(
        weight: Tensor, log_alpha: Tensor, noise: Tensor, temperature: float, gamma: float, zeta: float
    ) -> tuple[Tensor, Tensor]:
        gates = _overwrite(noise.view_as(noise).logit_(), log_alpha, temperature, gamma, zeta)
        return weight * gates.to(weight.dtype), gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, log_alpha, _, *ctx.constants = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, log_alpha, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, log_alpha, gates = ctx.saved_tensors
        temperature, gamma, zeta = ctx.constants
        if grad is None:
            return (None,) * 6
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: let z depend on log_alpha again
            gates = _reattach(gates, log_alpha, temperature, gamma, zeta)
            grad_alpha = (grad * weight).to(gates.dtype) * _slope(gates, temperature, gamma, zeta)
            return grad * gates.to(weight.dtype), grad_alpha, None, None, None, None
        grad_weight = grad * gates.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            grad_alpha = _slope_times(gates, grad * weight, temperature, gamma, zeta)
        return grad_weight, grad_alpha, None, None, None, None


class _HeldWeight(torch.autograd.Function):
    """weight · constant gates, and a gradient of zero for their log-odds."""

    @staticmethod
    def forward(weight: Tensor, log_alpha: Tensor, gates: Tensor) -> Tensor:
        return weight * gates.to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gates,) = ctx.saved_tensors
        none = torch.zeros_like(gates) if ctx.needs_input_grad[1] else None
        return grad * gates.to(grad.dtype), none, None


def _reattach(gates: Tensor, log_alpha: Tensor, temperature: float, gamma: float, zeta: float) -> Tensor:
    """The same gates as a differentiable function of ``log_alpha`` at fixed noise, clamped gates as constants."""
    inside = (gates > 0) & (gates < 1)
    s = torch.where(inside, (gates - gamma) / (zeta - gamma), 0.5)
    moved = torch.sigmoid(torch.logit(s) + (log_alpha - log_alpha.detach()) / temperature)
    return torch.where(inside, gamma + (zeta - gamma) * moved, gates)


def _slope_times(gates: Tensor, grad: Tensor, temperature: float, gamma: float, zeta: float) -> Tensor:
    """``grad`` times dz/dlogα, in two new arrays."""
    scale = 1 / ((zeta - gamma) * temperature)
    slope = gates.mul(-scale).add_(scale * (gamma + zeta)).mul_(gates).sub_(scale * gamma * zeta)
    # hardtanh's backward is the clamp's: zero where the gate is exactly 0 or 1
    product: Tensor = torch.ops.aten.hardtanh_backward(slope.mul_(grad), gates, 0.0, 1.0)
    return product


def _slope(gates: Tensor, temperature: float, gamma: float, zeta: float) -> Tensor:
    """dz/dlogα as a function of z: (z − γ)(ζ − z)/((ζ − γ)β) inside, 0 at the clamps."""
    slope = (gates - gamma) * (zeta - gates) / ((zeta - gamma) * temperature)
    return torch.where((gates > 0) & (gates < 1), slope, 0.0)


def sampled(
    log_alpha: Tensor,
    noise: Tensor,
    temperature: float = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Tensor:
    """``sample(log_alpha, noise)``, fused.

    Parameters
    ----------
    log_alpha : Tensor, float32 or float64
    noise : Tensor, dtype of ``log_alpha``, its shape or with more axes in front, uniform in [0, 1]
    temperature, gamma, zeta : float

    Returns
    -------
    Tensor, dtype and shape of ``noise``

    Examples
    --------
    >>> sampled(torch.tensor([9.0, -9.0]), torch.full((3, 2), 0.5))[0]
    tensor([1., 0.])
    """
    gates: Tensor = _Sampled.apply(log_alpha, noise, temperature, gamma, zeta)  # type: ignore[no-untyped-call]
    return gates


def gated_weight(
    weight: Tensor,
    log_alpha: Tensor,
    noise: Tensor,
    temperature: float = TEMPERATURE,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Tensor:
    """``weight * sample(log_alpha, noise)``, fused: one gate per weight, ``noise`` is **overwritten**.

    Parameters
    ----------
    weight : Tensor, any floating dtype
    log_alpha : Tensor, float32 or float64, shape of ``weight``
    noise : Tensor, dtype and shape of ``log_alpha``, uniform in [0, 1]
        Consumed as scratch memory.
    temperature, gamma, zeta : float

    Returns
    -------
    Tensor, dtype and shape of ``weight``

    Examples
    --------
    >>> gated_weight(torch.ones(2), torch.tensor([9.0, -9.0]), torch.full((2,), 0.5))
    tensor([1., 0.])
    """
    gated: Tensor = _GatedWeight.apply(weight, log_alpha, noise, temperature, gamma, zeta)[0]  # type: ignore[no-untyped-call]
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
