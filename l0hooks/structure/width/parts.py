"""What gates on the channels of a residual stream multiply, and the norms that read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

NormKind = Literal["layer", "rms", "group"]


@dataclass(frozen=True)
class WidthGate:
    """An axis of a parameter that the gates of a stream multiply.

    Attributes
    ----------
    names : tuple of str
        Qualified names of the parameter; several if it is tied.
    axis : int
    open_only : bool
        Multiply with 1 where a gate is not 0, rather than with the gate itself.
    """

    names: tuple[str, ...]
    axis: int
    open_only: bool = False


@dataclass(frozen=True)
class WidthNorm:
    """A norm over all channels of a stream.

    Attributes
    ----------
    module : str
        Qualified name of the module.
    kind : "layer", "rms" or "group"
        LayerNorm, RMSNorm, or GroupNorm with one group. The first and the last subtract the mean.
    weight : tuple of str
        Names of its weight.
    epsilon : str
        The module's attribute that holds ε.
    offset : float
        What is added to the weight before it multiplies: 1 in Gemma's norms.
    """

    module: str
    kind: NormKind
    weight: tuple[str, ...]
    epsilon: str
    offset: float = 0.0


@dataclass(frozen=True)
class Width:
    """How a stream of n channels is gated and cut.

    Gates z multiply what writes the stream, so that closed channels are zero in it. A norm that subtracts the mean
    takes it over the open channels. With r open ones,

    .. math:: norm_n(x; w, ε) = norm_r(x; w\\sqrt{n/r}, εn/r).

    Attributes
    ----------
    gates : tuple of WidthGate
    norms : tuple of WidthNorm

    Examples
    --------
    >>> Width((WidthGate(("encoder.fc.weight",), 0),), ()).within("encoder").gates[0].names
    ('fc.weight',)
    """

    gates: tuple[WidthGate, ...]
    norms: tuple[WidthNorm, ...]

    def within(self, path: str) -> Width:
        """The same by names inside the module at ``path``, without what is elsewhere."""
        start = f"{path}." if path else ""
        return self.renamed(lambda name: name.removeprefix(start) if name.startswith(start) else None)

    def renamed(self, rename: Callable[[str], str | None]) -> Width:
        """The same by other names of modules and tensors, without what has none."""
        gates = [(gate, _renamed(gate.names, rename)) for gate in self.gates]
        norms = [(norm, rename(norm.module), _renamed(norm.weight, rename)) for norm in self.norms]
        return Width(
            tuple(replace(gate, names=names) for gate, names in gates if names),
            tuple(replace(norm, module=new, weight=weight) for norm, new, weight in norms if new is not None),
        )


def _renamed(names: tuple[str, ...], rename: Callable[[str], str | None]) -> tuple[str, ...]:
    return tuple(new for name in names if (new := rename(name)) is not None)
