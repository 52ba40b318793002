"""Contexts that run models in evaluation mode or on shapes only, and functions that the compiler skips."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from l0hooks._torch.attributes import SIMPLE, Attributes
from l0hooks._torch.names import lookup

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # no sign of a fault in the model


@contextmanager
def evaluating(model: nn.Module, *, afresh: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients; modes, attributes and the random state are restored afterwards.

    A model may keep what it computes in attributes: under tracing these are tensors without data. It returns no caches
    of keys and values, which no graph can return and which are smaller once heads are cut.

    Parameters
    ----------
    model : nn.Module
    afresh : bool
        Go through training mode first, in which models drop what they keep in evaluation.
    """
    before = Attributes(model)
    modes = [(module, module.training) for module in model.modules()]
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        if afresh:
            model.train()
        if afresh or any(training for _, training in modes):  # a needless eval() would discard cached weights
            model.eval()
        with torch.random.fork_rng(gpus), torch.no_grad(), _without_caches(model):
            yield
    finally:
        before.restore()
        for module, training in modes:
            module.training = training


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode without gradients; everything is restored afterwards, as by :func:`evaluating`."""
    with evaluating(model):
        model.train()
        yield


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Switch ``use_cache`` off wherever it is on."""
    switched = [table for table in _settings(model) if table.get("use_cache") is True]
    for table in switched:
        table["use_cache"] = False
    try:
        yield
    finally:
        for table in switched:
            table["use_cache"] = True


def _settings(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The attributes of all modules and of their configurations: an encoder and a decoder may have copies of one."""
    seen: set[int] = set()
    found: list[object] = [value for module in model.modules() for value in (module, *vars(module).values())]
    while found:
        value = found.pop()
        if type(value) in SIMPLE:  # most of them
            continue
        table = getattr(value, "__dict__", None)
        if not isinstance(table, dict) or isinstance(value, (Tensor, type, ModuleType)) or id(value) in seen:
            continue
        seen.add(id(value))
        yield table
        if not isinstance(value, nn.Module):  # a configuration may hold those of its parts
            found += [part for name, part in table.items() if "config" in name]


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Let ``model`` drop, **in place**, what it keeps in evaluation, and compute it again if its modes say so.

    It goes through training mode, and every module back into its own.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, training in modes:  # from the outside in
        if module.training != training:
            module.train(training)


@contextmanager
def slow_attention() -> Iterator[None]:
    """Disable torch's fused encoder path, which calls no submodule and therefore runs no hooks."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def shapes_alone() -> AbstractContextManager[object]:
    """A context for models on the meta device, where code that skips checks of data under tracing skips them."""
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import
    except ImportError:
        return nullcontext()  # such code then raises its own error about meta tensors
    mode: AbstractContextManager[object] = FakeTensorMode(allow_non_fake_inputs=True)
    return mode


def run_eagerly(*functions: Callable[..., object]) -> None:
    """Keep the compiler from tracing hooks of the compiled model itself, which it calls eagerly.

    Hooks inside a graph are still traced. This does the work of ``skip_code`` of ``torch._dynamo``, whose import takes
    a second. If private names are missing, ``skip_code`` is used; without it the compiler traces the hooks, slowly.
    """
    frames: Any = lookup("_C._dynamo.eval_frame", None)
    names: set[str] = set() if frames is None else set(vars(frames))
    for function in functions:
        inner = inspect.unwrap(function)
        if "set_code_exec_strategy" in names and {"_FrameAction", "_FrameExecStrategy"} <= names:
            action = frames._FrameAction
            frames.set_code_exec_strategy(inner.__code__, frames._FrameExecStrategy(action.SKIP, action.DEFAULT))
        elif "skip_code" in names and TorchVersion(torch.__version__) < "2.7":
            frames.skip_code(inner.__code__)
        else:
            _skip_by_dynamo(inner)


def _skip_by_dynamo(function: Callable[..., object]) -> None:
    try:
        skip_code: Any = importlib.import_module("torch._dynamo.eval_frame").skip_code
    except (ImportError, AttributeError):
        return
    skip_code(function.__code__)
