"""The check that squares and ratios of the data can be represented."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from l0hooks.errors import InvalidValueError, explain

SMALLEST, LARGEST = 1e-75, 1e75  # a coefficient is y/x, and its square is 1e300 at most


def check_magnitudes(where: str, x: Any, y: Any = None, sample_weight: Any = None) -> None:
    """Raise an error if the largest entry of a column of X, of y or of the weights is too large or too small.

    Parameters
    ----------
    where : str
        The call, for the message.
    x : array or scipy.sparse array or matrix in CSR or CSC, shape (n, p)
    y, sample_weight : array, shape (n,), optional

    Raises
    ------
    InvalidValueError
        If one of them is not 0 and outside of 1e-75 to 1e75: its square, or a coefficient's, would overflow or vanish.

    Examples
    --------
    >>> check_magnitudes("fit", np.eye(2), np.array([1e155, 0.0]))
    Traceback (most recent call last):
    l0hooks.errors.InvalidValueError: fit: the largest entry of y must be of a magnitude that can be squared.
      expected: 0, or from 1e-75 to 1e+75
      got: 1e+155
      try: other units
    """
    sizes = {"y": y, "sample_weight": sample_weight}
    for name, values in sizes.items():
        if values is not None:
            _check(where, name, _largest(np.asarray(values).reshape(-1, 1))[0])
    columns = _largest(x)
    wrong = np.flatnonzero(~_fits(columns))
    if wrong.size:
        _check(where, f"column {wrong[0]} of X", columns[wrong[0]])


def _fits(size: Any) -> Any:
    return (size == 0) | ((size >= SMALLEST) & (size <= LARGEST))


def _check(where: str, name: str, size: float) -> None:
    if not _fits(size):
        must = f"the largest entry of {name} must be of a magnitude that can be squared."
        expected = f"0, or from {SMALLEST:g} to {LARGEST:g}"
        raise InvalidValueError(explain(where, must, expected=expected, got=f"{size:g}", hint="other units"))


def _largest(x: Any) -> NDArray[np.float64]:
    """The largest absolute value of each column."""
    if isinstance(x, np.ndarray):
        return np.asarray(np.maximum(x.max(axis=0), -x.min(axis=0)), np.float64)
    entries = sparse.coo_array(x)
    found = np.zeros(entries.shape[1])
    np.maximum.at(found, entries.col, np.abs(entries.data))
    return found
