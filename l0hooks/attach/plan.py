"""What ``sparsify`` will gate, checked; nothing is changed here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from torch import nn

from l0hooks._torch.modules import tensors_of
from l0hooks.attach.groups import check_examples, choose_groups
from l0hooks.attach.layers import choose_blocks, named_blocks, wants_groups, wants_layers
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
from l0hooks.attach.weight_plan import WeightPlan, check_kind, check_values, plan_weight, tie_clashes
from l0hooks.errors import L0HooksWarning, SpecError, explain
from l0hooks.structure import ChannelGroup, GroupSite
from l0hooks.structure.blocks import Block
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.structure.layers import (
    GATEABLE,
    gateable_weights,
    is_gateable,
)
from l0hooks.structure.stacked_weights import bare_weights

Spec = GateSpec | Shorthand | Mapping[Pattern, GateSpec | Shorthand]
_WILDCARD = re.compile(r"[*?\[]")


def plan_gates(
    model: nn.Module,
    spec: Spec,
    exclude: Pattern | Sequence[Pattern],
    example_inputs: ExampleInputs | None,
    groups: Sequence[ChannelGroup] | None,
) -> tuple[list[WeightPlan], list[tuple[ChannelGroup, GateSpec]], list[tuple[Block, GateSpec]]]:
    """Everything that will be gated, checked; nothing is changed."""
    values = spec if isinstance(spec, Mapping) else {"all": spec}
    specs = {pattern: as_spec(value) for pattern, value in values.items()}
    if not specs:
        raise SpecError(explain("sparsify", "the specification must not be empty.", hint='sparsify(model, "weight")'))
    if not isinstance(spec, Mapping):
        _refuse_without_layers(model, coupled=specs["all"].granularity == "coupled")
    named = named_blocks(model, specs) if any(map(wants_layers, specs.values())) else set()
    assigned = _assigned(model, specs, exclude)
    modules = dict(named_modules(model))
    bare = _bare(specs, assigned, modules)
    _refuse_ungateable(specs, assigned, modules, bare, named)
    plans: dict[tuple[int, str], WeightPlan] = {}
    for name, module_spec in assigned.items():
        if name in bare:
            plans |= _bare_plans(name, modules[name], module_spec)
        if not is_gateable(modules[name]) or module_spec.granularity == "coupled":
            continue
        for owner, tensor_name, layout in gateable_weights(name, modules[name]):
            owner_name = name if owner is modules[name] else ".".join(filter(None, (name, "out_proj")))
            if (id(owner), tensor_name) not in plans and not is_excluded(model, owner_name, exclude):
                full = ".".join(filter(None, (owner_name, tensor_name)))
                plan = plan_weight(full, owner, tensor_name, layout, assigned.get(owner_name, module_spec))
                plans[id(owner), tensor_name] = plan
    found = _without_clashes(model, list(plans.values()), specs)
    if not any(spec.granularity == "coupled" for spec in assigned.values()):
        if groups is not None:
            raise SpecError(
                explain("sparsify", "groups are gated together.", got="no coupled granularity", hint='spec="coupled"')
            )
        return found, [], []
    inputs = check_examples(model, example_inputs)
    asked = [spec for spec in assigned.values() if spec.granularity == "coupled"]
    chosen, blocks = [], []
    if groups is not None or any(map(wants_groups, asked)):
        chosen = choose_groups(model, assigned, exclude, inputs, groups)
    if any(map(wants_layers, asked)):
        blocks = choose_blocks(model, assigned, named, exclude, inputs, found)
    _check_readers(model, chosen, found)
    return found, chosen, blocks


def _assigned(
    model: nn.Module, specs: Mapping[Pattern, GateSpec], exclude: Pattern | Sequence[Pattern]
) -> dict[str, GateSpec]:
    """The specification of every module that a pattern matches.

    Coupled gates go on whatever reads a group. For them "all" means every module with weights of its own.
    """
    every = specs["all"] if "all" in specs and specs["all"].granularity == "coupled" else None
    modules = dict(named_modules(model))
    others = [name for name, module in modules.items() if _carries_coupled(module) and not is_gateable(module)]
    if every is None or not others:
        return first_matches(model, specs, where="sparsify", exclude=exclude)
    if not any(matches("all", name, module) for name, module in modules.items()):
        specs = {pattern: spec for pattern, spec in specs.items() if pattern != "all"}
    assigned = first_matches(model, specs, where="sparsify", exclude=exclude)
    free = [name for name in others if name not in assigned and not is_excluded(model, name, exclude)]
    return {**assigned, **dict.fromkeys(free, every)}


def _without_clashes(model: nn.Module, plans: list[WeightPlan], specs: Mapping[Pattern, GateSpec]) -> list[WeightPlan]:
    """``plans`` without weights that are tied to others gated otherwise or not at all; a warning names them.

    A pattern that selects only such weights is an error.
    """
    clashing = tie_clashes(model, plans)
    if not clashing:
        return plans
    modules = dict(named_modules(model))
    selected: dict[Pattern, list[str]] = {}
    for plan in plans:
        name = plan.name.rpartition(".")[0]
        places = (name, name.rpartition(".")[0])  # the second for the output projection of attention
        pattern = next(p for place in places for p in specs if matches(p, place, modules[place]))
        selected.setdefault(pattern, []).append(plan.name)
    for names in selected.values():
        if all(name in clashing for name in names):
            raise SpecError(clashing[names[0]])
    left = list(clashing)
    shown = ", ".join(map(repr, left[:4])) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    text = f"sparsify: without gates stays {shown}. {clashing[left[0]]}"
    warnings.warn(text, L0HooksWarning, stacklevel=4)
    return [plan for plan in plans if plan.name not in clashing]


def _carries_coupled(module: nn.Module) -> bool:
    """Whether a module owns a weight that coupled gates could multiply; recurrent layers read theirs as one block."""
    own = [t for _, t in tensors_of(module) if not isinstance(t, nn.parameter.UninitializedParameter)]
    return is_gateable(module) or (any(t.dim() > 1 for t in own) and not isinstance(module, nn.RNNBase))


def _check_readers(model: nn.Module, groups: list[tuple[ChannelGroup, GateSpec]], plans: list[WeightPlan]) -> None:
    """What holds coupled groups must be plain; the weights that read them finite, too, and not gated otherwise."""
    planned = {(id(plan.module), plan.tensor_name) for plan in plans}
    for group, _ in groups:
        for site in (site for site in group.sites if not site.buffer):
            check_kind(site.names[0], model.get_parameter(site.names[0]))
        for site in every_gated(group):
            module, name = model.get_submodule(site.module), site.names[0]
            check_values(name, module.get_parameter(name.rpartition(".")[2]))
            if (id(module), name.rpartition(".")[2]) in planned:
                raise SpecError(
                    explain(
                        repr(name),
                        "a weight can be gated only once.",
                        got=f"other gates, and those of the group {group}",
                        hint="leave the group out, or the weight",
                    )
                )


def _refuse_without_layers(model: nn.Module, *, coupled: bool) -> None:
    """Without a pattern of the user's, the error speaks of layers, not of the pattern "all"."""
    modules = dict(named_modules(model))
    layers = [(name, module) for name, module in modules.items() if is_gateable(module)]
    others = any(_carries_coupled(module) and not is_gateable(module) for module in modules.values())
    if any(matches("all", name, module) for name, module in layers) or (coupled and others):
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


def _bare(
    specs: Mapping[Pattern, GateSpec], assigned: Mapping[str, GateSpec], modules: Mapping[str, nn.Module]
) -> set[str]:
    """Modules with parameters of their own that are no layers, where a pattern means them and no layer."""
    found: set[str] = set()
    for pattern, spec in specs.items():
        caught = [name for name in modules if matches(pattern, name, modules[name])]
        if spec.granularity != "coupled" and not any(is_gateable(modules[name]) for name in caught):
            found |= {name for name in caught if assigned.get(name) is spec and bare_weights(modules[name])}
    return found


def _bare_plans(name: str, module: nn.Module, spec: GateSpec) -> dict[tuple[int, str], WeightPlan]:
    """Plans for the parameters of a module that is no layer."""
    found = {}
    for tensor_name in bare_weights(module):
        full = ".".join(filter(None, (name, tensor_name)))
        found[id(module), tensor_name] = plan_weight(full, module, tensor_name, None, spec)
    return found


def _refuse_ungateable(
    specs: Mapping[Pattern, GateSpec],
    assigned: Mapping[str, GateSpec],
    modules: Mapping[str, nn.Module],
    bare: AbstractSet[str],
    named: AbstractSet[str],
) -> None:
    """A pattern without wildcards must name a gateable layer or bare weights; any other must match at least one."""
    for pattern, spec in specs.items():
        carries = _carries_coupled if spec.granularity == "coupled" else is_gateable
        caught = [name for name in modules if matches(pattern, name, modules[name])]
        exact = isinstance(pattern, str) and not _WILDCARD.search(pattern) and pattern in modules
        bad = [name for name in caught if not carries(modules[name]) and name not in named]
        if any(name in bare for name in caught):
            continue
        if bad and (exact or len(bad) == len(caught)):
            gateable_weights(bad[0], modules[bad[0]])
    carried = (_carries_coupled if s.granularity == "coupled" else is_gateable for s in assigned.values())
    some = any(carries(modules[name]) for name, carries in zip(assigned, carried, strict=True))
    if not (some or bare) and named.isdisjoint(assigned):
        raise SpecError(explain("sparsify", "at least one weight must be left to gate.", got="none after exclude"))


def every_gated(group: ChannelGroup) -> Iterator[GroupSite]:
    """What the gates of a group multiply, under every name it has."""
    for site in group.gated:
        yield from (replace(site, names=(name,)) for name in site.names)
