"""The table of rules: how labels pass through each operator.

A rule takes the tracer and a node of the graph and returns the labels of the node's value. Inputs of operators without
a rule are frozen, which is always safe: their channels are never removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from l0hooks.structure.tracer import Tracer

Rule = Callable[[Tracer, fx.Node], Any]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen operators with these names, without overload names."""

    def add(function: Rule) -> Rule:
        for name in operators:
            RULES[name] = function
        return function

    return add
