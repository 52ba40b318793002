"""Install gates in the layers of a model, and remove them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from l0hooks._torch.modules import (
    Tie,
    drop_load_hooks,
    drop_parametrization,
    own_class,
    parameters_of,
    parametrization_lists,
    read_directly,
    reorder_parameters,
)
from l0hooks._torch.tensors import same_tensor
from l0hooks.attach.gated_weight import Gating, Site
from l0hooks.attach.pickling import make_picklable
from l0hooks.gates.gate import iter_gates
from l0hooks.gates.registry import rules_over
from l0hooks.gates.saved_state import check_checkpoint


def install_gates(gatings: Sequence[tuple[nn.Module, str, Gating]]) -> None:
    """Multiply tensors of modules with gates from now on, **in place**.

    Parameters
    ----------
    gatings : sequence of (module, name of the tensor, Gating)
    """
    owners = {id(module): module for module, _, _ in gatings}.values()
    for module in owners:
        if parametrize.is_parametrized(module):
            own_class(module)
    for module, _, gating in gatings:
        gating.order = tuple(parameters_of(module))
    for module, tensor_name, gating in gatings:
        gating.train(module.training)
        parametrize.register_parametrization(module, tensor_name, gating, unsafe=True)
        read_directly(module, tensor_name)
    for module in owners:
        make_picklable(module)
        module.register_load_state_dict_pre_hook(accept_dense)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(settle_gates)  # type: ignore[no-untyped-call]
    _tie(gatings)


def _tie(gatings: Sequence[tuple[nn.Module, str, Gating]]) -> None:
    """Tie the parametrizations of one weight."""
    shared: dict[tuple[Any, ...], list[tuple[parametrize.ParametrizationList, Gating]]] = {}
    for module, tensor_name, gating in gatings:
        chain = parametrization_lists(module)[tensor_name]
        if isinstance(chain.original, torch.Tensor):
            shared.setdefault(same_tensor(chain.original), []).append((chain, gating))
    for places in shared.values():
        if len(places) > 1:
            tie = Tie([chain for chain, _ in places])
            for _, gating in places:
                gating.tie = tie


def accept_dense(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Let a dense checkpoint load into a gated layer: its weight is put under the gates, which do not change."""
    for tensor_name, chain in parametrization_lists(module).items():
        inner = f"{prefix}parametrizations.{tensor_name}."
        gating = chain[0]
        if inner + "original" in state_dict:
            state_dict.pop(prefix + tensor_name, None)  # the plain weight beside the gated one: see ``save_both``
        if prefix + tensor_name in state_dict and isinstance(gating, Gating):
            state_dict[inner + "original"] = state_dict.pop(prefix + tensor_name)
            for key, value in gating.state_dict(prefix=inner + "0.").items():
                state_dict.setdefault(key, value)


def refuse_other_budgets(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Check all gates below ``module`` before anything of a checkpoint is loaded: each must be of the same budget."""
    for name, gate in iter_gates(module):
        check_checkpoint(gate, state_dict, f"{prefix}{name}.")
    for rule in rules_over(gate for _, gate in iter_gates(module)):
        rule.before_load(module, state_dict, prefix)


def settle_gates(module: nn.Module, _: object) -> None:
    """After a checkpoint was loaded with ``assign=True``: gates without data start where the weights now are."""
    for chain in parametrization_lists(module).values():
        gating = chain[0]
        if isinstance(gating, Gating):
            gating.settle(chain)


def remove_gates(site: Site) -> None:
    """Make a gated layer plain again, its weight as it lies beneath the gates.

    The parameter stays the same object at its old place, so that ties, flags and optimisers survive.
    """
    module, tensor_name, weight = site.module, site.tensor_name, site.weight
    drop_parametrization(module, tensor_name)
    module.register_parameter(tensor_name, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight))
    reorder_parameters(module, site.gating.order)
    drop_load_hooks(module, accept_dense, settle_gates)
