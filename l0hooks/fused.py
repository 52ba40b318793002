"""The per-weight gate, weight and gate in one autograd function: the plain formula in the fewest passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l0hooks.hard_concrete import GAMMA, TEMPERATURE, ZETA


class _GatedWeight(torch.autograd.Function):
    """weight · sample(log_alpha, noise) in the fewest passes over memory; saves the weight and the gates only."""

    @staticmethod
    def forward(
        weight: Tensor, log_alpha: Tensor, noise: Tensor, temperature: float, gamma: float, zeta: float
    ) -> tuple[Tensor, Tensor]:
        gates = noise.view_as(noise).logit_().add_(log_alpha).mul_(1 / temperature).sigmoid_()
        gates.mul_(zeta - gamma).add_(gamma).clamp_(0, 1)
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
            scale = 1 / ((zeta - gamma) * temperature)
            slope = gates.mul(-scale).add_(scale * (gamma + zeta)).mul_(gates).sub_(scale * gamma * zeta)
            # hardtanh's backward is the clamp's: zero where the gate is exactly 0 or 1
            grad_alpha = torch.ops.aten.hardtanh_backward(slope.mul_(grad * weight), gates, 0.0, 1.0)
        return grad_weight, grad_alpha, None, None, None, None


def _reattach(gates: Tensor, log_alpha: Tensor, temperature: float, gamma: float, zeta: float) -> Tensor:
    """The same gates as a differentiable function of ``log_alpha`` at fixed noise, clamped gates as constants."""
    inside = (gates > 0) & (gates < 1)
    s = torch.where(inside, (gates - gamma) / (zeta - gamma), 0.5)
    moved = torch.sigmoid(torch.logit(s) + (log_alpha - log_alpha.detach()) / temperature)
    return torch.where(inside, gamma + (zeta - gamma) * moved, gates)


def _slope(gates: Tensor, temperature: float, gamma: float, zeta: float) -> Tensor:
    """dz/dlogα as a function of z: (z − γ)(ζ − z)/((ζ − γ)β) inside, 0 at the clamps."""
    slope = (gates - gamma) * (zeta - gates) / ((zeta - gamma) * temperature)
    return torch.where((gates > 0) & (gates < 1), slope, 0.0)


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
