"""Names of targets and households: values given by name are put into the order of the matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l0hooks.calibration.data.frames import (
    Kind,
    Named,
    array_of,
    few,
    is_frame,
    is_pandas,
    is_series,
    opened,
    plain_scalar,
    read_values,
    split_names,
)
from l0hooks.calibration.numerics.columns import Floats, Integers
from l0hooks.errors import InvalidValueError, explain, near_names

_COLUMNS = {"target": "value", "household": "weight"}  # what a frame's column of values is called


def check_distinct(names: Iterable[Hashable], what: str) -> tuple[Hashable, ...]:
    """``names`` as a tuple.

    Raises
    ------
    InvalidValueError
        If one is missing (NaN, None), cannot be a name, or occurs twice.
    """
    found = tuple(names)
    empty = [place for place, name in enumerate(found) if name is None or name != name]
    if empty:
        raise InvalidValueError(explain(what, "every name must be given.", got=f"none at place {few(empty)}"))
    if any(not isinstance(name, Hashable) for name in found):
        raise InvalidValueError(explain(what, "names must be strings, numbers or tuples of them."))
    if len(set(found)) < len(found):
        twice = [name for name, times in Counter(found).items() if times > 1]
        raise InvalidValueError(explain(what, "names must be distinct.", got=f"more than once: {few(twice)}"))
    return found


@dataclass(frozen=True, eq=False)
class Axis:
    """The targets or the households of a matrix: how many there are, and what they are called.

    Parameters
    ----------
    kind : "target" or "household"
    count : int
    names : tuple, optional
        Distinct, one for each.

    Examples
    --------
    >>> axis = Axis("target", 2, ("men", "women"))
    >>> axis.values({"women": 5, "men": 3}, "y")
    array([3., 5.])
    """

    kind: Kind
    count: int
    names: tuple[Hashable, ...] | None = None

    @cached_property
    def index(self) -> Mapping[Hashable, int]:
        """Where each name stands."""
        return {name: place for place, name in enumerate(self.names or range(self.count))}

    @cached_property
    def labels(self) -> Sequence[Hashable]:
        """The names, or the numbers where there are none."""
        return range(self.count) if self.names is None else self.names

    def shown(self, places: NDArray[Any] | Sequence[int]) -> str:
        """The names of a few, for a message."""
        return few([self.labels[int(place)] for place in places])

    def adopt(self, given: object) -> Axis:
        """The same axis with the names of ``given``, if that has names and the axis none.

        Names that are the numbers 0, 1, … in any order are not adopted: they say which entry is meant.
        """
        if self.names is not None or given is None:
            return self
        found = read_values(given, self.kind, _COLUMNS[self.kind], f"{self.kind}s")
        names = found.names if isinstance(found, Named) else None
        if names is None or len(names) != self.count or _numbers(names, self.count):
            return self
        return Axis(self.kind, self.count, check_distinct(names, f"{self.kind}s"))

    def values(self, given: object, what: str, *, fill: float | None = None, column: str | None = None) -> Floats:
        """Numbers, one for each entry: float64, shape (count,).

        Parameters
        ----------
        given : array_like, tensor, Series, mapping or frame
            Aligned by name if it has names.
        what : str
            Its name in messages.
        fill : float, optional
            For entries that a mapping or a Series does not name; without it they are an error.

        Raises
        ------
        InvalidValueError
            If lengths or names do not fit, a name occurs twice, or something is not a number.
        """
        return _floats(self.objects(given, what, fill=fill, column=column), what)

    def objects(self, given: object, what: str, *, fill: object = None, column: str | None = None) -> NDArray[Any]:
        """As :meth:`values`, for entries of any type."""
        found = read_values(given, self.kind, column or _COLUMNS[self.kind], what)
        if not isinstance(found, Named):
            return self._by_position(found, what)
        names, content = found.names, found.values
        check_distinct(names, what)
        unknown = [name for name in names if name not in self.index]
        if unknown:
            raise InvalidValueError(self._unknown_names(unknown, what))
        if fill is None and len(names) < self.count:
            present = set(names)
            missing = [name for name in self.labels if name not in present]
            raise InvalidValueError(
                explain(what, f"every {self.kind} must be named.", got=f"{len(missing):,} missing: {few(missing)}")
            )
        placed = np.empty(self.count, object if content.dtype.kind not in "biuf" else content.dtype)
        if fill is not None:
            placed = np.full(self.count, fill, np.result_type(content, np.float64) if _number(fill) else object)
        if len(names):
            placed[np.fromiter((self.index[name] for name in names), np.int64, len(names))] = content
        return placed

    def places(self, given: object, what: str) -> Integers:
        """Which entries are meant, sorted: names (numbers where there are none), or one flag for each entry.

        Raises
        ------
        InvalidValueError
            If a name is unknown or occurs twice, or flags are not one for each entry.
        """
        given = self._flags_or_names(given, what)
        array = given if isinstance(given, np.ndarray) else None
        listed = [plain_scalar(name) for name in given]
        if (array is not None and array.dtype.kind == "b") or (listed and all(type(n) is bool for n in listed)):
            if len(listed) != self.count:
                raise InvalidValueError(
                    explain(what, f"flags must be one for each {self.kind}.", expected=self.count, got=len(listed))
                )
            return np.flatnonzero(np.asarray(listed, np.bool_))
        check_distinct(listed, what)
        unknown = [name for name in listed if name not in self.index]
        if unknown:
            raise InvalidValueError(self._unknown_names(unknown, what))
        return np.sort(np.fromiter((self.index[name] for name in listed), np.int64, len(listed)))

    def _flags_or_names(self, given: object, what: str) -> Iterable[Any]:
        """Names, or flags in the order of the axis."""
        if isinstance(given, str):
            return [given]
        given = opened(given)
        if is_frame(given):
            given = self._of_frame(given, what)
        elif isinstance(given, Mapping):
            given = read_values(given, self.kind, "", what)
        elif is_series(given):
            values = array_of(given, what)
            flags = values.dtype.kind == "b" and is_pandas(given, "Series")
            given = Named(given.index.tolist(), values) if flags else values
        elif isinstance(given, torch.Tensor):
            given = array_of(given, what)
        if isinstance(given, Named) and all(isinstance(flag, (bool, np.bool_)) for flag in given.values):
            return self.objects(given, what, fill=False).astype(np.bool_)
        if not isinstance(given, Iterable) or (isinstance(given, np.ndarray) and given.ndim != 1):
            shown = given.values if isinstance(given, Named) else given
            must = f"it must list {self.kind}s, or hold one flag for each."
            raise InvalidValueError(explain(what, must, got=str(shown)[:60]))
        return given

    def _of_frame(self, frame: Any, what: str) -> Any:
        """The names in a frame, or its one column of flags."""
        names, columns = split_names(frame, self.kind, (), what)
        if not columns and names is not None:
            return names
        if len(columns) != 1:
            must = f"a frame must have a column {self.kind!r}, and no other than one of flags."
            raise InvalidValueError(explain(what, must, got=few(columns)))
        values = array_of(frame[columns[0]], what)
        return values if names is None else Named(names, values)

    def _by_position(self, content: NDArray[Any], what: str) -> NDArray[Any]:
        if content.ndim == 2 and 1 in content.shape:
            content = content.ravel()
        if content.shape != (self.count,):
            got = f"{len(content):,}" if content.ndim == 1 else f"shape {content.shape}" if content.ndim else content
            raise InvalidValueError(
                explain(what, f"there must be one for each {self.kind}.", expected=f"{self.count:,}", got=got)
            )
        return content

    def _unknown_names(self, unknown: Sequence[Hashable], what: str) -> str:
        texts = [label for label in self.labels[:20_000] if isinstance(label, str)]
        hint = near_names(str(unknown[0]), texts) if texts else None
        if self.names is None:
            hint = f"the matrix has no names: {self.kind}s are numbered 0 to {self.count - 1}"
        elif str(unknown[0]) in map(str, self.labels):
            hint = "they are numbers in one and text in the other: cast one of them"
        elif len(unknown) == self.count and _numbers(unknown, self.count):
            hint = "it has numbers where the matrix has names; if the order is right, pass .to_numpy()"
        return explain(what, f"names must be those of the matrix's {self.kind}s.", got=few(unknown), hint=hint)


def _floats(content: NDArray[Any], what: str) -> Floats:
    if content.dtype.kind not in "biufO":
        raise InvalidValueError(explain(what, "values must be real numbers.", got=f"{content.dtype} values"))
    try:
        return content.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(explain(what, "values must be real numbers.", got=str(error))) from error


def _numbers(names: Sequence[Hashable], count: int) -> bool:
    """Whether they are 0, 1, …, count − 1 in some order."""
    return all(isinstance(name, Integral) for name in names) and set(names) == set(range(count))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
