"""The penalty registry: what a model's gates cost, as one differentiable number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from l0hooks.coupled import CoupledPlan, CoupledWeight
from l0hooks.errors import SpecError, StateError, explain, near_names
from l0hooks.gate import Gate, iter_gates, whole
from l0hooks.placement import same_tensor
from l0hooks.spec import Pattern, matches, no_match
from l0hooks.structure import ChannelGroup
from l0hooks.weights import Site, iter_sites

Strength = float | Tensor | tuple[float, float]
F = TypeVar("F", bound=Callable[..., Tensor])
_registry: dict[str, tuple[Callable[..., Tensor], int]] = {}


@dataclass(frozen=True)
class Coupled:
    """A coupled group: its plan, its number there, and the gates of all groups of the plan.

    ``prefix`` is what a wrapper puts before the names in the plan; ``otherwise`` names the plan's weights that have
    gates of their own, which count by these.
    """

    plan: CoupledPlan
    number: int
    gates: tuple[Gate, ...]
    prefix: str = ""
    otherwise: frozenset[str] = frozenset()

    @property
    def group(self) -> ChannelGroup:
        """The group itself."""
        return self.plan.groups[self.number]

    def expected(self, count: Callable[..., Any]) -> Tensor | float:
        """The expected cost of the whole plan, told by its first group."""
        if self.number:
            return 0.0
        keep = [gate.keep_prob() for gate in self.gates]
        mean, variance = [p.sum() for p in keep], [(p * (1 - p)).sum() for p in keep]
        cost: Tensor | float = count(mean.__getitem__, self.otherwise, variance=variance.__getitem__)
        return cost


@dataclass(frozen=True)
class Gated:
    """One gate and the weights it multiplies; a standalone gate has none.

    Attributes
    ----------
    name : str
        Qualified name of the module whose weight is gated, or of the standalone gate.
    module : nn.Module
        That module.
    gate : Gate
    sites : tuple of Site
        Several if the weight is tied, or if the gate is a coupled group's.
    coupled : Coupled or None
        The group that the gate belongs to.

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> _ = sparsify(model, "output")
    >>> (gated,) = iter_gated(model)
    >>> gated.name, gated.gate.log_alpha.shape, [site.weight.shape for site in gated.weights()]
    ('0', torch.Size([4]), [torch.Size([4, 8])])
    """

    name: str
    module: nn.Module
    gate: Gate
    sites: tuple[Site, ...] = ()
    coupled: Coupled | None = None

    def weights(self) -> Iterator[Site]:
        """The sites with different weights: tied ones once."""
        yield from {same_tensor(site.weight): site for site in self.sites}.values()


def iter_gated(model: nn.Module) -> Iterator[Gated]:
    """Every gate below ``model`` once, with the weights it multiplies."""
    by_gate: dict[int, list[Site]] = {}
    for site in iter_sites(model):
        for gate in site.gating.gates:
            by_gate.setdefault(id(gate), []).append(site)
    groups = _coupled(by_gate)
    for name, gate in iter_gates(model):
        sites = tuple(by_gate.get(id(gate), ()))
        coupled = groups.get(id(gate))
        if coupled is not None:
            yield Gated(coupled.prefix + coupled.group.name, _written_by(model, coupled), gate, sites, coupled)
        elif sites:
            yield Gated(sites[0].module_name, sites[0].module, gate, sites)
        else:
            yield Gated(name, gate, gate)


def _coupled(by_gate: Mapping[int, list[Site]]) -> dict[int, Coupled]:
    """The group of every coupled gate, by the gate's id."""
    members: dict[int, tuple[CoupledPlan, str, dict[int, Gate]]] = {}
    for sites in by_gate.values():
        gating = sites[0].gating
        if isinstance(gating, CoupledWeight):
            prefix = sites[0].name.removesuffix(gating.name)
            _, _, gates = members.setdefault(id(gating.plan), (gating.plan, prefix, {}))
            gates.update(zip(gating.numbers, gating.gates, strict=True))
            if not sites[0].name.endswith(gating.name):
                raise _not_whole(gating.name)
    own = {s.name for sites in by_gate.values() for s in sites if not isinstance(s.gating, CoupledWeight)}
    found = {}
    for plan, prefix, gates in members.values():
        otherwise = frozenset(name.removeprefix(prefix) for name in own)
        if len(gates) < len(plan.groups):
            raise _not_whole(next(group.name for n, group in enumerate(plan.groups) if n not in gates))
        ordered = tuple(gates[number] for number in range(len(plan.groups)))
        for number, gate in enumerate(ordered):
            found[id(gate)] = Coupled(plan, number, ordered, prefix, otherwise)
    return found


def _written_by(model: nn.Module, coupled: Coupled) -> nn.Module:
    first = (*coupled.group.writers, *coupled.group.sites)[0]
    try:
        return model.get_submodule((coupled.prefix + first.module).rstrip("."))
    except AttributeError as error:
        raise _not_whole(first.names[0]) from error


def _not_whole(name: str) -> StateError:
    return StateError(
        explain(
            f"coupled gates at {name!r}",
            "groups run through the whole model.",
            expected="the model that was sparsified, or one that contains it",
            got="a part of it",
        )
    )


def register_penalty(name: str, *, strengths: int = 1) -> Callable[[F], F]:
    """Make a function of one :class:`Gated` available as ``penalty(model, name=…)``.

    Parameters
    ----------
    name : str
        A new name.
    strengths : int
        1: the function takes the ``Gated`` and its value is multiplied by the strength. More: the strengths are
        given as a tuple and handed to the function, which uses them itself.

    Returns
    -------
    decorator

    Raises
    ------
    SpecError
        If the name is taken.

    Examples
    --------
    >>> @register_penalty("variance_of_keep_prob")
    ... def variance_of_keep_prob(gated):
    ...     return gated.gate.keep_prob().var()
    >>> penalty(Gate(4), variance_of_keep_prob=1.0).item()
    0.0
    """
    if name in _registry:
        raise SpecError(
            explain("register_penalty", "a penalty's name must be new.", got=repr(name), hint="another name")
        )

    def add(function: F) -> F:
        _registry[name] = (function, strengths)
        return function

    return add


def penalty(model: nn.Module, **strengths: Strength | Mapping[Pattern, Strength]) -> Tensor:
    r"""The sum over every gate below ``model`` of the penalties asked for, times their strengths.

    ======================  ==================================================================
    ``l0=λ``                λ Σ keep_prob over the gates
    ``l2=λ``                λ Σ w² over the gated weights
    ``expected_l2=λ``       λ Σ keep_prob·w² over the gated weights
    ``l0l2=(λ0, λ2)``       Σ keep_prob·(λ0 + λ2/2·w²) over the gated weights (the paper's)
    ``params=λ``            λ times the expected number of gated weights that stay
    ``macs=λ``              λ times their expected multiply-adds on the example inputs
    ``budget=1.0``          the price of every ``Budget(method="lagrangian")``
    ======================  ==================================================================

    Parameters
    ----------
    model : nn.Module
        Its gates may sit in parametrizations, stand alone, or belong to a fitter.
    **strengths : float, Tensor, tuple, or mapping from pattern to one of these
        With a mapping, the first pattern that matches a gated module counts; unmatched ones cost nothing.

    Returns
    -------
    Tensor, float32, shape (), on the gates' device

    Raises
    ------
    StateError
        If there is no gate below ``model``, or ``macs`` is asked for and no example inputs were ever given.
    SpecError
        If a penalty is unknown, none is given, or a pattern matches no gate.

    Examples
    --------
    >>> gates = nn.ModuleDict({"a": Gate(2, init_keep_prob=0.5), "b": Gate(4, init_keep_prob=0.25)})
    >>> round(penalty(gates, l0=1.0).item(), 6)
    2.0
    >>> round(penalty(gates, l0={"a": 10.0, "b": 1.0}).item(), 6)
    11.0

    References
    ----------
    Louizos, Welling & Kingma (2018), equations 2 and 9, and appendix A for the L0L2 objective.
    """
    for name in strengths:
        if name not in _registry:
            raise SpecError(
                explain("penalty", "the penalty must be registered.", got=repr(name), hint=near_names(name, _registry))
            )
    if not strengths:
        raise SpecError(explain("penalty", "at least one strength must be given.", hint="penalty(model, l0=1e-3)"))
    gated = list(iter_gated(model))
    if not gated:
        raise StateError(
            explain("penalty", "the model must hold gates.", got="none", hint="sparsify(model, ...) first")
        )
    total = torch.zeros((), device=gated[0].gate.log_alpha.device)
    for name, strength in strengths.items():
        for one, value in _strengths(name, strength, gated):
            total = total + _term(name, value, one).to(total.device)
    return total


def _strengths(
    name: str, strength: Strength | Mapping[Pattern, Strength], gated: list[Gated]
) -> Iterator[tuple[Gated, Strength]]:
    """Each gate with the strength that applies to it."""
    if not isinstance(strength, Mapping):
        yield from ((one, strength) for one in gated)
        return
    for pattern in strength:
        if not any(matches(pattern, one.name, one.module) for one in gated):
            raise SpecError(no_match(f"penalty {name}", pattern, [one.name for one in gated]))
    for one in gated:
        for pattern, value in strength.items():
            if matches(pattern, one.name, one.module):
                yield one, value
                break


def _term(name: str, strength: Strength, gated: Gated) -> Tensor:
    function, count = _registry[name]
    given = len(strength) if isinstance(strength, tuple) else 1
    if given != count:
        raise SpecError(
            explain(
                f"penalty {name}", "the number of strengths must fit.", expected=f"{count} strength(s)", got=strength
            )
        )
    return function(gated, *strength) if isinstance(strength, tuple) else strength * function(gated)


@register_penalty("l0")
def _l0(gated: Gated) -> Tensor:
    return gated.gate.expected_l0()


@register_penalty("l2")
def _l2(gated: Gated) -> Tensor:
    return _squares(gated, torch.ones_like(whole(gated.gate.log_alpha)))


@register_penalty("expected_l2")
def _expected_l2(gated: Gated) -> Tensor:
    return _squares(gated, gated.gate.keep_prob())


def _squares(gated: Gated, values: Tensor) -> Tensor:
    """Σ value·w² over the weights behind a gate, one value for each of its gates."""
    total = torch.zeros((), device=values.device)
    for site in gated.weights():
        gates = site.gating.gates
        mine = [values if gate is gated.gate else torch.zeros_like(whole(gate.log_alpha)) for gate in gates]
        total = total + (site.gating.factor(mine, 0.0) * whole(site.weight).float().square()).sum()
    return total


@register_penalty("l0l2", strengths=2)
def _l0l2(gated: Gated, l0: float, l2: float) -> Tensor:
    return l0 * _params(gated) + l2 / 2 * _expected_l2(gated)


def _zero(gate: Gate) -> Tensor:
    return torch.zeros((), device=gate.log_alpha.device)


@register_penalty("params")
def _params(gated: Gated) -> Tensor:
    if gated.coupled is not None:
        return _zero(gated.gate) + gated.coupled.expected(gated.coupled.plan.parameters)
    per_gate = sum(site.weight.numel() for site in gated.weights()) / gated.gate.log_alpha.numel()
    return per_gate * gated.gate.expected_l0()


@register_penalty("macs")
def _macs(gated: Gated) -> Tensor:
    if gated.coupled is not None:
        return _zero(gated.gate) + gated.coupled.expected(gated.coupled.plan.macs)
    macs = 0.0
    for site in gated.sites:  # a tied weight works at each of its sites
        if site.gating.positions is None:
            raise StateError(
                explain(
                    f"penalty macs of {site.name!r}",
                    "multiply-adds are known only for example inputs.",
                    hint="sparsify(model, spec, example_inputs=(x,))",
                )
            )
        macs += site.gating.positions * site.weight.numel()
    return macs / gated.gate.log_alpha.numel() * gated.gate.expected_l0()


@register_penalty("budget")
def _budget(gated: Gated) -> Tensor:
    gate = gated.gate
    if gate.rule is None or gate.multipliers is None:  # told once, by the gate that holds them
        return gate.log_alpha.new_zeros(())
    return gate.rule.penalty()
