"""``margins``: the matrix and the targets of a calibration from microdata and the totals of their categories."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from l0hooks.calibration.data.margin_rows import Empty, RowOptions, refuse_missing, rows_of
from l0hooks.calibration.data.margin_terms import Term, read_term
from l0hooks.calibration.data.matrix import NamedMatrix
from l0hooks.calibration.data.microdata import Categories, FrameMicrodata, Microdata, need_column
from l0hooks.calibration.data.targets import CalibrationWarning
from l0hooks.calibration.numerics.columns import Floats
from l0hooks.errors import InvalidValueError, explain

_TOTALS_APART = 1e-6  # relative difference of two margins' sums that is told


@dataclass(frozen=True, eq=False)
class Margins:
    """What :meth:`~l0hooks.calibration.Calibrator.fit` takes, made of margins.

    Attributes
    ----------
    matrix : NamedMatrix
        Sparse, one row for each target.
    targets : dict from name to float
        A target is called ``margin=category``.
    groups : dict from name to str
        The margin of each target.
    design_weights : float64, shape (N,), or None
    dropped : tuple of str
        Cells that no household is in, left out.

    Examples
    --------
    >>> import pandas as pd
    >>> found = margins(pd.DataFrame({"age": ["old", "young", "old"]}), {"age": {"old": 7, "young": 5, "baby": 0}})
    >>> found.matrix.matrix.toarray()
    array([[1., 0., 1.],
           [0., 1., 0.]])
    >>> found.groups, found.dropped
    ({'age=old': 'age', 'age=young': 'age'}, ('age=baby',))
    """

    matrix: NamedMatrix
    targets: dict[str, float]
    groups: dict[str, str]
    design_weights: Floats | None
    dropped: tuple[str, ...]


def margins(
    households: object,
    totals: Mapping[str, object],
    *,
    names: str | None = None,
    design_weights: str | None = None,
    unit: str | None = None,
    partial: bool = False,
    empty: Empty = "refuse",
) -> Margins:
    r"""Targets from microdata: \(\sum_i w_i x_i\,[i \in c] = t_c\) for each cell \(c\) of each margin.

    Means \(m\) and shares are the conditions \(\sum_i w_i (x_i - m)\,[i \in c] = 0\), divided by the expected
    \(\sum_i w_i\,[i \in c]\), and means by \(|m|\) too: the error of such a target is about the relative error of the
    mean, or the error of the share.

    Parameters
    ----------
    households : data frame of any kind
        One row for each household, or for each person if ``unit`` is given.
    totals : mapping from margin to totals
        ``"tenure"`` or ``"region:age"`` counts the cells of columns, ``"count"`` all. ``"income"`` with one number is a
        sum, ``"income by region"`` one for each cell, ``"mean income by region"`` a mean, and ``"share tenure by
        region"`` shares, which add up to one within each region. Totals are a number, a mapping or Series by category
        (tuples for crossed columns, or ``"north:old"``), or a frame with the margin's columns and one of values.
    names : str, optional
        The column that names the households; ``household`` or the index of pandas if not given.
    design_weights : str, optional
        A column.
    unit : str, optional
        The column that says which household a person is in. Persons are added up: counts are of persons.
    partial : bool
        Whether categories without a total, and rows whose category is missing, are left free.
    empty : "refuse" or "drop"
        What becomes of a cell that no household is in, unless its total is zero: then it is dropped.

    Returns
    -------
    Margins

    Raises
    ------
    InvalidValueError
        If a column or a category is not there, with near names; if a category has no total, a cell no household, a
        value is missing, or shares do not add up to one.

    Warns
    -----
    CalibrationWarning
        If the counts of two margins add up to different populations.

    Examples
    --------
    >>> import pandas as pd
    >>> from l0hooks.calibration import Calibrator
    >>> people = pd.DataFrame({"tenure": ["own", "rent", "own"], "income": [30.0, 20.0, 50.0]})
    >>> found = margins(people, {"tenure": {"own": 60, "rent": 40}, "income": 3500})
    >>> found.targets
    {'tenure=own': 60.0, 'tenure=rent': 40.0, 'income': 3500.0}
    >>> Calibrator(progress=False, groups=found.groups).fit(found.matrix, found.targets).weights.round(3)
    array([15., 40., 45.])

    References
    ----------
    Deville & Särndal (1992), Calibration estimators in survey sampling, section 1.
    """
    if not isinstance(totals, Mapping) or not totals:
        got = f"{type(totals).__name__}: {str(totals)[:60]}"
        raise InvalidValueError(explain("margins", "totals must be a mapping from margins.", got=got))
    if empty not in ("refuse", "drop"):
        raise InvalidValueError(explain("empty", "it must be known.", expected="'refuse' or 'drop'", got=repr(empty)))
    data = FrameMicrodata(households)
    terms = [read_term(name, given, data) for name, given in totals.items()]
    return margins_of(data, terms, names=names, design_weights=design_weights, unit=unit, partial=partial, empty=empty)


def margins_of(
    data: Microdata,
    terms: list[Term],
    *,
    names: str | None,
    design_weights: str | None,
    unit: str | None,
    partial: bool,
    empty: Empty,
) -> Margins:
    """As :func:`margins`, of microdata and margins that have been read."""
    design = None if design_weights is None else _design(data, design_weights)
    weights = np.ones(data.count) if design is None else design
    options = RowOptions(partial, empty, weights, _population(terms, partial) / weights.sum())
    parts, targets, groups, dropped = [], {}, {}, []
    for term in terms:
        matrix, asked, without = rows_of(data, term, options)
        parts.append(matrix)
        targets.update(asked)
        groups.update(dict.fromkeys(asked, term.name))
        dropped += without
    stacked = sparse.vstack(parts, format="csr")
    if unit is None:
        return Margins(
            NamedMatrix(stacked, list(targets), _names(data, names)), targets, groups, design, tuple(dropped)
        )
    people = data.categories(need_column(data, unit, "unit"))
    refuse_missing(people, unit, "unit")
    ones = np.ones(data.count)
    spread = sparse.csr_array((ones, (np.arange(data.count), people.codes)), shape=(data.count, len(people.labels)))
    if design is not None:
        design = _of_units(design, people, unit)
    return Margins(NamedMatrix(stacked @ spread, list(targets), people.labels), targets, groups, design, tuple(dropped))


def _population(terms: list[Term], partial: bool) -> float:
    """How many there are, by the margins that count all; told if they differ. Without one: NaN."""
    counted = {term.name: sum(term.cells.values()) for term in terms if term.measure == "count"}
    if not counted or partial:
        return max(counted.values(), default=float("nan"))
    first, size = next(iter(counted.items()))
    for name, other in counted.items():
        if abs(other - size) > _TOTALS_APART * max(abs(other), abs(size)):
            must = "margins that count all should add up to one population: no weights can meet both."
            got = f"{first!r} to {size:,.10g}, {name!r} to {other:,.10g}"
            warnings.warn(explain("margins", must, got=got), CalibrationWarning, stacklevel=4)
            break
    return size


def _design(data: Microdata, name: str) -> Floats:
    design = data.numbers(need_column(data, name, "design_weights"))
    bad = np.flatnonzero(~np.isfinite(design) | (design < 0))
    if len(bad) or not design.any():
        got = f"{design[bad[0]]:g} in row {bad[0] + 1:,}" if len(bad) else "zero for all"
        raise InvalidValueError(explain("design_weights", "they must be finite and not negative.", got=got))
    return design


def _of_units(design: Floats, people: Categories, unit: str) -> Floats:
    """The design weight that all persons of a household have."""
    found = np.zeros(len(people.labels))
    found[people.codes] = design
    apart = np.flatnonzero(found[people.codes] != design)
    if len(apart):
        must = "all rows of a household must have one design weight."
        raise InvalidValueError(
            explain("design_weights", must, got=f"{unit} {people.labels[people.codes[apart[0]]]!r}")
        )
    return found


def _names(data: Microdata, names: str | None) -> list[Hashable] | None:
    if names is None and "household" not in data.columns:
        return data.row_names()
    name = need_column(data, names or "household", "names")
    column = data.categories(name)
    refuse_missing(column, name, "names")
    return [column.labels[code] for code in column.codes.tolist()]
