"""Every gate of a model with the weights it multiplies, for penalties, budgets and reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from l0hooks._torch.tensors import same_tensor
from l0hooks.attach.coupled_weight import CoupledWeight
from l0hooks.attach.gated_weight import Site, sites_among
from l0hooks.errors import StateError, explain
from l0hooks.gates.gate import Gate
from l0hooks.gates.shared_sampling import keep_probs
from l0hooks.structure import ChannelGroup
from l0hooks.structure.group_costs import CoupledPlan


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

    def expected(
        self, unit: Literal["params", "macs", "memory"], each: Mapping[str, int] | None = None
    ) -> Tensor | float:
        """The expected cost of the whole plan, returned for its first group; for memory, ``each`` has bytes by name."""
        return 0.0 if self.number else self.plan.expected(keep_probs(self.gates), self.otherwise, unit, each)


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
    """Every gate below ``model`` once, with the weights it multiplies.

    Parameters
    ----------
    model : nn.Module

    Yields
    ------
    Gated

    Raises
    ------
    StateError
        If ``model`` is a part of a model with coupled gates, which run through the whole of it.

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    >>> _ = sparsify(model, {"0": "output", "1": "weight"})
    >>> [gated.name for gated in iter_gated(model)]
    ['0', '1']
    """
    modules = dict(model.named_modules())  # one walk: a penalty's gates cost less than finding them
    by_gate: dict[int, list[Site]] = {}
    for site in sites_among(modules.items()):
        for gate in site.gating.gates:
            by_gate.setdefault(id(gate), []).append(site)
    groups = _coupled(by_gate)
    of_gate = {key: coupled.plan.groups[coupled.number] for key, coupled in groups.items()}
    places = {key: (group.name, group.first.module, group.first.names[0]) for key, group in of_gate.items()}
    for name, gate in modules.items():
        if isinstance(gate, Gate):
            sites = tuple(by_gate.get(id(gate), ()))
            coupled = groups.get(id(gate))
            if coupled is not None:
                group_name, owner, tensor = places[id(gate)]
                module = _module(model, modules, coupled.prefix + owner, tensor)
                yield Gated(coupled.prefix + group_name, module, gate, sites, coupled)
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
                raise _not_whole(gating.name, sites[0].name)
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


def _module(model: nn.Module, modules: Mapping[str, nn.Module], name: str, tensor: str) -> nn.Module:
    """The module called ``name``, which owns ``tensor`` of a coupled group."""
    name = name.rstrip(".")
    try:
        return modules[name] if name in modules else model.get_submodule(name)  # a second name of a module
    except AttributeError as error:
        raise _not_whole(tensor) from error


def _not_whole(name: str, place: str | None = None) -> StateError:
    """The error for a group that is not where it was gated; its weight is at ``place``."""
    got, hint = "a part of it", None
    if place is not None:
        got += f", or a layer that was wrapped: the weight is at {place!r}"
        hint = "take adapters out (peft: unload), prune, and add them to the pruned model"
    return StateError(
        explain(
            f"coupled gates at {name!r}",
            "groups run through the whole model.",
            expected="the model that was sparsified, or one that contains it",
            got=got,
            hint=hint,
        )
    )
