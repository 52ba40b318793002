"""Layers that a model uses in training only, such as the auxiliary heads of GoogLeNet."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from l0hooks._torch.graphs import export
from l0hooks._torch.modules import parametrization_lists, tensors_of
from l0hooks._torch.running import OUT_OF_MEMORY, as_in_training, evaluating, shapes_alone
from l0hooks._torch.tensors import beside, has_meta
from l0hooks.errors import in_one_line
from l0hooks.structure.cut_modules import apply_cuts, plan_cuts
from l0hooks.structure.groups import ChannelGroup


def used_in_training_only(model: nn.Module, example_inputs: Sequence[Any], unused: Collection[str]) -> bool:
    """Whether ``model`` calls layers in training mode that it does not call in evaluation.

    Parameters
    ----------
    model : nn.Module
        Everything that running it changes is restored.
    example_inputs : sequence
        Positional arguments of ``model``. If it does not take them in training mode, for want of targets, say, the
        answer is no.
    unused : collection of str
        Tensors that the graph of the evaluation does not use.

    Examples
    --------
    >>> used_in_training_only(nn.Linear(2, 2), (torch.zeros(1, 2),), ())
    False
    """
    layers = [module for name, module in model.named_modules() if _all_unused(name, module, unused)]
    called: list[nn.Module] = []
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(lambda module, _: called.append(module))
            stack.callback(handle.remove)
        return bool(layers) and not training_error(model, example_inputs) and bool(called)


def _all_unused(name: str, module: nn.Module, unused: Collection[str]) -> bool:
    names = [f"{name}.{tensor_name}".lstrip(".") for tensor_name, _ in tensors_of(module)]
    return bool(names) and all(one in unused for one in names)


def training_program(model: nn.Module, example_inputs: Sequence[Any]) -> torch.export.ExportedProgram | None:
    """The graph of ``model`` in training mode, if it can be exported in it."""
    with as_in_training(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first export has given them
        try:
            return export(model, beside(model, example_inputs))
        except OUT_OF_MEMORY:
            raise
        except Exception:  # noqa: BLE001  # whatever the tracer or the model's code raises
            return None


def training_error(model: nn.Module, example_inputs: Sequence[Any], *, training: bool = True) -> str:
    """The error that ``model`` raises in training mode, in one line; empty if it raises none.

    Parameters
    ----------
    model : nn.Module
        Everything that running it changes is restored.
    example_inputs : sequence
        Positional arguments of ``model``.
    training : bool
        False: in evaluation.
    """
    with ExitStack() as stack:
        stack.enter_context(as_in_training(model) if training else evaluating(model))
        if has_meta(model):
            stack.enter_context(shapes_alone())
        try:
            model(*beside(model, example_inputs))
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001  # a model's own code can raise anything
            return in_one_line(error)
    return ""


def breaking_training(model: nn.Module, example_inputs: Sequence[Any], groups: Sequence[ChannelGroup]) -> list[int]:
    """The groups that cannot be cut from ``model`` because training mode would raise an error then.

    A copy without one member of every group is tried; if it raises one, a copy for each group.

    Parameters
    ----------
    model : nn.Module
        Not changed. One with parametrizations is not tried.
    example_inputs : sequence
        Positional arguments of ``model``.
    groups : sequence of ChannelGroup

    Returns
    -------
    list of int
        Their indices.
    """
    plain = not any(parametrization_lists(module) for module in model.modules())
    if not plain or not _breaks(model, example_inputs, groups):
        return []
    return [number for number, group in enumerate(groups) if _breaks(model, example_inputs, [group])]


def _breaks(model: nn.Module, example_inputs: Sequence[Any], groups: Sequence[ChannelGroup]) -> bool:
    """Whether a copy without the first member of each group runs in evaluation, and in training mode does not."""
    small = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    apply_cuts(small, plan_cuts((group, np.arange(group.size) > 0) for group in groups))
    if not training_error(small, example_inputs):
        return False
    return len(groups) > 1 or not training_error(small, example_inputs, training=False)
