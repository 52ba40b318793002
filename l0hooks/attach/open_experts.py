"""Which experts a router may choose: those with open gates, and as many as it must choose."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from l0hooks.attach.coupled_weight import CoupledWeight
from l0hooks.gates.gate import Gate
from l0hooks.gates.shared_sampling import SharedSampling
from l0hooks.structure.routers import HiddenExperts, hidden_experts


def at_least(stays: Tensor, log_alpha: Tensor, least: int, multiple: int = 1) -> Tensor:
    """``stays`` and, where these are too few, the others with the largest log-odds, of equal ones the first.

    Parameters
    ----------
    stays : Tensor, boolean, shape (members,)
    log_alpha : Tensor, float, shape (members,)
    least : int
    multiple : int
        The number is raised to a multiple of it, where there are as many members.

    Examples
    --------
    >>> at_least(torch.tensor([False, True, False]), torch.tensor([-2.0, 1.0, -1.0]), 2).tolist()
    [False, True, True]
    """
    count = max(int(stays.sum()), min(least, len(stays)))
    count = min(-(-count // multiple) * multiple, len(stays))
    if count <= int(stays.sum()):
        return stays
    order = torch.where(stays, torch.inf, log_alpha.detach()).argsort(descending=True, stable=True)
    return stays.index_fill(0, order[:count].to(stays.device), True)


class OpenExperts:
    """Which experts are open in the running forward: in training those whose drawn gate is positive.

    Where a draw opens fewer experts than the router must choose, those with the largest log-odds among the others are
    chosen from, too; their gate is zero, and so is what they add.

    Parameters
    ----------
    gate : Gate
    shared : SharedSampling
        All gates of the plan.
    least : int
        How many experts the router must be able to choose from.
    """

    def __init__(self, gate: Gate, shared: SharedSampling, least: int) -> None:
        self._gate = gate
        self._shared = shared
        self._least = least

    def __call__(self, module: nn.Module) -> Tensor | None:
        if not module.training:
            return self.in_evaluation()
        return self._among(self._shared.sample(self._gate).detach() > 0)

    def in_evaluation(self) -> Tensor | None:
        """Which experts are open in evaluation; None if all are."""
        return self._among(self._gate.support())

    def _among(self, stays: Tensor) -> Tensor | None:
        opened = at_least(stays, self._gate.log_alpha, self._least)
        return None if bool(opened.all()) else opened


class HeldOpen:
    """The experts that were open when a plain copy was made."""

    def __init__(self, opened: Tensor | None) -> None:
        self._opened = opened

    def __call__(self, module: nn.Module) -> Tensor | None:
        return self._opened


def hide_closed(model: nn.Module, gatings: Iterable[CoupledWeight]) -> list[RemovableHandle]:
    """Hide closed experts from their routers, **in place**; the hooks' handles.

    Parameters
    ----------
    model : nn.Module
    gatings : iterable of CoupledWeight
        Of one plan.
    """
    found: dict[str, HiddenExperts] = {}
    for gating in gatings:
        for number, gate in zip(gating.numbers, gating.gates, strict=True):
            group = gating.plan.groups[number]
            if group.router is not None:
                opened = OpenExperts(gate, gating.shared, group.least)
                found.setdefault(group.router.module, HiddenExperts(group.router, opened))
    return [handle for name, one in found.items() for handle in one.attach(model.get_submodule(name))]


@torch.no_grad()
def hold_open_experts(model: nn.Module) -> None:
    """Let routers see the experts that are open in evaluation now, whatever becomes of the gates, **in place**."""
    for _, one in hidden_experts(model):
        if isinstance(one.opened, OpenExperts):
            one.opened = HeldOpen(one.opened.in_evaluation())


def any_hidden(model: nn.Module) -> bool:
    """Whether experts are hidden from a router below ``model`` in evaluation."""
    opened = [one.opened for _, one in hidden_experts(model)]
    return any(isinstance(one, OpenExperts) and one.in_evaluation() is not None for one in opened)
