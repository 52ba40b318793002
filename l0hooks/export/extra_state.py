"""What modules return from ``get_extra_state``, as plain data for the plan of a file, without pickle."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.tensors import is_meta
from l0hooks.errors import InvalidValueError, StateError, explain

_KEY = "_extra_state"  # the last part of the name in a state
_DEEPEST = 30  # nesting
_MOST_BYTES = 10_000_000  # of one tensor: plans are read as text
_PLAIN = (bool, int, float, str, type(None))
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def is_extra(name: str) -> bool:
    """Whether an entry of a state is what a module returned from ``get_extra_state``."""
    return name.rpartition(".")[2] == _KEY


def extra_states(model: nn.Module) -> dict[str, Any]:
    """All extra states of a model, described as plain data, by their name in the state.

    Raises
    ------
    StateError
        If one holds anything but tensors, numbers, strings, and lists, tuples and dicts of these.

    Examples
    --------
    >>> extra_states(nn.Linear(2, 2))
    {}
    """
    return {name: _described(value, name) for name, value in model.state_dict().items() if is_extra(name)}


def made(described: Any, where: str) -> Any:
    """The extra state that was described.

    Raises
    ------
    InvalidValueError
        If ``described`` is not what :func:`extra_states` makes.

    Examples
    --------
    >>> made({"list": [{"plain": 3}, {"tuple": []}]}, "a plan")
    [3, ()]
    """
    try:
        return _made(described)
    except (ValueError, TypeError, KeyError, RecursionError, RuntimeError, binascii.Error) as error:
        raise InvalidValueError(
            explain(where, "an extra state must be one that was described.", got=repr(described)[:80])
        ) from error


def _described(value: Any, name: str, depth: int = 0) -> dict[str, Any]:
    if depth > _DEEPEST:
        raise _refusal(name, f"one nested deeper than {_DEEPEST} levels")
    if type(value) in _PLAIN:
        return {"plain": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(one, name, depth + 1) for one in value]}
    if isinstance(value, dict):
        pairs = [[_described(k, name, depth + 1), _described(v, name, depth + 1)] for k, v in value.items()]
        return {"dict": pairs}
    if not isinstance(value, Tensor):
        raise _refusal(name, f"one that holds a {type(value).__name__}")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES or value.layout != torch.strided or is_meta(value):
        raise _refusal(name, f"a tensor of {dtype}, {value.layout}, on {value.device}")
    if value.nbytes > _MOST_BYTES:
        raise _refusal(name, f"a tensor of {value.nbytes:,} bytes")
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"tensor": [dtype, list(value.shape), base64.b64encode(data).decode()]}


def _refusal(name: str, got: str) -> StateError:
    return StateError(
        explain(
            f"save_pruned at {name!r}",
            "an extra state must consist of tensors, numbers, strings, lists, tuples and dicts.",
            got=got,
            hint="a get_extra_state that returns a tensor or a dict of numbers; or torch.save(model.state_dict(), ...)",
        )
    )


def _made(described: Any) -> Any:
    if not isinstance(described, dict):
        raise TypeError(type(described))
    ((kind, value),) = described.items()
    if kind == "plain" and type(value) in _PLAIN:
        return value
    if kind in ("list", "tuple") and isinstance(value, list):
        parts = [_made(one) for one in value]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict" and isinstance(value, list):
        return {_made(key): _made(one) for key, one in value}
    if kind != "tensor":
        raise ValueError(kind)
    dtype, shape, text = value
    data = bytearray(base64.b64decode(text, validate=True))
    flat = torch.frombuffer(data, dtype=DTYPES[dtype]) if data else torch.zeros(0, dtype=DTYPES[dtype])
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(shape)
    return flat.reshape(shape).clone()
