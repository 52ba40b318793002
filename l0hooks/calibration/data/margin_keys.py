"""What a margin is called: ``"region:age"``, ``"income by region"``, ``"mean(income) where employed"``, ``"count"``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from l0hooks.errors import InvalidValueError, explain, near_names

Statistic = Literal["count", "sum", "mean", "share"]
_CALL = re.compile(r"(mean|share|sum)\((.+)\)")


@dataclass(frozen=True)
class MarginKey:
    """A margin, taken apart.

    Attributes
    ----------
    statistic : "count", "sum", "mean" or "share"
    number : str, optional
        The column that is added up or averaged.
    by : tuple of str
        The columns whose categories have a target each; crossed, if there are several.
    where : str, optional
        A column of truth values: the domain.
    """

    statistic: Statistic
    number: str | None
    by: tuple[str, ...]
    where: str | None


def read_key(key: str, columns: Sequence[str]) -> MarginKey:
    """The parts of a margin's name.

    Parameters
    ----------
    key : str
        ``"count"``, ``"sum(x)"``, ``"mean(x)"``, each perhaps followed by ``by a:b``; ``"a:b"`` for counts by category,
        ``"x by a"`` for sums, ``"share(a:b)"`` for proportions; and perhaps ``where d``. A column of the whole name is
        that column.
    columns : sequence of str
        Of the microdata.

    Raises
    ------
    InvalidValueError
        If a column is unknown.

    Examples
    --------
    >>> read_key("income by region:age where employed", ["region", "age", "income", "employed"])
    MarginKey(statistic='sum', number='income', by=('region', 'age'), where='employed')
    """
    rest, where = key.strip(), None
    if rest in columns:
        return MarginKey("count", None, (rest,), None)
    if " where " in rest:
        rest, where = (part.strip() for part in rest.rsplit(" where ", 1))
    first, *categories = (part.strip() for part in rest.rsplit(" by ", 1))
    by = tuple(part.strip() for part in categories[0].split(":")) if categories else ()
    called = _CALL.fullmatch(first)
    if called is not None and called[1] == "share":
        if by:
            must = "shares are named by their own categories."
            raise InvalidValueError(explain(f"margin {key!r}", must, expected="share(a:b)", got=key))
        found = MarginKey("share", None, tuple(part.strip() for part in called[2].split(":")), where)
    elif called is not None:
        found = MarginKey("mean" if called[1] == "mean" else "sum", called[2].strip(), by, where)
    elif first == "count" and first not in columns:
        found = MarginKey("count", None, by, where)
    elif by:
        found = MarginKey("sum", first, by, where)
    else:
        found = MarginKey("count", None, tuple(part.strip() for part in first.split(":")), where)
    for name in (found.number, *found.by, found.where):
        if name is not None and name not in columns:
            must = f"{name!r} must be a column of the households."
            raise InvalidValueError(explain(f"margin {key!r}", must, hint=near_names(name, columns)))
    return found
