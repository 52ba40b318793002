"""The fields of a saved state, each checked for its type, shape and range when it is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from l0hooks.calibration.fit.stage import Selection
from l0hooks.calibration.numerics.columns import Floats, Integers
from l0hooks.errors import StateError, explain

_LARGEST = 2**62  # whole numbers beyond it are not counts


class Fields:
    """One record of a saved state.

    Parameters
    ----------
    state : object
        A dict with exactly the keys ``names``.
    where : str
        What it is the state of, for messages.
    names : str

    Raises
    ------
    StateError
        If it is none; every method raises it, too, for a field that is not as it asks.

    Examples
    --------
    >>> Fields({"round": 3}, "swaps", "round").whole("round", most=5)
    3
    """

    def __init__(self, state: object, where: str, *names: str) -> None:
        if not isinstance(state, dict) or set(state) != set(names):
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise self._refusal(where, f"the fields {', '.join(names)}", got)
        self._state, self._where = state, where

    def whole(self, name: str, *, least: int = 0, most: int = _LARGEST) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self._state[name]
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, *, least: float = -math.inf, infinite: bool = False) -> float:
        """A number, not NaN; infinite ones only if they may be."""
        value = self._state[name]
        if type(value) not in (int, float) or not least <= value <= math.inf or not (infinite or math.isfinite(value)):
            raise self._wrong(name, "a number" + (f" >= {least}" if least > -math.inf else ""))
        return float(value)

    def text(self, name: str, known: Sequence[str] | None = None) -> str:
        """A string, of those that are known."""
        value = self._state[name]
        if not isinstance(value, str) or (known is not None and value not in known):
            raise self._wrong(name, "a string" if known is None else " or ".join(map(repr, known)))
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._state[name]
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def listed(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self._state[name]
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A dict of anything."""
        value = self._state[name]
        if not isinstance(value, dict):
            raise self._wrong(name, "names and values")
        return value

    def any(self, name: str) -> Any:
        """The field as it is, to be checked elsewhere."""
        return self._state[name]

    def array(self, name: str, shape: tuple[int, ...], dtype: type[np.generic] = np.float64) -> Any:
        """An array of finite numbers, of this shape and dtype."""
        value = self._state[name]
        fits = isinstance(value, np.ndarray) and value.shape == shape and value.dtype == dtype
        if not fits or not np.isfinite(value).all():
            raise self._wrong(name, f"finite numbers of shape {shape}, {np.dtype(dtype)}")
        return value

    def _units(self, name: str, size: int) -> Integers:
        """Numbers of units below ``size``, in ascending order."""
        value = self._state[name]
        fits = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == np.int64
        if not fits or (len(value) and not (value.min() >= 0 and value.max() < size)):
            raise self._wrong(name, f"units from 0 to {size - 1}")
        if (np.diff(value) <= 0).any():
            raise self._wrong(name, "distinct units in ascending order")
        found: Integers = value
        return found

    def check(self, name: str, holds: bool, expected: str) -> None:
        """Refuse the field unless something holds."""
        if not holds:
            raise self._wrong(name, expected)

    def selection(self, size: int) -> Selection:
        """The fields ``units`` and ``g``."""
        units = self._units("units", size)
        g: Floats = self.array("g", (len(units),))
        return Selection(units, g)

    def _wrong(self, name: str, expected: str) -> StateError:
        return self._refusal(f"{self._where}, field {name!r}", expected, self._state[name])

    @staticmethod
    def _refusal(where: str, expected: str, got: object) -> StateError:
        return StateError(
            explain(
                f"checkpoint: {where}",
                "a saved state must be one of such a fit.",
                expected=expected,
                got=repr(got)[:80],
                hint="another path, or delete the file to begin anew",
            )
        )


def selection_of(state: object, where: str, size: int) -> Selection:
    """A selection of units below ``size``."""
    return Fields(state, where, "units", "g").selection(size)


def each(values: Sequence[Any], where: str, *names: str) -> list[Fields]:
    """A list of records."""
    return [Fields(value, f"{where} {place}", *names) for place, value in enumerate(values)]
