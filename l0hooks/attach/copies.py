"""Copies of a gated model that take no more memory than needed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from l0hooks.attach.gated_weight import Site, iter_sites
from l0hooks.gates.gate import iter_gates


def run_copy(model: nn.Module, replaced: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A copy to be run in evaluation mode: modules, buffers and attributes of its own, the parameters of ``model``.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    replaced : mapping from the id of a parameter to Tensor, optional
        Other parameters in place of some.

    Examples
    --------
    >>> model = nn.Linear(2, 2)
    >>> run_copy(model).weight is model.weight
    True
    """
    gates = [gate for _, gate in iter_gates(model)]
    states = [tensor for gate in gates for tensor in (gate.log_alpha, gate.mask, gate.held) if tensor is not None]
    shared = [*model.parameters(), *(site.gating.kept for site in iter_sites(model)), *states]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, when it copies a graph
        return copy.deepcopy(model, {id(one): one for one in shared} | dict(replaced or {}))


@torch.no_grad()
def folded_weights(sites: Sequence[Site]) -> dict[int, Tensor]:
    """The gated weights times their test-time gates, by the id of the weight; a tied one once."""
    folded: dict[int, Tensor] = {}
    for site in sites:
        if id(site.weight) not in folded:
            folded[id(site.weight)] = site.gating.fold_into(site.weight, out=torch.empty_like(site.weight))
    return folded


def folded_copy(model: nn.Module, sites: Sequence[Site], folded: Mapping[int, Tensor]) -> nn.Module:
    """A copy that shares the gates of ``model`` and has the tensors of ``folded`` beneath them.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    sites : sequence of Site
        All gated weights of ``model``.
    folded : mapping from the id of a weight to Tensor
        From :func:`folded_weights`.

    Examples
    --------
    >>> from l0hooks import iter_gates, sparsify
    >>> model = nn.Linear(2, 2)
    >>> _ = sparsify(model)
    >>> sites = list(iter_sites(model))
    >>> (twin,) = iter_sites(folded_copy(model, sites, folded_weights(sites)))
    >>> twin.gating is sites[0].gating, twin.weight is sites[0].weight
    (True, False)
    """
    gatings: dict[int, object] = {id(site.gating): site.gating for site in sites}
    gatings |= {id(gate): gate for site in sites for gate in site.gating.gates}  # routers ask them, too
    weights = {
        id(site.weight): nn.Parameter(folded[id(site.weight)], requires_grad=site.weight.requires_grad)
        for site in sites
    }
    return copy.deepcopy(model, {**gatings, **weights})
