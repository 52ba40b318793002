"""The integers that a module holds: in attributes, in tuples, lists and dictionaries, and in configuration objects."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn

from l0hooks._torch.attributes import is_foreign

Path = tuple[str | int, ...]  # an attribute's name, then names or positions inside it
_DEPTH = 4  # a configuration, that of a part, a list in it, its items
_MOST_ITEMS = 64
_OWN = frozenset({*vars(nn.Module()), "training"})  # tables of every module


def integers(module: nn.Module) -> Iterator[tuple[Path, int]]:
    """Where ``module`` holds plain integers, and which.

    Examples
    --------
    >>> module = nn.Module()
    >>> module.sizes = (8, 2)
    >>> list(integers(module))
    [(('sizes', 0), 8), (('sizes', 1), 2)]
    """
    for name, value in () if isinstance(module, fx.GraphModule) else vars(module).items():  # its code holds them
        if name not in _OWN:
            yield from _integers((name,), value, ())


def epsilons(module: nn.Module) -> Iterator[tuple[str, float]]:
    """The attributes of ``module`` itself that hold the small number that a norm adds to a variance.

    Examples
    --------
    >>> list(epsilons(nn.LayerNorm(3, eps=1e-6)))
    [('eps', 1e-06)]
    """
    return ((name, value) for name, value in vars(module).items() if "eps" in name and type(value) is float)


def change(module: nn.Module, path: Path, value: int) -> None:
    """Put ``value`` at ``path``, **in place**; what contains it is copied, because other modules may share it.

    Examples
    --------
    >>> one, two = nn.Module(), nn.Module()
    >>> one.sizes = two.sizes = [8, 2]
    >>> change(one, ("sizes", 0), 6)
    >>> one.sizes, two.sizes
    ([6, 2], [8, 2])
    """
    own = vars(module)
    own[str(path[0])] = _with(own[str(path[0])], path[1:], value)


def _integers(path: Path, value: Any, above: tuple[object, ...]) -> Iterator[tuple[Path, int]]:
    if type(value) is int:
        yield path, value
    elif len(path) <= _DEPTH and not any(value is one for one in above):
        for key, part in _parts(value):
            yield from _integers((*path, key), part, (*above, value))


def _parts(value: Any) -> Iterator[tuple[str | int, Any]]:
    """What a container or a configuration holds, by its position or name."""
    if isinstance(value, (tuple, list)):
        yield from enumerate(value[:_MOST_ITEMS])
    elif isinstance(value, dict):
        yield from ((key, part) for key, part in list(value.items())[:_MOST_ITEMS] if type(key) is str)
    elif not isinstance(value, (nn.Module, Tensor, type, FunctionType)) and not is_foreign(value):
        own = getattr(value, "__dict__", None)
        yield from own.items() if isinstance(own, dict) else ()


def _with(value: Any, path: Path, new: int) -> Any:
    """A copy of ``value`` with ``new`` at ``path``."""
    if not path:
        return new
    key: Any = path[0]
    if isinstance(value, tuple):
        items = [_with(part, path[1:], new) if position == key else part for position, part in enumerate(value)]
        make: Any = getattr(type(value), "_make", type(value))  # of a named tuple
        return make(items)
    twin = copy.copy(value)
    table: Any = twin if isinstance(twin, (list, dict)) else vars(twin)
    table[key] = _with(table[key], path[1:], new)
    return twin
