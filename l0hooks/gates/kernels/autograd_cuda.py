"""The gated weight whose gates are not kept: Triton kernels draw the same noise in both directions.

Nothing imports this room before a tensor is met that the kernels are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l0hooks._torch.autograd import DeferredGradients, wants_plain
from l0hooks._torch.memory import lie_alike
from l0hooks.gates.derivatives import count_slope, inverted, reattach, slope_of
from l0hooks.gates.kernels import cuda as kernels

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


class _Recomputed(torch.autograd.Function):
    """weight · sample(log_alpha, noise); saves the two alone."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_alpha: Tensor,
        numbers: tuple[int, int],
        constants: tuple[float, float, float],
    ) -> Tensor:
        ctx.numbers, ctx.constants = numbers, constants
        ctx.deferred = DeferredGradients()
        ctx.save_for_backward(weight, log_alpha)
        return kernels.gated(weight, log_alpha, *numbers, inverted(constants))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_alpha = ctx.saved_tensors
        seed, start = ctx.numbers
        owed = ctx.deferred.take()
        if wants_plain(grad):
            gates = torch.ops.l0hooks.philox_gates(log_alpha.detach(), seed, start, ctx.constants)
            gates = reattach(gates, log_alpha, ctx.constants)
            to_location = (grad * weight).to(gates.dtype) * slope_of(gates, ctx.constants)
            return grad * gates.to(weight.dtype), to_location, None, None
        to_weight, to_location = kernels.gated_backward(
            grad.contiguous(),
            weight,
            log_alpha,
            seed,
            start,
            inverted(ctx.constants),
            owed[0] if owed else None,
            wanted=ctx.needs_input_grad[:2],
        )
        if to_location is not None:
            for count, shift in owed[1:]:
                to_location.add_(count_slope(log_alpha, shift, count))
        return to_weight, to_location, None, None


@torch.library.custom_op("l0hooks::philox_gates", mutates_args=())
def _gates_op(log_alpha: Tensor, seed: int, start: int, constants: Sequence[float]) -> Tensor:
    temperature, gamma, zeta = constants
    return kernels.gated(None, log_alpha, seed, start, inverted((temperature, gamma, zeta)))


@_gates_op.register_fake
def _(log_alpha: Tensor, seed: int, start: int, constants: Sequence[float]) -> Tensor:
    return torch.empty_like(log_alpha)


def fits(weight: Tensor, log_alpha: Tensor) -> bool:
    """Whether the kernels can multiply ``weight`` with gates: plain, contiguous tensors of one shape, float64 excepted.

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
    return weight.dtype in _WEIGHTS and lie_alike(weight, log_alpha)


def recomputed(
    weight: Tensor,
    log_alpha: Tensor,
    numbers: tuple[int, int],
    constants: tuple[float, float, float],
) -> Tensor:
    """``weight * sample(log_alpha, noise)`` by Triton kernels; no gates are kept.

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
    >>> recomputed(torch.ones(2), torch.tensor([30.0, -30.0]), (7, 0), (2 / 3, -0.1, 1.1))
    tensor([1., 0.])
    """
    gated: Tensor = _Recomputed.apply(  # type: ignore[no-untyped-call]
        weight, log_alpha, numbers, constants
    )
    return gated
