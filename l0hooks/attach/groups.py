"""The coupled groups that a specification selects, and a gate parametrization for each weight that reads one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from l0hooks.attach.check_groups import check_groups
from l0hooks.attach.coupled_weight import CoupledWeight, MaskInput
from l0hooks.attach.expert_weight import ExpertWeight, expert_readers, shared_by_experts
from l0hooks.attach.spec import GateSpec, Pattern, is_excluded
from l0hooks.attach.width import find_groups, warn_without_width, without_expert_streams
from l0hooks.attach.width_weight import WidthWeight, Written
from l0hooks.errors import L0HooksWarning, SpecError, StateError, explain
from l0hooks.gates.gate import Gate, iter_gates
from l0hooks.gates.shared_sampling import SharedSampling
from l0hooks.structure import ChannelGroup
from l0hooks.structure.example_inputs import ExampleInputs, positional
from l0hooks.structure.group_costs import CoupledPlan
from l0hooks.structure.layers import CONVOLUTIONS, TRANSPOSED, is_hugging_face_conv1d


@dataclass(frozen=True)
class Reader:
    """A weight that reads gated groups; ``takes_mask`` if its layer is called with the channels it reads."""

    name: str
    module: nn.Module
    tensor_name: str
    gating: CoupledWeight
    takes_mask: bool


def check_examples(model: nn.Module, example_inputs: ExampleInputs | None) -> tuple[Any, ...]:
    """The arguments of ``model``, on which coupled groups and blocks are found; it must hold no gates.

    Raises
    ------
    SpecError
        If there are no example inputs.
    StateError
        If the model holds gates already.
    """
    if example_inputs is None:
        raise SpecError(
            explain(
                "sparsify",
                "coupled groups are found, or their cost is, by running the model.",
                got="no example_inputs",
                hint='sparsify(model, "coupled", example_inputs=(x,))',
            )
        )
    if next(iter_gates(model), None) is not None:
        raise StateError(
            explain(
                "sparsify",
                "coupled gates must be attached first, or in the same call.",
                got="a gated model",
                hint="set_budget(model, ...) for the gates it has; model = prune(model) to begin again",
            )
        )
    return positional(model, example_inputs)


def choose_groups(
    model: nn.Module,
    assigned: Mapping[str, GateSpec],
    exclude: Pattern | Sequence[Pattern],
    example_inputs: Sequence[Any],
    groups: Sequence[ChannelGroup] | None = None,
) -> list[tuple[ChannelGroup, GateSpec]]:
    """The groups to gate: those that a module with a coupled specification writes or reads, and no excluded one does.

    They are chosen from ``groups`` if these are given, else from what tracing the model finds.

    Raises
    ------
    SpecError
        If no group is left to gate, or ``groups`` do not fit the model or read a weight along two axes.
    UnsupportedModuleError
        If ``torch.export`` cannot trace the model.
    """
    chosen = []
    coupled = [spec for spec in assigned.values() if spec.granularity == "coupled"]
    found = find_groups(model, coupled, example_inputs) if groups is None else check_groups(model, groups)
    for group in found:
        modules = list(dict.fromkeys(site.module for site in (*group.writers, *group.readers)))
        specs = [assigned[m] for m in modules if m in assigned and assigned[m].granularity == "coupled"]
        wanted = [s for s in specs if s.wants(group.kind) or (s.kinds is None and groups is not None)]
        if group.readers and wanted and not any(is_excluded(model, m, exclude) for m in modules):
            chosen.append((group, wanted[0]))
    if not chosen:
        raise SpecError(
            explain(
                "sparsify",
                "at least one coupled group must match.",
                got=f"none of {len(found)}" if len(found) else "none",
                hint="print(l0hooks.channel_groups(model, example_inputs)) shows the groups and what is frozen"
                if groups is None
                else "a specification that means a writer or reader of the groups given",
            )
        )
    warn_without_width(coupled, chosen, found)
    chosen = shared_by_experts(without_expert_streams(chosen))
    return _along_one_axis(chosen, given=groups is not None)


def _along_one_axis(
    chosen: Sequence[tuple[ChannelGroup, GateSpec]], *, given: bool
) -> list[tuple[ChannelGroup, GateSpec]]:
    """``chosen`` without groups that read a weight along another axis than an earlier group; a warning names them.

    A weight that is used both as it is and transposed reads along two axes: one parametrization cannot gate both.
    Groups that were ``given`` by hand are refused.
    """
    axes: dict[str, int] = {}
    stay, left = [], []
    for group, spec in chosen:
        if group.kind == "expert":  # its gates multiply whole weights, whatever lies along their axes
            stay.append((group, spec))
            continue
        reading = group.gated if group.width is None else ()  # a stream's gates may lie along any axis
        clash = next((s for s in reading if axes.get(s.names[0], s.axis) != s.axis), None)
        if clash is None:
            stay.append((group, spec))
            axes |= {site.names[0]: site.axis for site in reading}
        else:
            left.append((group, clash))
    if left:
        group, clash = left[0]
        text = explain(
            repr(clash.names[0]),
            "coupled gates lie along one axis of a weight.",
            got="a weight that is used transposed, too",
            hint=f"exclude={clash.module!r}" if given else None,
        )
        if given:
            raise SpecError(text)
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(f"sparsify: without gates stays the group {group}{more}. {text}", L0HooksWarning, stacklevel=5)
    return stay


def build_readers(
    model: nn.Module,
    chosen: Sequence[tuple[ChannelGroup, GateSpec]],
    positions: Mapping[str, float],
    make_gate: Callable[[ChannelGroup, GateSpec, nn.Module], Gate],
    plan: CoupledPlan,
) -> list[Reader]:
    """A parametrization for every weight that gates of a chosen group multiply; nothing is attached yet."""
    members: dict[str, dict[int, Gate]] = {}
    written: dict[str, list[Written]] = {}
    axes: dict[str, int] = {}
    of_experts = {name for group, _ in chosen for site in expert_readers(group) for name in site.names}
    gates_of_plan: list[Gate] = []
    for number, (group, spec) in enumerate(chosen):
        gate = make_gate(group, spec, model.get_submodule(group.gated[0].module))
        gates_of_plan.append(gate)
        for site in group.gated if group.width is None else ():
            for name in site.names:
                members.setdefault(name, {})[number] = gate
                axes[name] = site.axis
        for part in () if group.width is None else group.width.gates:
            for name in part.names:
                written.setdefault(name, []).append(Written(number, gate, part.axis, part.open_only))
    shared = SharedSampling(tuple(gates_of_plan))
    called = {name for name in members if name in positions and _takes_mask(model, name, axes[name])} - of_experts
    by_example = _drawn_by_example(chosen, members, called)
    readers = []
    done = set()
    for name in (*members, *(name for name in written if name not in members)):
        path, _, tensor_name = name.rpartition(".")
        module = model.get_submodule(path)
        if (module, tensor_name) in done:  # a layer that has two names
            continue
        done.add((module, tensor_name))
        weight = module.get_parameter(tensor_name)
        make = ExpertWeight if name in of_experts else CoupledWeight
        gating = (partial(WidthWeight, written=written[name]) if name in written else make)(
            plan,
            members.get(name, {}),
            name,
            weight.shape,
            shared=shared,
            positions=positions.get(name),
            example_noise=name in by_example,
        )
        readers.append(Reader(name, module, tensor_name, gating, name in called))
    return readers


def _drawn_by_example(
    chosen: Sequence[tuple[ChannelGroup, GateSpec]],
    members: Mapping[str, Mapping[int, Gate]],
    called: AbstractSet[str],
) -> set[str]:
    """The readers that get a mask for each example: all readers of their groups can take one, and are to."""
    by_step = members.keys() - called
    by_step |= {name for name, numbers in members.items() if any(chosen[n][1].noise == "step" for n in numbers)}
    while True:  # a group has one draw for all its readers, and a reader one way to take it
        numbers = {n for name in by_step for n in members[name]}
        more = {name for name, gates in members.items() if not numbers.isdisjoint(gates)}
        if more == by_step:
            return set(members) - by_step
        by_step = more


def _takes_mask(model: nn.Module, name: str, axis: int) -> bool:
    """Whether a weight belongs to a layer whose call reads channels along ``axis``, and only multiplies them.

    Attention reads its projections without calling them, and a tied embedding writes what it is said to read. So does a
    layer whose weight is used transposed elsewhere, as in tied autoencoders. A subclass with a forward of its own may
    use its input for more than the product.
    """
    module = model.get_submodule(name.rpartition(".")[0])
    plain = any(type(module).forward is kind.forward for kind in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
    if (
        not (plain or is_hugging_face_conv1d(module))
        or type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear
    ):
        return False
    return axis == (1 if isinstance(module, (nn.Linear, *CONVOLUTIONS)) else 0)


def hook_inputs(readers: Sequence[Reader]) -> list[RemovableHandle]:
    """Multiply gates into the input of the readers that allow it."""
    handles: list[RemovableHandle] = []
    for reader in readers:
        if reader.takes_mask:
            convolution = isinstance(reader.module, (*CONVOLUTIONS, *TRANSPOSED))
            channel = 1 - len(reader.gating.shape) if convolution else -1
            handles += MaskInput(reader.gating, channel).attach(reader.module)
    return handles
