"""``GateSpec``: how a weight is gated, and which modules a pattern means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from torch import nn

from l0hooks.errors import SpecError, explain, near_names
from l0hooks.gates.families import FamilyName, initial_log_alpha, make_family
from l0hooks.gates.hard_concrete import GAMMA, ZETA, check_constants
from l0hooks.gates.log_odds import Estimator, check_estimator_name
from l0hooks.structure import Kind
from l0hooks.structure.layers import (
    CONVOLUTIONS,
    EMBEDDINGS,
    GRANULARITIES,
    TRANSPOSED,
    Granularity,
    is_gateable,
    is_hugging_face_conv1d,
)

Pattern = str | re.Pattern[str] | type[nn.Module]
Shorthand = str | tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """How a weight is gated.

    Parameters
    ----------
    granularity : "weight", "input", "output", "kernel", (rows, cols) or "coupled"
        One gate for each weight, input channel, output channel, convolution kernel, or block of ``rows`` output by
        ``cols`` input channels; or, coupled, for each channel, neuron or head through all layers that share it.
        Closed weights become zeros; closed channels are cut out by ``prune`` with example inputs, coupled ones always,
        others where the neighbouring layers permit it.
    family : "hard_concrete", "straight_through", "stg" or "deterministic"
    init_mean : float in (0, 1), optional
        E[z] at the start; 0.95 if no start is given.
    init_keep_prob : float in (0, 1), optional
        P(z ≠ 0) at the start; not together with ``init_mean``.
    temperature : float, > 0, optional
        β; the family's default if not given.
    gamma, zeta : float, gamma < 0, zeta > 1
        Stretch interval.
    estimator : "median", "paper" or "mean"
        The test-time gate.
    noise : "step" or "example"
        For coupled groups: one draw for a forward, or one for each example (along axis 0 of the readers' inputs).
        Groups read by attention's own projections, embeddings or bare parameters have one draw for a forward anyway.
    kinds : tuple of "channel", "neuron" and "head", optional
        For coupled groups: gate only groups of these kinds.

    Raises
    ------
    SpecError
        If the granularity, the noise or a kind is unknown.
    InvalidValueError
        If a number is out of range, or both starts are given.

    Examples
    --------
    >>> GateSpec(granularity="output", init_mean=0.9).granularity
    'output'
    """

    granularity: Granularity = "weight"
    family: FamilyName = "hard_concrete"
    init_mean: float | None = None
    init_keep_prob: float | None = None
    temperature: float | None = None
    gamma: float = GAMMA
    zeta: float = ZETA
    estimator: Estimator = "median"
    noise: Literal["step", "example"] = "step"
    kinds: tuple[Kind, ...] | None = None

    def __post_init__(self) -> None:
        check_granularity(self.granularity)
        check_one_of("noise", self.noise, ("step", "example"))
        for kind in self.kinds or ():
            check_one_of("kinds", kind, get_args(Kind))
        family = make_family(self.family, self.gamma, self.zeta)
        temperature = family.default_temperature if self.temperature is None else self.temperature
        check_constants("GateSpec", temperature, self.gamma, self.zeta)
        initial_log_alpha(family, self.init_mean, self.init_keep_prob, temperature)
        check_estimator_name(self.estimator)


def check_granularity(granularity: object) -> None:
    """Refuse what is neither a known granularity nor a pair of block sizes.

    Raises
    ------
    SpecError
        If it is not.
    """
    if isinstance(granularity, str):
        if granularity in GRANULARITIES:
            return
    elif (
        isinstance(granularity, tuple)
        and len(granularity) == 2
        and all(isinstance(n, int) and n > 0 for n in granularity)
    ):
        return
    raise SpecError(
        explain(
            "granularity",
            "the shape of the gates must be known.",
            expected=", ".join(map(repr, GRANULARITIES)) + " or (rows, cols) with positive integers",
            got=repr(granularity),
            hint=near_names(granularity, GRANULARITIES) if isinstance(granularity, str) else None,
        )
    )


def check_one_of(where: str, value: str, known: Sequence[str]) -> None:
    """Refuse a name that is not ``known``.

    Raises
    ------
    SpecError
        If it is not.
    """
    if value not in known:
        raise SpecError(explain(where, "the name must be known.", got=repr(value), hint=near_names(str(value), known)))


def as_spec(value: GateSpec | Shorthand) -> GateSpec:
    """A ``GateSpec``, from itself or from the granularity it differs by."""
    if isinstance(value, GateSpec):
        return value
    check_granularity(value)
    return GateSpec(granularity=value)  # type: ignore[arg-type]  # checked on the line above


def matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    """Whether ``pattern`` means the module called ``name``.

    Parameters
    ----------
    pattern : str, re.Pattern or module type
        ``"all"``, ``"all-linear"``, ``"all-conv"``, a shell pattern over the qualified name (``*`` crosses dots),
        a regular expression that matches the whole name, or a class.
    name : str
    module : nn.Module

    Examples
    --------
    >>> matches("layer*.conv?", "layer1.0.conv2", nn.Conv2d(1, 1, 1)), matches(nn.Linear, "fc", nn.Linear(1, 1))
    (True, True)
    """
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if pattern == "all":
        return is_gateable(module) and not isinstance(module, EMBEDDINGS)
    if pattern == "all-linear":
        return isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_hugging_face_conv1d(module)
    if pattern == "all-conv":
        return isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    return fnmatch.fnmatchcase(name, pattern)


def as_patterns(patterns: Pattern | Sequence[Pattern]) -> tuple[Pattern, ...]:
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, (str, re.Pattern, type)) else tuple(patterns)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below ``model`` under every name they have, without those inside a parametrization."""
    for name, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" not in name.split("."):
            yield name, module


def is_excluded(model: nn.Module, name: str, exclude: Pattern | Sequence[Pattern]) -> bool:
    """Whether a pattern of ``exclude`` matches the module called ``name``, or one that contains it."""
    patterns = as_patterns(exclude)
    parts = name.split(".") if name else []
    above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)] or [""]
    return any(matches(pattern, part, model.get_submodule(part)) for part in above for pattern in patterns)


def first_matches(
    model: nn.Module, values: Mapping[Pattern, T], *, where: str, exclude: Pattern | Sequence[Pattern] = ()
) -> dict[str, T]:
    """For every module name that is not excluded the value of the first pattern that matches it.

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
    """The message for a pattern that means nothing."""
    shown = pattern.__name__ if isinstance(pattern, type) else repr(pattern)
    text = pattern if isinstance(pattern, str) else shown
    return explain(
        where,
        "a pattern must match at least one module.",
        got=f"{shown}, which matches none",
        hint=near_names(text, [n for n in names if n]),
    )
