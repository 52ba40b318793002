"""Derivatives: of a gate, as a function of its value; of an expected count, as a function of the log-odds."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_STEEPEST = 1e37  # the largest 1/β: logits of noise times it are finite in float32


@functools.lru_cache(maxsize=64)  # asked in every forward and backward pass
def inverted(constants: tuple[float, float, float]) -> tuple[float, float, float]:
    """1/β, or the largest that float32 can multiply logits of noise with, γ and ζ − γ."""
    temperature, gamma, zeta = constants
    return min(1 / temperature, _STEEPEST), gamma, zeta - gamma


@functools.lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """``value`` as a tensor on the CPU."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def reattach(gates: Tensor, log_alpha: Tensor, constants: tuple[float, float, float]) -> Tensor:
    """The same gates as a differentiable function of ``log_alpha`` at fixed noise, clamped gates as constants."""
    temperature, gamma, zeta = constants
    inside = (gates > 0) & (gates < 1)
    s = torch.where(inside, (gates - gamma) / (zeta - gamma), 0.5)
    moved = torch.sigmoid(torch.logit(s) + (log_alpha - log_alpha.detach()) / temperature)
    return torch.where(inside, gamma + (zeta - gamma) * moved, gates)


def slope_times(gates: Tensor, grad: Tensor, constants: tuple[float, float, float], out: Tensor) -> None:
    """``grad`` times dz/dlogα = (ζ − γ)/β · s(1 − s), where z = γ + (ζ − γ)s."""
    steepness, gamma, width = inverted(constants)
    s = torch.add(constant(-gamma / width, gates.dtype), gates, alpha=1 / width)
    aten = torch.ops.aten
    aten.sigmoid_backward.grad_input(grad.to(gates.dtype), s, grad_input=out)
    # hardtanh's backward is the clamp's: zero where the gate is exactly 0 or 1
    aten.hardtanh_backward.grad_input(out.mul_(width * steepness), gates, 0.0, 1.0, grad_input=out)


def slope_of(gates: Tensor, constants: tuple[float, float, float]) -> Tensor:
    """dz/dlogα as a function of z: (z − γ)(ζ − z)/((ζ − γ)β) inside, 0 at the clamps."""
    steepness, gamma, width = inverted(constants)
    inside = (gates > 0) & (gates < 1)
    return torch.where(inside, (gates - gamma) * (gamma + width - gates) / width * steepness, 0.0)


def count_slope(log_alpha: Tensor, shift: float, grad: Tensor, out: Tensor | None = None) -> Tensor:
    """``grad`` · p(1 − p) with p = σ(log_alpha − shift)."""
    p = torch.sub(log_alpha, shift, out=out).sigmoid_()
    product: Tensor = torch.ops.aten.sigmoid_backward.grad_input(grad.expand_as(p), p, grad_input=p)
    return product
