"""``sparsify``: attach gates to the weights of an existing model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l0hooks.coupling import build_readers, choose_groups, hook_inputs
from l0hooks.errors import SpecError, explain
from l0hooks.gate import Gate
from l0hooks.layers import GateLayout, WeightLayout, gate_layout, gateable_weights, is_gateable, tensors_of
from l0hooks.noise import Door, NoiseSource
from l0hooks.spec import GateSpec, Pattern, Shorthand, as_spec, first_matches, is_excluded, matches, named_modules
from l0hooks.structure import ChannelGroup, GroupSite
from l0hooks.summary import Summary, summary
from l0hooks.tracing import count_positions
from l0hooks.weights import GatedWeight, Gating, accept_dense, own_class

Spec = GateSpec | Shorthand | Mapping[Pattern, GateSpec | Shorthand]
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class _Plan:
    """One weight that will be gated."""

    name: str
    module: nn.Module
    tensor_name: str
    weight: nn.Parameter
    spec: GateSpec
    layout: GateLayout


def sparsify(
    model: nn.Module,
    spec: Spec = "weight",
    *,
    example_inputs: Sequence[Any] | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    groups: Sequence[ChannelGroup] | None = None,
) -> Summary:
    """Attach Hard Concrete gates to weights of ``model``, **in place**; all of them or, on any error, none.

    Parameters
    ----------
    model : nn.Module
        Any model; its layers stay the objects they are.
    spec : GateSpec, shorthand, or mapping from pattern to one of these
        A shorthand is a granularity: ``"weight"``, ``"input"``, ``"output"``, ``"kernel"`` or ``(rows, cols)``.
        Without a mapping it is meant for every Linear, convolution, attention projection and Hugging Face Conv1D.
        In a mapping the first pattern that matches a module wins; patterns are shell patterns over qualified names
        (``"layer*.conv?"``, ``*`` crosses dots), compiled regular expressions, module types, ``"all"``,
        ``"all-linear"`` or ``"all-conv"``.
    example_inputs : sequence, optional
        Positional arguments of ``model``. The model runs on them once, in evaluation mode, to count multiply-adds.
    exclude : pattern or sequence of patterns
        Modules to leave alone; a name stands for the modules below it too.
    groups : sequence of ChannelGroup, optional
        What coupled gates choose from, instead of what tracing the model finds: groups declared by
        :func:`l0hooks.structure.declare_group`, or a part of :func:`l0hooks.channel_groups`.

    Returns
    -------
    Summary
        What was gated; prints as a table.

    Raises
    ------
    SpecError
        If a pattern matches nothing, a weight is gated already, tied to one that is left out, not finite, on the
        meta device, or not divisible into the blocks asked for; if ``groups`` overlap, do not fit the model, or
        nothing is coupled.
    UnsupportedModuleError
        If a pattern names a module without a weight that can carry gates, or coupled groups are to be found in a
        model that ``torch.export`` cannot trace.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> report = sparsify(model, {"0": "output", "*": "weight"})
    >>> report.gates
    80
    >>> model[0].weight.shape
    torch.Size([16, 8])

    References
    ----------
    Louizos, Welling & Kingma (2018), equation 9.
    """
    plans, chosen = _plan(model, spec, exclude, example_inputs, groups)
    positions = None if example_inputs is None else count_positions(model, example_inputs)
    _attach(model, plans, chosen, positions, declared=groups is not None)
    return summary(model)


def _plan(
    model: nn.Module,
    spec: Spec,
    exclude: Pattern | Sequence[Pattern],
    example_inputs: Sequence[Any] | None,
    groups: Sequence[ChannelGroup] | None,
) -> tuple[list[_Plan], list[tuple[ChannelGroup, GateSpec]]]:
    """Everything that will be gated, checked; nothing is changed."""
    values = spec if isinstance(spec, Mapping) else {"all": spec}
    specs = {pattern: as_spec(value) for pattern, value in values.items()}
    if not specs:
        raise SpecError(explain("sparsify", "the specification must not be empty.", hint='sparsify(model, "weight")'))
    assigned = first_matches(model, specs, where="sparsify", exclude=exclude)
    modules = dict(named_modules(model))
    _refuse_ungateable(specs, assigned, modules)
    plans: dict[tuple[int, str], _Plan] = {}
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


def _check_readers(model: nn.Module, groups: list[tuple[ChannelGroup, GateSpec]], plans: list[_Plan]) -> None:
    """The weights that read coupled groups must be plain, finite, and not gated otherwise."""
    planned = {(id(plan.module), plan.tensor_name) for plan in plans}
    for group, _ in groups:
        for site in _every_reader(group):
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


def _plan_weight(name: str, module: nn.Module, tensor_name: str, layout: WeightLayout, spec: GateSpec) -> _Plan:
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
    return _Plan(
        name, module, tensor_name, weight, spec, gate_layout(spec.granularity, layout, weight.shape, where=repr(name))
    )


def _check_values(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise SpecError(
            explain(
                repr(name), "gates multiply real floating-point weights.", expected="a floating dtype", got=weight.dtype
            )
        )
    if weight.device.type == "meta":
        raise SpecError(
            explain(
                repr(name),
                "the weight must have data.",
                got="device meta",
                hint="model.to_empty(device=...) and load a checkpoint",
            )
        )
    if weight.numel() == 0:
        raise SpecError(explain(repr(name), "the weight must have elements.", got=f"shape {tuple(weight.shape)}"))
    if not bool(torch.isfinite(weight).all()):
        raise SpecError(
            explain(
                repr(name),
                "the weight must be finite.",
                got="NaN or infinite values",
                hint="check the checkpoint it came from",
            )
        )


def _check_tied(model: nn.Module, plans: list[_Plan]) -> None:
    """Refuse a weight whose memory belongs to another parameter too, unless both get the same gates."""
    planned = {(id(p.module), p.tensor_name): p for p in plans}
    by_storage: dict[int, list[tuple[str, nn.Module, str, Tensor]]] = {}
    for name, module in named_modules(model):
        for tensor_name, tensor in tensors_of(module):
            full = ".".join(filter(None, (name, tensor_name)))
            if tensor.device.type != "meta" and not isinstance(tensor, nn.parameter.UninitializedParameter):
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(
                    (full, module, tensor_name, tensor)
                )
    for plan in plans:
        for full, module, tensor_name, tensor in by_storage[plan.weight.untyped_storage().data_ptr()]:
            if (module is plan.module and tensor_name == plan.tensor_name) or not _overlap(plan.weight, tensor):
                continue
            other = planned.get((id(module), tensor_name))
            if (
                other is None
                or replace(other.spec, granularity=plan.spec.granularity) != plan.spec  # input here is output there
                or other.layout != plan.layout
                or not _same_memory(plan.weight, tensor)
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


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in one storage share an element (their address ranges meet)."""

    def span(t: Tensor) -> tuple[int, int]:
        last = sum((int(n) - 1) * int(step) for n, step in zip(t.shape, t.stride(), strict=True))
        start = int(t.storage_offset()) * t.element_size()
        return start, start + (last + 1) * t.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _attach(
    model: nn.Module,
    plans: list[_Plan],
    groups: list[tuple[ChannelGroup, GateSpec]],
    positions: Mapping[tuple[int, str], float] | None,
    *,
    declared: bool,
) -> None:
    """Build every gate, then hang them in; nothing here can fail for the user's input."""
    readers_of = {model.get_submodule(s.module) for group, _ in groups for s in _every_reader(group)}
    doors = _doors(model, NoiseSource(), {id(p.module) for p in plans} | {id(m) for m in readers_of})
    numbers = itertools.count()

    def make(shape: Sequence[int], spec: GateSpec, module: nn.Module, device: torch.device) -> Gate:
        return Gate(
            shape,
            family=spec.family,
            init_mean=spec.init_mean,
            init_keep_prob=spec.init_keep_prob,
            temperature=spec.temperature,
            gamma=spec.gamma,
            zeta=spec.zeta,
            estimator=spec.estimator,
            device=device,
            door=doors[id(module)][1],
            index=next(numbers),
        )

    gates: dict[int, Gate] = {}
    hangings: list[tuple[nn.Module, str, Gating]] = []
    for plan in plans:
        key = plan.weight.data_ptr()
        if key not in gates:
            gates[key] = make(plan.layout.shape, plan.spec, plan.module, plan.weight.device)
        count = None if positions is None else positions.get((id(plan.module), plan.tensor_name), 0)
        gating = GatedWeight(gates[key], plan.layout, plan.spec.granularity, count)
        hangings.append((plan.module, plan.tensor_name, gating))
    named = _named_positions(model, positions or {})
    readers = build_readers(
        model,
        groups,
        named,
        lambda group, spec, module: make((group.size,), spec, module, _device(module)),
        declared=declared,
    )
    hangings += [(reader.module, reader.tensor_name, reader.gating) for reader in readers]
    _hang(hangings)
    for module, door in doors.values():
        door.attach(module)
    hook_inputs(readers)


def _hang(hangings: Sequence[tuple[nn.Module, str, Gating]]) -> None:
    """Register parametrizations that are built already."""
    owners = {id(module): module for module, _, _ in hangings}.values()
    for module in owners:
        if parametrize.is_parametrized(module):
            own_class(module)
    for module, _, gating in hangings:
        gating.order = tuple(module._parameters)
    for module, tensor_name, gating in hangings:
        gating.train(module.training)
        parametrize.register_parametrization(module, tensor_name, gating, unsafe=True)
    for module in owners:
        module.register_load_state_dict_pre_hook(accept_dense)  # type: ignore[no-untyped-call]


def _every_reader(group: ChannelGroup) -> Iterator[GroupSite]:
    """The readers of a group under every name they have."""
    for site in group.readers:
        yield from (replace(site, names=(name,)) for name in site.names)


def _named_positions(model: nn.Module, positions: Mapping[tuple[int, str], float]) -> dict[str, float]:
    """Multiply-adds per weight by the parameter's qualified name."""
    found = {}
    for name, module in named_modules(model):
        for tensor_name, _ in tensors_of(module):
            if (id(module), tensor_name) in positions:
                found[".".join(filter(None, (name, tensor_name)))] = positions[id(module), tensor_name]
    return found


def _device(module: nn.Module) -> torch.device:
    return next(tensor for _, tensor in tensors_of(module)).device


def _doors(model: nn.Module, source: NoiseSource, gated: set[int]) -> dict[int, tuple[nn.Module, Door]]:
    """A door for every gated module and everything that contains one, by the module's id."""
    modules = dict(named_modules(model))
    above: dict[int, list[str]] = {}
    for name, module in modules.items():
        if id(module) in gated:
            parts = name.split(".") if name else []
            chain = [".".join(parts[:n]) for n in range(len(parts) + 1)]
            for depth, part in enumerate(chain):
                above.setdefault(id(modules[part]), []).extend(chain[:depth])
    names: dict[int, str] = {}
    for name, module in modules.items():
        names.setdefault(id(module), name)
    first = {names[key]: modules[names[key]] for key in above}
    return {
        id(module): (module, source.add_door(name, {names[id(modules[n])] for n in above[id(module)]}))
        for name, module in first.items()
    }
