"""A weight times its gates by a module of kernels, whatever the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from l0hooks.gates.constants import Constants
from l0hooks.gates.sampling import _GatedByKernels


def gated_by(kernels: Any, weight: Tensor, log_alpha: Tensor, constants: Constants) -> Tensor:
    """``weight * sample(log_alpha, noise)`` with the noise of seed 3."""
    gated: Tensor = _GatedByKernels.apply(weight, log_alpha, 3, constants, kernels)  # type: ignore[no-untyped-call]
    return gated
