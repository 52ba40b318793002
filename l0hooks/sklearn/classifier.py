"""``L0Classifier``: logistic and multinomial regression with exactly k features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax
from sklearn.base import ClassifierMixin  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.utils.multiclass import check_classification_targets  # type: ignore[import-untyped]

from l0hooks.errors import InvalidValueError, explain
from l0hooks.sklearn.base import FORMATS, L0LinearModel, checked_data
from l0hooks.sklearn.magnitudes import check_magnitudes
from l0hooks.sklearn.subset.design import Floats, Ints
from l0hooks.sklearn.subset.size_choice import Task


class L0Classifier(ClassifierMixin, L0LinearModel):  # type: ignore[misc]
    r"""Logistic or, for more than two classes, multinomial regression on the best subset of k features.

    min over |S| = k of  −Σ wᵢ log P(yᵢ | xᵢ)/Σ wᵢ + (alpha/2)·Σ β²;  with more than two classes a chosen feature has
    one coefficient for each class.

    Parameters
    ----------
    k : int >= 0, "ebic", "ric" or "cv"
        The number of features, or of groups. "ebic" takes the size of least extended BIC, "cv" that of least
        held-out loss. "ric" chooses by held-out loss among the few sizes that the risk inflation criterion proposes
        with penalties of 1.5 to 2.5 times log p. An int larger than the number of features means all of them.
    l0 : float >= 0, optional
        A price for each feature, instead of k: the size minimises ``loss + l0·k``.
    alpha : float >= 0
        Ridge on the coefficients of the columns as given; the intercept is not penalised. If the chosen features
        separate the classes there is no finite optimum with ``alpha=0``: a ridge of 1e-9 on standardised columns is
        then used, and ``fit`` warns.
    groups, max_k, cv, one_standard_error, fit_intercept, random_state, n_jobs
        As for :class:`L0Regressor`; folds are stratified.

    Attributes
    ----------
    classes_ : array, shape (n_classes,)
    coef_ : float64 array, shape (1 or n_classes, n_features)
    intercept_ : float64 array, shape (1 or n_classes,)
    support_, k_, path_, solver_, n_iter_, n_features_in_, feature_names_in_
        As for :class:`L0Regressor`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(200, 10))
    >>> y = np.where(x[:, 3] + 0.5 * x[:, 7] > 0, "yes", "no")
    >>> model = L0Classifier(k=2).fit(x, y)
    >>> np.flatnonzero(model.support_).tolist(), model.score(x, y) > 0.97
    ([3, 7], True)

    References
    ----------
    Dedieu, Hazimeh & Mazumder (2021), JMLR 22(135), for the problem.
    """

    def __init__(
        self,
        k: int | str = "ebic",
        *,
        l0: float | None = None,
        alpha: float = 1e-4,
        groups: Sequence[Any] | None = None,
        max_k: int | None = None,
        cv: Any = 5,
        one_standard_error: bool = False,
        fit_intercept: bool = True,
        random_state: Any = None,
        n_jobs: int | None = None,
    ) -> None:
        super().__init__(
            k,
            l0=l0,
            alpha=alpha,
            groups=groups,
            max_k=max_k,
            cv=cv,
            one_standard_error=one_standard_error,
            fit_intercept=fit_intercept,
            random_state=random_state,
            n_jobs=n_jobs,
        )

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803
        """Find the support and fit on it.

        Parameters
        ----------
        X : array, frame or scipy.sparse array or matrix, shape (n, n_features), finite
            A sparse X is never made dense.
        y : array, shape (n,)
            Labels of two or more classes.
        sample_weight : array, shape (n,), >= 0, optional

        Raises
        ------
        InvalidValueError
            If a parameter or the weights are outside their range, there is only one class, or the largest entry of a
            column or of the weights is not 0 and outside of 1e-75 to 1e75.
        """
        self._check_parameters()
        X, y = checked_data(self, X, y, accept_sparse=FORMATS, dtype=(np.float64, np.float32))  # noqa: N806
        check_classification_targets(y)
        weight = self._weights(X, sample_weight)
        check_magnitudes("L0Classifier", X, sample_weight=weight)
        classes, code = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            must = "y must hold more than one class."
            raise InvalidValueError(explain("L0Classifier", must, expected="2 classes", got="1 class"))
        self.classes_ = classes
        groups = self._columns_of_groups(X.shape[1])
        if len(classes) == 2:
            task = Task("logistic", float(self.alpha), groups, bool(self.fit_intercept))
            subset = self._search(X, code.astype(np.float64), weight, task, code)
        else:
            task = Task("multinomial", float(self.alpha), groups, bool(self.fit_intercept))
            subset = self._search(X, np.eye(len(classes))[code], weight, task, code)
        self.coef_, self.intercept_ = subset.coef, subset.intercept
        if self.alpha == 0:
            self._warn_if_separated(X, code, weight)
        return self

    def _warn_if_separated(self, x: Any, code: Ints, weight: Floats | None) -> None:
        counts = np.ones(len(code), bool) if weight is None else weight > 0
        eta = np.asarray(x @ self.coef_.T) + self.intercept_
        scores = np.column_stack([np.zeros(len(eta)), eta]) if len(self.classes_) == 2 else eta
        own = scores[np.arange(len(code)), code]
        others = scores.copy()
        others[np.arange(len(code)), code] = -np.inf
        if ((own > others.max(1)) | ~counts).all():
            message = explain(
                "L0Classifier",
                "the chosen features separate the classes, so there is no finite optimum without a ridge.",
                got="alpha=0; a ridge of 1e-9 on standardised columns was used",
                hint="alpha=1e-3",
            )
            warnings.warn(message, ConvergenceWarning, stacklevel=3)

    def decision_function(self, X: Any) -> Floats:  # noqa: N803
        """The linear predictor, shape (n,) for two classes, else (n, n_classes)."""
        eta = self._predictor(X)
        return eta[:, 0] if len(self.classes_) == 2 else eta

    def predict_proba(self, X: Any) -> Floats:  # noqa: N803
        """The probability of each class, shape (n, n_classes)."""
        eta = self._predictor(X)
        if len(self.classes_) == 2:
            return np.column_stack([expit(-eta[:, 0]), expit(eta[:, 0])])
        return np.asarray(softmax(eta, axis=1))

    def predict_log_proba(self, X: Any) -> Floats:  # noqa: N803
        """The logarithm of the probability of each class, shape (n, n_classes)."""
        eta = self._predictor(X)
        scores = np.column_stack([np.zeros(len(eta)), eta]) if len(self.classes_) == 2 else eta
        return np.asarray(log_softmax(scores, axis=1))

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """The most probable class of each row, shape (n,)."""
        score = self.decision_function(X)
        index = (score > 0).astype(np.int64) if len(self.classes_) == 2 else score.argmax(1)
        return np.asarray(self.classes_[index])
