"""The layers of a gated model that can be recovered, and least squares for each of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l0hooks._torch.modules import parameters_of
from l0hooks._torch.tensors import same_tensor
from l0hooks.attach.gated_weight import GatedWeight, Site
from l0hooks.attach.walk import Gated
from l0hooks.gates.gate import Gate
from l0hooks.structure.layers import CONVOLUTIONS
from l0hooks.training.exchange import exchange
from l0hooks.training.layer_inputs import as_matrix, as_weight, has_rows
from l0hooks.training.layer_runs import Folds
from l0hooks.training.normal_equations import NormalEquations

SHARES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge, to choose from
_ROUGHLY = 1e-3  # what conjugate gradients may leave where errors are only compared


@dataclass(frozen=True)
class Layer:
    """A Linear or Conv layer: its weight beneath the gates, and where these are, if it has any."""

    name: str
    module: nn.Module
    weight: Tensor
    site: Site | None = None

    @torch.no_grad()
    def gates(self) -> Tensor:
        """The test-time gates laid over the weight: float32, of its shape."""
        if self.site is None:
            return torch.ones_like(self.weight, dtype=torch.float32)
        gating = self.site.gating
        return gating.factor([gate.value() for gate in gating.gates]).expand(self.weight.shape)

    @property
    def inputs(self) -> int:
        """The most open inputs of any output."""
        return int((as_matrix(self.module, self.gates()) != 0).sum(-1).max())

    @property
    def reads_closed(self) -> bool:
        """Whether some gate is closed."""
        return self.site is not None and bool((self.gates() == 0).any())


def layers_of(model: nn.Module, every: Sequence[Gated]) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that least squares can be solved for, by their names; weights with closed gates that are left out."""
    sites = {site.name: site for one in every for site in one.sites}
    own = (p for module in model.modules() for p in parameters_of(module).values() if p is not None)
    uses = Counter(map(same_tensor, own))
    found: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    for site in sites.values():
        layer = Layer(site.module_name, site.module, site.weight, site)
        if has_rows(site.module) and uses[same_tensor(site.weight)] == 1:
            found[layer.name] = layer
        elif layer.reads_closed:
            kind = type(site.module).__name__.removeprefix("Parametrized")
            skipped[site.name] = "tied" if has_rows(site.module) else f"a weight of {kind}"
    gated = {site.module_name for site in sites.values()}
    for name, module in model.named_modules():
        weight = parameters_of(module).get("weight")
        if name not in gated and has_rows(module) and weight is not None and uses[same_tensor(weight)] == 1:
            found[name] = Layer(name, module, weight)
    return found, skipped


@torch.no_grad()
def exchange_members(layer: Layer, gate: Gate, members: Tensor, equations: NormalEquations, ridge: Tensor) -> int:
    """Let the open and closed members of ``gate`` that explain the layer's outputs better change places.

    Only their ``log_alpha`` are exchanged. Returns how many members were opened.
    """
    gates = as_matrix(layer.module, layer.gates())[0]
    weight = as_matrix(layer.module, layer.weight)[0].double()
    gram, cross, penalty = equations.gram[0], equations.cross[0].clone(), ridge[0]
    features = weight.shape[1]
    cross[:, :features] += weight * penalty[:features]
    stays = gate.support().flatten()
    mine = torch.zeros(gram.shape[0], dtype=torch.bool, device=gram.device)
    mine[members.flatten()] = True
    fixed = torch.ones_like(mine)
    fixed[:features] = (gates != 0).any(0)
    always = (fixed & ~mine).nonzero().flatten()
    better = exchange(gram + penalty.diag(), cross, stays, members, always)
    opened, closed = (better & ~stays).nonzero().flatten(), (stays & ~better).nonzero().flatten()
    location = gate.log_alpha.detach().flatten()
    values = location.clone()
    location[opened], location[closed] = values[closed], values[opened]
    gate.log_alpha.copy_(location.view_as(gate.log_alpha))
    return len(opened)


def exchangeable(layer: Layer, every: Mapping[int, Gated]) -> list[tuple[Gate, Tensor]]:
    """The gates on whole input channels that multiply this weight alone, and the features of their members."""
    site, module, found = layer.site, layer.module, []
    kernel = math.prod(layer.weight.shape[2:])
    if site is None or (isinstance(module, CONVOLUTIONS) and module.groups > 1):
        return []
    for gate in site.gating.gates:
        one = every[id(gate)]
        if len({same_tensor(other.weight) for other in one.sites}) != 1:
            continue
        if one.coupled is not None:
            (reader,) = {id(r): r for r in one.coupled.group.readers}.values()
            channels = torch.from_numpy(reader.indices)
        elif isinstance(site.gating, GatedWeight) and site.gating.granularity == "input":
            channels = torch.arange(gate.log_alpha.numel())[:, None]
        else:
            continue
        channels = channels.to(gate.log_alpha.device)
        members = channels[:, :, None] * kernel + torch.arange(kernel, device=channels.device)
        found.append((gate, members.flatten(1)))
    return found


@dataclass(frozen=True)
class Problem:
    """Weights of a layer as matrices of shape (groups, outputs, features), the bias as their last column."""

    before: Tensor
    prior: Tensor
    stays: Tensor
    gates: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, layer: Layer, *, constant: bool) -> Problem:
        """The layer as it is now."""
        bias = layer.module.get_parameter("bias") if constant else None
        gates = as_matrix(layer.module, layer.gates()).double()
        weight = as_matrix(layer.module, layer.weight).double()
        always = None if bias is None else torch.ones_like(bias, dtype=torch.bool)
        return cls(
            before=_with_bias(weight * gates, bias),
            prior=_with_bias(torch.where(gates != 0, weight, 0.0), bias),
            stays=_with_bias(gates != 0, always),
            gates=gates,
        )

    def validated(self, folds: Folds, shares: Sequence[float]) -> tuple[float, float | None]:
        """The least error on the fold that weights were not fitted to, and the share of the ridge that gives it.

        None: to leave the weights as they are.
        """
        found: list[tuple[float, float | None]] = [(sum(fold.error(self.before) for fold in folds), None)]
        for share in shares:
            fits = [fold.fitted(self.prior, self.stays, share, accuracy=_ROUGHLY) for fold in folds]
            found.append((folds[1].error(fits[0]) + folds[0].error(fits[1]), share))
        return min(found, key=lambda one: one[0])


@torch.no_grad()
def recover_layer(
    layer: Layer, folds: Folds, shares: Sequence[float], groups: Sequence[tuple[Gate, Tensor]]
) -> tuple[float, float, int]:
    """Exchange members of ``groups``, and give a layer the weights that reproduce its outputs best, **in place**.

    Everything is judged by errors on the fold that weights were not fitted to, and left as it is where that is better.

    Returns
    -------
    (float, float, int)
        The errors before and after as shares of Σ |y|², and how many members were exchanged.
    """
    equations, constant = folds[0] + folds[1], folds[0].constant
    problem = Problem.of(layer, constant=constant)
    error, share = problem.validated(folds, shares)
    before = sum(fold.error(problem.before) for fold in folds)
    exchanged = 0
    for gate, members in groups:
        if share is None:
            break
        start = gate.log_alpha.detach().clone()
        count = exchange_members(layer, gate, members, equations, equations.ridge(share))
        other = Problem.of(layer, constant=constant)
        lower, chosen = other.validated(folds, shares) if count else (error, share)
        if lower < error and chosen is not None:
            problem, error, share, exchanged = other, lower, chosen, exchanged + count
        else:
            gate.log_alpha.copy_(start)
    if share is not None:
        _write(layer, problem, equations.fitted(problem.prior, problem.stays, share))
    scale = equations.total or 1.0
    return before / scale, error / scale, exchanged


def _write(layer: Layer, problem: Problem, found: Tensor) -> None:
    """Put solved weights under the gates."""
    gates, features = problem.gates, problem.gates.shape[-1]
    weight = as_matrix(layer.module, layer.weight).double()
    opened = torch.where(gates != 0, found[..., :features] / gates.clamp(min=1e-12), weight)
    layer.weight.copy_(as_weight(layer.module, opened, layer.weight.shape))
    if found.shape[-1] > features:
        layer.module.get_parameter("bias").copy_(found[..., features].flatten())


def _with_bias(matrix: Tensor, bias: Tensor | None) -> Tensor:
    """A last column with the bias, shape (groups, outputs, features + 1)."""
    if bias is None:
        return matrix
    column = bias.detach().to(matrix.dtype).reshape(*matrix.shape[:2], 1)
    return torch.cat([matrix, column], dim=-1)
