"""Nested arguments and outputs: tuples, lists, mappings, and classes registered with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

try:
    from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
except ImportError:
    from l0hooks._torch.names import refuse

    def _refuse(*_: Any, **__: Any) -> NoReturn:
        refuse("utils._pytree", "example_inputs")

    tree_leaves: Callable[..., Any] = _refuse  # type: ignore[no-redef]
    tree_map: Callable[..., Any] = _refuse  # type: ignore[no-redef]
    tree_map_only: Callable[..., Any] = _refuse  # type: ignore[no-redef]

__all__ = ["tree_leaves", "tree_map", "tree_map_only"]
