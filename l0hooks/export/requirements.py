"""What a gated model and the arguments of ``prune`` must be like; everything is checked before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from l0hooks._torch.memory import pieces
from l0hooks._torch.modules import parametrization_lists
from l0hooks._torch.tensors import is_meta, is_sharded
from l0hooks.attach.gated_weight import Site
from l0hooks.attach.walk import Gated
from l0hooks.errors import SpecError, StateError, explain
from l0hooks.structure import GroupSite


def check_model(model: nn.Module, every: Sequence[Gated], sites: Sequence[Site]) -> None:
    """The model must hold gates on weights, whole and with data, that can be folded into them.

    Parameters
    ----------
    model : nn.Module
    every : sequence of Gated
        All gates of ``model``.
    sites : sequence of Site
        All gated weights of ``model``.

    Raises
    ------
    StateError
    """
    _check_whole(model, every)
    if not every:
        raise StateError(explain("prune", "the model must hold gates.", got="none", hint="sparsify(model, ...) first"))
    _check_gates(every)
    for site in sites:
        if len(parametrization_lists(site.module)[site.tensor_name]) > 1:
            raise StateError(
                explain(
                    f"prune at {site.name!r}",
                    "gates must be the only parametrization of their weight.",
                    got="another one after them",
                    hint="torch.nn.utils.parametrize.remove_parametrizations on a copy, or gate the plain weight",
                )
            )


def _check_whole(model: nn.Module, every: Sequence[Gated]) -> None:
    sharded = any(is_sharded(one.gate.log_alpha) for one in every)
    if sharded or any(hasattr(module, "set_requires_gradient_sync") for module in model.modules()):
        raise StateError(
            explain(
                "prune",
                "a model must lie whole in the process that prunes it.",
                got="one that fully_shard has spread over several",
                hint="load torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)) into a model sparsified in the same way",
            )
        )


def _check_gates(every: Sequence[Gated]) -> None:
    for one in every:
        if any(map(is_meta, (one.gate.log_alpha, *(site.weight for site in one.sites)))):
            raise StateError(
                explain(
                    f"prune at {one.name!r}",
                    "weights and gates must have data.",
                    got="device meta",
                    hint="model.to_empty(device=...) and load_state_dict first",
                )
            )
    for one in every:
        if not one.sites and one.layer is None:
            raise StateError(
                explain(
                    f"prune at {one.name!r}",
                    "a standalone gate is part of the model's own code and cannot be folded away.",
                    hint="replace it in the model by a constant mask from gate.eval()() first",
                )
            )
        if not all(bool(torch.isfinite(part).all()) for (part,) in pieces(one.gate.log_alpha.detach())):
            raise StateError(
                explain(f"prune at {one.name!r}", "log-odds must be finite.", got="NaN", hint="a smaller gate_lr")
            )


def check_storage(sparse_format: str | None, block_size: object) -> None:
    """The sparse format must be known, and a block two positive integers.

    Raises
    ------
    SpecError
    """
    if sparse_format not in (None, "csr", "bsr"):
        raise SpecError(
            explain("prune", "the sparse format must be known.", expected="'csr' or 'bsr'", got=repr(sparse_format))
        )
    pair = isinstance(block_size, tuple) and len(block_size) == 2
    if not (pair and all(isinstance(n, int) and n > 0 for n in block_size)):  # type: ignore[attr-defined]
        raise SpecError(explain("prune", "block_size must be two positive integers.", got=repr(block_size)))


def check_coupled(
    model: nn.Module, every: Sequence[Gated], example_inputs: Sequence[Any] | None, *, inplace: bool
) -> None:
    """Coupled groups are cut in a copy, which is compared with the gated model on example inputs.

    Parameters
    ----------
    model : nn.Module
    every : sequence of Gated
        All gates of ``model``.
    example_inputs : sequence or None
    inplace : bool

    Raises
    ------
    StateError
    """
    coupled = [part for one in every if (part := one.coupled or one.layer)]
    if not coupled:
        return
    if coupled[0].prefix:
        raise StateError(
            explain(
                "prune",
                "a model with coupled gates is cut as it was sparsified.",
                got=f"a wrapper that holds it at {coupled[0].prefix.rstrip('.')!r}",
                hint="prune that module",
            )
        )
    if example_inputs is None:
        raise StateError(
            explain(
                "prune",
                "a model with coupled gates is compared before and after it is cut.",
                got="no example_inputs",
                hint="prune(model, example_inputs=(x,))",
            )
        )
    if inplace:
        raise StateError(
            explain("prune", "a model with coupled gates is cut in a copy.", got="inplace=True", hint="inplace=False")
        )
    _check_sites(model, [site for one in every if one.coupled for site in one.coupled.group.sites])


def _check_sites(model: nn.Module, sites: Iterable[GroupSite]) -> None:
    """What groups hold must still be where it was when they were gated, of the same shape."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
    for site in sites:
        for name in site.names:
            path, dot, own = name.rpartition(".")
            found = shapes.get(name, shapes.get(f"{path}{dot}parametrizations.{own}.original"))
            if found != site.own_shape:
                raise StateError(
                    explain(
                        f"prune at {name!r}",
                        "a model with coupled gates is cut as it was sparsified.",
                        expected=f"a tensor of shape {site.own_shape}",
                        got="no tensor of that name" if found is None else f"shape {found}",
                        hint="take adapters out (peft: unload), prune, and add them to the pruned model",
                    )
                )
