"""Sampling in one autograd function, alone or with the weight: the plain formula in the fewest passes over memory."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l0hooks.hard_concrete import GAMMA, TEMPERATURE, ZETA, closing_point, keep_prob
from l0hooks.memory import fresh, fresh_like, pieces
from l0hooks.streams import Stream

_FEW = 2**15  # below, a call of a Python function costs more than the memory it saves
_STEEPEST = 1e37  # 1/β that logits of noise can be multiplied with in float32


class Constants(NamedTuple):
    """β, γ and ζ."""

    temperature: float = TEMPERATURE
    gamma: float = GAMMA
    zeta: float = ZETA


def is_traced() -> bool:
    """Whether the plain formulas must run: in a graph being built, under a torch.func transform, in forward mode."""
    building = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    transformed = torch._C._functorch.maybe_current_level() is not None
    return building or transformed or torch.autograd.forward_ad._current_level >= 0


def _wants_plain(grad: Tensor) -> bool:
    """Whether a backward pass must consist of ordinary operations: a graph of it is wanted, or ``grad`` is batched."""
    # the last is what torch.autograd.grad(is_grads_batched=True) hands out
    return torch.is_grad_enabled() or is_traced() or torch._C._functorch.is_legacy_batchedtensor(grad)


class LastSample:
    """The autograd node that sampled a gate last, for as long as its graph lives; a copy of the gate has none."""

    def __init__(self) -> None:
        self._node: weakref.ref[Any] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return LastSample, ()

    def __deepcopy__(self, memo: dict[int, object]) -> LastSample:
        return LastSample()

    @property
    def node(self) -> weakref.ref[Any] | None:
        """The node."""
        return self._node

    def note(self, gated: Tensor) -> None:
        """``gated`` was sampled now."""
        self._node = None if gated.grad_fn is None else weakref.ref(gated.grad_fn)


class _Sampled(torch.autograd.Function):
    """sample(log_alpha, noise); saves the gates only."""

    @staticmethod  # one method, for torch takes 20 µs to call a setup_context
    def forward(ctx: Any, log_alpha: Tensor, noise: Stream, constants: Constants, examples: int | None) -> Tensor:
        shape = log_alpha.shape if examples is None else (examples, *log_alpha.shape)
        gates = fresh(shape, log_alpha.dtype, log_alpha.device)
        for location, z in pieces(log_alpha, gates) if examples is None else [(log_alpha, gates)]:
            _draw(z, location, noise, constants)
        ctx.constants = constants
        ctx.save_for_backward(log_alpha, gates)
        return gates

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_alpha, gates = ctx.saved_tensors
        return _sampled_backward(log_alpha, gates, grad, ctx.constants), None, None, None


class _SampledTogether(torch.autograd.Function):
    """The same for several log-odds, each of one axis, one after the other; no gradient for gates nobody has read."""

    @staticmethod
    def forward(
        ctx: Any, noise: Stream, constants: Constants, examples: int | None, *log_alphas: Tensor
    ) -> tuple[Tensor, ...]:
        together = torch.cat(log_alphas)
        shape = together.shape if examples is None else (examples, *together.shape)
        gates = fresh(shape, together.dtype, together.device)
        _draw(gates, together, noise, constants)
        ctx.set_materialize_grads(False)
        ctx.constants = constants
        ctx.kept = gates, log_alphas  # saved tensors are gone after the first backward pass
        return torch.split(gates.detach(), [len(location) for location in log_alphas], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, log_alphas = ctx.kept
        sizes = [len(location) for location in log_alphas]
        shares = zip(grads, torch.split(gates, sizes, -1), strict=True)
        grad = torch.cat([torch.zeros_like(z) if g is None else g for g, z in shares], -1)
        slopes = torch.split(_sampled_backward(torch.cat(log_alphas), gates, grad, ctx.constants), sizes)
        return None, None, None, *(None if g is None else slope for g, slope in zip(grads, slopes, strict=True))


class _GatedWeight(torch.autograd.Function):
    """weight · sample(log_alpha, noise); saves the weight and the gates only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_alpha: Tensor, noise: Stream, constants: Constants) -> Tensor:
        gates, product = fresh(log_alpha.shape, log_alpha.dtype, log_alpha.device), fresh_like(weight)
        for w, location, z, p in pieces(weight, log_alpha, gates, product):
            _draw(z, location, noise, constants)
            torch.mul(w, z.to(w.dtype), out=p)
        ctx.constants = constants
        ctx.debt = _Debt()
        ctx.save_for_backward(weight, log_alpha, gates)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_alpha, gates = ctx.saved_tensors
        by_weight, by_location = ctx.needs_input_grad[:2]
        owed = ctx.debt.take()
        if _wants_plain(grad):  # let z depend on log_alpha again
            gates = _reattach(gates, log_alpha, ctx.constants)
            grad_location = (grad * weight).to(gates.dtype) * _slope(gates, ctx.constants)
            return grad * gates.to(weight.dtype), grad_location, None, None
        grad_weight = fresh_like(weight) if by_weight else None
        grad_location = fresh_like(gates) if by_location else None
        for g, w, location, z, to_weight, to_location in pieces(
            grad, weight, log_alpha, gates, grad_weight, grad_location
        ):
            if to_weight is not None:
                torch.mul(g, z.to(g.dtype), out=to_weight)
            if to_location is not None:
                _slope_times(z, g * w, ctx.constants, out=to_location)
                for count, shift in owed:
                    to_location.add_(_count_slope(location, shift, count))
        return grad_weight, grad_location, None, None


class _HeldWeight(torch.autograd.Function):
    """weight · constant gates, and a gradient of zero for their log-odds."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_alpha: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(gates)
        return torch.mul(weight, gates.to(weight.dtype), out=fresh_like(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gates,) = ctx.saved_tensors
        none = fresh_like(gates).zero_() if ctx.needs_input_grad[1] else None
        if _wants_plain(grad):
            return grad * gates.to(grad.dtype), none, None
        return torch.mul(grad, gates.to(grad.dtype), out=fresh_like(grad)), none, None


class _Debt:
    """Gradients of expected counts, which the node that samples the gates adds to its own in the same pass."""

    def __init__(self) -> None:
        self._task = -1
        self._paid = -1
        self._owed: list[tuple[Tensor, float]] = []

    def add(self, node: torch.autograd.graph.Node, grad: Tensor, shift: float) -> bool:
        """Leave ``grad`` to ``node``, if that is still to come in this backward pass."""
        task = torch._C._current_graph_task_id()
        if self._paid == task or not torch._C._will_engine_execute_node(node):
            return False
        if self._task != task:  # what a pass that failed has left
            self._task, self._owed = task, []
        self._owed.append((grad, shift))
        return True

    def take(self) -> list[tuple[Tensor, float]]:
        """What is owed in this backward pass."""
        task = torch._C._current_graph_task_id()
        owed = self._owed if self._task == task else []
        self._paid, self._task, self._owed = task, -1, []
        return owed


class _ExpectedCount(torch.autograd.Function):
    """Σ σ(log_alpha − shift); saves nothing, for a second pass costs less than memory for the first."""

    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, shift: float, sampler: weakref.ref[Any] | None) -> Tensor:
        ctx.shift, ctx.sampler = shift, sampler
        ctx.save_for_backward(log_alpha)
        return torch.stack([torch.sub(location, shift).sigmoid_().sum() for (location,) in pieces(log_alpha)]).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (log_alpha,) = ctx.saved_tensors
        if _wants_plain(grad):
            p = torch.sigmoid(log_alpha - ctx.shift)
            return grad * p * (1 - p), None, None
        node = None if ctx.sampler is None else ctx.sampler()
        if node is not None and node.debt.add(node, grad, ctx.shift):
            return None, None, None
        slope = fresh_like(log_alpha)
        for location, out in pieces(log_alpha, slope):
            _count_slope(location, ctx.shift, grad, out=out)
        return slope, None, None


def _count_slope(log_alpha: Tensor, shift: float, grad: Tensor, out: Tensor | None = None) -> Tensor:
    """``grad`` · p(1 − p) with p = σ(log_alpha − shift)."""
    p = torch.sub(log_alpha, shift, out=out).sigmoid_()
    slope: Tensor = torch.ops.aten.sigmoid_backward.grad_input(grad.expand_as(p), p, grad_input=p)
    return slope


def _draw(gates: Tensor, log_alpha: Tensor, noise: Stream, constants: Constants) -> None:
    """Fill ``gates`` with a sample."""
    temperature, gamma, zeta = constants
    steepness = min(1 / temperature, _STEEPEST)
    s = noise.logistic_(gates, steepness).add_(log_alpha, alpha=steepness).sigmoid_()
    torch.add(_number(gamma, s), s, alpha=zeta - gamma, out=s).clamp_(0, 1)  # one pass, where mul_ and add_ are two


def _sampled_backward(log_alpha: Tensor, gates: Tensor, grad: Tensor, constants: Constants) -> Tensor:
    if _wants_plain(grad):
        gates = _reattach(gates.detach(), log_alpha, constants)
        slope = _slope(gates, constants) * grad
    else:
        slope = fresh_like(gates)
        for z, g, s in pieces(gates, grad, slope):
            _slope_times(z, g, constants, out=s)
    return slope.sum_to_size(log_alpha.shape)


def _reattach(gates: Tensor, log_alpha: Tensor, constants: Constants) -> Tensor:
    """The same gates as a differentiable function of ``log_alpha`` at fixed noise, clamped gates as constants."""
    temperature, gamma, zeta = constants
    inside = (gates > 0) & (gates < 1)
    s = torch.where(inside, (gates - gamma) / (zeta - gamma), 0.5)
    moved = torch.sigmoid(torch.logit(s) + (log_alpha - log_alpha.detach()) / temperature)
    return torch.where(inside, gamma + (zeta - gamma) * moved, gates)


def _slope_times(gates: Tensor, grad: Tensor, constants: Constants, out: Tensor) -> None:
    """``grad`` times dz/dlogα = (ζ − γ)/β · s(1 − s), where z = γ + (ζ − γ)s."""
    temperature, gamma, zeta = constants
    s = torch.add(_number(-gamma / (zeta - gamma), gates), gates, alpha=1 / (zeta - gamma))
    aten = torch.ops.aten
    aten.sigmoid_backward.grad_input(grad.to(gates.dtype), s, grad_input=out)
    # hardtanh's backward is the clamp's: zero where the gate is exactly 0 or 1
    aten.hardtanh_backward.grad_input(out.mul_((zeta - gamma) / temperature), gates, 0.0, 1.0, grad_input=out)


@functools.lru_cache(maxsize=16)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def _number(value: float, like: Tensor) -> Tensor:
    return _constant(value, like.dtype)


def _slope(gates: Tensor, constants: Constants) -> Tensor:
    """dz/dlogα as a function of z: (z − γ)(ζ − z)/((ζ − γ)β) inside, 0 at the clamps."""
    temperature, gamma, zeta = constants
    slope = (gates - gamma) * (zeta - gates) / ((zeta - gamma) * temperature)
    return torch.where((gates > 0) & (gates < 1), slope, 0.0)


def sampled(log_alpha: Tensor, noise: Stream, constants: Constants, examples: int | None = None) -> Tensor:
    """``sample(log_alpha, noise)``, fused.

    Parameters
    ----------
    log_alpha : Tensor, float32 or float64
    noise : Stream
    constants : Constants
    examples : int, optional
        How many independent samples; they become the first axis.

    Returns
    -------
    Tensor, dtype and shape of ``log_alpha``, ``examples`` in front if given

    Examples
    --------
    >>> from l0hooks.streams import stream
    >>> noise = stream(0, 6, torch.device("cpu"))
    >>> sampled(torch.tensor([30.0, -30.0]), noise, Constants(), examples=3)[0]
    tensor([1., 0.])
    """
    gates: Tensor = _Sampled.apply(log_alpha, noise, constants, examples)  # type: ignore[no-untyped-call]
    return gates


def sampled_together(
    log_alphas: Sequence[Tensor], noise: Stream, constants: Constants, examples: int | None = None
) -> tuple[Tensor, ...]:
    """``sampled`` for several log-odds, in one node of the graph.

    Outputs with backward passes of their own may come from it: what it keeps stays until the graph goes. Log-odds
    whose gates nobody has read get no gradient.

    Parameters
    ----------
    log_alphas : sequence of Tensor, each of one axis, of one dtype
    noise : Stream
        For all of them, one after the other along the last axis.
    constants : Constants
    examples : int, optional

    Returns
    -------
    tuple of Tensor, one for each of ``log_alphas``

    Examples
    --------
    >>> from l0hooks.streams import stream
    >>> noise = stream(0, 3, torch.device("cpu"))
    >>> sampled_together([torch.tensor([30.0, -30.0]), torch.tensor([30.0])], noise, Constants())
    (tensor([1., 0.]), tensor([1.]))
    """
    gates: tuple[Tensor, ...] = _SampledTogether.apply(  # type: ignore[no-untyped-call]
        noise, constants, examples, *log_alphas
    )
    return gates


def gated_weight(weight: Tensor, log_alpha: Tensor, noise: Stream, constants: Constants) -> Tensor:
    """``weight * sample(log_alpha, noise)``, fused: one gate per weight.

    Parameters
    ----------
    weight : Tensor, any floating dtype
    log_alpha : Tensor, float32 or float64, shape of ``weight``
    noise : Stream
    constants : Constants

    Returns
    -------
    Tensor, dtype and shape of ``weight``

    Examples
    --------
    >>> from l0hooks.streams import stream
    >>> noise = stream(0, 2, torch.device("cpu"))
    >>> gated_weight(torch.ones(2), torch.tensor([30.0, -30.0]), noise, Constants())
    tensor([1., 0.])
    """
    gated: Tensor = _GatedWeight.apply(weight, log_alpha, noise, constants)  # type: ignore[no-untyped-call]
    return gated


def expected_count(log_alpha: Tensor, constants: Constants, sampler: weakref.ref[Any] | None = None) -> Tensor:
    """``keep_prob(log_alpha).sum()``, fused; its gradient is computed in the pass of the node that samples the gates.

    Parameters
    ----------
    log_alpha : Tensor, float32 or float64
    constants : Constants
    sampler : weak reference to an autograd node, optional
        Who multiplied a weight with these gates; asked only if it takes part in the same backward pass.

    Returns
    -------
    Tensor, dtype of ``log_alpha``, shape ()

    Examples
    --------
    >>> expected_count(torch.tensor([30.0, -30.0]), Constants())
    tensor(1.)
    """
    if log_alpha.numel() < _FEW:
        return keep_prob(log_alpha, *constants).sum()
    count: Tensor = _ExpectedCount.apply(log_alpha, closing_point(*constants), sampler)  # type: ignore[no-untyped-call]
    return count


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
