"""The attributes of a model's modules, so that a run which changes them can be undone."""

from __future__ import annotations

import operator
import sys
import types
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from l0hooks._torch.names import lookup

# without it copies take part in the running mode: slower
without_modes: Callable[[], AbstractContextManager[object]] = lookup(
    "utils._python_dispatch._disable_current_modes", nullcontext
)
_DEPTH = 6  # from a module to the tensors of a cache: config or cache, its list of layers, a layer, its own lists
_MANY = 10_000  # items: a vocabulary, not a cache
_PLAIN = ("types", "argparse", "collections", "dataclasses")  # modules of Python whose objects hold settings
_FOREIGN = frozenset({"torch", "l0hooks", "numpy", *sys.stdlib_module_names}) - {"__main__", *_PLAIN}
_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "l0hooks.")
SIMPLE = frozenset(  # types whose objects hold no state
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, nn.Parameter}
)
_NO_STATE = (Tensor, type, Enum, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)


class Attributes:
    """What the modules of a model hold now: attributes, buffers, children, and the objects and containers in these.

    Of buffers and other tensors the numbers are noted, too. Parameters stay as they are.

    Parameters
    ----------
    model : nn.Module

    Examples
    --------
    >>> model = nn.Linear(2, 2)
    >>> before = Attributes(model)
    >>> model.seen = [1]
    >>> before.restore()
    >>> "seen" in vars(model)
    False
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any] | deque[Any], list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._seen: dict[int, object] = {}
        self._plain: list[Tensor] = []
        self._learning = [(p, p.requires_grad) for p in model.parameters()]
        for module in model.modules():
            if not is_foreign(module):
                self._seen[id(module)] = module
                self._note_table(vars(module), _DEPTH)
        with without_modes(), torch.no_grad():  # a comparison's mode would change the dtype
            self._numbers = [tensor.detach().clone() for tensor in self._plain]

    def restore(self) -> None:
        """Put everything back that is no longer the same object, or a tensor of other numbers."""
        for table, then in self._tables:
            if list(table) != list(then) or any(map(operator.is_not, table.values(), then.values())):
                table.clear()
                table.update(then)
        for sequence, items in self._lists:
            if len(sequence) != len(items) or any(a is not b for a, b in zip(sequence, items, strict=True)):
                sequence.clear()
                sequence.extend(items)
        for members, those in self._sets:
            if members != those:
                members.clear()
                members.update(those)
        with without_modes(), torch.no_grad():
            for tensor, numbers in zip(self._plain, self._numbers, strict=True):
                if not torch.equal(tensor, numbers):
                    if tensor.shape != numbers.shape:
                        tensor.resize_(numbers.shape)
                    tensor.copy_(numbers)
        for parameter, learns in self._learning:
            if parameter.requires_grad != learns:
                parameter.requires_grad_(learns)

    def _note_table(self, table: dict[Any, Any], depth: int) -> None:
        self._tables.append((table, dict(table)))
        if len(table) <= _MANY:
            for key, value in table.items():
                if key != "_parameters":  # sharded ones are replaced by torch itself
                    self._note(value, depth - 1)

    def _note(self, value: Any, depth: int) -> None:
        if type(value) in SIMPLE:  # most of them
            return
        if type(value) is Tensor and id(value) not in self._seen:
            self._seen[id(value)] = value
            if value.layout == torch.strided and not value.is_meta:
                self._plain.append(value)
        if depth < 0 or isinstance(value, _NO_STATE) or id(value) in self._seen:
            return
        if isinstance(value, dict):
            self._seen[id(value)] = value
            self._note_table(value, depth)
        elif isinstance(value, (list, deque)):
            self._seen[id(value)] = value
            self._lists.append((value, list(value)))
        elif isinstance(value, set):
            self._seen[id(value)] = value
            self._sets.append((value, set(value)))
        elif not isinstance(value, (tuple, str)):
            own = None if is_foreign(value) else getattr(value, "__dict__", None)
            if isinstance(own, dict):
                self._seen[id(value)] = value
                self._note_table(own, depth)
        if isinstance(value, (list, deque, tuple)) and len(value) <= _MANY:
            for one in value:
                self._note(one, depth - 1)


def is_foreign(value: object) -> bool:
    """Whether an object's state belongs to a library and not to the model."""
    home = type(value).__module__
    if isinstance(value, nn.Module):
        return home.startswith(_WRAPPERS) or isinstance(value, nn.modules.lazy.LazyModuleMixin)
    return home.partition(".")[0] in _FOREIGN
