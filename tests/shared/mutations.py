"""Every field of plain data, changed in several ways, for tests of readers of files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]

_REPLACEMENTS: tuple[Any, ...] = (None, True, -1, 7.5, float("nan"), 10**30, "text", [], {}, [None], {"odd": 1}, DEEP)


def mutations(data: Any, most: int = 3) -> Iterator[tuple[str, Any]]:
    """(what was changed, the changed copy), for every field; of a list the first ``most`` entries only."""
    for path in [(), *_paths(data, most)]:
        old = _at(data, path)
        for new in _REPLACEMENTS:
            if type(new) is not type(old) or new != old:
                yield f"{_named(path)} = {str(new)[:20]}", _changed(data, path, new)
        if isinstance(old, dict):
            yield f"{_named(path)} with another key", _changed(data, path, {**old, "another": 1})
            for key in list(old)[:most] if len(old) > 12 else old:
                yield f"{_named(path)} without {key}", _changed(data, path, {k: v for k, v in old.items() if k != key})
        elif isinstance(old, np.ndarray):
            for new in _arrays(old):
                yield f"{_named(path)} = {new.dtype}{new.shape}", _changed(data, path, new)
        elif isinstance(old, list) and old:
            yield f"{_named(path)} without its last", _changed(data, path, old[:-1])
            yield f"{_named(path)} longer", _changed(data, path, [*old, old[0]])


def _arrays(old: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    yield old.astype(str)
    yield old.astype(np.int8) if old.dtype.kind == "f" else old.astype(np.float64)
    yield old[None]
    yield np.concatenate([old, old])
    for bad in (-1, 2**40) if old.dtype.kind == "i" else (np.nan, np.inf):
        if old.size:
            new = old.copy()
            new.reshape(-1)[0] = bad
            yield new
            yield old[:-1]
            yield old[::-1] if old.dtype.kind == "i" and len(old) > 1 else old[:0]


def _paths(data: Any, most: int, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys: Any = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys if isinstance(data, dict) and len(keys) <= 12 else keys[:most]:
        yield (*before, key)
        yield from _paths(data[key], most, (*before, key))


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def _changed(data: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    data = copy.deepcopy(data)
    _at(data, path[:-1])[path[-1]] = new
    return data


def _named(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path)) or "all"
