"""``GateSpec``: how a weight is gated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from l0hooks.errors import SpecError, explain, near_names
from l0hooks.gates.constants import GAMMA, ZETA, check_constants
from l0hooks.gates.families import FamilyName, initial_log_alpha, make_family
from l0hooks.gates.log_odds import Estimator, check_estimator_name
from l0hooks.structure import Kind
from l0hooks.structure.groups import WITHOUT_ASKING
from l0hooks.structure.layers import GRANULARITIES, Granularity
from l0hooks.structure.patterns import (
    Pattern,
    as_patterns,
    first_matches,
    is_excluded,
    matches,
    named_modules,
    no_match,
)

__all__ = [
    "GateSpec",
    "Pattern",
    "Shorthand",
    "as_patterns",
    "as_spec",
    "check_granularity",
    "check_one_of",
    "first_matches",
    "is_excluded",
    "matches",
    "named_modules",
    "no_match",
]

Shorthand = str | tuple[int, int]


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
    kinds : tuple of "channel", "neuron", "head", "expert", "width" and "layer", optional
        For coupled groups: gate only groups of these kinds; by default channels, neurons and heads. ``"width"`` are the
        channels of the residual stream, of whose removal a model suffers most; their gates multiply the layers that
        write the stream, with one draw for a forward. ``"layer"`` is one gate for each residual block as a whole.

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

    def wants(self, kind: Kind) -> bool:
        """Whether groups of this kind are gated."""
        return kind in (WITHOUT_ASKING if self.kinds is None else self.kinds)

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
