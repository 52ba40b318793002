"""Pickles of gated layers: ``torch.save(model)``, ``pickle`` and ``copy.copy``.

A gated layer has a class of its own, which torch makes at run time and refuses to pickle. Its pickle names the
layer's plain class instead, and the class with the gates is made again where the pickle is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from l0hooks._torch.modules import parameters_of, parametrization_lists, read_directly
from l0hooks.attach.gated_weight import Gating


def make_picklable(module: nn.Module) -> None:
    """Let a gated layer be pickled, **in place**. Its deepcopies are made as before.

    Parameters
    ----------
    module : nn.Module
        With parametrizations, and a class that no other module has.
    """
    cls = type(module)
    if "__getstate__" in vars(cls):
        del cls.__getstate__  # torch's, which raises
    cls.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """What ``pickle`` stores of a gated layer: what its plain class stores, and which tensors are gated."""
    gated_class = type(module)
    plain = gated_class.__bases__[0]
    reduced = super(gated_class, module).__reduce_ex__(protocol)
    if isinstance(reduced, str):  # the name of a global object, which is not this module
        raise TypeError(f"{plain.__name__}.__reduce__ names a global object and cannot store gates")
    build, arguments, *rest = reduced
    build, *arguments = (plain if part is gated_class else part for part in (build, *arguments))
    chains = parametrization_lists(module)
    gated = tuple(name for name, chain in chains.items() if isinstance(chain[0], Gating))
    state = rest[0] if rest else None
    stored = isinstance(state, dict) and "parametrizations" in state.get("_modules", {})
    others = None if stored else module.parametrizations  # a class that stores only what it is built from
    return (
        rebuild_gated,
        (build, tuple(arguments), tuple(chains), gated, others, RemovableHandle.next_id),
        *rest,
    )


def rebuild_gated(
    build: Callable[..., nn.Module],
    arguments: tuple[Any, ...],
    parametrized: Sequence[str],
    gated: Sequence[str],
    parametrizations: nn.Module | None,
    next_hook: int,
) -> nn.Module:
    """A gated layer out of a pickle; what it holds is set afterwards.

    Parameters
    ----------
    build, arguments : callable, tuple
        What makes the plain layer.
    parametrized, gated : sequence of str
        Its tensors with any parametrization, and those with gates.
    parametrizations : nn.ModuleDict or None
        Where the plain class does not store them itself.
    next_hook : int
        The number of the next hook where the pickle was made: new hooks must not take the numbers of stored ones.
    """
    RemovableHandle.next_id = max(RemovableHandle.next_id, next_hook)
    module = build(*arguments)
    plain = type(module)
    module.__class__ = type(f"Parametrized{plain.__name__}", (plain,), _namespace(plain, parametrized))
    make_picklable(module)
    for tensor_name in gated:
        read_directly(module, tensor_name)
    if parametrizations is not None:
        for tensor_name in parametrized:
            parameters_of(module).pop(tensor_name, None)
        module.add_module("parametrizations", parametrizations)
    return module


def _namespace(plain: type[nn.Module], parametrized: Sequence[str]) -> dict[str, Any]:
    """What torch adds to a class whose tensors of these names are parametrized."""
    sample = nn.Module()
    for tensor_name in parametrized:
        sample.register_parameter(tensor_name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(sample, tensor_name, nn.Identity(), unsafe=True)
    added = vars(type(sample))
    names = [*parametrized, *(() if "__deepcopy__" in dir(plain) else ("__deepcopy__",))]
    return {name: added[name] for name in names}
