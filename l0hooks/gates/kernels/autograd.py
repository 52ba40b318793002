"""The gated weight whose gates are kept in 16 bits, by Numba's kernels.

Nothing imports this room before a tensor is met that the kernels are for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l0hooks._torch.autograd import DeferredGradients, wants_plain
from l0hooks._torch.memory import has_address, lie_alike
from l0hooks.gates.derivatives import count_slope, inverted, reattach, slope_of
from l0hooks.gates.kernels import cpu as cpu_kernels


class _Levelled(torch.autograd.Function):
    """weight · sample(log_alpha, noise); saves the two and the levels."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_alpha: Tensor,
        numbers: tuple[int, int],
        constants: tuple[float, float, float],
    ) -> Tensor:
        ctx.constants = constants
        ctx.deferred = DeferredGradients()
        product, levels = cpu_kernels.gated(weight, log_alpha, *numbers, inverted(constants))
        ctx.save_for_backward(weight, log_alpha, levels)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_alpha, levels = ctx.saved_tensors
        owed = ctx.deferred.take()
        grad = grad.contiguous() if grad.layout == torch.strided else grad
        if wants_plain(grad) or not _can_go_back(grad, weight, log_alpha, levels):
            gates = reattach(cpu_kernels.gates_of(levels), log_alpha, ctx.constants)
            by_location = grad * weight * slope_of(gates, ctx.constants)
            for count, shift in owed:
                by_location = by_location + count_slope(log_alpha, shift, count)
            return grad * gates, by_location, None, None
        to_weight, to_location = cpu_kernels.gated_backward(
            grad,
            weight,
            log_alpha,
            levels,
            inverted(ctx.constants),
            *((float(count), shift) for count, shift in owed[:1]),
            wanted=ctx.needs_input_grad[:2],
        )
        if to_location is not None:
            for count, shift in owed[1:]:
                to_location.add_(count_slope(log_alpha, shift, count))
        return to_weight, to_location, None, None


def _can_go_back(grad: Tensor, weight: Tensor, log_alpha: Tensor, levels: Tensor) -> bool:
    """Whether the kernels can read the gradient, and what hooks have made of saved tensors."""
    return fits(weight, log_alpha) and fits(weight, grad) and has_address(levels, torch.uint16)


def fits(weight: Tensor, log_alpha: Tensor) -> bool:
    """Whether the kernels can multiply ``weight`` with gates: plain, contiguous tensors of float32, of one shape.

    Parameters
    ----------
    weight, log_alpha : Tensor

    Returns
    -------
    bool

    Examples
    --------
    >>> fits(torch.ones(2, 3), torch.ones(2, 3)), fits(torch.ones(3, 2).t(), torch.ones(2, 3))
    (True, False)
    """
    return weight.dtype == torch.float32 and lie_alike(weight, log_alpha)


def levelled(
    weight: Tensor,
    log_alpha: Tensor,
    numbers: tuple[int, int],
    constants: tuple[float, float, float],
) -> Tensor:
    """``weight * sample(log_alpha, noise)`` by Numba's kernels; the gates are kept in 16 bits.

    Parameters
    ----------
    weight, log_alpha : Tensor
        That :func:`fits`, of one shape.
    numbers : (int, int)
        The seed of the noise, and which of its numbers comes first.
    constants : (float, float, float)
        β, γ and ζ.

    Returns
    -------
    Tensor, dtype and shape of ``weight``

    Examples
    --------
    >>> levelled(torch.ones(2), torch.tensor([30.0, -30.0]), (7, 0), (2 / 3, -0.1, 1.1))
    tensor([1., 0.])
    """
    gated: Tensor = _Levelled.apply(weight, log_alpha, numbers, constants)  # type: ignore[no-untyped-call]
    return gated
