"""The targets of ``L0FeatureSelector``: their task and their encoding."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.utils.multiclass import check_classification_targets  # type: ignore[import-untyped]
from sklearn.utils.validation import column_or_1d  # type: ignore[import-untyped]

from l0hooks.errors import InvalidValueError, explain
from l0hooks.sklearn.standardised import Floats


def task_of(y: Any) -> Literal["classification", "regression"]:
    """The task that ``task="auto"`` means for a target.

    Whole numbers are classes if there are at most max(10, √n_samples) different ones, and so are targets that are not
    numbers.

    Examples
    --------
    >>> task_of(["a", "b"]), task_of([0, 1, 1]), task_of([0.5, 1.5])
    ('classification', 'classification', 'regression')
    """
    values = column_or_1d(y)
    if values.dtype.kind not in "iuf":
        return "classification"
    different = np.unique(values)
    whole = bool(np.all(different == np.floor(different)))
    few = len(different) <= max(10, math.isqrt(len(values)))
    return "classification" if whole and few else "regression"


def encoded(y: Any, task: Literal["classification", "regression"]) -> tuple[Floats, npt.NDArray[Any] | None]:
    """The number of each sample's class and the classes; for a regression the values and None.

    Raises
    ------
    InvalidValueError
        If the target of a regression is not numeric and finite, or if there is only one class.

    Examples
    --------
    >>> encoded(["a", "b", "a"], "classification")
    (array([0., 1., 0.]), array(['a', 'b'], dtype='<U1'))
    """
    if task == "regression":
        try:
            values: Floats = np.asarray(y, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise invalid("a regression needs a numeric target.", "numbers", np.asarray(y).dtype) from error
        if not np.isfinite(values).all():
            raise invalid("a regression needs a numeric target.", "a finite target", "NaN or infinity")
        return values, None
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise invalid("a classification needs at least two classes.", ">= 2", f"{len(classes)} class")
    return np.asarray(codes, dtype=np.float64), classes


def invalid(must: str, expected: object, got: object) -> InvalidValueError:
    """The error for an argument of ``L0FeatureSelector``."""
    return InvalidValueError(explain("L0FeatureSelector", must, expected=expected, got=got))
