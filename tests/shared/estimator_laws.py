"""The laws that every estimator keeps, as abstract test cases. A subclass writes how an estimator is made."""

from __future__ import annotations

import abc
import pickle
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from l0hooks.sklearn import L0FeatureSelector


def named(x: Any) -> pd.DataFrame:
    return pd.DataFrame(x, columns=[f"f{i}" for i in range(x.shape[1])])


CONTAINERS = [np.asfortranarray, named, sp.csr_array, sp.csc_matrix, sp.coo_array]


class EstimatorLaws(abc.ABC):
    """What holds for every estimator: exactly k features, the same for every kind of table, repeated by a seed."""

    n_features: ClassVar[int]
    sizes: ClassVar[tuple[int, ...]]
    relevant: ClassVar[list[int]]
    attributes: ClassVar[set[str]]
    tolerance: ClassVar[float] = 1e-6
    seeds: ClassVar[int] = 3
    excess: ClassVar[int] = 2  # irrelevant features that a rule for the size may add
    outcome_is_sparse: ClassVar[bool] = False  # for a sparse table

    @abc.abstractmethod
    def make(self, k: int, seed: int = 0) -> Any:
        """The estimator, with options that make a fit quick."""

    @abc.abstractmethod
    def data(self, n: int, seed: int = 0) -> tuple[Any, Any]:
        """A table of n samples and a target to which only the relevant features matter."""

    @abc.abstractmethod
    def support(self, model: Any) -> Any:
        """Which features a fitted model has chosen, boolean."""

    def decisions(self, model: Any) -> list[Any]:
        """All results of a fit, for exact comparison."""
        return list(self.support(model).tolist())

    @abc.abstractmethod
    def numbers(self, model: Any) -> Any:
        """The numbers that a fit has learned, at least one for each feature."""

    @abc.abstractmethod
    def outcome(self, model: Any, x: Any) -> Any:
        """The output of a fitted model for a table."""

    def rough(self, k: int, seed: int) -> Any:
        """The estimator for tests in which only the number of features matters."""
        return self.make(k, seed)

    def size(self, model: Any, k: int) -> int:
        """The number of features that a model made for k must have."""
        return min(k, self.n_features)

    def fitted(self, n: int = 120, **options: Any) -> Any:
        return self.make(len(self.relevant), **options).fit(*self.data(n))

    def test_exactly_k_features_are_chosen(self) -> None:
        for k in self.sizes:
            for seed in range(self.seeds):
                model = self.rough(k, seed).fit(*self.data(50, seed))
                assert self.support(model).sum() == self.size(model, k)
                assert self.support(model).shape == (self.n_features,)
                assert np.isfinite(self.numbers(model)).all()

    def test_the_relevant_features_are_found(self) -> None:
        chosen = np.flatnonzero(self.support(self.fitted(250))).tolist()
        assert set(self.relevant) <= set(chosen)
        assert len(chosen) <= len(self.relevant) + self.excess

    def test_a_random_state_repeats_a_fit_and_global_generators_are_not_used(self) -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        one = self.fitted(seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], numpy_before)
        torch.rand(7)
        np.testing.assert_array_equal(self.numbers(self.fitted(seed=1)), self.numbers(one))

    def test_every_kind_of_table_gives_the_same_features(self) -> None:
        x, y = self.data(150)
        x = np.where(np.abs(x) < 0.4, 0, x)
        wanted = self.make(len(self.relevant)).fit(x, y)
        for container in CONTAINERS:
            table = container(x)
            got = self.make(len(self.relevant)).fit(table, y)
            assert set(self.relevant) <= set(np.flatnonzero(self.support(got)).tolist()), container
            assert self.support(got).tolist() == self.support(wanted).tolist(), container
            close = {"rtol": self.tolerance, "atol": self.tolerance}
            np.testing.assert_allclose(self.numbers(got), self.numbers(wanted), **close)
            outcome = self.outcome(got, table)
            assert outcome.shape[0] == 150
            assert sp.issparse(outcome) == (sp.issparse(table) and self.outcome_is_sparse), container

    def test_the_names_of_features_are_kept_and_checked(self) -> None:
        x, y = self.data(80)
        frame = named(x)
        names = frame.columns.tolist()
        model = self.make(2).fit(frame, y)
        assert model.feature_names_in_.tolist() == names
        with pytest.raises(ValueError, match="feature names"):
            self.outcome(model, frame[names[::-1]])
        assert "feature_names_in_" not in vars(model.fit(x, y))

    def test_a_sample_of_weight_zero_does_not_count(self) -> None:
        x, y = self.data(80)
        weight = np.ones(80)
        weight[::4] = 0
        wild = x.copy()
        wild[::4] = 1e6
        weighted = self.make(3).fit(wild, y, sample_weight=weight)
        alone = self.make(3).fit(x[weight > 0], y[weight > 0])
        assert self.decisions(weighted) == self.decisions(alone)
        np.testing.assert_allclose(self.numbers(weighted), self.numbers(alone), rtol=1e-4, atol=1e-4)

    def test_a_clone_has_the_parameters_and_is_not_fitted(self) -> None:
        model = self.fitted()
        again = clone(model)
        own, other = model.get_params(), again.get_params()
        assert own.keys() == other.keys()
        assert all(repr(own[name]) == repr(other[name]) for name in own)
        assert clone(again).set_params(**other).get_params() == other
        with pytest.raises(NotFittedError):
            self.outcome(again, np.zeros((2, self.n_features)))

    def test_a_pickle_gives_the_same(self) -> None:
        x, _ = self.data(40)
        model = self.fitted()
        again = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(self.outcome(again, x), self.outcome(model, x))
        np.testing.assert_array_equal(self.numbers(again), self.numbers(model))

    def test_a_fit_returns_the_model_and_leaves_its_arguments_alone(self) -> None:
        x, y = self.data(60)
        weight = np.random.default_rng(0).integers(1, 3, 60).astype(float)
        before, model = [a.copy() for a in (x, y, weight)], self.make(2)
        parameters = repr(model.get_params())
        assert model.fit(x, y, weight) is model
        assert all(np.array_equal(a, b) for a, b in zip(before, (x, y, weight), strict=True))
        assert repr(model.get_params()) == parameters

    def test_a_fit_has_its_attributes_and_forgets_an_earlier_one(self) -> None:
        x, y = self.data(80)
        model = self.make(2)
        assert not [name for name in vars(model) if name.endswith("_")]
        model.fit(x, y)
        learned = {name for name in vars(model) if name.endswith("_")}
        assert self.attributes <= learned
        assert model.n_features_in_ == self.n_features
        fresh = clone(model).fit(x[:60], y[:60])
        np.testing.assert_array_equal(self.numbers(model.fit(x[:60], y[:60])), self.numbers(fresh))

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda x, y: (np.where(np.arange(len(x))[:, None] == 3, np.nan, x), y), "NaN"),
            (lambda x, y: (np.where(np.arange(len(x))[:, None] == 3, np.inf, x), y), "infinity"),
            (lambda x, y: (x[:, 0], y), "2D array"),
            (lambda x, y: (x, y[:-1]), "inconsistent numbers of samples"),
            (lambda x, y: (x[:0], y[:0]), "minimum of"),
            (lambda x, y: (x[:, :0], y), "0 feature"),
            (lambda x, y: (x, y, np.ones(3)), r"sample_weight\.shape"),
            (lambda x, y: (x, y, np.where(np.arange(len(x)) == 3, np.nan, 1.0)), "NaN"),
        ],
    )
    def test_tables_that_do_not_fit_are_refused(self, spoil: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.make(2).fit(*spoil(*self.data(40)))

    def test_another_number_of_features_and_missing_values_are_refused_after_fitting(self) -> None:
        x, _ = self.data(40)
        model = self.fitted()
        with pytest.raises(ValueError, match=f"expecting {self.n_features} features"):
            self.outcome(model, x[:, :-1])
        with pytest.raises(ValueError, match="2D array"):
            self.outcome(model, x[0])


class CopyLaws(EstimatorLaws):
    """A weight is that many copies of the row: for all estimators whose choice does not depend on folds."""

    def test_a_weight_is_that_many_copies_of_the_row(self) -> None:
        x, y = self.data(80)
        weights = np.random.default_rng(1).integers(0, 4, 80)
        weighted = self.make(3).fit(x, y, sample_weight=weights)
        repeated = self.make(3).fit(x.repeat(weights, axis=0), y.repeat(weights))
        assert self.decisions(weighted) == self.decisions(repeated)
        np.testing.assert_allclose(self.numbers(weighted), self.numbers(repeated), rtol=1e-4, atol=1e-4)


class LinearLaws(EstimatorLaws):
    """The linear estimators: coefficients outside the support are 0; k may be 0 or exceed the number of features."""

    n_features, relevant = 30, [3, 11, 20]
    sizes = (0, 1, 2, 7, 29, 30, 31, 500)
    attributes: ClassVar[set[str]] = {"coef_", "intercept_", "k_", "n_iter_", "path_", "solver_", "support_"}

    def data(self, n: int, seed: int = 0) -> tuple[Any, Any]:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, 30))
        return x, self.target(2 * x[:, 3] - 2 * x[:, 20] + x[:, 11] + 0.5 * rng.normal(size=n) + 4)

    def target(self, y: Any) -> Any:
        return y

    def support(self, model: Any) -> Any:
        return model.support_

    def numbers(self, model: Any) -> Any:
        return np.column_stack([model.coef_[None] if model.coef_.ndim == 1 else model.coef_, model.intercept_])

    def outcome(self, model: Any, x: Any) -> Any:
        return model.predict(x)

    def test_coefficients_are_zero_outside_the_support_and_the_path_agrees(self) -> None:
        for k in self.sizes:
            model = self.make(k).fit(*self.data(50))
            assert not model.coef_[..., ~model.support_].any()
            assert model.support_.sum() == model.k_
            subset = model.path_[model.path_.k.tolist().index(model.k_)]
            assert subset.support.tolist() == model.support_.tolist()
            assert repr(pickle.loads(pickle.dumps(model)).path_) == repr(model.path_)


class RuleLaws(LinearLaws):
    """Sizes that a rule chooses: the support has the size that the model reports."""

    sizes = (3,)

    def size(self, model: Any, k: int) -> int:
        return int(model.k_)


class SelectorLaws(CopyLaws):
    """The selector: it transforms a table to the columns of its support."""

    n_features, relevant = 9, [3, 6]
    sizes, seeds = (1, 2, 5, 8, 9), 1
    tolerance, outcome_is_sparse = 1e-3, True
    attributes: ClassVar[set[str]] = {"estimator_", "feature_importances_", "ranking_", "task_"}
    estimator: ClassVar[Any]

    def make(self, k: int, seed: int = 0) -> Any:
        estimator = self.estimator() if callable(self.estimator) else self.estimator
        return L0FeatureSelector(k, estimator, steps=60, gate_lr=0.1, lr=0.01, random_state=seed)

    def rough(self, k: int, seed: int) -> Any:
        return self.make(k, seed).set_params(steps=10)

    def data(self, n: int, seed: int = 0) -> tuple[Any, Any]:
        x = np.random.default_rng(seed).standard_normal((n, 9))
        return x, self.target(x[:, 3] + x[:, 6])

    def target(self, y: Any) -> Any:
        return (y > 0).astype(int)

    def support(self, model: Any) -> Any:
        return model.get_support()

    def decisions(self, model: Any) -> list[Any]:
        return list(model.ranking_.tolist())

    def numbers(self, model: Any) -> Any:
        return model.feature_importances_

    def outcome(self, model: Any, x: Any) -> Any:
        return model.transform(x)

    def test_the_columns_of_the_support_come_out_as_they_went_in(self) -> None:
        x, _ = self.data(40)
        model = self.fitted()
        np.testing.assert_array_equal(model.transform(x), x[:, model.get_support()])

        assert model.get_feature_names_out().tolist() == [f"x{i}" for i in model.get_support(indices=True)]
        assert (model.ranking_ == 1).tolist() == model.get_support().tolist()
