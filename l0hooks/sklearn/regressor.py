"""``L0Regressor``: linear and Poisson regression with exactly k features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from sklearn.base import RegressorMixin  # type: ignore[import-untyped]

from l0hooks.errors import InvalidValueError, explain
from l0hooks.sklearn.base import FORMATS, L0LinearModel, checked_data
from l0hooks.sklearn.magnitudes import check_magnitudes
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
        held-out loss. "ric" chooses by held-out loss among the few sizes that the risk inflation criterion proposes
        with penalties of 1.5 to 2.5 times log p. An int larger than the number of features means all of them.
    loss : "squared" or "poisson"
    l0 : float >= 0, optional
        A price for each feature, instead of k: the size minimises ``loss + l0·k``.
    alpha : float >= 0
        Ridge on the coefficients of the columns as given; the intercept is not penalised.
    groups : sequence, shape (n_features,), optional
        A label for each column. Columns with the same label, such as the dummies of a factor, enter together.
    max_k : int >= 0, optional
        The largest size that is tried if ``k`` is a rule; by default about n/(1.5·log p), at most n/3 and 100.
    cv : int or scikit-learn splitter
        The folds of ``k="cv"`` and "ric"; an int is the number of shuffled folds.
    one_standard_error : bool
        With ``k="cv"``: take the smallest size within one standard error of the least held-out loss.
    fit_intercept : bool
    random_state : int, RandomState or None
        Shuffles the folds. The search itself is deterministic.
    n_jobs : int or None
        How many folds are fitted in parallel.

    Attributes
    ----------
    support_ : bool array, shape (n_features,)
        Exactly k features (or all columns of k groups). Features that add nothing to the others, such as constant
        ones, are chosen last.
    k_ : int
    coef_ : float64 array, shape (n_features,)
    intercept_ : float
    path_ : SubsetPath
        For each size that was tried: k, support, loss, and the criterion that chooses the size.
    solver_ : str
        The algorithm that was used.
    n_iter_ : int
        The number of Newton steps; 1 for squared loss.
    n_features_in_ : int
    feature_names_in_ : str array, shape (n_features,)
        If X has names.

    Notes
    -----
    No exchange of a chosen feature for another one lowers the squared loss; a better subset that differs in several
    features can exist. A sample weight counts as that many copies of the row, also in "ebic". Weights that sum to less
    than their number count as shares and are scaled to a mean of 1.

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
            A sparse X is never made dense.
        y : array, shape (n,)
            For "poisson" not negative and not all zero.
        sample_weight : array, shape (n,), >= 0, optional

        Raises
        ------
        InvalidValueError
            If a parameter, y or the weights are outside their range, or the largest entry of a column, of y or
            of the weights is not 0 and outside of 1e-75 to 1e75.
        """
        self._check_parameters()
        if self.loss not in ("squared", "poisson"):
            must = "the loss must be known."
            raise InvalidValueError(explain("L0Regressor", must, expected='"squared" or "poisson"', got=self.loss))
        X, y = checked_data(  # noqa: N806
            self, X, y, accept_sparse=FORMATS, dtype=(np.float64, np.float32), y_numeric=True
        )
        weight = self._weights(X, sample_weight)
        y = np.asarray(y, dtype=np.float64)
        check_magnitudes("L0Regressor", X, y, weight)
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


def _check_counts(y: Floats, weight: Floats | None) -> None:
    if (y < 0).any() or not (y if weight is None else y * weight).any():
        must = "in Poisson regression y must not be negative, nor all zero."
        raise InvalidValueError(explain("L0Regressor", must, got=f"from {y.min():g} to {y.max():g}"))
