"""``GatedWeight``: the parametrization that multiplies an existing weight with gates."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l0hooks.families import HardConcreteFamily
from l0hooks.fused import gated_weight
from l0hooks.gate import Gate, steps_taken
from l0hooks.layers import GateLayout, Granularity


class GatedWeight(nn.Module):
    """weight ↦ weight · spread(gates), with fresh gates in training and a kept product in evaluation.

    Parameters
    ----------
    gate : Gate
    layout : GateLayout
        How the gates lie over the weight.
    granularity : str or (int, int)
        The name the layout goes by.
    positions : float, optional
        How often each weight is used in one pass over the example inputs: multiply-adds per weight.
    """

    def __init__(
        self, gate: Gate, layout: GateLayout, granularity: Granularity, positions: float | None = None
    ) -> None:
        super().__init__()
        self.gate = gate
        self.layout = layout
        self.granularity = granularity
        self.positions = positions
        self.order: tuple[str, ...] = ()  # the layer's parameters as they stood before, for pruning
        self._kept = _Kept()

    def forward(self, weight: Tensor) -> Tensor:
        """The gated weight, dtype and shape of ``weight``."""
        if self.training:
            return self._sampled(weight)
        if _is_traced() or weight.is_inference() or self.gate.log_alpha.is_inference():  # no versions to compare
            return self.fold(weight)
        kept = self._kept.product(self, weight)
        if torch.is_grad_enabled() and (weight.requires_grad or self.gate.log_alpha.requires_grad):
            gates, slopes = self._kept.gates(self.gate)
            folded: Tensor = _Folded.apply(  # type: ignore[no-untyped-call]
                weight, self.gate.log_alpha, kept, gates, slopes, self.layout
            )
            return folded
        return kept

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning a tensor (torch takes no Parameter here) to the layer's weight replaces it beneath the gates."""
        return weight

    def spread(self, gates: Tensor, weight: Tensor) -> Tensor:
        """Gates of the gate's shape as a tensor that broadcasts with ``weight``, in its dtype."""
        return self.layout.spread(gates).to(weight.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        """The weight times the test-time gates, differentiable; +0.0 wherever a gate is closed."""
        gates = self.spread(self.gate.value(), weight)
        return torch.where(gates == 0, 0.0, weight * gates)

    def train(self, mode: bool = True) -> GatedWeight:
        """Switch modes; the kept product does not outlive the switch."""
        self._kept.drop()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedWeight:
        self._kept.drop()  # a move to another dtype and back may put other values at the same address
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _sampled(self, weight: Tensor) -> Tensor:
        gate, family = self.gate, self.gate.family
        if self.layout.pattern is None and type(family) is HardConcreteFamily and not _is_traced():
            return gated_weight(weight, gate.log_alpha, gate.noise(), gate.temperature, family.gamma, family.zeta)
        return weight * self.spread(gate.sample(), weight)


def _is_traced() -> bool:
    """Whether the plain formulas must run: in a graph being built, or under a torch.func transform."""
    building = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return building or torch._C._functorch.maybe_current_level() is not None


class _Kept:
    """The folded weight, kept while neither weight, gates nor temperature have changed."""

    def __init__(self) -> None:
        self._product: Tensor | None = None
        self._gates: tuple[Tensor, Tensor] | None = None
        self._of: tuple[weakref.ref[Tensor], ...] = ()
        self._key: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, object]) -> _Kept:
        return _Kept()

    def product(self, owner: GatedWeight, weight: Tensor) -> Tensor:
        of = weight, owner.gate.log_alpha
        if (
            self._product is None
            or any(kept() is not now for kept, now in zip(self._of, of, strict=True))
            or self._key != self._key_of(owner, weight, self._product)
        ):
            with torch.inference_mode(False), torch.no_grad():
                self._product = owner.fold(weight)
            self._gates = None
            self._of = tuple(map(weakref.ref, of))
            self._key = self._key_of(owner, weight, self._product)
        return self._product

    def gates(self, gate: Gate) -> tuple[Tensor, Tensor]:
        """The test-time gates of the product asked for last, and their slopes dz/dlogα."""
        if self._gates is None:
            with torch.inference_mode(False), torch.enable_grad():
                location = gate.log_alpha.detach().requires_grad_()
                gates = gate.value(location) + 0 * location  # binary gates have no slope of their own
                (slopes,) = torch.autograd.grad(gates.sum(), location)
            self._gates = gates.detach(), slopes
        return self._gates

    def drop(self) -> None:
        self._product = self._gates = None

    @staticmethod
    def _key_of(owner: GatedWeight, weight: Tensor, product: Tensor) -> tuple[Any, ...]:
        gate = owner.gate
        log_alpha = gate.log_alpha
        return (
            *(weight._version, weight.data_ptr(), weight.dtype, weight.device),
            *(log_alpha._version, log_alpha.data_ptr(), gate.temperature, gate.estimator),
            product._version,  # the caller was handed this very tensor
            steps_taken(),
        )


class _Folded(torch.autograd.Function):
    """The kept product going forward; the gradient of the product it was computed from going back."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log_alpha: Tensor, kept: Tensor, gates: Tensor, slopes: Tensor, layout: GateLayout
    ) -> Tensor:
        ctx.save_for_backward(weight, gates, slopes)
        ctx.layout = layout
        return kept.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gates, slopes = ctx.saved_tensors
        layout: GateLayout = ctx.layout
        grad_weight = grad * layout.spread(gates).to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                leaf = gates.detach().requires_grad_()
                spread = layout.spread(leaf)
            (summed,) = torch.autograd.grad(spread, leaf, (grad * weight).to(gates.dtype).sum_to_size(spread.shape))
            grad_alpha = summed * slopes
        return grad_weight, grad_alpha, None, None, None, None


class Site(NamedTuple):
    """One gated weight: where it is, what it is, and the parametrization that gates it."""

    name: str
    module: nn.Module
    tensor_name: str
    weight: Tensor
    gating: GatedWeight

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
            if isinstance(gating, GatedWeight) and isinstance(chain.original, Tensor):
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
        if prefix + tensor_name in state_dict and isinstance(gating, GatedWeight):
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
