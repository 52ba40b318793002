"""The residual blocks that a specification selects, and a gate for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from l0hooks.attach.layer_gate import BlockGate, LayerGate
from l0hooks.attach.spec import GateSpec, Pattern, is_excluded, matches, named_modules
from l0hooks.attach.weight_plan import WeightPlan
from l0hooks.errors import SpecError, explain
from l0hooks.gates.shared_sampling import SharedSampling
from l0hooks.structure import ChannelGroup
from l0hooks.structure.blocks import Block, residual_blocks
from l0hooks.structure.group_costs import CoupledPlan
from l0hooks.structure.remove_blocks import entries_of, is_list

_MOST_REASONS = 4


def wants_layers(spec: GateSpec) -> bool:
    """Whether blocks are to be gated; only where they are asked for."""
    return spec.granularity == "coupled" and spec.kinds is not None and "layer" in spec.kinds


def wants_groups(spec: GateSpec) -> bool:
    """Whether groups of channels are to be gated."""
    return spec.granularity == "coupled" and spec.kinds != ("layer",)


def named_blocks(model: nn.Module, specs: Mapping[Pattern, GateSpec]) -> set[str]:
    """Entries of lists that a pattern for layers names: it matches them, and nothing within them."""
    modules = dict(named_modules(model))
    patterns = [pattern for pattern, spec in specs.items() if wants_layers(spec) and pattern not in ("*", "all")]
    found = set()
    for owner, module in modules.items():
        for key, entry in entries_of(module) if patterns and is_list(module) else ():
            name = f"{owner}.{key}".lstrip(".")
            inner = {f"{name}.{own}": part for own, part in entry.named_modules() if own}
            if any(_names(pattern, name, entry, inner) for pattern in patterns):
                found.add(name)
    return found


def _names(pattern: Pattern, name: str, entry: nn.Module, inner: Mapping[str, nn.Module]) -> bool:
    """Whether a pattern names this entry; one without modules inside only by its name or type."""
    if not matches(pattern, name, entry) or any(matches(pattern, one, part) for one, part in inner.items()):
        return False
    return bool(inner) or pattern == name or isinstance(pattern, type)


def choose_blocks(
    model: nn.Module,
    assigned: Mapping[str, GateSpec],
    named: set[str],
    exclude: Pattern | Sequence[Pattern],
    example_inputs: Sequence[object],
    plans: Sequence[WeightPlan],
) -> list[tuple[Block, GateSpec]]:
    """The blocks to gate: those that a specification with ``"layer"`` names, or in which it means any module.

    Raises
    ------
    SpecError
        If there are none, or a weight within one of them gets gates of its own.
    """
    blocks, reasons = residual_blocks(model, example_inputs, named)
    chosen = []
    for block in blocks:
        spec = assigned.get(block.name) if block.name in named else None
        specs = [spec] if spec is not None else [s for name, s in assigned.items() if block.holds(name)]
        wanted = next((s for s in specs if wants_layers(s)), None)
        within = [name for name, _ in named_modules(model) if block.holds(name)]
        if wanted is not None and not any(is_excluded(model, name, exclude) for name in within):
            chosen.append((block, wanted))
    if not chosen:
        shown = [f"{name}: {why}" for name, why in reasons.items()][:_MOST_REASONS]
        raise SpecError(
            explain(
                "sparsify",
                'at least one residual block must match for kinds with "layer".',
                expected="entries of a ModuleList or Sequential that map x to x + f(x) and are called once",
                got="; ".join(shown) or "none",
                hint='a pattern that names the blocks, as {"layers.?": GateSpec(granularity="coupled", '
                'kinds=("layer",))}, for any that keep the shape of x',
            )
        )
    clash = next((p.name for p in plans for block, _ in chosen if block.holds(p.name)), None)
    if clash is not None:
        raise SpecError(
            explain(
                repr(clash),
                "a block with a gate holds coupled gates alone.",
                got="gates of its own on a weight within it",
                hint="exclude the block, or leave the weight out",
            )
        )
    return chosen


def with_names_of(blocks: Sequence[Block], groups: Sequence[ChannelGroup]) -> tuple[Block, ...]:
    """``blocks``, their tensors called as those of ``groups`` are: tied ones have several names, in some order."""
    known = {name: site.names for group in groups for site in group.sites for name in site.names}
    return tuple(
        replace(block, tensors=tuple((known.get(names[0], names), shape) for names, shape in block.tensors))
        for block in blocks
    )


def make_plan(
    model: nn.Module,
    chosen: Sequence[tuple[ChannelGroup, GateSpec]],
    blocks: Sequence[tuple[Block, GateSpec]],
    positions: Mapping[str, float],
    *,
    declared: bool,
) -> CoupledPlan:
    """The plan of everything coupled in ``model``."""
    once = {name for name, _ in model.named_modules()}  # a layer with two names counts under its first
    counted = {name: value for name, value in positions.items() if name.rpartition(".")[0] in once}
    groups = tuple(group for group, _ in chosen)
    return CoupledPlan(groups, counted, declared, with_names_of([block for block, _ in blocks], groups))


def build_block_gates(
    model: nn.Module,
    chosen: Sequence[tuple[Block, GateSpec]],
    plan: CoupledPlan,
    make_gate: Callable[[GateSpec, nn.Module], LayerGate],
) -> list[tuple[nn.Module, BlockGate]]:
    """A gate for every chosen block; nothing is attached yet."""
    modules = [model.get_submodule(block.name) for block, _ in chosen]
    gates = [make_gate(spec, module) for (_, spec), module in zip(chosen, modules, strict=True)]
    shared = SharedSampling(gates)
    lists: dict[str, list[LayerGate]] = {}
    for (block, _), gate in zip(chosen, gates, strict=True):
        lists.setdefault(block.owner, []).append(gate)
    for (block, _), gate in zip(chosen, gates, strict=True):
        mates = lists[block.owner]
        if block.list_stays and len(mates) == block.among:
            gate.rivals = tuple(mates)
    return [
        (module, BlockGate(gate, plan, number, shared, example_noise=spec.noise == "example"))
        for number, (module, gate, (_, spec)) in enumerate(zip(modules, gates, chosen, strict=True))
    ]
