"""``sparsify``: attach gates to the weights of an existing model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l0hooks._torch.modules import tensors_of
from l0hooks._torch.tensors import same_tensor
from l0hooks.attach._summary import summary
from l0hooks.attach.gated_weight import (
    GatedWeight,
    Gating,
    iter_sites,
)
from l0hooks.attach.groups import build_readers, hook_inputs
from l0hooks.attach.install import install_gates, refuse_other_budgets, remove_gates
from l0hooks.attach.plan import Spec, plan_gates
from l0hooks.attach.pretrained import SavesBoth, save_both
from l0hooks.attach.spec import GateSpec, Pattern, named_modules
from l0hooks.attach.summary_table import Summary
from l0hooks.attach.weight_plan import WeightPlan
from l0hooks.attach.width import gated_modules, hook_norms
from l0hooks.errors import SpecError, explain
from l0hooks.gates.gate import Gate
from l0hooks.gates.noise import EntryPoint, GateNoise, NoiseSource
from l0hooks.structure import ChannelGroup
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.structure.macs import count_positions
from l0hooks.training._set_budget import set_budget
from l0hooks.training.budget import Budget


def sparsify(
    model: nn.Module,
    spec: Spec = "weight",
    *,
    example_inputs: ExampleInputs | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    groups: Sequence[ChannelGroup] | None = None,
    budget: Budget | Mapping[Pattern, Budget] | None = None,
    scores: Callable[[nn.Module], Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None,
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
    example_inputs : sequence or mapping, optional
        Arguments of ``model``. The model runs on them once, in evaluation mode, to count
        multiply-adds for one example (one index along the first axis of the first tensor).
    exclude : pattern or sequence of patterns
        Modules to leave alone; a name stands for the modules below it too.
    groups : sequence of ChannelGroup, optional
        What coupled gates choose from, instead of what tracing the model finds: groups declared by
        :func:`l0hooks.structure.declare_group`, or a part of :func:`l0hooks.channel_groups`.
    budget : Budget, or mapping from pattern to Budget, optional
        The size to reach, in place of a penalty: see :func:`l0hooks.set_budget`.
    scores : callable from the gated model to scores, or scores of the shape of each gate, optional
        What closing each gate would cost, from which the budget's gates start:
        ``scores=lambda gated: l0hooks.score(gated, batches)``.

    Returns
    -------
    Summary
        What was gated; prints as a table.

    Warns
    -----
    L0HooksWarning
        If weights are left out because they are tied to others that get other gates, or none; if a group is left out
        because a weight reads it along another axis than the group before.

    Notes
    -----
    A model on the meta device gets its gates there, and runs there on ``example_inputs``. They start when their memory
    comes: by ``model.to_empty(device=...)``, or with the weights by ``load_state_dict(..., assign=True)``. Whether
    weights are finite is not looked at then, and budgets are set afterwards: :func:`l0hooks.set_budget`.

    Raises
    ------
    SpecError
        If a pattern matches nothing, or only weights tied to others that are left out; if a weight is gated already,
        not finite, or not divisible into the blocks asked for; if ``groups`` overlap or do not fit the model, or no
        channels are coupled; if ``scores`` do not fit the gates, or there is no budget that they could start.
    UnsupportedModuleError
        If a pattern names a module without a weight that can carry gates, or coupled groups are to be found in a
        model that ``torch.export`` cannot trace.
    InvalidValueError
        If the budget cannot be reached, or ``scores`` are negative or not finite.
    StateError
        If there is to be a budget on the meta device.

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
    if scores is not None and budget is None:
        raise SpecError(
            explain(
                "sparsify",
                "scores start the gates of a budget.",
                got="scores without a budget",
                hint="budget=Budget(sparsity=...)",
            )
        )
    plans, chosen = plan_gates(model, spec, exclude, example_inputs, groups)
    positions = None if example_inputs is None else count_positions(model, example_inputs)
    before = {id(site.gating) for site in iter_sites(model)}
    handles = _attach(model, plans, chosen, positions, declared=groups is not None)
    if budget is not None:
        try:
            known = scores(model) if callable(scores) else scores
            set_budget(model, budget, example_inputs=example_inputs, scores=known)
        except BaseException:  # the user's own schedule may raise anything
            _detach(model, before, handles)
            raise
    return summary(model)


def _attach(
    model: nn.Module,
    plans: list[WeightPlan],
    groups: list[tuple[ChannelGroup, GateSpec]],
    positions: Mapping[tuple[int, str], float] | None,
    *,
    declared: bool,
) -> list[RemovableHandle | SavesBoth]:
    """Build every gate, then install them; the user's input cannot make this fail. Returns the hooks' handles."""
    holders = {module for group, _ in groups for module in gated_modules(model, group)}
    entries = _entry_points(model, NoiseSource(), {id(p.module) for p in plans} | {id(m) for m in holders})
    numbers = itertools.count()

    def make(shape: Sequence[int], spec: GateSpec, module: nn.Module, device: torch.device) -> Gate:
        gate = Gate(
            shape,
            family=spec.family,
            init_mean=spec.init_mean,
            init_keep_prob=spec.init_keep_prob,
            temperature=spec.temperature,
            gamma=spec.gamma,
            zeta=spec.zeta,
            estimator=spec.estimator,
            device=device,
        )
        gate.noise_source = GateNoise(entries[id(module)][1], next(numbers))
        return gate

    gates: dict[tuple[Any, ...], Gate] = {}
    gatings: list[tuple[nn.Module, str, Gating]] = []
    for plan in plans:
        key = same_tensor(plan.weight)
        if key not in gates:
            gates[key] = make(plan.layout.shape, plan.spec, plan.module, plan.weight.device)
        count = None if positions is None else positions.get((id(plan.module), plan.tensor_name), 0)
        gating = GatedWeight(gates[key], plan.layout, plan.spec.granularity, count)
        gatings.append((plan.module, plan.tensor_name, gating))
    named = _named_positions(model, positions or {})
    readers = build_readers(
        model,
        groups,
        named,
        lambda group, spec, module: make((group.size,), spec, module, _device(module)),
        declared=declared,
    )
    gatings += [(reader.module, reader.tensor_name, reader.gating) for reader in readers]
    install_gates(gatings)
    handles = [handle for module, entry in entries.values() for handle in entry.attach(module)]
    for module, _ in entries.values():
        handles.append(module.register_load_state_dict_pre_hook(refuse_other_budgets))  # type: ignore[no-untyped-call]
    norms = hook_norms(model, groups, [reader.gating for reader in readers])
    return [*handles, *hook_inputs(readers), *norms, *save_both(model)]


def _detach(model: nn.Module, before: AbstractSet[int], handles: Sequence[RemovableHandle | SavesBoth]) -> None:
    """Take back all gates but those of ``before``, by their id, and the hooks that came with them."""
    for handle in handles:
        handle.remove()
    for site in list(iter_sites(model)):
        if id(site.gating) not in before:
            remove_gates(site)


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


def _entry_points(model: nn.Module, source: NoiseSource, gated: set[int]) -> dict[int, tuple[nn.Module, EntryPoint]]:
    """An entry point for every gated module and everything that contains one, by the module's id."""
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
        id(module): (module, source.add_entry(name, {names[id(modules[n])] for n in above[id(module)]}))
        for name, module in first.items()
    }
