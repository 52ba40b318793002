"""One weight that ``sparsify`` will gate, checked; and which are tied to weights that get other gates or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l0hooks._torch.memory import pieces
from l0hooks._torch.modules import tensors_of
from l0hooks._torch.tensors import is_meta, is_sharded, overlap, same_tensor, storage_of
from l0hooks.attach.gated_weight import Gating
from l0hooks.attach.spec import GateSpec, named_modules
from l0hooks.errors import SpecError, explain
from l0hooks.structure.layers import GateLayout, WeightLayout, gate_layout
from l0hooks.structure.stacked_weights import bare_layout


@dataclass(frozen=True)
class WeightPlan:
    """One weight that will be gated."""

    name: str
    module: nn.Module
    tensor_name: str
    weight: nn.Parameter
    spec: GateSpec
    layout: GateLayout


def plan_weight(
    name: str, module: nn.Module, tensor_name: str, layout: WeightLayout | None, spec: GateSpec
) -> WeightPlan:
    """One weight's plan, after every check that needs nothing but the weight; without a layout it is no layer's."""
    if parametrize.is_parametrized(module, tensor_name):
        gated = isinstance(module.parametrizations[tensor_name][0], Gating)  # type: ignore[index]
        raise SpecError(
            explain(
                repr(name),
                "a weight can be gated only once." if gated else "the weight must be a plain parameter.",
                got="a gated weight" if gated else "a weight with another parametrization",
                hint="exclude it, or prune the model first"
                if gated
                else "torch.nn.utils.parametrize.remove_parametrizations",
            )
        )
    weight = dict(tensors_of(module)).get(tensor_name)
    if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.parameter.UninitializedParameter):
        kind = "no parameter of that name" if weight is None else type(weight).__name__
        raise SpecError(
            explain(
                repr(name),
                "the weight must be an initialised parameter.",
                got=kind,
                hint="remove weight_norm or similar; run a lazy module once",
            )
        )
    check_values(name, weight)
    laid = (
        bare_layout(spec.granularity, tuple(weight.shape), where=repr(name))
        if layout is None
        else gate_layout(spec.granularity, layout, weight.shape, where=repr(name))
    )
    return WeightPlan(name, module, tensor_name, weight, spec, laid)


def check_kind(name: str, weight: Tensor) -> None:
    """The weight must be plain floating-point numbers: none that are quantised, now or when they are moved to a GPU.

    Raises
    ------
    SpecError
    """
    kind = type(weight)
    # a class that computes with its own numbers, as in torchao, or quantises when it is moved, as in bitsandbytes
    special = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or kind.to is not Tensor.to
    if weight.is_floating_point() and (not special or is_sharded(weight)):
        return
    shown = "" if kind in (Tensor, nn.Parameter) else f", {kind.__name__} of {kind.__module__.partition('.')[0]}"
    raise SpecError(
        explain(
            repr(name),
            "gates multiply real floating-point weights, which are not quantised.",
            expected="a plain tensor of a floating dtype",
            got=f"{weight.dtype}{shown}",
            hint="sparsify and prune the model before it is quantised",
        )
    )


def check_values(name: str, weight: Tensor) -> None:
    """The weight must be made of finite floating-point numbers.

    Raises
    ------
    SpecError
    """
    check_kind(name, weight)
    if weight.numel() == 0:
        raise SpecError(explain(repr(name), "the weight must have elements.", got=f"shape {tuple(weight.shape)}"))
    if not is_meta(weight) and not all(bool(torch.isfinite(piece).all()) for (piece,) in pieces(weight.detach())):
        raise SpecError(
            explain(
                repr(name),
                "the weight must be finite.",
                got="NaN or infinite values",
                hint="check the checkpoint it came from",
            )
        )


def tie_clashes(model: nn.Module, plans: Sequence[WeightPlan]) -> dict[str, str]:
    """The weights whose memory belongs to another parameter too that does not get the same gates.

    Parameters
    ----------
    model : nn.Module
    plans : sequence of WeightPlan

    Returns
    -------
    dict from str to str
        By the weight's name an error message.

    Examples
    --------
    >>> tie_clashes(nn.Linear(2, 2), [])
    {}
    """
    by_storage: dict[tuple[bool, int], list[tuple[str, nn.Module, str, Tensor]]] = {}
    for name, module in named_modules(model):
        for tensor_name, tensor in tensors_of(module):
            full = ".".join(filter(None, (name, tensor_name)))
            if not isinstance(tensor, nn.parameter.UninitializedParameter):
                by_storage.setdefault(storage_of(tensor), []).append((full, module, tensor_name, tensor))
    planned = {(id(plan.module), plan.tensor_name): plan for plan in plans}
    clashing: dict[str, str] = {}
    found = True
    while found:  # what is left out leaves out what is tied to it
        found = False
        for plan in list(planned.values()):
            places = by_storage[storage_of(plan.weight)]
            message = next(filter(None, (_clash(plan, place, planned) for place in places)), None)
            if message is not None:
                clashing[plan.name], found = message, True
        planned = {key: plan for key, plan in planned.items() if plan.name not in clashing}
    return clashing


def _clash(
    plan: WeightPlan, place: tuple[str, nn.Module, str, Tensor], planned: dict[tuple[int, str], WeightPlan]
) -> str | None:
    """Why a weight cannot be gated beside another place of its memory; None if it can."""
    full, module, tensor_name, tensor = place
    if (module is plan.module and tensor_name == plan.tensor_name) or not overlap(plan.weight, tensor):
        return None
    other = planned.get((id(module), tensor_name))
    if (
        other is not None
        and replace(other.spec, granularity=plan.spec.granularity) == plan.spec  # input here is output there
        and other.layout == plan.layout
        and same_tensor(plan.weight) == same_tensor(tensor)
    ):
        return None
    return explain(
        repr(plan.name),
        "a tied weight needs the same gates at all its places.",
        expected=f"{full!r} gated alike, over the same axes",
        got="left out" if other is None else f"granularity {other.spec.granularity!r} there",
        hint="name both in the specification, or exclude both",
    )
