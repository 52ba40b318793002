"""Why ``torch.export`` stopped: the line of the model's code, the module, and the reason."""

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
_DATA_DEPENDENT_ERRORS = ("GuardOnDataDependent", "DataDependentOutput", "DynamicOutputShape")
_CACHE_OUTPUT = re.compile(r"Found <class 'transformers\.cache_utils\.\w+'> in output")  # of transformers' decoders
_LONGEST = 400  # characters of a line of torch's message
_BRANCH_KEYWORD = re.compile(r"(^|[^\w])(if|elif|while|assert)\b")


def export_failure(model: nn.Module, example_inputs: Sequence[Any], error: Exception) -> UnsupportedModuleError:
    """The error to raise when exporting ``model`` failed with ``error``.

    Parameters
    ----------
    model : nn.Module
        Run once in evaluation mode, to see whether it fails without ``torch.export``, too.
    example_inputs : sequence
        Positional arguments of ``model``.
    error : Exception
        What ``torch.export`` raised.
    """
    own = _own_failure(model, example_inputs)
    if own is not None:
        return UnsupportedModuleError(
            explain(
                "channel_groups",
                "the model must run on the example inputs.",
                got=f"the model itself fails{_location(model, own)[0]}; {_first_line(own)}",
                hint="example inputs of the usual kind, as a tuple of positional arguments",
            )
        )
    place, text = _location(model, error)
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


def _location(model: nn.Module, error: Exception) -> tuple[str, str]:
    """Where the model's own code stopped, as part of a message, and the text of that line; empty if unknown."""
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
    """Whether a frame runs the user's code, not that of a library."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package not in _LIBRARIES and frame.f_code.co_filename != "<string>"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception, text: str) -> str:
    """What the code did that an exported graph cannot do."""
    for one in _chain(error):
        kind, message = type(one).__name__, str(one)
        if kind.startswith(_DATA_DEPENDENT_ERRORS):
            if _BRANCH_KEYWORD.search(text):
                return "branches on data"
            if "specialized" in message:
                return "turns data into a Python number"
            return "depends on the values of data"
        if "numpy" in message:
            return "calls into numpy"
        if "data pointer" in message or "data_ptr" in message:
            return "reads the address of a tensor's memory"
        if "fake impl" in message or kind.startswith(("UnsupportedOperator", "OperatorWithout")):
            return "runs an operator that torch.export does not know"
    return "stops"


def _hint(error: Exception) -> str:
    """The usual remedy."""
    if any(_CACHE_OUTPUT.search(str(one)) for one in _chain(error)):
        return "use_cache=False in the call that asks for a cache of keys and values, which a graph cannot return"
    return "groups declared by hand: sparsify(..., groups=[l0hooks.structure.declare_group(model, ...)])"


def _first_line(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line.strip()[:_LONGEST]}" if line else type(error).__name__
