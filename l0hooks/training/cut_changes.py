"""The changes that cut a gated model while it trains: tensors, optimiser states, sizes and gates; all or none."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l0hooks._torch.modules import parametrization_lists
from l0hooks._torch.tensors import replace_data
from l0hooks.attach.coupled_weight import CoupledWeight
from l0hooks.attach.walk import Gated
from l0hooks.gates.gate import Gate
from l0hooks.gates.optimizer_hooks import optimizers_of
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_modules import Bools, Cut, groups_left, sliced
from l0hooks.structure.group_costs import CoupledPlan
from l0hooks.structure.settings import change, integers


class Changes:
    """What is changed in a gated model that trains: all of it, or nothing."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._new: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._states: list[tuple[dict[str, Any], str, Tensor]] = []

    def plan_tensors(self, model: nn.Module, cuts: Sequence[Cut]) -> str:
        """Slice tensors, gradients and what optimisers keep of them, beside the old; why it cannot be done."""
        held = optimizers_of(model.parameters())
        for cut in cuts:
            for tensor in {id(t): t for t in (_at(model, name) for name in cut.names)}.values():
                grad = None if tensor.grad is None else sliced(tensor.grad, cut)
                self._new.append((tensor, sliced(tensor, cut), grad))
                for optimizer in held:
                    why = self._plan_state(optimizer, tensor, cut)
                    if why:
                        return why
        return ""

    def _plan_state(self, optimizer: torch.optim.Optimizer, tensor: Tensor, cut: Cut) -> str:
        state = optimizer.state.get(tensor, {})
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != tensor.shape:
                return f"{type(optimizer).__name__}, which keeps {name!r} of shape {tuple(value.shape)} for a parameter"
            self._states.append((state, name, sliced(value, cut)))
        return ""

    def settings(self, model: nn.Module, plain: nn.Module, small: nn.Module) -> None:
        """Give the modules the sizes that differ between a plain copy and the smaller one."""
        modules, new = dict(model.named_modules()), dict(small.named_modules())
        for name, module in plain.named_modules():
            old = dict(integers(module))
            for place, value in integers(new[name]):
                if old.get(place, value) != value:
                    own, key = vars(modules[name]), str(place[0])
                    self._undo.append(partial(operator.setitem, own, key, own[key]))
                    change(modules[name], place, value)

    def tensors(self) -> None:
        """Put the slices in place of the old tensors; parameters stay the same objects."""
        for tensor, data, grad in self._new:
            self._undo.append(partial(replace_data, tensor, tensor.data, tensor.grad))
            replace_data(tensor, data, grad)
        for state, name, value in self._states:
            self._undo.append(partial(operator.setitem, state, name, state[name]))
            state[name] = value

    def gates(self, every: Sequence[Gated], groups: Sequence[tuple[ChannelGroup, Bools]]) -> None:
        """Drop the gates of members that are gone, and give all readers the plan of what is left."""
        (plan,) = {id(one.coupled.plan): one.coupled.plan for one in every if one.coupled}.values()
        numbers = {one.coupled.number: n for n, one in enumerate(every) if one.coupled}
        left = groups_left(groups)
        ordered = tuple(left[numbers[n]] for n in range(len(plan.groups)))
        new = CoupledPlan(ordered, plan.positions, plan.declared)
        shapes = {name: site.shape for group in ordered for site in group.sites for name in site.names}
        for one, (_, stays) in zip(every, groups, strict=True):
            if not stays.all():
                self._drop(one.gate, stays)
        for gating in {id(site.gating): site.gating for one in every for site in one.sites}.values():
            if isinstance(gating, CoupledWeight):
                self._undo.append(partial(gating.follow, gating.plan, gating.shape))
                gating.follow(new, shapes[gating.name])

    def _drop(self, gate: Gate, stays: Bools) -> None:
        """The gate's log-odds are the same parameter, so that its optimiser's state is cut, too."""
        chosen = torch.from_numpy(np.flatnonzero(stays)).to(gate.log_alpha.device)
        cut = Cut(("",), tuple(gate.log_alpha.shape), ((0, tuple(chosen.tolist())),))
        before = gate.log_alpha.data, gate.log_alpha.grad
        places, masks = gate.positions, (gate.mask, gate.held)

        def back() -> None:
            replace_data(gate.log_alpha, *before)
            gate.positions = places
            gate.mask, gate.held = masks

        self._undo.append(back)
        for optimizer in optimizers_of([gate.log_alpha]):
            state = optimizer.state.get(gate.log_alpha, {})
            for name, value in list(state.items()):
                if isinstance(value, Tensor) and value.shape == gate.log_alpha.shape:
                    self._undo.append(partial(operator.setitem, state, name, value))
                    state[name] = sliced(value, cut)
        gate.drop(chosen)
        gate.mask = None if gate.mask is None else gate.mask[chosen]
        gate.held = None if gate.held is None else gate.held[chosen]

    def take_back(self) -> None:
        """Undo everything, the last change first."""
        for undo in reversed(self._undo):
            undo()


def _at(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name; beneath its gates, if it has any."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    chains = parametrization_lists(module)
    tensor: Tensor = chains[own].original if own in chains else getattr(module, own)
    return tensor
