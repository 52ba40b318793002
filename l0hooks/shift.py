"""The one shift that gates under a budget share: it keeps their expected size where it is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from l0hooks.families import HardConcreteFamily
from l0hooks.gate import Gate
from l0hooks.sizes import Floats, Size

_ACCURACY, _EXACT = 1e-6, 1e-9  # of the size that is wanted
_FARTHEST = 2.0  # that one Newton step may go


class SharedShift:
    """Log-odds a + δ of several arrays of gates, δ solving E[size] = wanted.

    Every pass over the gates leaves p′ = dp/da behind, with which the gradient is projected; and a shift is first
    guessed to be the last one, so that a step seldom costs more than one pass.

    Parameters
    ----------
    gates : sequence of Gate
    size : Size
        By the numbers of gates that stay in each array.
    """

    def __init__(self, gates: Sequence[Gate], size: Size) -> None:
        self._gates = gates
        self._size = size
        self._slopes: list[Tensor] = []
        self._kept = self._slope = self._variance = np.zeros(0)
        self._last = 0.0
        self._key: object = None

    def expected(self) -> float:
        """The expected size of the gates as they stand."""
        kept, _, variance = self._measure(0.0, [None] * len(self._gates))
        return self._size.of(kept, variance)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take the share along the constraint out of the gradients: g − c·p′·Σg / Σ(c·p′)."""
        if self._key != self._state():
            self._pass(0.0)
        grads = [gate.log_alpha.grad for gate in self._gates]
        sums = [grad.sum() for grad in grads if grad is not None]
        if not sums:
            return
        price = self._size.price(self._kept)
        common = _to_numpy(torch.stack([s.to(sums[0].device) for s in sums])).sum() / max(price @ self._slope, 1e-30)
        for grad, slope, cost in zip(grads, self._slopes, price.tolist(), strict=True):
            if grad is not None:
                grad.add_(slope.view_as(grad), alpha=-cost * float(common))

    @torch.no_grad()
    def shift_to(self, wanted: float) -> None:
        """Add the shift that makes the expected size ``wanted``: damped Newton steps between bounds that close in."""
        shift, low, high = self._last, -math.inf, math.inf
        for _ in range(100):
            self._pass(shift)
            error, step = self._size.of(self._kept, self._variance) - wanted, 0.0
            if abs(error) <= _EXACT * wanted:
                break
            slope = max(float(self._size.price(self._kept) @ self._slope), 1e-30)
            low, high = (low, shift) if error > 0 else (shift, high)
            step = min(max(-error / slope, -_FARTHEST), _FARTHEST)
            inside = low < shift + step < high
            shift = shift + step if inside else (low + high) / 2
            # |p″| <= p′, so this bounds the error that is left
            if inside and slope * step * step * math.exp(abs(step)) / 2 <= _ACCURACY * wanted:
                break
        self._kept = self._kept + self._slope * step
        self._last = shift
        for gate in self._gates:
            gate.log_alpha.add_(shift)
        self._key = self._state()

    @property
    def _device(self) -> torch.device:
        return self._gates[0].log_alpha.device

    def _state(self) -> object:
        """What tells whether the gates are where the last pass left them."""
        tensors = [gate.log_alpha for gate in self._gates]
        return sum(t._version for t in tensors), [t.data_ptr() for t in tensors], [g.temperature for g in self._gates]

    def _pass(self, shift: float) -> None:
        """Measure the gates at a shift, and keep their p′."""
        sizes = [gate.log_alpha.numel() for gate in self._gates]
        devices = [gate.log_alpha.device for gate in self._gates]
        if [len(s) for s in self._slopes] != sizes or [s.device for s in self._slopes] != devices:
            self._slopes = [torch.empty_like(gate.log_alpha.detach()).flatten() for gate in self._gates]
        self._kept, self._slope, self._variance = self._measure(shift, self._slopes)
        self._key = self._state()

    @torch.no_grad()
    def _measure(self, shift: float, slopes: Sequence[Tensor | None]) -> tuple[Floats, Floats, Floats]:
        """Σ p, Σ p′ and Σ p(1 − p) of every array of gates with its log-odds shifted; p′ goes into ``slopes``."""
        parts = [torch.stack(_sums(g, shift, s)).to(self._device) for g, s in zip(self._gates, slopes, strict=True)]
        found = _to_numpy(torch.stack(parts))
        return found[:, 0], found[:, 1], found[:, 2]


def _sums(gate: Gate, shift: float, slopes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    family, location = gate.family, gate.log_alpha.detach().flatten()
    if isinstance(family, HardConcreteFamily):
        p = torch.add(location, shift - gate.temperature * math.log(-family.gamma / family.zeta), out=slopes).sigmoid_()
        total = p.sum()
        slope = torch.addcmul(p, p, p, value=-1, out=p).sum()  # p′ = p(1 − p), in the same memory
        return total, slope, slope
    moved = (location + shift).requires_grad_()
    with torch.enable_grad():
        p = family.keep_prob(moved, gate.temperature)
        (found,) = torch.autograd.grad(p.sum(), moved)
    if slopes is not None:
        slopes.copy_(found)
    p = p.detach()
    return p.sum(), found.sum(), (p * (1 - p)).sum()


def _to_numpy(tensor: Tensor) -> Floats:
    found: Floats = tensor.detach().double().cpu().numpy()
    return found
