"""The one shift that gates under a budget share: it keeps their expected size where it is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l0hooks._torch.memory import has_address
from l0hooks._torch.tensors import is_sharded, version, whole
from l0hooks.gates.families import HardConcreteFamily
from l0hooks.gates.gate import Gate
from l0hooks.gates.hard_concrete import closing_point
from l0hooks.gates.kernels import loading
from l0hooks.training.size import Floats, Size

_ACCURACY, _EXACT = 1e-6, 1e-9  # of the size that is wanted
_LONGEST_STEP = 2.0  # of Newton's method, in log-odds


class SharedShift:
    """Log-odds a + δ of several arrays of gates, δ solving E[size] = wanted.

    A shift is first guessed to be the last one, so that it seldom costs more than one pass over the gates. The gradient
    is projected with p′ = dp/da of the gates as they stand, which is one more. So what follows depends on the gates
    and on ``last`` alone, and a run that is resumed from them goes on like one that was not interrupted.

    Parameters
    ----------
    gates : sequence of Gate
    size : Size
        By the numbers of gates that stay in each array.
    """

    def __init__(self, gates: Sequence[Gate], size: Size) -> None:
        self._gates = gates
        self._size = size
        self._bent = size.bent  # arrays whose variance costs something
        self._slopes: list[Tensor] = []
        self._sums = np.zeros((len(gates), 4))
        self.last = 0.0
        self._key: object = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy measures its own gates."""
        return self.__dict__ | {"_slopes": [], "_key": None}

    def expected(self) -> float:
        """The expected size of the gates as they stand."""
        return self._expected(self._measure(0.0, [None] * len(self._gates)))

    def restart(self, last: float = 0.0) -> None:
        """Measure the gates again, and guess the next shift to be ``last``."""
        self.last, self._key = last, None

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take the share along the constraint out of the gradients: g − s·Σg / Σs with s = ∂E[size]/∂log_alpha."""
        grads = [gate.log_alpha.grad for gate in self._gates]
        sums = [whole(grad.sum()).to(self._device) for grad in grads if grad is not None]
        total = float(torch.stack(sums).sum()) if sums else 0.0
        if not total or not math.isfinite(total):  # a loss scaler is about to skip this step
            return
        if self._key is None or self._key != self._state():
            self._pass(0.0)
        self._share_gradients(grads)
        common = total / max(self._slope(self._sums), 1e-30)
        marginal, spreads = self._gradient(self._sums), self._size.spread(self._sums[:, 0])
        for number, (gate, grad) in enumerate(zip(self._gates, grads, strict=True)):
            if grad is None:
                continue
            spread = float(spreads[number])
            if spread or is_sharded(grad):
                p, slope = _with_slope(gate, gate.log_alpha.detach())
                slope = slope * (float(marginal[number]) + spread * (1 - 2 * p))
                grad.add_(slope, alpha=-common)
            else:
                grad.add_(self._slopes[number].view_as(grad), alpha=-float(marginal[number]) * common)

    def _share_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Within each set, give every array the mean share along its shift: a step must not pull the arrays apart."""
        known = {number: grad for number, grad in enumerate(grads) if grad is not None}
        for arrays in self._size.sets or ():
            sums = {number: float(whole(known[number].sum())) for number in arrays if number in known}
            if len(sums) > 1:
                slopes = {number: max(float(self._sums[number, 1]), 1e-30) for number in sums}
                mean = sum(sums.values()) / sum(slopes.values())
                for number, own in sums.items():
                    gate, grad = self._gates[number], known[number]
                    sharded = is_sharded(grad)
                    slope = (
                        _with_slope(gate, gate.log_alpha.detach())[1] if sharded else self._slopes[number].view_as(grad)
                    )
                    grad.add_(slope, alpha=mean - own / slopes[number])

    def settle(self, wanted: float) -> None:
        """Make the expected size ``wanted``, and equal within each set of arrays what they expect."""
        self._shift_to(wanted)
        if any(len(arrays) > 1 for arrays in self._size.sets or ()):
            self._equalise()
            self._shift_to(wanted)  # by little, which leaves them almost equal

    @torch.no_grad()
    def _shift_to(self, wanted: float) -> None:
        """Add the shift that makes the expected size ``wanted``: damped Newton steps between bounds that close in."""
        shift, low, high = self.last, -math.inf, math.inf
        for _ in range(100):
            self._pass(shift)
            error, step = self._expected(self._sums) - wanted, 0.0
            if abs(error) <= _EXACT * wanted:
                break
            if not math.isfinite(error):  # one gate that is no number must not spoil the others
                self._key = None
                return
            slope = max(self._slope(self._sums), 1e-30)
            low, high = (low, shift) if error > 0 else (shift, high)
            step = min(max(-error / slope, -_LONGEST_STEP), _LONGEST_STEP)
            newton = step == -error / slope and low < shift + step < high
            shift = shift + step if low < shift + step < high else (low + high) / 2
            # |p″| <= p′, so this bounds the error that a whole Newton step leaves
            if newton and slope * step * step * math.exp(abs(step)) / 2 <= _ACCURACY * wanted:
                break
        self.last, self._key = shift, None
        for gate in self._gates:
            gate.log_alpha.add_(shift)

    @torch.no_grad()
    def _equalise(self) -> None:
        """Let the arrays of each set expect equally many open gates, the mean of the set, by a shift of each."""
        for arrays in self._size.sets or ():
            if len(arrays) > 1:
                gates = [self._gates[number] for number in arrays]
                wanted = float(np.mean([_open(gate, 0.0)[0] for gate in gates]))
                for gate in gates:
                    gate.log_alpha.add_(_shift_of(gate, wanted))
                self._key = None

    def _expected(self, sums: Floats) -> float:
        return self._size.of(sums[:, 0], sums[:, 2])

    def _slope(self, sums: Floats) -> float:
        """d E[size] / dδ."""
        return float(self._gradient(sums) @ sums[:, 1] + self._size.spread(sums[:, 0]) @ sums[:, 3])

    def _gradient(self, sums: Floats) -> Floats:
        return self._size.gradient(sums[:, 0], sums[:, 2])

    @property
    def _device(self) -> torch.device:
        return self._gates[0].log_alpha.device

    def _state(self) -> object:
        """A key that changes when the gates do; None if there is none."""
        tensors = [gate.log_alpha for gate in self._gates]
        if any(is_sharded(t) or t.is_inference() for t in tensors):
            return None
        return [(version(t), t.data_ptr(), gate.temperature) for t, gate in zip(tensors, self._gates, strict=True)]

    def _pass(self, shift: float) -> None:
        """Measure the gates at a shift, and keep their p′."""
        sizes = [(gate.log_alpha.numel(), gate.log_alpha.device) for gate in self._gates]
        if [(s.numel(), s.device) for s in self._slopes] != sizes:
            self._slopes = [torch.empty(count, device=device) for count, device in sizes]
        self._sums = self._measure(shift, self._slopes)
        self._key = self._state()

    @torch.no_grad()
    def _measure(self, shift: float, slopes: Sequence[Tensor | None]) -> Floats:
        """Σ p, Σ p′, Σ p(1 − p) and its slope, for every array of gates with its log-odds shifted."""
        bent = self._bent
        found, by_torch = np.empty((len(self._gates), 4)), {}
        for number, (gate, slope) in enumerate(zip(self._gates, slopes, strict=True)):
            sums = None if slope is None or bent[number] else _sums_by_kernels(gate, shift, slope)
            if sums is None:
                by_torch[number] = torch.stack(_sums_of(gate, shift, slope, bent=bool(bent[number]))).to(self._device)
            else:
                found[number, 0], found[number, 1:] = sums
        if by_torch:  # brought over at once
            found[list(by_torch)] = torch.stack(list(by_torch.values())).double().cpu().numpy()
        return found


def _sums_by_kernels(gate: Gate, shift: float, slopes: Tensor) -> tuple[float, float] | None:
    """Σ p and Σ p′, and p′ in ``slopes``, in one pass by compiled code; None if there is none for these gates."""
    family, location = gate.family, gate.log_alpha
    if not isinstance(family, HardConcreteFamily):
        return None
    kernels: Any = loading.median_kernels_for(location.numel(), location.device)
    if kernels is None or not has_address(location):
        return None
    sums: tuple[float, float] = kernels.measure(
        location, shift - closing_point(gate.temperature, family.gamma, family.zeta), slopes
    )
    return sums


def _open(gate: Gate, shift: float) -> tuple[float, float]:
    """Σ p and Σ p′ of one array with its log-odds shifted."""
    total, slope, *_ = _sums_of(gate, shift, None, bent=False)
    return float(total), float(slope)


def _shift_of(gate: Gate, wanted: float) -> float:
    """The shift at which one array expects ``wanted`` open gates: Newton's method between bounds that close in."""
    shift, low, high = 0.0, -math.inf, math.inf
    for _ in range(50):
        total, slope = _open(gate, shift)
        error = total - wanted
        if abs(error) <= _ACCURACY * wanted or not math.isfinite(error):
            break
        low, high = (low, shift) if error > 0 else (shift, high)
        step = min(max(-error / max(slope, 1e-30), -_LONGEST_STEP), _LONGEST_STEP)
        shift = shift + step if low < shift + step < high else (low + high) / 2
    return shift


def _sums_of(gate: Gate, shift: float, slopes: Tensor | None, *, bent: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    family, location = gate.family, whole(gate.log_alpha.detach()).flatten()
    if isinstance(family, HardConcreteFamily) and not bent:
        p = torch.add(location, shift - gate.temperature * math.log(-family.gamma / family.zeta), out=slopes).sigmoid_()
        total = p.sum()
        slope = torch.addcmul(p, p, p, value=-1, out=p).sum()  # p′ = p(1 − p), in the same memory
        return total, slope, slope, slope
    p, slope = _with_slope(gate, location + shift)
    if slopes is not None:
        slopes.copy_(slope)
    return p.sum(), slope.sum(), (p * (1 - p)).sum(), (slope * (1 - 2 * p)).sum()


def _with_slope(gate: Gate, location: Tensor) -> tuple[Tensor, Tensor]:
    """p and p′ at log-odds, spread over processes if these are."""
    location = location.requires_grad_()
    with torch.enable_grad():
        p = gate.family.keep_prob(location, gate.temperature)
        (slope,) = torch.autograd.grad(p.sum(), location)
    return p.detach(), slope
