"""The constants β, γ and ζ of a Hard Concrete gate: defaults, and what they must satisfy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from l0hooks.errors import InvalidValueError, explain

TEMPERATURE, GAMMA, ZETA = 2 / 3, -0.1, 1.1
HALF_DTYPES = (torch.float16, torch.bfloat16)


class Constants(NamedTuple):
    """β, γ and ζ."""

    temperature: float = TEMPERATURE
    gamma: float = GAMMA
    zeta: float = ZETA


def check_constants(where: str, temperature: float, gamma: float, zeta: float) -> None:
    """Refuse constants for which the stretched variable does not straddle [0, 1].

    Parameters
    ----------
    where : str
        What the message begins with.
    temperature, gamma, zeta : float

    Raises
    ------
    InvalidValueError
        Unless ``temperature`` is positive and finite, ``gamma`` < 0 and ``zeta`` > 1.

    Examples
    --------
    >>> check_constants("gate", 0.5, GAMMA, ZETA)
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidValueError(explain(where, "temperature must be positive.", expected="> 0", got=temperature))
    if not (math.isfinite(gamma) and math.isfinite(zeta) and gamma < 0 and zeta > 1):
        raise InvalidValueError(
            explain(
                where,
                "the stretch interval must contain [0, 1] strictly.",
                expected="gamma < 0 and zeta > 1",
                got=f"gamma={gamma}, zeta={zeta}",
                hint="the paper's gamma=-0.1, zeta=1.1",
            )
        )


def check_open_unit(where: str, value: float) -> None:
    """Refuse a start that would need infinite log-odds.

    Parameters
    ----------
    where : str
        Name of the argument.
    value : float

    Raises
    ------
    InvalidValueError
        Unless 0 < ``value`` < 1.

    Examples
    --------
    >>> check_open_unit("init_mean", 0.95)
    """
    if not 0 < value < 1:
        raise InvalidValueError(
            explain(
                where,
                "the start must lie strictly between 0 and 1: the ends need infinite log-odds.",
                expected=f"0 < {where} < 1",
                got=value,
                hint="0.999 for gates that start open",
            )
        )
