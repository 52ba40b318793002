"""Data frames of any kind, read by the names in them: pandas by index or column, all others by column.

Frames of polars, pyarrow and others are read by ``narwhals``, which is imported when the first one is given.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from l0hooks.calibration.numerics.columns import Floats
from l0hooks.errors import InvalidValueError, explain, near_names

Kind = Literal["target", "household"]
VALUE_COLUMNS = ("value", "lower", "upper", "group", "importance", "weight", "cluster")  # columns that hold no names
NAME_COLUMNS: tuple[Kind, ...] = ("target", "household")  # columns that name the rows of a matrix
_NAMES_SHOWN = 5
_PLAIN = (np.ndarray, np.generic, str, bytes, bool, int, float, complex, list, tuple, set, frozenset, range)


@runtime_checkable
class _ArrowStream(Protocol):
    """A table that hands out its columns as Arrow does."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


@dataclass(frozen=True, eq=False)
class Named:
    """Values with names, as a Series or a mapping holds them.

    Attributes
    ----------
    names : list of hashable
    values : array, one for each name
    """

    names: list[Hashable]
    values: NDArray[Any]


def few(items: Sequence[object]) -> str:
    """The first few, and how many more there are.

    Examples
    --------
    >>> few(["a", "b", "c", "d", "e", "f", "g"])
    "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    shown = ", ".join(repr(plain_scalar(item)) for item in items[:_NAMES_SHOWN])
    return shown + (f" and {len(items) - _NAMES_SHOWN:,} more" if len(items) > _NAMES_SHOWN else "")


def plain_scalar(value: Any) -> Any:
    """A NumPy scalar as one of Python's, whose ``repr`` is easier to read."""
    return value.item() if isinstance(value, np.generic) else value


def is_pandas(given: object, kind: Literal["DataFrame", "Series"]) -> TypeGuard[Any]:
    """Whether it is of pandas; does not import pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(given, vars(pandas)[kind])


def opened(given: object) -> Any:
    """A frame or Series of pandas as it is, one of any other kind as narwhals wraps it, all else unchanged.

    Examples
    --------
    >>> opened([1, 2])
    [1, 2]
    """
    if given is None or isinstance(given, (*_PLAIN, Mapping, torch.Tensor, Named)) or sparse.issparse(given):
        return given
    if is_pandas(given, "DataFrame") or is_pandas(given, "Series"):
        return given
    narwhals = _narwhals()
    if isinstance(given, (narwhals.DataFrame, narwhals.Series)):
        wrapped: Any = given
    else:
        try:
            wrapped = narwhals.from_native(given, allow_series=True, pass_through=True)
        except narwhals.exceptions.DuplicateError as error:
            raise InvalidValueError(explain("a frame", "columns must have distinct names.", got=str(error))) from error
    if isinstance(wrapped, narwhals.LazyFrame):
        wrapped = wrapped.collect()
    if not isinstance(wrapped, (narwhals.DataFrame, narwhals.Series)):
        if not isinstance(given, _ArrowStream):
            return given
        wrapped = narwhals.from_arrow(given, backend="pyarrow")
    return wrapped.to_pandas() if wrapped.implementation.is_pandas_like() else wrapped


def is_frame(given: object) -> TypeGuard[Any]:
    """Whether :func:`opened` gave a frame."""
    return is_pandas(given, "DataFrame") or _is_narwhals(given, "DataFrame")


def is_series(given: object) -> TypeGuard[Any]:
    """Whether :func:`opened` gave a Series."""
    return is_pandas(given, "Series") or _is_narwhals(given, "Series")


def read_values(given: object, kind: Kind, column: str, what: str) -> Any:
    """``given`` as :class:`Named` where it has names, else as an array.

    Parameters
    ----------
    given : array_like, tensor, Series, mapping or frame
        The names in a frame are those of its column ``kind``, else, with pandas, its index.
    kind : "target" or "household"
        What is named.
    column : str
        Which column is read, if a frame has several.
    what : str
        For messages.

    Raises
    ------
    InvalidValueError
        If it is not clear which columns hold names and values, or values are not one plain list.

    Examples
    --------
    >>> read_values({"a": 1, "b": 2}, "target", "value", "y").names
    ['a', 'b']
    """
    given = opened(given)
    if isinstance(given, Named):
        return given
    if isinstance(given, Mapping):
        content = np.empty(len(given), object)
        content[:] = list(given.values())
        return Named([plain_scalar(name) for name in given], content)
    if is_frame(given):
        names, columns = split_names(given, kind, (column,), what)
        if len(columns) != 1 and column not in columns:
            hint = near_names(column, map(str, columns))
            raise InvalidValueError(
                explain(what, f"a frame must have one column, or one called {column!r}.", got=few(columns), hint=hint)
            )
        values = array_of(given[column if column in columns else columns[0]], what)
        return values if names is None else Named(names, values)
    if is_pandas(given, "Series"):
        return Named(given.index.tolist(), array_of(given, what))
    return array_of(given, what)


def split_names(frame: Any, kind: Kind, read: Iterable[str], what: str) -> tuple[list[Hashable] | None, list[Hashable]]:
    """The names of a frame's rows, if it has them, and the columns that do not hold them.

    Raises
    ------
    InvalidValueError
        If there are no names, but columns that might hold them.
    """
    columns = list(frame.columns)
    if kind in columns:
        return array_of(frame[kind], what).tolist(), [name for name in columns if name != kind]
    if is_pandas(frame, "DataFrame"):
        return frame.index.tolist(), columns
    others = [name for name in columns if name not in VALUE_COLUMNS and name not in read]
    if others and len(columns) > 1:  # one of them may hold the names: the order is not guessed
        must = f"a frame without an index needs a column {kind!r}, or no column but those that are read."
        raise InvalidValueError(explain(what, must, got=few(columns), hint=f"rename one of them to {kind!r}"))
    return None, columns


def array_of(given: Any, what: str) -> NDArray[Any]:
    """One list of values as an array; masked ones are NaN.

    Raises
    ------
    InvalidValueError
        If it is ragged, or a tensor that cannot be read.
    """
    if isinstance(given, np.ma.MaskedArray):
        given = np.ma.filled(given.astype(np.float64), np.nan)
    if isinstance(given, torch.Tensor):
        return tensor_values(given, what)
    if sparse.issparse(given):
        stored: Any = given  # the stubs of issparse do not know the method
        given = stored.toarray()
    try:
        return np.asarray(given.to_numpy() if is_series(given) else given)
    except (ValueError, TypeError) as error:
        raise InvalidValueError(explain(what, "it must be one plain list of values.", got=str(error))) from error


def tensor_values(given: torch.Tensor, what: str) -> NDArray[Any]:
    """A tensor on any device, with or without a gradient, as an array.

    Examples
    --------
    >>> tensor_values(torch.ones(2, requires_grad=True, dtype=torch.bfloat16), "y")
    array([1., 1.], dtype=float32)
    """
    if given.layout is not torch.strided:
        given = given.to_dense()
    given = given.detach().cpu().resolve_conj().resolve_neg()
    found: NDArray[Any] = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    return found


def sparse_of_tensor(given: torch.Tensor) -> Any:
    """A sparse tensor of two axes as a SciPy array.

    Examples
    --------
    >>> sparse_of_tensor(torch.eye(2).to_sparse()).toarray()
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    given = given.detach().cpu()
    if given.layout is not torch.sparse_coo:
        given = given.to_sparse()
    entries = given.coalesce()
    rows, columns = entries.indices().numpy()
    return sparse.coo_array((tensor_values(entries.values(), "M"), (rows, columns)), shape=tuple(entries.shape))


def columns_of_numbers(frame: Any, columns: Sequence[str], what: str) -> Any:
    """Columns of a frame that narwhals wraps, as a sparse array: float64, shape (rows, len(columns)).

    They are read one by one, and only what is not zero is held.

    Raises
    ------
    InvalidValueError
        If a column does not hold numbers.
    """
    narwhals = _narwhals()
    schema = frame.schema
    strange = [name for name in columns if not (schema[name].is_numeric() or schema[name] == narwhals.Boolean)]
    if strange:
        hint = "a column that names the rows is called 'target' or 'household'"
        raise InvalidValueError(
            explain(what, "every column must hold numbers.", got=f"not so in {few(strange)}", hint=hint)
        )
    counts = [int(np.count_nonzero(_numbers(frame, name))) for name in columns]
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    data, places = np.empty(int(ends[-1])), np.empty(int(ends[-1]), np.int32)
    for name, start, end in zip(columns, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        values = _numbers(frame, name)
        filled = np.flatnonzero(values)
        data[start:end], places[start:end] = values[filled], filled
    return sparse.csc_array((data, places, ends), shape=(len(frame), len(columns)))


def _numbers(frame: Any, name: str) -> Floats:
    """A column in float64, missing values NaN."""
    values: Floats = np.asarray(frame[name].to_numpy()).astype(np.float64)
    return values


def _narwhals() -> ModuleType:
    import narwhals.stable.v2 as narwhals

    return narwhals


def _is_narwhals(given: object, kind: Literal["DataFrame", "Series"]) -> bool:
    narwhals = sys.modules.get("narwhals.stable.v2")
    return narwhals is not None and isinstance(given, vars(narwhals)[kind])
