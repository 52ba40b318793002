"""The weights behind gates: sums over them for each gate, and whether they can be looked at."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from l0hooks._torch.tensors import is_meta, is_sharded
from l0hooks.attach.gated_weight import Site
from l0hooks.errors import StateError, explain
from l0hooks.gates.gate import Gate


def sum_by_gate(site: Site, gate: Gate, values: Tensor) -> Tensor:
    """Σ of ``values`` over the weights that each gate multiplies.

    Parameters
    ----------
    site : Site
        A weight that ``gate`` multiplies.
    gate : Gate
    values : Tensor, of the shape of the weight

    Returns
    -------
    Tensor, float32, shape of ``gate.log_alpha``

    Examples
    --------
    >>> from torch import nn
    >>> from l0hooks import sparsify
    >>> from l0hooks.attach.gated_weight import iter_sites
    >>> model = nn.Linear(3, 2)
    >>> _ = sparsify(model, "input")
    >>> (site,) = iter_sites(model)
    >>> sum_by_gate(site, site.gating.gates[0], torch.ones(2, 3))
    tensor([2., 2., 2.])
    """
    with torch.enable_grad():
        leaves = [torch.ones_like(one.log_alpha, requires_grad=one is gate) for one in site.gating.gates]
        factor = site.gating.factor(leaves, 0.0)
        (mine,) = [leaf for leaf, one in zip(leaves, site.gating.gates, strict=True) if one is gate]
        summed = values.detach().to(factor).sum_to_size(factor.shape)
        return torch.autograd.grad(factor, mine, summed)[0]


def check_data(where: str, sites: Iterable[Site]) -> None:
    """Refuse weights that have no data, or only a part of them in this process.

    Raises
    ------
    StateError
        If there is one.
    """
    for site in sites:
        if is_meta(site.weight) or is_sharded(site.weight):
            got = "a weight on the meta device" if is_meta(site.weight) else "a weight spread over processes"
            hint = f"{where} before fully_shard, and where the weights have data"
            raise StateError(
                explain(f"{where}: {site.name!r}", "weights must be whole and have data.", got=got, hint=hint)
            )
