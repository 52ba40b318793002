"""The parametrizations that multiply an existing weight with gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l0hooks._torch.autograd import is_traced
from l0hooks._torch.modules import (
    Tie,
    parameters_of,
    parametrized_tensors,
)
from l0hooks._torch.tensors import is_meta
from l0hooks.attach.folded_weight import Folded, Kept
from l0hooks.gates.gate import Gate
from l0hooks.gates.median_weight import median_weight
from l0hooks.gates.sampling import gated_weight, held_weight
from l0hooks.structure.layers import GateLayout, Granularity


class Gating(nn.Module):
    """A parametrization weight ↦ weight · factor, the factor made of gates; a kept product in evaluation.

    Attributes
    ----------
    granularity : str or (int, int)
        The name of the shape of the gates.
    positions : float or None
        How often each weight is used for one of the example inputs: multiply-adds per weight.
    order : tuple of str
        The layer's parameters as they stood before, for pruning.
    gates : tuple of Gate
        The gates that the factor is made of.
    kept : Kept
        The product in evaluation.
    tie : Tie or None
        The tie with the other layers that have the same weight.
    """

    def __init__(self, granularity: Granularity, positions: float | None, gates: tuple[Gate, ...]) -> None:
        super().__init__()
        self.gates = gates  # also children under their own names; a tuple is faster to read
        self.granularity = granularity
        self.positions = positions
        self.order: tuple[str, ...] = ()
        self.kept = Kept()
        self.tie: Tie | None = None

    def factor(self, values: Sequence[Tensor], rest: float = 1.0) -> Tensor:
        """One array of values for each of ``gates``, laid over the weight; ``rest`` where it has no gate."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The gated weight, dtype and shape of ``weight``."""
        if self.training:
            return self.sampled(weight)
        tensors = (weight, *(gate.log_alpha for gate in self.gates))
        if is_traced() or any(t.is_inference() for t in tensors) or _in_processes():  # no versions to compare
            return self.fold(weight)
        kept = self.kept.product(self, tensors)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            values, slopes = self.kept.gates(self)
            folded: Tensor = Folded.apply(self.factor, kept, *tensors, *values, *slopes)  # type: ignore[no-untyped-call]
            return folded
        return kept

    def read(self, weight: Tensor) -> Tensor | None:
        """The gated weight, if a sample or the kept product is enough; else None."""
        if self.training:
            return self.sampled(weight)
        if torch.is_grad_enabled():
            return None
        if self.kept.held is not None:
            return self.kept.held
        locations: Any = [parameters_of(gate)["log_alpha"] for gate in self.gates]  # attributes of modules take longer
        return self.kept.known(self, (weight, *locations))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning a tensor (torch refuses a Parameter here) to the layer's weight puts it under the gates."""
        return weight

    def fold(self, weight: Tensor) -> Tensor:
        """The weight times the test-time gates, differentiable; +0.0 wherever a gate is closed."""
        factor = self.factor([gate.value() for gate in self.gates]).to(weight.dtype)
        return torch.where(factor == 0, 0.0, weight * factor)

    def fold_into(self, weight: Tensor, out: Tensor) -> Tensor:
        """:meth:`fold` without a gradient, into ``out``, which may be ``weight`` itself."""
        return out.copy_(self.fold(weight))

    def train(self, mode: bool = True) -> Gating:
        """Switch modes; the kept product does not outlive the switch."""
        self.kept.drop()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gating:
        self.kept.drop()  # a move to another dtype and back may put other values at the same address
        if self.tie is not None:  # torch moves the weight next, perhaps to the one that another layer has already
            self.tie.meet(self, fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def settle(self, chain: parametrize.ParametrizationList) -> None:
        """After a checkpoint was loaded: what still has no data gets it where the weight, ``chain``'s, has its own."""
        if self.tie is not None:
            self.tie.rejoin(chain)
        weight = chain.original
        if isinstance(weight, Tensor) and not is_meta(weight):
            self._materialise(weight.device)

    def _materialise(self, device: torch.device) -> None:
        for gate in self.gates:
            gate.materialise(device)

    def sampled(self, weight: Tensor) -> Tensor:
        """The weight times the gates of the running forward."""
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
        super().__init__(granularity, positions, (gate,))
        self.gate = gate
        self.layout = layout

    def factor(self, values: Sequence[Tensor], rest: float = 1.0) -> Tensor:
        return self.layout.spread(values[0])

    def fold_into(self, weight: Tensor, out: Tensor) -> Tensor:
        if self.layout.pattern is None:
            return self.gate.multiply(weight, out)
        return super().fold_into(weight, out)

    def sampled(self, weight: Tensor) -> Tensor:
        gate = self.gate
        if self.layout.pattern is not None or is_traced():
            return super().sampled(weight)
        if gate.rule is not None and gate.rule.finished:
            return held_weight(weight, gate.log_alpha, gate.final())
        if gate.noiseless is not None:
            gated = median_weight(weight, gate.log_alpha, gate.noiseless)
        elif gate.constants is not None:
            gated = gated_weight(weight, gate.log_alpha, gate.noise_source.seed(), gate.constants)
        else:
            return super().sampled(weight)
        gate.last_sample.note(gated)
        return gated


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


def iter_sites(model: nn.Module) -> Iterator[Site]:
    """Every gated weight below ``model``; a weight shared by several modules comes once for each."""
    return sites_among(model.named_modules())


def sites_among(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Site]:
    """The gated weights that modules own themselves."""
    for name, module, tensor_name, chain in parametrized_tensors(modules):
        gating, weight = chain[0], parameters_of(chain).get("original")
        if isinstance(gating, Gating) and weight is not None:
            full = f"{name}.{tensor_name}" if name else tensor_name
            yield Site(full, module, tensor_name, weight, gating)
