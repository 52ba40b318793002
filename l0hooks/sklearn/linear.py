"""Linear models with exactly k features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, RegressorMixin  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.utils.multiclass import check_classification_targets  # type: ignore[import-untyped]

from l0hooks.errors import InvalidValueError, explain
from l0hooks.sklearn.base import FORMATS, L0LinearModel, checked_data
from l0hooks.sklearn.subset.design import Floats
from l0hooks.sklearn.subset.size_choice import Task


class L0Regressor(RegressorMixin, L0LinearModel):  # type: ignore[misc]  # scikit-learn has no types
    r"""Linear or Poisson regression on the best subset of k features.

    min over |S| = k of  Σ wᵢ ℓ(yᵢ, xᵢᵀβ + β₀)/Σ wᵢ + (alpha/2)·Σ βⱼ²,  ℓ half the squared error or half the Poisson
    deviance with mean exp(xᵀβ + β₀).

    Parameters
    ----------
    k : int >= 0, "ebic", "ric" or "cv"
        The number of features, or of groups. "ebic" takes the size of least extended BIC, "cv" that of least
        held-out loss, "ric" chooses by held-out loss among the few sizes that the risk inflation criterion with
        1.5 to 2.5 times log p proposes. An int above the number of features means all of them.
    loss : "squared" or "poisson"
    l0 : float >= 0, optional
        Instead of k, a price: the size that minimises ``loss + l0·k``.
    alpha : float >= 0
        Ridge on the coefficients of the columns as they are given; the intercept is free.
    groups : sequence, shape (n_features,), optional
        A label for each column; columns of one label, as of a factor, enter together.
    max_k : int >= 0, optional
        The largest size looked at when k is not an int. Without it about n/(1.5·log p), at most n/3 and 100.
    cv : int or scikit-learn splitter
        Folds for ``k="cv"`` and "ric"; an int means that many, shuffled by ``random_state``.
    one_standard_error : bool
        With ``k="cv"``: the smallest size within one standard error of the least held-out loss.
    fit_intercept : bool
    random_state : int, RandomState or None
        Shuffles the folds. The search itself draws nothing.
    n_jobs : int or None
        Folds fitted at once.

    Attributes
    ----------
    support_ : bool array, shape (n_features,)
        Exactly k features (or all columns of k groups); features that add nothing to the others, such as constant
        ones, come last.
    k_ : int
    coef_ : float64 array, shape (n_features,)
    intercept_ : float
    path_ : SubsetPath
        For each size looked at: k, support, loss, and the criterion it was chosen by.
    solver_ : str
        The algorithm that was used.
    n_iter_ : int
        Newton steps; 1 for squared loss.
    n_features_in_ : int
    feature_names_in_ : str array, shape (n_features,)
        If X has names.

    Notes
    -----
    No exchange of one chosen for one other feature lowers the squared loss; a better subset that needs several
    exchanges at once can exist. A sample weight counts as that many copies of the row, for "ebic" too; weights
    that sum to less than their number are taken as shares, with a mean of 1.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(60, 20))
    >>> model = L0Regressor(k=2).fit(x, 3 * x[:, 4] - x[:, 11])
    >>> np.flatnonzero(model.support_).tolist(), model.coef_[[4, 11]].round(6).tolist()
    ([4, 11], [3.0, -1.0])

    References
    ----------
    Hazimeh & Mazumder (2020), Operations Research 68(5), for the problem; Chen & Chen (2008) for extended BIC; Foster
    & George (1994) for the risk inflation criterion.
    """

    def __init__(
        self,
        k: int | str = "ebic",
        *,
        loss: Literal["squared", "poisson"] = "squared",
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
        self.loss = loss

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = self.loss == "poisson"
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803  scikit-learn's name
        """Find the support and fit on it.

        Parameters
        ----------
        X : array, frame or scipy.sparse array or matrix, shape (n, n_features), finite
            Sparse X is never densified.
        y : array, shape (n,)
            For "poisson" not negative, and not all zero.
        sample_weight : array, shape (n,), >= 0, optional

        Raises
        ------
        InvalidValueError
            If a parameter, y or the weights are outside their range.
        """
        self._check_parameters()
        if self.loss not in ("squared", "poisson"):
            must = "loss must be one of the two."
            raise InvalidValueError(explain("L0Regressor", must, expected='"squared" or "poisson"', got=self.loss))
        X, y = checked_data(  # noqa: N806
            self, X, y, accept_sparse=FORMATS, dtype=(np.float64, np.float32), y_numeric=True
        )
        weight = self._weights(X, sample_weight)
        y = np.asarray(y, dtype=np.float64)
        if self.loss == "poisson":
            _check_counts(y, weight)
        task = Task(self.loss, float(self.alpha), self._columns_of_groups(X.shape[1]), bool(self.fit_intercept))
        subset = self._search(X, y, weight, task, None)
        self.coef_ = subset.coef[0]
        self.intercept_ = float(subset.intercept[0])
        return self

    def predict(self, X: Any) -> Floats:  # noqa: N803
        """The expected y of each row, shape (n,)."""
        eta = self._predictor(X)
        return np.exp(eta) if self.loss == "poisson" else eta


class L0Classifier(ClassifierMixin, L0LinearModel):  # type: ignore[misc]
    r"""Logistic or, for more than two classes, multinomial regression on the best subset of k features.

    min over |S| = k of  −Σ wᵢ log P(yᵢ | xᵢ)/Σ wᵢ + (alpha/2)·Σ β²;  a feature has a coefficient for every class.

    Parameters
    ----------
    k : int >= 0, "ebic", "ric" or "cv"
        The number of features, or of groups. "ebic" takes the size of least extended BIC, "cv" that of least
        held-out loss, "ric" chooses by held-out loss among the few sizes that the risk inflation criterion with
        1.5 to 2.5 times log p proposes. An int above the number of features means all of them.
    l0 : float >= 0, optional
        Instead of k, a price: the size that minimises ``loss + l0·k``.
    alpha : float >= 0
        Ridge on the coefficients of the columns as they are given; the intercept is free. With 0, classes that the
        chosen features separate have no finite optimum: the smallest ridge that has one, 1e-9 on standardised
        columns, is used, and ``fit`` warns.
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
            Sparse X is never densified.
        y : array, shape (n,)
            Labels of two classes or more.
        sample_weight : array, shape (n,), >= 0, optional

        Raises
        ------
        InvalidValueError
            If a parameter or the weights are outside their range, or there is only one class.
        """
        self._check_parameters()
        X, y = checked_data(self, X, y, accept_sparse=FORMATS, dtype=(np.float64, np.float32))  # noqa: N806
        check_classification_targets(y)
        weight = self._weights(X, sample_weight)
        classes, code = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            must = "the labels must be of more than one class."
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

    def _warn_if_separated(self, x: Any, code: NDArray[np.int64], weight: Floats | None) -> None:
        counts = np.ones(len(code), bool) if weight is None else weight > 0
        eta = np.asarray(x @ self.coef_.T) + self.intercept_
        scores = np.column_stack([np.zeros(len(eta)), eta]) if len(self.classes_) == 2 else eta
        own = scores[np.arange(len(code)), code]
        others = scores.copy()
        others[np.arange(len(code)), code] = -np.inf
        if ((own > others.max(1)) | ~counts).all():
            message = explain(
                "L0Classifier",
                "the chosen features separate the classes: without a ridge there is no finite optimum.",
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
        place = (score > 0).astype(np.int64) if len(self.classes_) == 2 else score.argmax(1)
        return np.asarray(self.classes_[place])


def _check_counts(y: Floats, weight: Floats | None) -> None:
    if (y < 0).any() or not (y if weight is None else y * weight).any():
        must = "y must not be negative, nor all zero, for Poisson regression."
        raise InvalidValueError(explain("L0Regressor", must, got=f"from {y.min():g} to {y.max():g}"))
