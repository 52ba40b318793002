"""Cut the closed members of coupled groups out of a plain model, and check on examples that it computes the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from l0hooks.attach.copies import run_copy
from l0hooks.attach.open_experts import at_least
from l0hooks.attach.walk import Gated
from l0hooks.errors import L0HooksWarning, StateError, UnsupportedModuleError, explain
from l0hooks.export.comparison import Comparison
from l0hooks.export.cut_and_repair import cut_and_repair
from l0hooks.export.cut_inside import Calls, cut_inside
from l0hooks.export.recipe import rewrite_by
from l0hooks.structure import ChannelGroup
from l0hooks.structure.cut_experts import cut_experts
from l0hooks.structure.cut_graph import FREE
from l0hooks.structure.cut_modules import Bools, plan_cuts
from l0hooks.structure.graph_sizes import Sizes
from l0hooks.structure.routers import show_all
from l0hooks.structure.training_trace import training_error

_MOST_NAMES = 3  # of graphs in a remark
SPELLINGS = (
    "Code that takes sizes from its layers' outputs keeps the modules: view(b, t, heads, -1), flatten(-2), "
    "reshape(b, t, -1), unflatten(-1, (-1, head_size))."
)
_GRAPHS = (
    "A graph calls the layers of torch.nn; what else the code does in training only, such as dropout in attention, it "
    f"does not. {SPELLINGS}"
)


def members_that_stay(gated: Iterable[Gated]) -> list[tuple[ChannelGroup, Bools]]:
    """The final support of every coupled group; of closed members those with the largest log-odds, if too few stay."""
    found = []
    for one in gated:
        if one.coupled is not None:
            group = one.coupled.plan.groups[one.coupled.number]
            mask = one.gate.support()
            if int(mask.sum()) < group.least or group.multiple > 1:
                mask = at_least(mask, one.gate.log_alpha, group.least, group.multiple)
            found.append((group, mask.cpu().numpy()))
    return found


def without_experts(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]]
) -> tuple[nn.Module, Sequence[tuple[ChannelGroup, Bools]]]:
    """A copy without the experts that are closed, and the other groups as they are in it; the same without experts."""
    if all(group.kind != "expert" for group, _ in groups):
        return model, groups
    small = run_copy(model)
    show_all(small)
    return small, cut_experts(small, groups)


def shrink(
    model: nn.Module,
    groups: Sequence[tuple[ChannelGroup, Bools]],
    comparison: Comparison,
    example_inputs: Sequence[Any],
    *,
    declared: bool = False,
    folded: bool = False,
) -> tuple[nn.Module, str]:
    """A copy of ``model`` cut down to the members that stay: its own modules if they can be, else its exported graph.

    Parameters
    ----------
    model : nn.Module
        Plain; the weights that read closed members are zero. Not changed.
    groups : sequence of (ChannelGroup, bool array)
    comparison : Comparison
        With what the gated model computes.
    example_inputs : sequence
    declared : bool
        Whether groups were given by hand. Then it is checked first that nothing else reads their closed members.
    folded : bool
        Whether constants were added to weights of ``model``, which rounds them.

    Returns
    -------
    (nn.Module, str)
        The smaller model, and a remark for the report; empty if it consists of the model's own modules.

    Warns
    -----
    L0HooksWarning
        If it is an exported graph, or raises an error in training mode where ``model`` raises none.

    Raises
    ------
    StateError
        If neither computes what it should, or something reads closed members.
    """
    model, groups = without_experts(model, groups)
    cuts = plan_cuts(groups)
    narrower = any(group.width is not None and not stays.all() for group, stays in groups)
    folded = folded or narrower  # the norms' weights are rounded
    small = copy.deepcopy(model) if declared else run_copy(model)  # cutting puts new tensors in place of old ones
    if declared:
        refuse_read_members(small, groups, comparison)
    wrong = cut_and_repair(small, cuts, groups, comparison, folded=folded)
    if not wrong:
        _warn_if_untrainable(model, small, example_inputs)
        return small, ""
    cut = inside(model, groups, comparison, folded=folded)
    if cut is not None:
        _warn_if_untrainable(model, cut[0], example_inputs)
        return cut[0], _told_inside(cut[1])
    hint = "exclude the group: sparsify(model, 'coupled', exclude=...)"
    failed = ["the norms of a narrower stream are folded into modules alone"] if narrower else []
    for free in () if narrower else FREE:
        try:
            graph, sizes = rewrite_by(model, cuts, example_inputs, free)
        except (StateError, UnsupportedModuleError) as error:
            failed.append(without_hint(error))
            if isinstance(error, UnsupportedModuleError):
                hint = f"sizes that the code takes from its layers; every layer in declare_group; or {hint}"
                break
            continue
        wrong_graph = comparison.wrong(graph, accepts=sizes.accept, folded=folded)
        if not wrong_graph:
            return graph, _told(wrong, sizes)
        failed.append(wrong_graph)
    raise StateError(
        explain(
            "prune",
            "the smaller model must compute what the gated one computes.",
            got=f"as modules: {wrong}; as a graph: {'; '.join(dict.fromkeys(failed))}",
            hint=hint,
        )
    )


def inside(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]], comparison: Comparison, *, folded: bool = False
) -> tuple[nn.Module, dict[str, str]] | None:
    """A copy cut module by module, and which modules are graphs; None if that cannot be done."""
    calls = Calls(comparison.allowed, comparison.inputs, comparison.expected)
    try:
        small, graphs = cut_inside(model, groups, calls)
    except (StateError, UnsupportedModuleError):
        return None
    return None if comparison.wrong(small, folded=folded) else (small, graphs)


def _warn_if_untrainable(model: nn.Module, small: nn.Module, example_inputs: Sequence[Any]) -> None:
    """Warn if a layer that is used in training only holds sizes by hand, which no comparison in evaluation shows."""
    error = training_error(copy.deepcopy(small), example_inputs)  # a copy: in training a model may write weights
    if error and not training_error(copy.deepcopy(model), example_inputs):
        text = explain(
            "prune",
            "the smaller model should run in training mode, too.",
            got=error,
            hint="in what it computes in training only, sizes taken from its layers' outputs; or exclude the layer",
        )
        warnings.warn(text, L0HooksWarning, stacklevel=4)


def _told_inside(graphs: Mapping[str, str]) -> str:
    """The remark on modules that are graphs, which is a warning, too; empty if there are none."""
    if not graphs:
        return ""
    names = ", ".join(list(graphs)[:_MOST_NAMES]) + (
        f" and {len(graphs) - _MOST_NAMES} more" if len(graphs) > _MOST_NAMES else ""
    )
    remark = f"{names}: a GraphModule, because its own code holds sizes by hand ({next(iter(graphs.values()))})"
    warnings.warn(
        f"prune: modules of the smaller model are graphs. {remark}. {_GRAPHS}",
        L0HooksWarning,
        stacklevel=4,
    )
    return remark


def _told(wrong: str, sizes: Sizes) -> str:
    """The remark on a graph, which is a warning, too."""
    remark = (
        f"a GraphModule for evaluation, because the model's own code holds sizes by hand ({wrong}); "
        f"sizes of its inputs that may vary: {sizes}"
    )
    warnings.warn(
        f"prune: the smaller model is {remark}. {_GRAPHS}",
        L0HooksWarning,
        stacklevel=4,
    )
    return remark


def refuse_read_members(model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]], comparison: Comparison) -> None:
    """Fill what will be cut with noise, **in place**: if the outputs change, something without a gate reads it.

    A closed member may happen to be zero on all example inputs. The cut would then look right.
    """
    for sign in (1.0, -1.0):  # a ReLU may hide one of the two
        _fill(model, groups, sign)
        wrong = comparison.wrong(model)
        if wrong:
            raise StateError(
                explain(
                    "prune",
                    "closed members must be irrelevant, whatever they hold.",
                    got=f"{wrong} with other numbers in them",
                    hint="name every layer that reads the group in declare_group(inputs=...); leave the group out if "
                    "anything else does; example inputs on which evaluation is deterministic",
                )
            )


@torch.no_grad()
def _fill(model: nn.Module, groups: Sequence[tuple[ChannelGroup, Bools]], sign: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for group, stays in groups:
        for site in group.sites if group.width is None else ():  # gates of a stream multiply what writes it
            if site.reads or site.buffer or stays.all():
                continue
            axis = site.axis - int(site.stacked)
            for name in site.names if site.stacked else site.names[:1]:
                tensor = model.get_parameter(name)
                dead = torch.from_numpy(site.indices[~stays].reshape(-1)).to(tensor.device)
                shape = [len(dead) if d == axis else n for d, n in enumerate(tensor.shape)]
                noise = torch.randn(shape, generator=generator, dtype=torch.float32)
                size = float(tensor.detach().abs().float().mean()) or 1.0  # larger ones might overflow in deep models
                tensor.index_copy_(axis, dead, (sign * size * noise).to(tensor))


def without_hint(error: Exception) -> str:
    """A message without its hint."""
    return " ".join(str(error).partition("\n  try:")[0].split())
