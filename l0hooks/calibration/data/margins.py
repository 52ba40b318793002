r"""Matrix and targets from microdata: counts, sums, means and shares, by categories and in domains.

Each target is one row of M. With \(x_i\) a household's number and \(1_i\) whether it is in a category and a domain:

    count: \(1_i\);  sum: \(1_i x_i\);  mean \(m\): \(1_i (x_i/m - 1)\), target 0;  share \(p\): \(1_i - p\), target 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from l0hooks.calibration.data.frames import Named, array_of, few, is_frame, is_pandas, opened, read_values
from l0hooks.calibration.data.margin_keys import MarginKey, read_key
from l0hooks.calibration.data.matrix import NamedMatrix
from l0hooks.calibration.data.targets import CalibrationWarning
from l0hooks.calibration.numerics.columns import Flags, Floats
from l0hooks.errors import InvalidValueError, explain, near_names

_DISAGREE = 1e-6  # relative difference of two totals of all households that is told
Category = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Margins:
    """What :func:`margins` makes of microdata.

    Attributes
    ----------
    matrix : NamedMatrix
        Sparse, one row for each target and one column for each household.
    targets : dict from str to float
        The targets by name, ``"region:age[north, young]"``.
    groups : dict from str to str
        The margin of each target: groups of a calibrator, so that every margin counts alike.

    Examples
    --------
    >>> found = margins({"tenure": ["own", "rent", "own"]}, {"tenure": {"own": 5, "rent": 2}})
    >>> found.targets
    {'tenure[own]': 5.0, 'tenure[rent]': 2.0}
    >>> found.matrix.matrix.toarray()
    array([[1., 0., 1.],
           [0., 1., 0.]])
    """

    matrix: NamedMatrix
    targets: dict[str, float]
    groups: dict[str, str]


def margins(households: object, totals: Mapping[str, object], *, names: str | None = None) -> Margins:
    """Matrix, targets and groups for :meth:`Calibrator.fit`, from one row of microdata for each household.

    Parameters
    ----------
    households : data frame of any kind, or mapping from column to values
        One row for each household.
    totals : mapping from margin to totals
        Margins are called

        - ``"tenure"`` or ``"region:age"``: how many households are in each category, or in each pair of categories;
        - ``"income by region"`` or ``"sum(income)"``: sums of a column;
        - ``"mean(income) by region"``: means;
        - ``"share(tenure)"``: proportions, between 0 and 1;
        - ``"count"``: how many there are;

        each perhaps followed by ``" where employed"``, a column of truth values. Totals are a number, or one for each
        category: a mapping (several categories as a tuple, or a text with colons), a Series, or a frame with the
        categories' columns and one of numbers.
    names : str, optional
        The column that names households; ``"household"`` if there is one.

    Returns
    -------
    Margins

    Raises
    ------
    InvalidValueError
        If a column is unknown or has empty cells, or no household is in a category that has a total.

    Warns
    -----
    CalibrationWarning
        Of categories without a total, and of margins whose totals of all households differ.

    Examples
    --------
    >>> people = {"region": ["n", "n", "s", "s"], "age": [20, 40, 60, 30], "tenure": ["own", "rent", "own", "own"]}
    >>> totals = {"region": {"n": 30, "s": 20}, "mean(age)": 35, "share(tenure)": {"own": 0.6, "rent": 0.4}}
    >>> found = margins(people, totals)
    >>> found.targets["region[n]"], found.groups["share(tenure)[own]"]
    (30.0, 'share(tenure)')
    >>> from l0hooks.calibration import Calibrator
    >>> weights = Calibrator(groups=found.groups, progress=False).fit(found.matrix, found.targets).weights
    >>> round(float(weights @ people["age"] / weights.sum()), 3)
    35.0
    """
    table = _Table(households)
    rows: list[Any] = []
    targets: dict[str, float] = {}
    groups: dict[str, str] = {}
    sums: dict[str, float] = {}
    for key, given in totals.items():
        margin = read_key(key, table.columns)
        values = _by_category(given, key, margin)
        found, complete = _rows(table, key, margin, values)
        for category, row in found.items():
            name = f"{key}[{', '.join(category)}]" if category else key
            rows.append(row)
            targets[name] = values[category] if margin.statistic in ("count", "sum") else 0.0
            groups[name] = key
        if margin.statistic == "count" and margin.where is None and complete:
            sums[key] = sum(values.values())
    _compare(sums)
    if not rows:
        raise InvalidValueError(explain("margins", "there must be targets.", got="no totals"))
    matrix = NamedMatrix(sparse.csr_array(sparse.vstack(rows)), list(targets), table.names(names))
    return Margins(matrix, targets, groups)


class _Table:
    """Columns of microdata by name."""

    def __init__(self, given: object) -> None:
        frame: Any = opened(given)
        if not isinstance(given, Mapping) and not is_frame(frame):
            must = "they must be a data frame, or a mapping from column to values."
            raise InvalidValueError(explain("households", must, got=type(given).__name__))
        self._given = frame
        self.columns = [str(name) for name in (given if isinstance(given, Mapping) else frame.columns)]
        sizes = {len(self.column(name)) for name in self.columns}
        if len(sizes) != 1 or not max(sizes):
            got = f"columns of {few(sorted(sizes))} rows" if sizes else "no columns"
            raise InvalidValueError(explain("households", "there must be rows, as many in each column.", got=got))
        (self.size,) = sizes

    def column(self, name: str) -> NDArray[Any]:
        return array_of(self._given[name], f"households, column {name!r}")

    def names(self, asked: str | None) -> list[Hashable] | None:
        name = "household" if asked is None and "household" in self.columns else asked
        if name is not None:
            if name not in self.columns:
                hint = near_names(name, self.columns)
                raise InvalidValueError(explain("names", f"{name!r} must be a column of the households.", hint=hint))
            found: list[Hashable] = self.column(name).tolist()
            return found
        return self._given.index.tolist() if is_pandas(self._given, "DataFrame") else None

    def numbers(self, name: str, key: str) -> Floats:
        try:
            values: Floats = self.column(name).astype(np.float64)
        except (TypeError, ValueError) as error:
            must = f"column {name!r} must hold numbers."
            raise InvalidValueError(explain(f"margin {key!r}", must, got=str(error))) from error
        self._full(~np.isfinite(values), name, key)
        return values

    def categories(self, name: str, key: str) -> NDArray[Any]:
        """The categories of a column as texts."""
        values = self.column(name)
        self._full(np.array([value is None or value != value or value == "" for value in values.tolist()]), name, key)
        found, inverse = np.unique(values.astype(str) if values.dtype.kind != "f" else values, return_inverse=True)
        return np.array([_text(one) for one in found.tolist()], object)[inverse]

    def flags(self, name: str, key: str) -> Flags:
        values = self.numbers(name, key)
        if not np.isin(values, (0.0, 1.0)).all():
            must = f"column {name!r} must hold truth values, or 0 and 1."
            raise InvalidValueError(explain(f"margin {key!r}", must, got=few(np.unique(values)[:5].tolist())))
        flags: Flags = values == 1.0
        return flags

    def _full(self, empty: Flags, name: str, key: str) -> None:
        if empty.any():
            must = f"column {name!r} must have a value for every household."
            got = f"{int(empty.sum()):,} empty cells, the first in row {int(empty.argmax()) + 1:,}"
            raise InvalidValueError(explain(f"margin {key!r}", must, got=got, hint="fill them, perhaps by 'unknown'"))


def _by_category(given: object, key: str, margin: MarginKey) -> dict[Category, float]:
    """The totals of a margin by its categories, as texts."""
    opened_frame: Any = opened(given)
    pairs: list[tuple[Any, Any]]
    if not margin.by:
        value = read_values(given, "target", "value", f"margin {key!r}")
        flat = np.asarray(value.values if isinstance(value, Named) else value).ravel()
        if len(flat) != 1:
            raise InvalidValueError(explain(f"margin {key!r}", "it has one total.", got=f"{len(flat)}"))
        return {(): _number(flat[0], key)}
    if is_frame(opened_frame) and set(margin.by) <= {str(name) for name in opened_frame.columns}:
        others = [name for name in opened_frame.columns if name not in margin.by]
        if len(others) != 1:
            must = "a frame of totals has the categories' columns and one of numbers."
            raise InvalidValueError(explain(f"margin {key!r}", must, got=few(others)))
        labels = list(zip(*(array_of(opened_frame[name], key).tolist() for name in margin.by), strict=True))
        pairs = list(zip(labels, array_of(opened_frame[others[0]], key).tolist(), strict=True))
    else:
        named = read_values(given, "target", "value", f"margin {key!r}")
        if not isinstance(named, Named):
            must = "its totals must be named by their categories."
            raise InvalidValueError(explain(f"margin {key!r}", must, expected=" and ".join(margin.by)))
        pairs = list(zip(named.names, named.values.tolist(), strict=True))
    found: dict[Category, float] = {}
    for label, value in pairs:
        parts = label if isinstance(label, tuple) else str(label).split(":") if len(margin.by) > 1 else (label,)
        category = tuple(_text(part) for part in parts)
        if len(category) != len(margin.by) or category in found:
            must = f"a total belongs to one category of {' and '.join(margin.by)}, and each has one."
            raise InvalidValueError(explain(f"margin {key!r}", must, got=repr(label)))
        found[category] = _number(value, key)
    return found


def _rows(
    table: _Table, key: str, margin: MarginKey, values: dict[Category, float]
) -> tuple[dict[Category, Any], bool]:
    """The row of M for each category that has a total, and whether every category has one."""
    inside = np.ones(table.size, np.bool_) if margin.where is None else table.flags(margin.where, key)
    x = np.ones(table.size) if margin.number is None else table.numbers(margin.number, key)
    columns = [table.categories(name, key) for name in margin.by]
    labels: list[Category] = [()] * table.size
    if columns:
        labels = list(zip(*(column.tolist() for column in columns), strict=True))
    places: dict[Category, list[int]] = {}
    for place in np.flatnonzero(inside).tolist():
        places.setdefault(labels[place], []).append(place)
    complete = _all_have_totals(key, values, places)
    rows = {}
    for category, value in values.items():
        members = np.array(places.get(category, []), np.int64)
        if not len(members):
            continue  # a total of zero that no household adds to
        row = np.zeros(table.size)
        row[members] = x[members]
        if margin.statistic == "mean":
            row[members] = x[members] / value - 1 if value else x[members]
        elif margin.statistic == "share":
            row -= value * inside
        rows[category] = sparse.csr_array(row[None])
    return rows, complete


def _all_have_totals(key: str, values: dict[Category, float], places: dict[Category, list[int]]) -> bool:
    """Whether every category has a total; a warning tells which have none."""
    known = {":".join(category): category for category in places}
    for category, value in values.items():
        if category not in places and value != 0:
            name = ":".join(category)
            must = f"some household must be in category {name!r}."
            raise InvalidValueError(explain(f"margin {key!r}", must, got="none", hint=near_names(name, known)))
    free = [name for name, category in known.items() if category not in values]
    if free:
        message = explain(f"margin {key!r}", "every category should have a total.", got=f"none for {few(free)}")
        warnings.warn(message, CalibrationWarning, stacklevel=4)
    return not free


def _compare(sums: dict[str, float]) -> None:
    """Tell margins of all households whose totals differ."""
    if sums and max(sums.values()) - min(sums.values()) > _DISAGREE * abs(max(sums.values())):
        got = ", ".join(f"{key!r} {value:,.6g}" for key, value in sums.items())
        message = explain("margins", "counts of all households should add up to one number.", got=got)
        warnings.warn(message, CalibrationWarning, stacklevel=3)


def _text(value: object) -> str:
    """A category as text: whole numbers without a point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _number(value: object, key: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InvalidValueError(explain(f"margin {key!r}", "totals must be numbers.", got=repr(value))) from error
    if not np.isfinite(number):
        raise InvalidValueError(explain(f"margin {key!r}", "totals must be finite.", got=repr(value)))
    return number
