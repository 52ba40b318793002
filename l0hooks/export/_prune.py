"""``prune``: from a gated model to a plain one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from l0hooks._torch.running import evaluating
from l0hooks.attach._summary import gates_kept, summarise, warn_tied, warn_unfinished
from l0hooks.attach.copies import folded_copy, folded_weights
from l0hooks.attach.gated_weight import Site
from l0hooks.attach.measured_size import count_parameters, count_zeros
from l0hooks.attach.plain import make_plain
from l0hooks.attach.summary_table import Summary
from l0hooks.attach.walk import iter_gated
from l0hooks.attach.width_weight import WidthWeight
from l0hooks.errors import StateError, explain
from l0hooks.export.comparison import Comparison
from l0hooks.export.cut_blocks import close_blocks, closed_blocks, groups_after, named_after, without_blocks
from l0hooks.export.cut_groups import members_that_stay, shrink
from l0hooks.export.fold_channels import Closed, after_cuts, closed_channels, cut_closed
from l0hooks.export.requirements import check_coupled, check_model, check_storage
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_modules import Bools
from l0hooks.structure.example_inputs import ExampleInputs, positional
from l0hooks.structure.macs import count_positions
from l0hooks.structure.remove_blocks import Renaming
from l0hooks.structure.width.fold import centre_norms

SparseFormat = Literal["csr", "bsr"]


@overload
def prune(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs | None = None,
    inplace: bool = False,
    sparse_format: SparseFormat | None = None,
    block_size: tuple[int, int] = (4, 4),
    return_report: Literal[False] = False,
) -> nn.Module: ...


@overload
def prune(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs | None = None,
    inplace: bool = False,
    sparse_format: SparseFormat | None = None,
    block_size: tuple[int, int] = (4, 4),
    return_report: Literal[True],
) -> tuple[nn.Module, Summary]: ...


def prune(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs | None = None,
    inplace: bool = False,
    sparse_format: SparseFormat | None = None,
    block_size: tuple[int, int] = (4, 4),
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, Summary]:
    """A plain model that computes what the gated one computes in evaluation: weight ← weight · test-time gate.

    The result holds no parametrization, hook or class of l0hooks: it can be pickled, scripted, exported and loaded
    wherever the original could. Weights with a closed gate are exact zeros, which the next step of an optimiser changes
    unless :func:`keep_zeros` holds them. With ``example_inputs``, closed channels are cut out if that changes no
    output: coupled ones always, those of single layers (gates on whole input or output channels, kernels or blocks) if
    the layers that read them permit it. The others stay as zeros, and the report's ``note`` says which and why.

    Parameters
    ----------
    model : nn.Module
        Not changed unless ``inplace``.
    example_inputs : sequence or mapping, optional
        Arguments of ``model``. If given, closed channels are cut out, and the outputs of both models in
        evaluation mode are compared.
    inplace : bool
        Prune ``model`` itself; its parameters stay the same objects, and nothing is cut out. A copy is made only to
        compare outputs, with ``example_inputs``, before ``model`` is changed.
    sparse_format : "csr" or "bsr", optional
        Store the weights of plain Linear layers (float32 or float64) as sparse tensors; channels of single layers are
        not cut out then.
    block_size : (int, int)
        Of ``"bsr"``; layers whose shape is no multiple of it stay dense.
    return_report : bool
        Also return a summary of what was removed.

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
    example_inputs = None if example_inputs is None else positional(model, example_inputs)
    every = list(iter_gated(model))
    sites = list({site.name: site for one in every for site in one.sites}.values())
    check_model(model, every, sites)
    check_storage(sparse_format, block_size)
    check_coupled(model, every, example_inputs, inplace=inplace)
    apart = not inplace or example_inputs is not None  # compared before ``model`` is changed
    weights = folded_weights(sites) if apart else {}  # else without memory for a second set of weights
    plain = make_plain(folded_copy(model, sites, weights)) if apart else model
    coupled = [one for one in every if one.coupled]
    groups = members_that_stay(coupled)
    centre_norms(plain, groups)
    kept = gates_kept(one for one in every if not one.coupled)
    kept |= {id(one.gate): int(stays.sum()) for one, (_, stays) in zip(coupled, groups, strict=True)}
    renaming, comparison = dict[str, str | None](), None
    with evaluating(model), _held(sites, weights):
        positions = None if example_inputs is None else _positions(model, plain, example_inputs)
        report = summarise(model, every, kept, positions)
        if example_inputs is not None:
            comparison, plain, renaming = _without_blocks(model, plain, closed_blocks(every), example_inputs)
    groups, names = groups_after(groups, renaming), set(named_after(dict.fromkeys(_reading(sites)), renaming))
    closed = named_after(closed_channels(sites) if not inplace and sparse_format is None else {}, renaming)
    target, note = plain if apart else _folded(model, sites), ""
    if comparison is not None and example_inputs is not None:
        if groups:
            declared = any(one.coupled.plan.declared for one in coupled if one.coupled)
            target, note = shrink(plain, groups, comparison, example_inputs, declared=declared)
        target, note = _without_closed(target, groups, closed, comparison, example_inputs, note)
    if sparse_format is not None:
        _store_sparse(target, {name.rpartition(".")[0] for name in names}, sparse_format, block_size)
    if comparison is not None and (target is plain or sparse_format is not None):  # others were compared when cut
        _refuse_difference(comparison, target)
    if inplace and apart:
        target = _folded(model, sites)
        if sparse_format is not None:
            _store_sparse(target, {site.module_name for site in sites}, sparse_format, block_size)
    warn_unfinished("prune", report)
    warn_tied("prune", every)
    exported, zeros = count_parameters(target, names), count_zeros(target, names)
    report = replace(report, note=note, exported_parameters=exported, exported_zeros=zeros)
    return (target, report) if return_report else target


def _without_blocks(
    model: nn.Module, plain: nn.Module, gone: Sequence[str], example_inputs: Sequence[Any]
) -> tuple[Comparison, nn.Module, Renaming]:
    """A comparison with ``model``, its plain copy without the blocks of ``gone``, and the new names of the others."""
    close_blocks(plain, gone)
    comparison = Comparison(model, example_inputs, twin=plain)
    return comparison, *without_blocks(plain, gone)


def _reading(sites: Sequence[Site]) -> set[str]:
    """The gated weights whose zeros are those of gates; an embedding's row of zeros is of the model itself."""
    return {site.name for site in sites if not isinstance(site.gating, WidthWeight)}


@contextmanager
def _held(sites: Sequence[Site], weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Let gated layers evaluate with these products (without any, with their own), and keep none afterwards.

    Products kept earlier may be wrong, because a change through ``.data`` leaves no trace.
    """
    for site in sites:
        site.gating.kept.drop()
    try:
        for site in sites if weights else ():
            site.gating.kept.hold(weights[id(site.weight)])
        yield
    finally:
        for site in sites:
            site.gating.kept.drop()


@torch.no_grad()
def _folded(model: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """``model`` itself, every weight multiplied with its test-time gates; one memory once."""
    for site in {site.weight.data_ptr(): site for site in sites}.values():
        site.gating.fold_into(site.weight, out=site.weight)
    return make_plain(model)


def _positions(model: nn.Module, plain: nn.Module, example_inputs: Sequence[Any]) -> dict[tuple[int, str], float]:
    """Multiply-adds per weight of ``model``, counted on ``plain``: its plain copy, or the model itself."""
    counted = count_positions(plain, example_inputs)
    names = dict(plain.named_modules())
    gated = {id(names[name]): id(module) for name, module in model.named_modules() if name in names}
    return {(gated[key], tensor_name): count for (key, tensor_name), count in counted.items()}


def _refuse_difference(comparison: Comparison, target: nn.Module) -> None:
    wrong = comparison.wrong(target)
    if wrong:
        raise StateError(
            explain(
                "prune",
                "the pruned model must compute what the gated one computes.",
                expected=f"a difference of at most {comparison.allowed:.1e} of the output's scale",
                got=wrong,
                hint="a model whose evaluation is deterministic",
            )
        )


def _without_closed(
    target: nn.Module,
    groups: Sequence[tuple[ChannelGroup, Bools]],
    closed: Closed,
    comparison: Comparison,
    example_inputs: Sequence[Any],
    note: str,
) -> tuple[nn.Module, str]:
    """``target`` without the channels that gates on single layers have closed, and the note for the report."""
    if note and closed:
        return target, f"{note}; channels that gates on single layers closed stay as zeros in it"
    target, remark = cut_closed(target, after_cuts(closed, groups), comparison, example_inputs)
    return target, note or remark


def _store_sparse(
    target: nn.Module, names: Iterable[str], sparse_format: SparseFormat, block_size: tuple[int, int]
) -> None:
    """Store gated Linear weights as CSR or BSR, **in place**; torch has no kernels for other layers and dtypes."""
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
