"""Gated models made plain again: their gates, and everything that came with these, taken away."""

from __future__ import annotations

import copy

from torch import nn

from l0hooks._torch.modules import drop_load_hooks, unhook
from l0hooks._torch.running import refresh
from l0hooks.attach.coupled_weight import MaskInput
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.attach.install import refuse_other_budgets, remove_gates
from l0hooks.attach.layer_gate import remove_block_gates
from l0hooks.attach.open_experts import hold_open_experts
from l0hooks.attach.pretrained import plain_method
from l0hooks.attach.width_weight import CentreInput
from l0hooks.gates.gate import iter_gates
from l0hooks.gates.noise import EntryPoint


def make_plain(model: nn.Module) -> nn.Module:
    """``model`` itself with its weights as they lie beneath the gates, and without what it kept in evaluation.

    Closed experts stay hidden from their routers; :func:`l0hooks.structure.routers.show_all` ends that.
    """
    hold_open_experts(model)
    for site in list(iter_sites(model)):
        remove_gates(site)
    remove_block_gates(model)
    for module in model.modules():
        unhook(module, (EntryPoint, MaskInput, CentreInput))
        drop_load_hooks(module, refuse_other_budgets)
    plain_method(model)
    refresh(model)
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A plain copy with the weights beneath the gates, for runs that must not change ``model``.

    Modules, buffers and attributes are its own. Its parameters share the memory of those of ``model``, but not their
    gradients.

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model = nn.Linear(2, 2)
    >>> _ = sparsify(model)
    >>> copied = plain_copy(model)
    >>> copied.weight.data_ptr() == model.parametrizations.weight.original.data_ptr()
    True
    """
    gatings: dict[int, object] = {id(site.gating): site.gating for site in iter_sites(model)}
    gatings |= {id(gate): gate for _, gate in iter_gates(model)}
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return make_plain(copy.deepcopy(model, {**gatings, **shared}))
