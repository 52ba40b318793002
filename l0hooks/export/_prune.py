"""``prune``: from a gated model to a plain one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import nn

from l0hooks._torch.memory import pieces
from l0hooks._torch.modules import parametrization_lists, unhook
from l0hooks._torch.running import evaluating
from l0hooks._torch.tensors import is_meta, is_sharded
from l0hooks.attach._summary import summary
from l0hooks.attach.copies import fold_copy
from l0hooks.attach.coupled_weight import MaskInput
from l0hooks.attach.gated_weight import Site, iter_sites
from l0hooks.attach.install import remove_gates
from l0hooks.attach.measured_size import count_parameters
from l0hooks.attach.summary_table import Summary
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import SpecError, StateError, explain
from l0hooks.export.comparison import Comparison
from l0hooks.export.cut_groups import members_that_stay, rewritten_from, shrink
from l0hooks.export.fold_channels import Closed, after_cuts, closed_channels, cut_closed
from l0hooks.gates.noise import Door
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_modules import Bools

SparseFormat = Literal["csr", "bsr"]


@overload
def prune(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    inplace: bool = False,
    sparse_format: SparseFormat | None = None,
    block_size: tuple[int, int] = (4, 4),
    return_report: Literal[False] = False,
) -> nn.Module: ...


@overload
def prune(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    inplace: bool = False,
    sparse_format: SparseFormat | None = None,
    block_size: tuple[int, int] = (4, 4),
    return_report: Literal[True],
) -> tuple[nn.Module, Summary]: ...


def prune(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    inplace: bool = False,
    sparse_format: SparseFormat | None = None,
    block_size: tuple[int, int] = (4, 4),
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, Summary]:
    """A plain model that computes what the gated one computes in evaluation: weight ← weight · test-time gate.

    The result holds no parametrization, hook or class of l0hooks: it pickles, scripts, exports and loads wherever
    the original did. Weights whose gate is closed are exact zeros. With ``example_inputs``, channels whose gates are
    closed are cut out where that changes nothing: coupled ones always, those of single layers (gates on whole input or
    output channels, kernels or blocks) where the layers that read them permit it. The others stay as zeros, and the
    report's ``note`` says which and why.

    Parameters
    ----------
    model : nn.Module
        Not changed unless ``inplace``.
    example_inputs : sequence, optional
        Positional arguments; if given, closed channels are cut out, and the outputs of both models are compared on
        them in evaluation mode.
    inplace : bool
        Prune ``model`` itself, without a copy; its parameters stay the same objects, and nothing is cut out.
    sparse_format : "csr" or "bsr", optional
        Store the weights of plain Linear layers (float32 or float64) as sparse tensors; channels of single layers are
        not cut out then.
    block_size : (int, int)
        Of ``"bsr"``; layers that it does not divide stay dense.
    return_report : bool
        Return the summary of what was removed, too.

    Returns
    -------
    nn.Module, or (nn.Module, Summary)

    Raises
    ------
    StateError
        If there are no gates, a gate stands alone, log-odds are not finite, or the outputs differ.
    SpecError
        If the sparse format is unknown, or the block size is not a pair of positive integers.

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> _ = sparsify(model, "weight")
    >>> prune(model)
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
    )
    """
    _check(model, sparse_format, block_size)
    _check_coupled(model, example_inputs, inplace=inplace)
    _drop_kept(model)  # a change through .data leaves no trace, and folding would see it
    with evaluating(model):  # once for all, so that every weight is folded once
        report = summary(model, example_inputs=example_inputs)
        comparison = None if example_inputs is None else Comparison(model, example_inputs, stays=not inplace)
    groups = members_that_stay(iter_gated(model))
    declared = any(one.coupled.plan.declared for one in iter_gated(model) if one.coupled)
    sites = list(iter_sites(model))
    closed = closed_channels(sites) if not inplace and sparse_format is None else {}
    _drop_kept(model)
    target = model if inplace else fold_copy(model)
    _remove_all(list(iter_sites(target)))
    for module in target.modules():
        unhook(module, (Door, MaskInput))
    note = ""
    if comparison is not None and example_inputs is not None:
        if groups:
            target, note = shrink(target, groups, comparison, example_inputs, declared=declared)
        target, note = _without_closed(target, groups, closed, comparison, example_inputs, note)
    if sparse_format is not None:
        _store_sparse(target, {site.module_name for site in sites}, sparse_format, block_size)
    every_size = rewritten_from(target) is None and sparse_format is None  # sparse tensors cannot be copied
    wrong = "" if comparison is None else comparison.wrong(target, every_size=every_size)
    if comparison is not None and wrong:
        raise StateError(
            explain(
                "prune",
                "the pruned model must compute what the gated one computes.",
                expected=f"a difference of at most {comparison.allowed:.1e} of the output's scale",
                got=wrong,
                hint="a model whose evaluation is deterministic",
            )
        )
    report = replace(report, note=note, exported_parameters=count_parameters(target, {site.name for site in sites}))
    return (target, report) if return_report else target


def _check(model: nn.Module, sparse_format: str | None, block_size: object) -> None:
    gated = list(iter_gated(model))
    spread = any(is_sharded(one.gate.log_alpha) for one in gated)
    if spread or any(hasattr(module, "set_requires_gradient_sync") for module in model.modules()):
        raise StateError(
            explain(
                "prune",
                "a model must lie whole in the process that prunes it.",
                got="one that fully_shard has spread over several",
                hint="load torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)) into a model sparsified in the same way",
            )
        )
    if not gated:
        raise StateError(explain("prune", "the model must hold gates.", got="none", hint="sparsify(model, ...) first"))
    for one in gated:
        if any(is_meta(tensor) for tensor in (one.gate.log_alpha, *(site.weight for site in one.sites))):
            raise StateError(
                explain(
                    f"prune at {one.name!r}",
                    "weights and gates must have data.",
                    got="device meta",
                    hint="model.to_empty(device=...) and load_state_dict first",
                )
            )
        if not one.sites:
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
    for site in iter_sites(model):
        if len(parametrization_lists(site.module)[site.tensor_name]) > 1:
            raise StateError(
                explain(
                    f"prune at {site.name!r}",
                    "gates must be the only parametrization of their weight.",
                    got="another one after them",
                    hint="torch.nn.utils.parametrize.remove_parametrizations on a copy, or gate the plain weight",
                )
            )
    if sparse_format not in (None, "csr", "bsr"):
        raise SpecError(
            explain("prune", "the sparse format must be known.", expected="'csr' or 'bsr'", got=repr(sparse_format))
        )
    pair = isinstance(block_size, tuple) and len(block_size) == 2
    if not (pair and all(isinstance(n, int) and n > 0 for n in block_size)):  # type: ignore[attr-defined]
        raise SpecError(explain("prune", "block_size must be two positive integers.", got=repr(block_size)))


def _check_coupled(model: nn.Module, example_inputs: Sequence[Any] | None, *, inplace: bool) -> None:
    """Cutting needs inputs to prove itself on, and a copy to fall back from."""
    coupled = [one.coupled for one in iter_gated(model) if one.coupled]
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


def _without_closed(
    target: nn.Module,
    groups: Sequence[tuple[ChannelGroup, Bools]],
    closed: Closed,
    comparison: Comparison,
    example_inputs: Sequence[Any],
    note: str,
) -> tuple[nn.Module, str]:
    """``target`` without the channels that gates on single layers have closed, and what there is to say."""
    if note and closed:
        return target, f"{note}; channels that gates on single layers closed stay as zeros in it"
    target, remark = cut_closed(target, after_cuts(closed, groups), comparison, example_inputs)
    return target, note or remark


def _drop_kept(model: nn.Module) -> None:
    for site in iter_sites(model):
        site.gating.kept.drop()


def _remove_all(sites: list[Site]) -> None:
    """Fold every weight once, a tied one too, then make its layers plain."""
    done: set[int] = set()
    for site in sites:
        remove_gates(site, folded=site.weight.data_ptr() in done)
        done.add(site.weight.data_ptr())


def _store_sparse(
    target: nn.Module, names: Iterable[str], sparse_format: SparseFormat, block_size: tuple[int, int]
) -> None:
    """Linear weights that were gated as CSR or BSR; torch has no such kernels for other layers and dtypes."""
    for name in names:
        module = target.get_submodule(name)
        parent = target.get_submodule(name.rpartition(".")[0])
        fused = isinstance(parent, nn.TransformerEncoderLayer)  # its fused path reads the weights as dense
        if type(module) is not nn.Linear or fused or module.weight.dtype not in (torch.float32, torch.float64):
            continue
        weight = module.weight.detach()
        if sparse_format == "csr":
            module.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=module.weight.requires_grad)
        elif not (weight.shape[0] % block_size[0] or weight.shape[1] % block_size[1]):
            module.weight = nn.Parameter(weight.to_sparse_bsr(block_size), requires_grad=module.weight.requires_grad)
