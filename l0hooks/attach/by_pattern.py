"""Which gates a pattern means: one answer for penalties, temperature schedules and budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from l0hooks.attach.spec import Pattern, matches, named_modules, no_match
from l0hooks.attach.walk import Gated
from l0hooks.errors import SpecError

T = TypeVar("T")


def by_pattern(
    model: nn.Module, gated: Sequence[Gated], values: Mapping[Pattern, T], *, where: str
) -> list[tuple[T, list[Gated]]]:
    """Each value of ``values`` with the gates it is for: those that its pattern is the first to match.

    A pattern matches a gate by any module whose weight the gate multiplies, and for a coupled group also by the
    modules that write the group, each under any of its names.

    Parameters
    ----------
    model : nn.Module
    gated : sequence of Gated
        Gates of ``model``.
    values : mapping from pattern to value
    where : str
        The call, for the message.

    Returns
    -------
    list of (value, list of Gated)
        In the order of ``values``; the list is empty if earlier patterns match the same gates.

    Raises
    ------
    SpecError
        If a pattern matches no gate.

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> from l0hooks.attach.walk import iter_gated
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    >>> _ = sparsify(model)
    >>> found = by_pattern(model, list(iter_gated(model)), {"1": "last", "*": "others"}, where="a call")
    >>> [(value, [one.name for one in part]) for value, part in found]
    [('last', ['1']), ('others', ['0'])]
    """
    modules = dict(named_modules(model))
    aliases: dict[int, list[str]] = {}
    for name, module in modules.items():
        aliases.setdefault(id(module), []).append(name)
    named = [(one, _modules_of(one, modules, aliases)) for one in gated]
    parts: dict[Pattern, list[Gated]] = {pattern: [] for pattern in values}
    matched: set[Pattern] = set()
    for one, own in named:
        those = [p for p in values if any(matches(p, name, module) for name, module in own.items())]
        matched.update(those)
        if those:
            parts[those[0]].append(one)
    for pattern in values:
        if pattern not in matched:
            raise SpecError(no_match(where, pattern, dict.fromkeys(name for _, own in named for name in own)))
    return [(value, parts[pattern]) for pattern, value in values.items()]


def _modules_of(
    one: Gated, modules: Mapping[str, nn.Module], aliases: Mapping[int, Sequence[str]]
) -> dict[str, nn.Module]:
    """The modules that a gate belongs to, under every name."""
    own = [site.module for site in one.sites]
    if one.coupled is not None:
        names = [one.coupled.prefix + site.module for site in one.coupled.group.writers]
        own += [modules[name] for name in names if name in modules]
    found = {one.name: one.module}
    for module in own or [one.module]:
        found |= dict.fromkeys(aliases.get(id(module), ()), module)
    return found
