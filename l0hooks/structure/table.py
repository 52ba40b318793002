"""The one table: operator → how labels flow through it.

A rule gets the tracer and the graph's node and returns the labels of the node's value. What no rule covers is frozen,
which is always safe: its channels simply cannot be removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from l0hooks.structure.tracer import Tracer

Rule = Callable[[Tracer, fx.Node], Any]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen operators called so, without overload names."""

    def add(function: Rule) -> Rule:
        for name in operators:
            RULES[name] = function
        return function

    return add
