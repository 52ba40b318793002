"""The base class of the linear estimators: parameters and checks, the search, and the choice of a size."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from sklearn.base import BaseEstimator  # type: ignore[import-untyped]
from sklearn.model_selection import KFold, StratifiedKFold, check_cv  # type: ignore[import-untyped]
from sklearn.utils.validation import _check_sample_weight, check_is_fitted  # type: ignore[import-untyped]

from l0hooks.errors import InvalidValueError, L0HooksWarning, explain
from l0hooks.sklearn.subset.design import Floats, Ints
from l0hooks.sklearn.subset.results import Subset, SubsetPath
from l0hooks.sklearn.subset.size_choice import (
    Task,
    chosen,
    fit_path,
    held_out,
    largest_size,
    ric_indices,
    with_ebic,
    with_held_out,
    with_price,
    with_ric,
)

try:
    from sklearn.utils.validation import validate_data as checked_data
except ImportError:  # scikit-learn before 1.6

    def checked_data(estimator: Any, *data: Any, **options: Any) -> Any:
        """X, or X and y, as arrays that fit the estimator."""
        return estimator._validate_data(*data, **options)


__all__ = ["FORMATS", "L0LinearModel", "checked_data"]

FORMATS = ("csr", "csc")
_SELECTED_FROM = 1e-5  # scikit-learn's default threshold for sparse coefficients
SOLVERS = {
    "squared": "forward and backward passes with exact exchanges",
    "logistic": "exchanges of a quadratic model with exact Newton fits",
    "multinomial": "exchanges of a quadratic model with exact Newton fits",
    "poisson": "exchanges of a quadratic model with exact Newton fits",
}


class L0LinearModel(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Parameters, checks and search of the linear estimators; use ``L0Regressor`` or ``L0Classifier``."""

    def __init__(
        self,
        k: int | str = "ebic",
        *,
        l0: float | None = None,
        alpha: float = 0.0,
        groups: Sequence[Any] | None = None,
        max_k: int | None = None,
        cv: Any = 5,
        one_standard_error: bool = False,
        fit_intercept: bool = True,
        random_state: Any = None,
        n_jobs: int | None = None,
    ) -> None:
        self.k = k
        self.l0 = l0
        self.alpha = alpha
        self.groups = groups
        self.max_k = max_k
        self.cv = cv
        self.one_standard_error = one_standard_error
        self.fit_intercept = fit_intercept
        self.random_state = random_state
        self.n_jobs = n_jobs

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    @property
    def penalty(self) -> str:
        """``"l1"``, no parameter: by it scikit-learn's ``SelectFromModel`` knows that coefficients are sparse.

        It then keeps the features with a coefficient of at least 1e-5, and warns here of chosen ones below. Without
        it, it keeps those above the mean.
        """
        if "coef_" in vars(self):
            size = np.abs(np.atleast_2d(self.coef_)).sum(axis=0)
            lost = int((self.support_ & (size < _SELECTED_FROM)).sum())
            if lost:
                text = explain(
                    "SelectFromModel",
                    "features are selected by coefficients of at least 1e-5 unless a threshold is given.",
                    expected=f"the {int(self.support_.sum())} features of the support",
                    got=f"{lost} of them with smaller coefficients",
                    hint='SelectFromModel(estimator, importance_getter="support_", threshold=0.5)',
                )
                warnings.warn(text, L0HooksWarning, stacklevel=3)
        return "l1"

    def _check_parameters(self) -> None:
        where = type(self).__name__
        if not (self.k in ("ebic", "cv", "ric") if isinstance(self.k, str) else _is_count(self.k)):
            rules = 'int >= 0, "ebic", "ric" or "cv"'
            raise InvalidValueError(explain(where, "k must be a size or a rule.", expected=rules, got=repr(self.k)))
        if self.l0 is not None and self.k != "ebic":
            must = "l0 replaces k: give only one of them."
            raise InvalidValueError(explain(where, must, got=f"k={self.k!r}, l0={self.l0!r}"))
        for name, value in (("alpha", self.alpha), ("l0", self.l0)):
            if value is not None and not (isinstance(value, Real) and 0 <= float(value) < np.inf):
                raise InvalidValueError(explain(where, f"{name} must be finite and not negative.", got=repr(value)))
        if isinstance(self.cv, Integral) and not (_is_count(self.cv) and int(self.cv) >= 2):
            must = "cross-validation needs at least two folds."
            raise InvalidValueError(explain(where, must, expected="cv >= 2", got=f"cv={self.cv!r}"))
        if self.max_k is not None and not _is_count(self.max_k):
            raise InvalidValueError(explain(where, "max_k must be a size.", expected="int >= 0", got=repr(self.max_k)))

    def _columns_of_groups(self, p: int) -> tuple[Ints, ...] | None:
        if self.groups is None:
            return None
        labels = np.asarray(self.groups)
        if labels.shape != (p,):
            where = type(self).__name__
            raise InvalidValueError(
                explain(where, "groups must name a group for each column.", expected=(p,), got=labels.shape)
            )
        _, inverse = np.unique(labels, return_inverse=True)
        return tuple(np.flatnonzero(inverse == g) for g in range(int(inverse.max()) + 1))

    def _weights(self, x: Any, sample_weight: Any) -> Floats | None:
        if sample_weight is None:
            return None
        weight = np.asarray(_check_sample_weight(sample_weight, x, dtype=np.float64, copy=True))
        counted, total = np.count_nonzero(weight), float(weight.sum())
        if 0 < total < counted and weight.min() >= 0:  # shares, not copies: only their ratios count
            weight *= counted / total
        return weight

    def _search(self, x: Any, y: Floats, weight: Floats | None, task: Task, strata: Any) -> Subset:
        """Set ``path_``, ``k_``, ``support_``, ``solver_`` and ``n_iter_``; return the chosen subset."""
        items = x.shape[1] if task.groups is None else len(task.groups)
        rows = float(x.shape[0]) if weight is None else float(weight.sum())
        if isinstance(self.k, str):
            max_size = (
                largest_size(rows, x.shape[1], task.groups) if self.max_k is None else min(int(self.max_k), items)
            )
            sizes: Iterable[int] = range(max_size + 1)
        else:
            sizes = [min(int(self.k), items)]
        path, steps, total = fit_path(x, y, weight, task, sizes)
        if self.l0 is not None:
            path = with_price(path, float(self.l0))
        elif self.k == "ebic":
            path = with_ebic(path, task, total)
        elif self.k == "cv":
            path = with_held_out(path, self._held_out(x, y, weight, task, path.k, strata))
        if self.k == "ric":
            proposed = ric_indices(path, task, total)
            index = int(proposed[0])
            if len(proposed) > 1:
                path, index = with_ric(path, proposed, self._held_out(x, y, weight, task, path.k[proposed], strata))
        else:
            index = chosen(path, one_standard_error=self.k == "cv" and self.one_standard_error) if len(path) > 1 else 0
        subset: Subset = path[index]
        self.path_: SubsetPath = path
        self.k_ = subset.k
        self.support_ = subset.support
        self.solver_ = SOLVERS[task.loss]
        self.n_iter_ = max(steps, 1)
        return subset

    def _held_out(
        self, x: Any, y: Floats, weight: Floats | None, task: Task, sizes: Any, strata: Any
    ) -> list[tuple[Floats, float]]:
        """The losses on each fold and the weight of the fold, for each of ``sizes``."""
        if weight is not None and _is_count(self.cv):  # rows of weight zero must not fill a fold
            keep = np.flatnonzero(weight)
            x, y, weight = x[keep], y[keep], weight[keep]
            strata = None if strata is None else strata[keep]
        splitter = self._splitter(x.shape[0], strata)
        folds = splitter.split(np.zeros((x.shape[0], 1)), strata)
        jobs = (delayed(_fit_fold)(x, y, weight, task, sizes, train, test) for train, test in folds)
        return list(Parallel(n_jobs=self.n_jobs)(jobs))

    def _splitter(self, n: int, strata: Any) -> Any:
        if not _is_count(self.cv):
            return check_cv(self.cv, strata, classifier=strata is not None)
        if n < 2:
            where = type(self).__name__
            raise InvalidValueError(
                explain(where, "cross-validation needs at least two samples.", expected=">= 2", got=f"n_samples={n}")
            )
        if strata is not None and np.bincount(strata).min() >= 2:
            least = int(np.bincount(strata).min())
            return StratifiedKFold(max(2, min(self.cv, least)), shuffle=True, random_state=self.random_state)
        return KFold(min(self.cv, n), shuffle=True, random_state=self.random_state)

    def _predictor(self, x: Any) -> Floats:
        """x·coef + intercept, shape (n,) or (n, outputs)."""
        check_is_fitted(self)
        x = checked_data(self, x, accept_sparse=FORMATS, dtype=(np.float64, np.float32), reset=False)
        return np.asarray(x @ self.coef_.T + self.intercept_)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, (bool, np.bool_)) and int(value) >= 0


def _fit_fold(
    x: Any, y: Floats, weight: Floats | None, task: Task, sizes: Any, train: Ints, test: Ints
) -> tuple[Floats, float]:
    """Fit on the rows ``train``; return the losses on the rows ``test`` and their weight."""
    inner, outer = (None, None) if weight is None else (weight[train], weight[test])
    path, _, _ = fit_path(x[train], y[train], inner, task, sizes)
    return held_out(path, x[test], y[test], outer, task)
