"""Why ``torch.export`` stopped: the model's own line, the module that ran, and the reason in plain words."""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from torch import nn

from l0hooks._torch.running import OUT_OF_MEMORY, evaluating
from l0hooks._torch.tensors import beside
from l0hooks.errors import UnsupportedModuleError, explain

_LIBRARIES = frozenset({"torch", "l0hooks", "numpy", "einops", *sys.stdlib_module_names}) - {"__main__"}
_DATA = ("GuardOnDataDependent", "DataDependentOutput", "DynamicOutputShape")
_CACHE = re.compile(r"Found <class 'transformers\.cache_utils\.\w+'> in output")  # of transformers' decoders
_BRANCH = re.compile(r"(^|[^\w])(if|elif|while|assert)\b")


def export_failure(model: nn.Module, example_inputs: Sequence[Any], error: Exception) -> UnsupportedModuleError:
    """What to raise when exporting ``model`` failed with ``error``.

    Parameters
    ----------
    model : nn.Module
        Run once in evaluation mode, to tell a model that fails by itself from one that only cannot be exported.
    example_inputs : sequence
    error : Exception
        What ``torch.export`` raised.
    """
    own = _own_failure(model, example_inputs)
    if own is not None:
        return UnsupportedModuleError(
            explain(
                "channel_groups",
                "the model must run on the example inputs.",
                got=f"the model itself fails{_place(model, own)[0]}; {_first_line(own)}",
                hint="example inputs of the usual kind, as a tuple of positional arguments",
            )
        )
    place, text = _place(model, error)
    return UnsupportedModuleError(
        explain(
            "channel_groups",
            "torch.export must be able to trace the model.",
            got=f"{_reason(error, text)}{place}; {_first_line(error)}",
            hint=_hint(error),
        )
    )


def _own_failure(model: nn.Module, example_inputs: Sequence[Any]) -> Exception | None:
    try:
        with evaluating(model):
            model(*beside(model, example_inputs))
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # noqa: BLE001  # a model's own code can raise anything
        return error
    return None


def _place(model: nn.Module, error: Exception) -> tuple[str, str]:
    """Where a model's own code stopped, for a message, and the text of that line; empty where none is known."""
    names = {id(module): name for name, module in model.named_modules()}
    line = text = module = ""
    for one in _chain(error):
        frames = list(traceback.walk_tb(one.__traceback__))
        for frame, number in frames:
            running = frame.f_locals.get("self")
            if id(running) in names:
                module = f"module {names[id(running)]!r}" if names[id(running)] else "the model"
                module += f": {type(running).__name__}"
            if _is_own(frame):
                code = frame.f_code
                text = linecache.getline(code.co_filename, number, frame.f_globals).strip()
                line = f" at {code.co_filename}:{number}, in {code.co_qualname}" + (f": `{text}`" if text else "")
        if line:
            break
    return line + (f" ({module})" if module else ""), text


def _is_own(frame: FrameType) -> bool:
    """Whether a frame runs the user's code, not that of a library underneath."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package not in _LIBRARIES and frame.f_code.co_filename != "<string>"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception, text: str) -> str:
    """What the code did that an exported graph cannot."""
    for one in _chain(error):
        kind, message = type(one).__name__, str(one)
        if kind.startswith(_DATA):
            if _BRANCH.search(text):
                return "branches on data"
            if "specialized" in message:
                return "makes a Python number of data"
            return "decides by data"
        if "numpy" in message:
            return "calls into numpy"
        if "data pointer" in message or "data_ptr" in message:
            return "reaches into a tensor's memory"
        if "fake impl" in message or kind.startswith(("UnsupportedOperator", "OperatorWithout")):
            return "runs an operator that torch.export does not know"
    return "stops"


def _hint(error: Exception) -> str:
    """What usually helps."""
    if any(_CACHE.search(str(one)) for one in _chain(error)):
        return "model.config.use_cache = False until it is pruned; a graph cannot return a cache of keys and values"
    return "groups declared by hand: sparsify(..., groups=[l0hooks.structure.declare_group(model, ...)])"


def _first_line(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line.strip()}" if line else type(error).__name__
