"""The penalty registry: what a model's gates cost, as one differentiable number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from l0hooks._torch.tensors import whole
from l0hooks.attach.by_pattern import by_pattern
from l0hooks.attach.spec import Pattern
from l0hooks.attach.walk import Gated, iter_gated
from l0hooks.errors import SpecError, StateError, explain, near_names
from l0hooks.gates.gate import Gate
from l0hooks.gates.shared_sampling import expected_l0

Strength = float | Tensor | tuple[float, float]
F = TypeVar("F", bound=Callable[..., Tensor])


class _Penalty(NamedTuple):
    """A function of one gate, how many strengths it takes, and the sum over several if that is less work."""

    function: Callable[..., Tensor]
    strengths: int
    together: Callable[[Sequence[Gated]], Tensor] | None


_registry: dict[str, _Penalty] = {}


def register_penalty(
    name: str, *, strengths: int = 1, together: Callable[[Sequence[Gated]], Tensor] | None = None
) -> Callable[[F], F]:
    """Make a function of one :class:`Gated` available as ``penalty(model, name=…)``.

    Parameters
    ----------
    name : str
        A new name. A function that was defined again under its own name in its own module, as when a notebook cell
        runs twice, replaces the one before it.
    strengths : int
        1: the function takes the ``Gated`` and its value is multiplied by the strength. More: the strengths are
        given as a tuple and handed to the function, which uses them itself.
    together : callable from a sequence of Gated to a Tensor of shape (), optional
        For a penalty of one strength: the sum of the function over several ``Gated``, where one pass over many small
        gates is faster than one for each.

    Returns
    -------
    decorator

    Raises
    ------
    SpecError
        If another function has the name, or ``together`` is given for a penalty of several strengths.

    Examples
    --------
    >>> @register_penalty("variance_of_keep_prob")
    ... def variance_of_keep_prob(gated):
    ...     return gated.gate.keep_prob().var()
    >>> penalty(Gate(4), variance_of_keep_prob=1.0).item()
    0.0
    """
    if together is not None and strengths != 1:
        raise SpecError(
            explain(
                f"register_penalty {name!r}",
                "only terms with one strength can be summed together.",
                expected="strengths=1",
                got=f"strengths={strengths}",
            )
        )

    def add(function: F) -> F:
        if name in _registry and not _is_same_place(_registry[name].function, function):
            raise SpecError(
                explain("register_penalty", "a penalty's name must be new.", got=repr(name), hint="another name")
            )
        _registry[name] = _Penalty(function, strengths, together)
        return function

    return add


def _is_same_place(first: Callable[..., Tensor], second: Callable[..., Tensor]) -> bool:
    """Whether two functions were defined under one name in one module: the second is the first, run again."""
    if not (isinstance(first, FunctionType) and isinstance(second, FunctionType)):
        return False
    return (first.__module__, first.__qualname__) == (second.__module__, second.__qualname__)


def penalty(model: nn.Module, **strengths: Strength | Mapping[Pattern, Strength]) -> Tensor:
    r"""The sum over every gate below ``model`` of the penalties asked for, times their strengths.

    ======================  ==================================================================
    ``l0=λ``                λ Σ keep_prob over the gates
    ``l2=λ``                λ Σ w² over the gated weights
    ``expected_l2=λ``       λ Σ keep_prob·w² over the gated weights
    ``l0l2=(λ0, λ2)``       Σ keep_prob·(λ0 + λ2/2·w²) over the gated weights (the paper's)
    ``params=λ``            λ times the expected number of gated weights that stay
    ``macs=λ``              λ times their expected multiply-adds for one of the example inputs
    ``budget=1.0``          the term of every ``Budget(method="lagrangian")``
    ======================  ==================================================================

    Parameters
    ----------
    model : nn.Module
        Its gates may sit in parametrizations, stand alone, or belong to a fitter.
    **strengths : float, Tensor, tuple, or mapping from pattern to one of these
        With a mapping, the first pattern that matches a gated module counts; for unmatched ones it is 0.

    Returns
    -------
    Tensor, float32, shape (), on the gates' device

    Raises
    ------
    StateError
        If there is no gate below ``model``, or ``macs`` is asked for and no example inputs were ever given.
    SpecError
        If a penalty is unknown, none is given, or a pattern matches no gate.

    Examples
    --------
    >>> gates = nn.ModuleDict({"a": Gate(2, init_keep_prob=0.5), "b": Gate(4, init_keep_prob=0.25)})
    >>> round(penalty(gates, l0=1.0).item(), 6)
    2.0
    >>> round(penalty(gates, l0={"a": 10.0, "b": 1.0}).item(), 6)
    11.0

    References
    ----------
    Louizos, Welling & Kingma (2018), equations 2 and 9, and appendix A for the L0L2 objective.
    """
    for name in strengths:
        if name not in _registry:
            raise SpecError(
                explain("penalty", "the penalty must be registered.", got=repr(name), hint=near_names(name, _registry))
            )
    if not strengths:
        raise SpecError(explain("penalty", "at least one strength must be given.", hint="penalty(model, l0=1e-3)"))
    gated = list(iter_gated(model))
    if not gated:
        raise StateError(
            explain("penalty", "the model must hold gates.", got="none", hint="sparsify(model, ...) first")
        )
    total = torch.zeros((), device=gated[0].gate.log_alpha.device)
    for name, strength in strengths.items():
        for value, those in _strengths(model, name, strength, gated):
            for term in _terms(name, value, those):
                total = total + term.to(total.device)
    return total


def _strengths(
    model: nn.Module, name: str, strength: Strength | Mapping[Pattern, Strength], gated: list[Gated]
) -> list[tuple[Strength, list[Gated]]]:
    """Each strength with the gates it applies to."""
    if not isinstance(strength, Mapping):
        return [(strength, gated)]
    return by_pattern(model, gated, strength, where=f"penalty {name}")


def _terms(name: str, strength: Strength, gated: list[Gated]) -> Iterator[Tensor]:
    """What adds up to a penalty of ``gated``."""
    penalty = _registry[name]
    given = len(strength) if isinstance(strength, tuple) else 1
    if given != penalty.strengths:
        raise SpecError(
            explain(
                f"penalty {name}",
                "the number of strengths must fit.",
                expected=f"{penalty.strengths} strength(s)",
                got=strength,
            )
        )
    if isinstance(strength, tuple):
        yield from (penalty.function(one, *strength) for one in gated)
    elif penalty.together is not None and gated:
        yield strength * penalty.together(gated)
    else:
        yield from (strength * penalty.function(one) for one in gated)


def _together(gated: Sequence[Gated]) -> Tensor:
    return expected_l0([one.gate for one in gated])


@register_penalty("l0", together=_together)
def _l0(gated: Gated) -> Tensor:
    return gated.gate.expected_l0()


@register_penalty("l2")
def _l2(gated: Gated) -> Tensor:
    return _squares(gated, torch.ones_like(whole(gated.gate.log_alpha)))


@register_penalty("expected_l2")
def _expected_l2(gated: Gated) -> Tensor:
    return _squares(gated, gated.gate.keep_prob())


def _squares(gated: Gated, values: Tensor) -> Tensor:
    """Σ value·w² over the weights behind a gate, one value for each of its gates."""
    total = torch.zeros((), device=values.device)
    for site in gated.weights():
        gates = site.gating.gates
        mine = [values if gate is gated.gate else torch.zeros_like(whole(gate.log_alpha)) for gate in gates]
        total = total + (site.gating.factor(mine, 0.0) * whole(site.weight).float().square()).sum()
    return total


@register_penalty("l0l2", strengths=2)
def _l0l2(gated: Gated, l0: float, l2: float) -> Tensor:
    return l0 * _params(gated) + l2 / 2 * _expected_l2(gated)


def _zero(gate: Gate) -> Tensor:
    return torch.zeros((), device=gate.log_alpha.device)


@register_penalty("params")
def _params(gated: Gated) -> Tensor:
    part = gated.coupled or gated.layer
    if part is not None:
        return _zero(gated.gate) + part.expected("params")
    per_gate = sum(site.weight.numel() for site in gated.weights()) / gated.gate.log_alpha.numel()
    return per_gate * gated.gate.expected_l0()


@register_penalty("macs")
def _macs(gated: Gated) -> Tensor:
    part = gated.coupled or gated.layer
    if part is not None:
        return _zero(gated.gate) + part.expected("macs")
    macs = 0.0
    for site in gated.sites:  # a tied weight works at each of its sites
        if site.gating.positions is None:
            raise StateError(
                explain(
                    f"penalty macs of {site.name!r}",
                    "multiply-adds are known only for example inputs.",
                    hint="sparsify(model, spec, example_inputs=(x,))",
                )
            )
        macs += site.gating.positions * site.weight.numel()
    return macs / gated.gate.log_alpha.numel() * gated.gate.expected_l0()


@register_penalty("budget")
def _budget(gated: Gated) -> Tensor:
    gate = gated.gate
    if gate.rule is None or gate.multipliers is None:  # counted once, for the gate that holds them
        return gate.log_alpha.new_zeros(())
    return gate.rule.penalty()
