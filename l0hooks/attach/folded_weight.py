"""The folded weight of a gated layer in evaluation: kept while nothing has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from l0hooks._torch.memory import fresh_like
from l0hooks._torch.tensors import version
from l0hooks.gates.optimizer_hooks import steps_taken

if TYPE_CHECKING:
    from l0hooks.gates.gate import Gate


class Foldable(Protocol):
    """What a weight is multiplied with."""

    training: bool
    gates: tuple[Gate, ...]
    kept: Kept

    def fold_into(self, weight: Tensor, out: Tensor) -> Tensor:
        """The weight times the test-time gates, into ``out``."""
        ...


class Kept:
    """The folded weight, kept while neither weight, gates nor settings have changed."""

    def __init__(self) -> None:
        self.held: Tensor | None = None  # the product to use without asking what has changed
        self._product: Tensor | None = None
        self._gates: tuple[list[Tensor], list[Tensor]] | None = None
        self._of: tuple[weakref.ref[Tensor], ...] = ()
        self._key: list[object] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[object, ...]:
        return Kept, ()  # a pickle computes the product anew

    def product(self, owner: Foldable, of: tuple[Tensor, ...]) -> Tensor:
        """The product of a weight and its gates' values; ``of`` is the weight and the gates' log-odds."""
        known = self.known(owner, of)
        if known is not None:
            return known
        with torch.inference_mode(False), torch.no_grad():
            product = self._product = owner.fold_into(of[0], fresh_like(of[0]))
        self._gates = None
        self._of = tuple(map(weakref.ref, of))
        self._key = _key_of(owner, of, product)
        return product

    def known(self, owner: Foldable, of: tuple[Tensor, ...]) -> Tensor | None:
        """The product, if it was made of the same and is still right."""
        product = self._product
        if product is None:
            return None
        for kept, now in zip(self._of, of, strict=True):
            if kept() is not now:
                return None
        return product if self._key == _key_of(owner, of, product) else None

    def gates(self, owner: Foldable) -> tuple[list[Tensor], list[Tensor]]:
        """The test-time gates of the product asked for last, and their slopes dz/dlogα."""
        if self._gates is None:
            self._gates = [], []
            for gate in owner.gates:
                with torch.inference_mode(False), torch.enable_grad():
                    location = gate.log_alpha.detach().requires_grad_()
                    value = gate.value(location) + 0 * location  # binary gates have no slope of their own
                    (slope,) = torch.autograd.grad(value.sum(), location)
                self._gates[0].append(value.detach())
                self._gates[1].append(slope)
        return self._gates

    def hold(self, product: Tensor) -> None:
        """Use ``product`` in evaluation without gradients until :meth:`drop`, whatever changes."""
        self.held = product

    def drop(self) -> None:
        """Forget the product."""
        self._product = self._gates = self.held = None


def _key_of(owner: Foldable, of: tuple[Tensor, ...], product: Tensor) -> list[object]:
    """All that the product depends on, besides which tensors it is made of."""
    # callers have this tensor and may change it; fused optimisers change tensors without a new version
    key: list[object] = [version(product), steps_taken()]
    for tensor in of:
        key += (version(tensor), tensor.data_ptr(), tensor.dtype)
    for gate in owner.gates:
        key += (gate.temperature, gate.estimator, None if gate.rule is None else gate.rule.refresh())
    return key


class Folded(torch.autograd.Function):
    """The kept product going forward; the gradient of the product it was computed from going back."""

    @staticmethod
    def forward(ctx: Any, factor: Callable[[Sequence[Tensor]], Tensor], kept: Tensor, *tensors: Tensor) -> Tensor:
        # a weight, then as many log-odds as values as slopes
        ctx.count = len(tensors) // 3
        ctx.save_for_backward(tensors[0], *tensors[1 + ctx.count :])
        ctx.factor = factor
        return kept.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        values, slopes = saved[: ctx.count], saved[ctx.count :]
        wanted_weight, *wanted = ctx.needs_input_grad[2 : 3 + ctx.count]
        grad_weight = grad * ctx.factor(values).to(grad.dtype) if wanted_weight else None
        grads: list[Tensor | None] = [None] * ctx.count
        if any(wanted):
            with torch.enable_grad():
                leaves = [value.detach().requires_grad_() for value in values]
                spread = ctx.factor(leaves)
            reduced = (grad * weight).to(spread.dtype).sum_to_size(spread.shape)
            summed = torch.autograd.grad(spread, leaves, reduced)
            grads = [g * slope if want else None for g, slope, want in zip(summed, slopes, wanted, strict=True)]
        return None, None, grad_weight, *grads, *([None] * (2 * ctx.count))
