"""What ``sparsify`` will gate, checked; nothing is changed here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l0hooks._torch.memory import pieces
from l0hooks._torch.modules import tensors_of
from l0hooks._torch.tensors import is_meta, overlap, same_tensor, storage_of
from l0hooks.attach.gated_weight import Gating
from l0hooks.attach.groups import choose_groups
from l0hooks.attach.spec import (
    GateSpec,
    Pattern,
    Shorthand,
    as_spec,
    first_matches,
    is_excluded,
    matches,
    named_modules,
)
from l0hooks.errors import SpecError, explain
from l0hooks.structure import ChannelGroup, GroupSite
from l0hooks.structure.layers import (
    GATEABLE,
    GateLayout,
    WeightLayout,
    gate_layout,
    gateable_weights,
    is_gateable,
)

Spec = GateSpec | Shorthand | Mapping[Pattern, GateSpec | Shorthand]
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class WeightPlan:
    """One weight that will be gated."""

    name: str
    module: nn.Module
    tensor_name: str
    weight: nn.Parameter
    spec: GateSpec
    layout: GateLayout


def plan_gates(
    model: nn.Module,
    spec: Spec,
    exclude: Pattern | Sequence[Pattern],
    example_inputs: Sequence[Any] | None,
    groups: Sequence[ChannelGroup] | None,
) -> tuple[list[WeightPlan], list[tuple[ChannelGroup, GateSpec]]]:
    """Everything that will be gated, checked; nothing is changed."""
    values = spec if isinstance(spec, Mapping) else {"all": spec}
    specs = {pattern: as_spec(value) for pattern, value in values.items()}
    if not specs:
        raise SpecError(explain("sparsify", "the specification must not be empty.", hint='sparsify(model, "weight")'))
    if not isinstance(spec, Mapping):
        _refuse_without_layers(model)
    assigned = first_matches(model, specs, where="sparsify", exclude=exclude)
    modules = dict(named_modules(model))
    _refuse_ungateable(specs, assigned, modules)
    plans: dict[tuple[int, str], WeightPlan] = {}
    for name, module_spec in assigned.items():
        if not is_gateable(modules[name]) or module_spec.granularity == "coupled":
            continue
        for owner, tensor_name, layout in gateable_weights(name, modules[name]):
            owner_name = name if owner is modules[name] else ".".join(filter(None, (name, "out_proj")))
            if (id(owner), tensor_name) not in plans and not is_excluded(model, owner_name, exclude):
                full = ".".join(filter(None, (owner_name, tensor_name)))
                plan = _plan_weight(full, owner, tensor_name, layout, assigned.get(owner_name, module_spec))
                plans[id(owner), tensor_name] = plan
    found = list(plans.values())
    _check_tied(model, found)
    if not any(spec.granularity == "coupled" for spec in assigned.values()):
        if groups is not None:
            raise SpecError(
                explain("sparsify", "groups are gated together.", got="no coupled granularity", hint='spec="coupled"')
            )
        return found, []
    chosen = choose_groups(model, assigned, exclude, example_inputs, groups)
    _check_readers(model, chosen, found)
    return found, chosen


def _check_readers(model: nn.Module, groups: list[tuple[ChannelGroup, GateSpec]], plans: list[WeightPlan]) -> None:
    """The weights that read coupled groups must be plain, finite, and not gated otherwise."""
    planned = {(id(plan.module), plan.tensor_name) for plan in plans}
    for group, _ in groups:
        for site in every_reader(group):
            module, name = model.get_submodule(site.module), site.names[0]
            _check_values(name, module.get_parameter(name.rpartition(".")[2]))
            if (id(module), name.rpartition(".")[2]) in planned:
                raise SpecError(
                    explain(
                        repr(name),
                        "a weight can be gated only once.",
                        got=f"other gates, and those of the group {group}",
                        hint="leave the group out, or the weight",
                    )
                )


def _refuse_without_layers(model: nn.Module) -> None:
    """A user who gave no pattern hears of layers, not of the pattern "all"."""
    layers = [(name, module) for name, module in named_modules(model) if is_gateable(module)]
    if any(matches("all", name, module) for name, module in layers):
        return
    raise SpecError(
        explain(
            "sparsify",
            f"the model must have layers that carry gates: {GATEABLE}.",
            got=f"embeddings alone, in {type(model).__name__}" if layers else f"none in {type(model).__name__}",
            hint='embeddings are gated where they are named: sparsify(model, {torch.nn.Embedding: "weight"})'
            if layers
            else "l0hooks.Gate(shape) multiplied with whatever the model computes",
        )
    )


def _refuse_ungateable(
    specs: Mapping[Pattern, GateSpec], assigned: Mapping[str, GateSpec], modules: Mapping[str, nn.Module]
) -> None:
    """A name spelt out must be gateable; a wider pattern must catch something that is."""
    for pattern in specs:
        caught = [name for name in modules if matches(pattern, name, modules[name])]
        exact = isinstance(pattern, str) and not _WILDCARD.search(pattern) and pattern in modules
        bad = [name for name in caught if not is_gateable(modules[name])]
        if bad and (exact or len(bad) == len(caught)):
            gateable_weights(bad[0], modules[bad[0]])
    if not any(is_gateable(modules[name]) for name in assigned):
        raise SpecError(explain("sparsify", "at least one weight must be left to gate.", got="none after exclude"))


def _plan_weight(name: str, module: nn.Module, tensor_name: str, layout: WeightLayout, spec: GateSpec) -> WeightPlan:
    """One weight's plan, after every check that needs nothing but the weight."""
    if parametrize.is_parametrized(module, tensor_name):
        gated = isinstance(module.parametrizations[tensor_name][0], Gating)  # type: ignore[index]
        raise SpecError(
            explain(
                repr(name),
                "a weight can be gated only once." if gated else "the weight must be a plain parameter.",
                got="a gated weight" if gated else "a weight with another parametrization",
                hint="exclude it, or prune the model first"
                if gated
                else "torch.nn.utils.parametrize.remove_parametrizations",
            )
        )
    weight = dict(tensors_of(module)).get(tensor_name)
    if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.parameter.UninitializedParameter):
        kind = "no parameter of that name" if weight is None else type(weight).__name__
        raise SpecError(
            explain(
                repr(name),
                "the weight must be an initialised parameter.",
                got=kind,
                hint="remove weight_norm or similar; run a lazy module once",
            )
        )
    _check_values(name, weight)
    return WeightPlan(
        name, module, tensor_name, weight, spec, gate_layout(spec.granularity, layout, weight.shape, where=repr(name))
    )


def _check_values(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise SpecError(
            explain(
                repr(name), "gates multiply real floating-point weights.", expected="a floating dtype", got=weight.dtype
            )
        )
    if weight.numel() == 0:
        raise SpecError(explain(repr(name), "the weight must have elements.", got=f"shape {tuple(weight.shape)}"))
    if not is_meta(weight) and not all(bool(torch.isfinite(piece).all()) for (piece,) in pieces(weight.detach())):
        raise SpecError(
            explain(
                repr(name),
                "the weight must be finite.",
                got="NaN or infinite values",
                hint="check the checkpoint it came from",
            )
        )


def _check_tied(model: nn.Module, plans: list[WeightPlan]) -> None:
    """Refuse a weight whose memory belongs to another parameter too, unless both get the same gates."""
    planned = {(id(p.module), p.tensor_name): p for p in plans}
    by_storage: dict[tuple[bool, int], list[tuple[str, nn.Module, str, Tensor]]] = {}
    for name, module in named_modules(model):
        for tensor_name, tensor in tensors_of(module):
            full = ".".join(filter(None, (name, tensor_name)))
            if not isinstance(tensor, nn.parameter.UninitializedParameter):
                by_storage.setdefault(storage_of(tensor), []).append((full, module, tensor_name, tensor))
    for plan in plans:
        for full, module, tensor_name, tensor in by_storage[storage_of(plan.weight)]:
            if (module is plan.module and tensor_name == plan.tensor_name) or not overlap(plan.weight, tensor):
                continue
            other = planned.get((id(module), tensor_name))
            if (
                other is None
                or replace(other.spec, granularity=plan.spec.granularity) != plan.spec  # input here is output there
                or other.layout != plan.layout
                or same_tensor(plan.weight) != same_tensor(tensor)
            ):
                raise SpecError(
                    explain(
                        repr(plan.name),
                        "a tied weight needs the same gates at all its places.",
                        expected=f"{full!r} gated alike, over the same axes",
                        got="left out" if other is None else f"granularity {other.spec.granularity!r} there",
                        hint="name both in the specification, or exclude both",
                    )
                )


def every_reader(group: ChannelGroup) -> Iterator[GroupSite]:
    """The readers of a group under every name they have."""
    for site in group.readers:
        yield from (replace(site, names=(name,)) for name in site.names)
