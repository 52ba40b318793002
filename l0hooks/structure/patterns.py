"""Patterns over the names and types of modules: which modules of a model a pattern matches."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from l0hooks.errors import SpecError, explain, near_names
from l0hooks.structure.layers import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED, is_gateable, is_hugging_face_conv1d

Pattern = str | re.Pattern[str] | type[nn.Module]
T = TypeVar("T")


def matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    """Whether ``pattern`` matches the module called ``name``.

    Parameters
    ----------
    pattern : str, re.Pattern or module type
        ``"all"``, ``"all-linear"``, ``"all-conv"``, a shell pattern over the qualified name (``*`` crosses dots),
        a regular expression that matches the whole name, or a class.
    name : str
    module : nn.Module

    Raises
    ------
    SpecError
        If it is no pattern.

    Examples
    --------
    >>> matches("layer*.conv?", "layer1.0.conv2", nn.Conv2d(1, 1, 1)), matches(nn.Linear, "fc", nn.Linear(1, 1))
    (True, True)
    """
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if not isinstance(pattern, str):
        raise _no_pattern(pattern)
    if pattern == "all":
        return is_gateable(module) and not isinstance(module, EMBEDDINGS)
    if pattern == "all-linear":
        return isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_hugging_face_conv1d(module)
    if pattern == "all-conv":
        return isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    return fnmatch.fnmatchcase(name, pattern)


def as_patterns(patterns: Pattern | Sequence[Pattern]) -> tuple[Pattern, ...]:
    """One pattern or several, as a tuple."""
    if isinstance(patterns, (str, re.Pattern, type)):
        return (patterns,)
    if isinstance(patterns, nn.Module) or not isinstance(patterns, Iterable):
        raise _no_pattern(patterns)
    return tuple(patterns)


def _no_pattern(got: object) -> SpecError:
    return SpecError(
        explain(
            "pattern",
            "modules are named by patterns.",
            expected="a name, a compiled regular expression, a module type, or a sequence of these",
            got=f"an object of type {type(got).__name__}",
            hint="the module's name in named_modules()",
        )
    )


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below ``model`` under every name they have, without those inside a parametrization."""
    for name, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" not in name.split("."):
            yield name, module


def is_excluded(model: nn.Module, name: str, exclude: Pattern | Sequence[Pattern]) -> bool:
    """Whether a pattern of ``exclude`` matches the module called ``name`` or a module that contains it."""
    patterns = as_patterns(exclude)
    parts = name.split(".") if name else []
    above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)] or [""]
    return any(matches(pattern, part, model.get_submodule(part)) for part in above for pattern in patterns)


def first_matches(
    model: nn.Module, values: Mapping[Pattern, T], *, where: str, exclude: Pattern | Sequence[Pattern] = ()
) -> dict[str, T]:
    """The value of the first pattern that matches, for each module name that a pattern matches and none excludes.

    Raises
    ------
    SpecError
        If a pattern matches nothing.
    """
    modules = dict(named_modules(model))
    for pattern in (*values, *as_patterns(exclude)):
        if not any(matches(pattern, name, module) for name, module in modules.items()):
            raise SpecError(no_match(where, pattern, modules))
    found: dict[str, T] = {}
    for name, module in modules.items():
        value = next((v for pattern, v in values.items() if matches(pattern, name, module)), None)
        if value is not None and not is_excluded(model, name, exclude):
            found[name] = value
    return found


def no_match(where: str, pattern: Pattern, names: Iterable[str]) -> str:
    """The error message for a pattern that matches no module."""
    shown = pattern.__name__ if isinstance(pattern, type) else repr(pattern)
    text = pattern if isinstance(pattern, str) else shown
    return explain(
        where,
        "a pattern must match at least one module.",
        got=f"{shown}, which matches none",
        hint=near_names(text, [n for n in names if n]),
    )
