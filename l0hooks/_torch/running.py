"""How models and functions are run: in evaluation, on shapes alone, out of the compiler's reach."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from l0hooks._torch.names import lookup

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # no reason to believe that a model is wrong


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode and the random state come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    if any(training for _, training in modes):  # else what evaluation has kept stays kept
        model.eval()
    try:
        with torch.random.fork_rng(gpus), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def slow_attention() -> Iterator[None]:
    """torch's fused encoder path calls no submodule, so no hook would see it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def shapes_alone() -> AbstractContextManager[object]:
    """A context in which code that asks whether it is traced, before it looks at data, learns that it is."""
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode  # imported here, for it takes a while
    except ImportError:
        return nullcontext()  # such code then looks at data that a meta tensor does not have, and says so
    mode: AbstractContextManager[object] = FakeTensorMode(allow_non_fake_inputs=True)
    return mode


def run_eagerly(*functions: Callable[..., object]) -> None:
    """Keep the compiler from turning a hook of the compiled model itself, which it calls eagerly, into a graph.

    Hooks inside a graph are still traced. This is ``skip_code`` of ``torch._dynamo`` without the second that importing
    it takes; where its parts are missing, it is called after all. Without that, the compiler traces the hooks: slower.
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
