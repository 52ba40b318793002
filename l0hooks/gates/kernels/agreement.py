"""Compare compiled kernels with the plain formula on a few thousand gates, before they are first used on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l0hooks._torch.autograd import apart
from l0hooks._torch.running import OUT_OF_MEMORY
from l0hooks.errors import in_one_line
from l0hooks.gates.constants import Constants
from l0hooks.gates.derivatives import slope_of

COUNT = 4096  # gates; a multiple of what Triton compiles another variant for
TOLERANCE = 3e-5  # of numbers of order 1: kernels are off by 1e-5 at most
_SEED = 0x1E3779B97F4A7C15
_SHIFT, _DEFERRED = 0.3, 0.7


def disagreement(kernels: Any, device: torch.device) -> str:
    """What kernels compute otherwise than the plain formula, and by how much; empty if nothing.

    Parameters
    ----------
    kernels : module
        ``kernels.cpu`` or ``kernels.cuda``.
    device : torch.device

    Returns
    -------
    str

    Examples
    --------
    >>> from l0hooks.gates.kernels import cpu
    >>> disagreement(cpu, torch.device("cpu"))
    ''
    """
    return _first_wrong(lambda: _computed(kernels, device))


def median_disagreement(kernels: Any) -> str:
    """The same for the kernels of gates without noise.

    Parameters
    ----------
    kernels : module
        ``kernels.cpu_median``.

    Returns
    -------
    str

    Examples
    --------
    >>> from l0hooks.gates.kernels import cpu_median
    >>> median_disagreement(cpu_median)
    ''
    """
    return _first_wrong(lambda: _computed_without_noise(kernels))


def _first_wrong(compute: Callable[[], list[tuple[str, Tensor, Tensor]]]) -> str:
    with apart():
        try:
            pairs = compute()
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a compiler or a driver raises
            return in_one_line(error)
        for what, got, expected in pairs:
            gap = float((got.cpu().double() - expected).abs().max())
            if not gap <= TOLERANCE:  # NaN is wrong, too
                return f"{what}: a difference of {gap:.1e}"
    return ""


def _computed(kernels: Any, device: torch.device) -> list[tuple[str, Tensor, Tensor]]:
    """Names, what the kernels compute, and what they should."""
    constants = Constants()
    location, weight, grad = _problem()
    noise = torch.logit(_uniforms(_SEED, COUNT))
    stretched = constants.gamma + (constants.zeta - constants.gamma) * torch.sigmoid(
        (noise + location) / constants.temperature
    )
    gates = stretched.clamp(0, 1)
    open_share = torch.sigmoid(location - _SHIFT)

    a, w, g = (one.to(device, torch.float32) for one in (location, weight, grad))
    drawn_noise = kernels.fill(torch.empty_like(a), _SEED, 0, 1.0)
    product, drawn = kernels.gated(w, a, _SEED, 0, constants)
    deferred = torch.tensor(_DEFERRED, device=device), _SHIFT
    by_weight, by_location = kernels.gated_backward(g, w, a, drawn, constants, deferred)
    total = kernels.count(a, _SHIFT)

    sure = _inside_or_outside(stretched)
    slope = grad * weight * slope_of(gates, constants) + _DEFERRED * open_share * (1 - open_share)
    return [
        ("noise", drawn_noise / 16, noise / 16),
        ("the product with the gates", product, weight * gates),
        ("the gradient of the weight", by_weight, grad * gates),
        ("the gradient of the log-odds", by_location.cpu() * sure, slope * sure),
        ("the expected count", total / COUNT, open_share.mean()),
    ]


def _computed_without_noise(kernels: Any) -> list[tuple[str, Tensor, Tensor]]:
    constants = Constants()
    location, weight, grad = _problem()
    stretched = constants.gamma + (constants.zeta - constants.gamma) * torch.sigmoid(location / constants.temperature)
    gates, open_share = stretched.clamp(0, 1), torch.sigmoid(location - _SHIFT)
    a, w, g = (one.float() for one in (location, weight, grad))
    deferred = torch.tensor(_DEFERRED, device="cpu"), _SHIFT
    by_weight, by_location = kernels.gated_backward(g, w, a, constants, deferred)
    slopes = torch.empty_like(a)
    sums = kernels.measure(a, -_SHIFT, slopes)
    sure, spread = _inside_or_outside(stretched), open_share * (1 - open_share)
    return [
        ("the product with the gates without noise", kernels.gated(w, a, constants), weight * gates),
        ("the gradient of the weight without noise", by_weight, grad * gates),
        (
            "the gradient of the log-odds without noise",
            by_location * sure,
            (grad * weight * slope_of(gates, constants) + _DEFERRED * spread) * sure,
        ),
        ("the slopes of the open share", slopes, spread),
        (
            "the sums of the open share",
            torch.tensor(sums, device="cpu") / COUNT,
            torch.stack([open_share.mean(), spread.mean()]),
        ),
    ]


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds, weights and a gradient, float64."""
    numbers = torch.arange(COUNT, dtype=torch.float64, device="cpu")
    return numbers / COUNT * 12 - 6, torch.cos(numbers), torch.sin(numbers)


def _inside_or_outside(stretched: Tensor) -> Tensor:
    """1 where a gate is surely clamped or surely not: at the clamps rounding decides whether there is a slope."""
    return ((stretched.abs() > TOLERANCE) & ((stretched - 1).abs() > TOLERANCE)).to(torch.float64)


def _uniforms(seed: int, count: int) -> Tensor:
    """Philox4x32-10 in NumPy: four numbers of 23 bits from each counter, float64."""
    low, high = np.uint64(2**32 - 1), np.uint64(32)
    none = np.zeros(count // 4, np.uint64)
    a, b, c, d = np.arange(count // 4, dtype=np.uint64), none, none, none
    key, other = seed % 2**32, seed >> 32
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> high) ^ b ^ np.uint64(key), q & low, (p >> high) ^ d ^ np.uint64(other), p & low
        key, other = (key + 0x9E3779B9) % 2**32, (other + 0xBB67AE85) % 2**32
    words = np.stack([a, b, c, d], axis=1).reshape(-1)
    return torch.from_numpy(((words >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23)
