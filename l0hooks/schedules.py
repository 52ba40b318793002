"""Schedules for temperatures, penalties and budgets: pure functions ``step -> value``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from l0hooks.errors import InvalidValueError, explain

Schedule = Callable[[int], float]
MakeSchedule = Callable[[float, float, int], Schedule]
ScheduleName = Literal["cubic", "linear", "cosine", "exponential"]


def linear(start: float, stop: float, steps: int) -> Schedule:
    """``start + (stop − start)·t`` with t = step/steps, held at ``stop`` afterwards.

    Parameters
    ----------
    start, stop : float
        Values at step 0 and from step ``steps`` on.
    steps : int, > 0

    Returns
    -------
    callable, int -> float

    Raises
    ------
    InvalidValueError
        If ``steps`` is not positive.

    Examples
    --------
    >>> value = linear(1.0, 0.0, steps=10)
    >>> value(0), value(5), value(99)
    (1.0, 0.5, 0.0)
    """
    _check_steps("linear", steps)
    return partial(_linear, start, stop, steps)


def exponential(start: float, stop: float, steps: int) -> Schedule:
    """``start·(stop/start)^t`` with t = step/steps, held at ``stop`` afterwards.

    Parameters
    ----------
    start, stop : float, > 0
    steps : int, > 0

    Returns
    -------
    callable, int -> float

    Raises
    ------
    InvalidValueError
        If a value or ``steps`` is not positive.

    Examples
    --------
    >>> value = exponential(1.0, 0.01, steps=10)
    >>> round(value(5), 6)
    0.1
    """
    _check_steps("exponential", steps)
    if not (start > 0 and stop > 0):
        raise InvalidValueError(
            explain("exponential", "both ends must be positive.", expected="> 0", got=f"start={start}, stop={stop}")
        )
    return partial(_exponential, start, stop, steps)


def cosine(start: float, stop: float, steps: int) -> Schedule:
    """``stop + (start − stop)·(1 + cos πt)/2`` with t = step/steps, held at ``stop`` afterwards.

    Parameters
    ----------
    start, stop : float
    steps : int, > 0

    Returns
    -------
    callable, int -> float

    Raises
    ------
    InvalidValueError
        If ``steps`` is not positive.

    Examples
    --------
    >>> value = cosine(1.0, 0.0, steps=10)
    >>> value(0), round(value(5), 6), value(10)
    (1.0, 0.5, 0.0)
    """
    _check_steps("cosine", steps)
    return partial(_cosine, start, stop, steps)


def cubic(start: float, stop: float, steps: int) -> Schedule:
    """``stop + (start − stop)·(1 − t)³`` with t = step/steps, held at ``stop`` afterwards (Zhu & Gupta, 2017).

    Parameters
    ----------
    start, stop : float
    steps : int, > 0

    Returns
    -------
    callable, int -> float

    Raises
    ------
    InvalidValueError
        If ``steps`` is not positive.

    Examples
    --------
    >>> value = cubic(1.0, 0.0, steps=10)
    >>> value(0), value(5), value(10)
    (1.0, 0.125, 0.0)
    """
    _check_steps("cubic", steps)
    return partial(_cubic, start, stop, steps)


NAMED: dict[str, MakeSchedule] = {"cubic": cubic, "linear": linear, "cosine": cosine, "exponential": exponential}


# Named functions, not lambdas, because a schedule is pickled with the model whose gates follow it.


def _linear(start: float, stop: float, steps: int, step: int) -> float:
    return _between(start, stop, _progress(step, steps))


def _exponential(start: float, stop: float, steps: int, step: int) -> float:
    t = _progress(step, steps)
    value: float = start ** (1 - t) * stop**t
    return value


def _cosine(start: float, stop: float, steps: int, step: int) -> float:
    return _between(stop, start, (1 + math.cos(math.pi * _progress(step, steps))) / 2)


def _cubic(start: float, stop: float, steps: int, step: int) -> float:
    return _between(stop, start, (1 - _progress(step, steps)) ** 3)


def _between(start: float, stop: float, t: float) -> float:
    """``start`` at t = 0 and ``stop`` at t = 1, both exactly."""
    return (1 - t) * start + t * stop


def _progress(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0)


def _check_steps(where: str, steps: int) -> None:
    if steps < 1:
        raise InvalidValueError(explain(where, "steps must be at least 1.", expected=">= 1", got=steps))
