"""``L0FeatureSelector``: exactly k features, chosen by a linear model, by networks or by any torch module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator  # type: ignore[import-untyped]
from sklearn.feature_selection import SelectorMixin  # type: ignore[import-untyped]
from sklearn.utils import check_random_state  # type: ignore[import-untyped]
from sklearn.utils.validation import _check_sample_weight, check_is_fitted  # type: ignore[import-untyped]
from torch import Tensor, nn

from l0hooks.errors import UnsupportedModuleError, explain
from l0hooks.select.gates import FeatureGate
from l0hooks.sklearn.base import checked_data
from l0hooks.sklearn.classifier import L0Classifier
from l0hooks.sklearn.magnitudes import check_magnitudes
from l0hooks.sklearn.networks import (
    Loss,
    Networks,
    Training,
    classification_loss,
    order_of,
    regression_loss,
    train_gates,
)
from l0hooks.sklearn.regressor import L0Regressor
from l0hooks.sklearn.screening import contrasts, evidence
from l0hooks.sklearn.standardised import Floats, Indices, Rows
from l0hooks.sklearn.targets import encoded, invalid, task_of

Task = Literal["auto", "classification", "regression"]
MAX_CANDIDATES = 256  # features that the networks see; 2k if that is more
_PRIOR_LOG_ODDS = 2.0  # added at the start to the log-odds of features with evidence


class L0FeatureSelector(SelectorMixin, BaseEstimator):  # type: ignore[misc]
    r"""Exactly k features, chosen by Hard Concrete gates in front of a network, or by a linear model's best subset.

    minimise E_z[loss(f(x ⊙ z), y)] over f and the log-odds of the gates, with E‖z‖₀ = k_t at every step t. k_t falls
    from half of the features to k; then the k features with the largest log-odds stay.

    Parameters
    ----------
    k : int, 1 <= k <= n_features, optional
        How many features stay; half of them if not given.
    estimator : "mlp", "linear" or nn.Module
        ``"mlp"``: four small networks on the same input. They see at most ``max(256, 2k)`` features, those with the
        most evidence alone or in a product with another; this evidence also decides where the gates start.
        ``"linear"``: the support of ``L0Regressor`` or ``L0Classifier``.
        A module receives standardised, gated inputs in the dtype of its parameters, shape (batch, n_features), and
        returns scores of shape (batch, n_classes), or for a regression (batch,) or (batch, 1). It is copied.
    task : "auto", "classification" or "regression"
        "auto": numbers are a regression if some are fractional, or if they take more than max(10, √n_samples) values;
        all other targets are classes.
    loss : callable, (output, target) -> Tensor, shape (), optional
        The loss of a module, instead of cross-entropy, or of squared error on the standardised target. It receives
        class numbers in int64, or the values as given in the dtype of the parameters.
    steps : int, >= 1
        Steps of the optimiser.
    batch_size : int, >= 1
        Rows in each step, drawn in proportion to their weights.
    lr, gate_lr : float, > 0
        Learning rates of the network and of the gates.
    random_state : int, RandomState instance or None

    Attributes
    ----------
    feature_importances_ : ndarray of float64, shape (n_features,)
        The keep probabilities P(z ≠ 0), 0 for features that the networks did not see; with ``"linear"`` the absolute
        coefficients of standardised features, as shares.
    ranking_ : ndarray of int64, shape (n_features,)
        1 for the k features; 2, 3, … for the others in order of their log-odds, or with ``"linear"`` 2 for all others.
    task_ : "classification" or "regression"
    classes_ : ndarray
        The classes of a classification.
    estimator_ : nn.Module, L0Regressor or L0Classifier
        The fitted model; absent if all features stay.
    n_features_in_ : int
    feature_names_in_ : str array, shape (n_features,)
        If X has names.

    Raises
    ------
    InvalidValueError
        From ``fit``: if an option is out of range, or ``k`` exceeds the number of features.
    UnsupportedModuleError
        From ``fit``: if the module's output does not fit the task.
    StateError
        From ``fit``: if training diverged and a gate is NaN.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.choice([-1.0, 1.0], (300, 8))
    >>> y = X[:, 2] != X[:, 5]  # neither feature helps alone
    >>> selector = L0FeatureSelector(2, steps=100, random_state=0).fit(X, y)
    >>> selector.get_support(indices=True)
    array([2, 5])
    >>> selector.transform(X).shape
    (300, 2)

    Notes
    -----
    A sample weight of 2 is the same as the row twice. Sparse input is made dense only in batches of rows.

    References
    ----------
    Louizos, Welling & Kingma (2018); Yamada, Lindenbaum, Negahban & Kluger (2020) for gates on features.
    """

    def __init__(
        self,
        k: int | None = None,
        estimator: Literal["mlp", "linear"] | nn.Module = "mlp",
        *,
        task: Task = "auto",
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        steps: int = 500,
        batch_size: int = 256,
        lr: float = 3e-3,
        gate_lr: float = 0.03,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.k = k
        self.estimator = estimator
        self.task = task
        self.loss = loss
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.gate_lr = gate_lr
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> L0FeatureSelector:  # noqa: N803
        """Choose the features.

        Parameters
        ----------
        X : array, pandas frame or scipy.sparse array or matrix, shape (n_samples, n_features)
        y : array, shape (n_samples,)
        sample_weight : array of float, shape (n_samples,), >= 0, optional

        Returns
        -------
        L0FeatureSelector
            Itself.

        Raises
        ------
        InvalidValueError
            If an option is out of range, or ``k`` exceeds the number of features.
        UnsupportedModuleError
            If the module's output does not fit the task.
        StateError
            If training diverged and a gate is NaN.
        """
        self._check_options()
        x, y = checked_data(self, X, y, accept_sparse="csr", dtype=np.float64, ensure_min_samples=2)
        weights = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        if not weights.any():
            raise invalid("weights must not all be zero.", "at least one above 0", "only zeros")
        k = self._number_to_keep(x.shape[1])
        for name in {"estimator_", "classes_"} & vars(self).keys():  # set by an earlier fit
            delattr(self, name)
        self.task_ = task_of(y) if self.task == "auto" else self.task
        target, classes = encoded(y, self.task_)
        check_magnitudes("L0FeatureSelector", x, target if classes is None else None, weights)
        if classes is not None:
            self.classes_ = classes
        if k == x.shape[1]:
            self._keep(np.arange(k), k, np.ones(k))
        elif self.estimator == "linear":
            self._fit_linear(x, y, weights, k)
        else:
            self._fit_gates(Rows(x, target, weights), target, k)
        return self

    def _fit_gates(self, rows: Rows, target: Floats, k: int) -> None:
        n_classes = len(self.classes_) if self.task_ == "classification" else None
        target = target[rows.index]
        found = evidence(rows, contrasts(target, n_classes, rows.weights))
        columns = np.arange(rows.n_features)
        if not isinstance(self.estimator, nn.Module):
            columns = np.sort(np.argsort(-found, kind="stable")[: max(MAX_CANDIDATES, 2 * k)])
        if n_classes is None and self.loss is None:
            mean = rows.weights @ target / rows.total
            target = (target - mean) / (math.sqrt(rows.weights @ (target - mean) ** 2 / rows.total) or 1.0)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            network = self._network(len(columns), n_classes)
            gates = self._train(network, rows, target, columns, n_classes, k, found[columns])
        importances = np.zeros(rows.n_features)
        importances[columns] = gates.importances().numpy()
        others = np.setdiff1d(np.argsort(-found, kind="stable"), columns, assume_unique=True)
        self._keep(np.concatenate([columns[order_of(gates)], others]), k, importances)
        self.estimator_ = network.eval()

    def _train(
        self,
        network: nn.Module,
        rows: Rows,
        target: Floats,
        columns: Indices,
        n_classes: int | None,
        k: int,
        found: Floats,
    ) -> FeatureGate:
        """Gates on the given columns, trained together with the network and in its dtype."""
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        values = torch.tensor(target, dtype=dtype if n_classes is None else torch.int64)
        is_dense = isinstance(rows.x, np.ndarray)
        dense = torch.tensor(rows.standardised(slice(None), columns), dtype=dtype) if is_dense else None

        def draw(uniform: Tensor) -> tuple[Tensor, Tensor]:
            index = rows.draw(uniform.numpy())
            if dense is not None:
                return dense[index], values[index]
            return torch.tensor(rows.standardised(index, columns), dtype=dtype), values[index]

        loss: Loss = self.loss or (regression_loss if n_classes is None else classification_loss)
        if isinstance(self.estimator, nn.Module) and self.loss is None:
            self._check_output(network, torch.zeros(2, rows.n_features, dtype=dtype), n_classes)
        training = Training(steps=self.steps, batch_size=self.batch_size, lr=self.lr, gate_lr=self.gate_lr)
        return train_gates(network, draw, loss, k, found, training, _PRIOR_LOG_ODDS)

    def _network(self, n_features: int, n_classes: int | None) -> nn.Module:
        if isinstance(self.estimator, nn.Module):
            return copy.deepcopy(self.estimator)
        return Networks(n_features, n_classes or 1)

    def _check_output(self, network: nn.Module, x: Tensor, n_classes: int | None) -> None:
        """Raise an error before training if the module's output does not fit the task."""
        with torch.no_grad():
            output = network.eval()(x)
        wanted = [(2, n_classes)] if n_classes else [(2,), (2, 1)]
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if got not in wanted:
            raise UnsupportedModuleError(
                explain(
                    "L0FeatureSelector",
                    f"the output of the module must fit a {self.task_}.",
                    expected=f"for a batch of 2, shape {' or '.join(map(str, wanted))}",
                    got=got,
                    hint="another last layer, another task=, or your own loss=",
                )
            )

    def _fit_linear(self, x: Any, y: Any, weights: Floats, k: int) -> None:
        kind = L0Classifier if self.task_ == "classification" else L0Regressor
        self.estimator_ = kind(k=k).fit(x, y, sample_weight=weights)
        rows = Rows(x, np.zeros(x.shape[0]), weights)
        size = np.abs(np.atleast_2d(self.estimator_.coef_)).max(axis=0) * rows.scale
        self.ranking_ = np.where(self.estimator_.support_, 1, 2)
        self.feature_importances_ = size / (size.sum() or 1.0)

    def _keep(self, order: npt.NDArray[np.int64], k: int, importances: Floats) -> None:
        self.ranking_ = np.empty(len(order), np.int64)
        self.ranking_[order] = np.maximum(np.arange(len(order)) - k + 2, 1)
        self.feature_importances_ = importances

    def _number_to_keep(self, n_features: int) -> int:
        if self.k is None:
            return max(1, n_features // 2)
        if self.k > n_features:
            raise invalid("k must not exceed the number of features.", f"at most {n_features}", self.k)
        return int(self.k)

    def _check_options(self) -> None:
        counts = {"k": 1 if self.k is None else self.k, "steps": self.steps, "batch_size": self.batch_size}
        for name, value in counts.items():
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise invalid(f"{name} must be a positive number.", "an integer >= 1", repr(value))
        for name, rate in {"lr": self.lr, "gate_lr": self.gate_lr}.items():
            if not isinstance(rate, Real) or not 0 < float(rate) < math.inf:
                raise invalid(f"{name} must be positive.", "a number > 0", repr(rate))
        if not isinstance(self.estimator, nn.Module) and self.estimator not in ("mlp", "linear"):
            raise invalid("the estimator must be known.", '"mlp", "linear" or a torch module', repr(self.estimator))
        if self.task not in ("auto", "classification", "regression"):
            raise invalid("the task must be known.", '"auto", "classification" or "regression"', repr(self.task))
        if self.loss is not None and not isinstance(self.estimator, nn.Module):
            raise invalid("loss= needs a torch module as estimator=.", "a torch module", repr(self.estimator))

    def _get_support_mask(self) -> npt.NDArray[np.bool_]:
        check_is_fitted(self)
        return np.asarray(self.ranking_ == 1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.sparse = True
        return tags
