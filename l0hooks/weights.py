"""The parametrizations that multiply an existing weight with gates."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l0hooks.families import HardConcreteFamily
from l0hooks.fused import Constants, gated_weight, held_weight
from l0hooks.gate import Gate
from l0hooks.layers import GateLayout, Granularity
from l0hooks.recording import is_traced
from l0hooks.stepping import steps_taken


class Gating(nn.Module):
    """A parametrization weight ↦ weight · factor, the factor made of gates; a kept product in evaluation.

    Attributes
    ----------
    granularity : str or (int, int)
        The name that the shape of the gates goes by.
    positions : float or None
        How often each weight is used in one pass over the example inputs: multiply-adds per weight.
    order : tuple of str
        The layer's parameters as they stood before, for pruning.
    """

    def __init__(self, granularity: Granularity, positions: float | None) -> None:
        super().__init__()
        self.granularity = granularity
        self.positions = positions
        self.order: tuple[str, ...] = ()
        self._kept = _Kept()

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates that the factor is made of."""
        raise NotImplementedError

    def factor(self, values: Sequence[Tensor], rest: float = 1.0) -> Tensor:
        """One array of values for each of ``gates``, laid over the weight; ``rest`` where it has no gate."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The gated weight, dtype and shape of ``weight``."""
        if self.training:
            return self._sampled(weight)
        tensors = (weight, *(gate.log_alpha for gate in self.gates))
        if is_traced() or any(t.is_inference() for t in tensors) or _in_processes():  # no versions to compare
            return self.fold(weight)
        kept = self._kept.product(self, tensors)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            values, slopes = self._kept.gates(self)
            folded: Tensor = _Folded.apply(self.factor, kept, *tensors, *values, *slopes)  # type: ignore[no-untyped-call]
            return folded
        return kept

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning a tensor (torch takes no Parameter here) to the layer's weight replaces it beneath the gates."""
        return weight

    def fold(self, weight: Tensor) -> Tensor:
        """The weight times the test-time gates, differentiable; +0.0 wherever a gate is closed."""
        factor = self.factor([gate.value() for gate in self.gates]).to(weight.dtype)
        return torch.where(factor == 0, 0.0, weight * factor)

    def train(self, mode: bool = True) -> Gating:
        """Switch modes; the kept product does not outlive the switch."""
        self._kept.drop()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gating:
        self._kept.drop()  # a move to another dtype and back may put other values at the same address
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _sampled(self, weight: Tensor) -> Tensor:
        return weight * self.factor([gate.sample() for gate in self.gates]).to(weight.dtype)


def _in_processes() -> bool:
    """Whether this is one of several processes: weights that ``fully_shard`` gathers change without a new version."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class GatedWeight(Gating):
    """One gate array laid over one weight.

    Parameters
    ----------
    gate : Gate
    layout : GateLayout
        How the gates lie over the weight.
    granularity : str or (int, int)
    positions : float, optional
    """

    def __init__(
        self, gate: Gate, layout: GateLayout, granularity: Granularity, positions: float | None = None
    ) -> None:
        super().__init__(granularity, positions)
        self.gate = gate
        self.layout = layout

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (self.gate,)

    def factor(self, values: Sequence[Tensor], rest: float = 1.0) -> Tensor:
        return self.layout.spread(values[0])

    def _sampled(self, weight: Tensor) -> Tensor:
        gate, family = self.gate, self.gate.family
        if gate.rule is not None and gate.rule.finished and self.layout.pattern is None and not is_traced():
            return held_weight(weight, gate.log_alpha, gate.final())
        if self.layout.pattern is None and type(family) is HardConcreteFamily and not is_traced():
            constants = Constants(gate.temperature, family.gamma, family.zeta)
            gated = gated_weight(weight, gate.log_alpha, gate.stream(), constants)
            gate.last_sample.note(gated)
            return gated
        return super()._sampled(weight)


class _Kept:
    """The folded weight, kept while neither weight, gates nor temperature have changed."""

    def __init__(self) -> None:
        self._product: Tensor | None = None
        self._gates: tuple[list[Tensor], list[Tensor]] | None = None
        self._of: tuple[weakref.ref[Tensor], ...] = ()
        self._key: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, object]) -> _Kept:
        return _Kept()

    def product(self, owner: Gating, of: tuple[Tensor, ...]) -> Tensor:
        """The product of a weight and its gates' values; ``of`` is the weight and the gates' log-odds."""
        if (
            self._product is None
            or any(kept() is not now for kept, now in zip(self._of, of, strict=True))
            or self._key != self._key_of(owner, of, self._product)
        ):
            with torch.inference_mode(False), torch.no_grad():
                self._product = owner.fold(of[0])
            self._gates = None
            self._of = tuple(map(weakref.ref, of))
            self._key = self._key_of(owner, of, self._product)
        return self._product

    def gates(self, owner: Gating) -> tuple[list[Tensor], list[Tensor]]:
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

    def drop(self) -> None:
        """Forget everything."""
        self._product = self._gates = None

    @staticmethod
    def _key_of(owner: Gating, of: tuple[Tensor, ...], product: Tensor) -> tuple[Any, ...]:
        tensors = ((t._version, t.data_ptr(), t.dtype, t.device) for t in of)
        settings = ((gate.temperature, gate.estimator, gate.rule and gate.rule.refresh()) for gate in owner.gates)
        return *tensors, *settings, product._version, steps_taken()  # the caller was handed this very product


class _Folded(torch.autograd.Function):
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


class Site(NamedTuple):
    """One gated weight: where it is, what it is, and the parametrization that gates it."""

    name: str
    module: nn.Module
    tensor_name: str
    weight: Tensor
    gating: Gating

    @property
    def module_name(self) -> str:
        """Qualified name of the module that owns the weight."""
        return self.name.rpartition(".")[0]


def parametrization_lists(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrized tensors of ``module`` itself, by name."""
    lists = module._modules.get("parametrizations") if parametrize.is_parametrized(module) else None
    if not isinstance(lists, nn.ModuleDict):
        return {}
    return {name: plist for name, plist in lists.items() if isinstance(plist, parametrize.ParametrizationList)}


def iter_sites(model: nn.Module) -> Iterator[Site]:
    """Every gated weight below ``model``; a weight shared by several modules comes once for each."""
    for name, module in model.named_modules():
        for tensor_name, chain in parametrization_lists(module).items():
            gating = chain[0]
            if isinstance(gating, Gating) and isinstance(chain.original, Tensor):
                full = f"{name}.{tensor_name}" if name else tensor_name
                yield Site(full, module, tensor_name, chain.original, gating)


def own_class(module: nn.Module, *, without: str = "") -> None:
    """Give a parametrized module a class of its own: its deepcopies share the one that holds the properties."""
    shared: type[nn.Module] = type(module)
    namespace = {k: v for k, v in vars(shared).items() if k not in (without, "__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, namespace)


def accept_dense(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Let a dense checkpoint load into a gated layer: the weight goes beneath the gates, which stay as they are."""
    for tensor_name, chain in parametrization_lists(module).items():
        inner = f"{prefix}parametrizations.{tensor_name}."
        gating = chain[0]
        if prefix + tensor_name in state_dict and isinstance(gating, Gating):
            state_dict[inner + "original"] = state_dict.pop(prefix + tensor_name)
            for key, value in gating.state_dict(prefix=inner + "0.").items():
                state_dict.setdefault(key, value)


@torch.no_grad()
def remove_gates(site: Site, *, folded: bool) -> None:
    """Make a gated layer plain again, its weight multiplied with the test-time gates unless it is ``folded`` already.

    The parameter stays the same object at its old place, so that ties, flags and optimisers survive.
    """
    module, tensor_name, weight = site.module, site.tensor_name, site.weight
    if not folded:
        weight.copy_(site.gating.fold(weight))
    plain: type[nn.Module] = type(module).__bases__[0]
    del module.parametrizations[tensor_name]  # type: ignore[operator, union-attr]  # torch types it as Module
    if parametrization_lists(module):
        own_class(module, without=tensor_name)
    else:
        module.__class__ = plain
        del module._modules["parametrizations"]
    module.register_parameter(tensor_name, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight))
    own = module._parameters
    module._parameters = {k: own[k] for k in (*site.gating.order, *own) if k in own}
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    for key in [k for k, hook in hooks.items() if hook.hook is accept_dense]:
        del hooks[key]
