"""Every estimator and setting keeps the laws of ``estimator_laws`` and scikit-learn's own checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from estimator_laws import CopyLaws, LinearLaws, RuleLaws, SelectorLaws
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from l0hooks.sklearn import L0Classifier, L0FeatureSelector, L0Regressor


class TestSquared(LinearLaws, CopyLaws):
    def make(self, k: int, seed: int = 0) -> Any:
        return L0Regressor(k, random_state=seed)


class TestRidge(LinearLaws, CopyLaws):
    def make(self, k: int, seed: int = 0) -> Any:
        return L0Regressor(k, alpha=0.1, fit_intercept=False, random_state=seed)


class TestPoisson(LinearLaws, CopyLaws):
    def make(self, k: int, seed: int = 0) -> Any:
        return L0Regressor(k, loss="poisson", random_state=seed)

    def target(self, y: Any) -> Any:
        return np.round(np.exp(y / 3))


class TestLogistic(LinearLaws, CopyLaws):
    def make(self, k: int, seed: int = 0) -> Any:
        return L0Classifier(k, alpha=1e-2, random_state=seed)

    def target(self, y: Any) -> Any:
        return np.where(y > 4, "high", "low")


class TestMultinomial(LinearLaws, CopyLaws):
    sizes = (0, 1, 7, 30, 500)

    def make(self, k: int, seed: int = 0) -> Any:
        return L0Classifier(k, alpha=1e-2, random_state=seed)

    def target(self, y: Any) -> Any:
        return np.where(y > 5, "high", np.where(y > 3, "middle", "low"))


class TestByExtendedBic(RuleLaws, CopyLaws):
    def make(self, k: int, seed: int = 0) -> Any:
        return L0Regressor(max_k=2 * k, random_state=seed)


class TestByPrice(RuleLaws, CopyLaws):
    def make(self, k: int, seed: int = 0) -> Any:
        return L0Regressor(l0=0.05, max_k=2 * k, random_state=seed)


class TestByRiskInflation(RuleLaws):
    excess = 3

    def make(self, k: int, seed: int = 0) -> Any:
        return L0Regressor("ric", max_k=2 * k, random_state=seed)


class TestByCrossValidation(RuleLaws):
    def make(self, k: int, seed: int = 0) -> Any:
        return L0Regressor("cv", max_k=5, one_standard_error=True, random_state=seed)


@pytest.mark.slow  # TestByCrossValidation and TestLogistic are fast
class TestClassesByCrossValidation(RuleLaws):
    def make(self, k: int, seed: int = 0) -> Any:
        return L0Classifier("cv", max_k=3, cv=2, alpha=1e-2, random_state=seed)

    def target(self, y: Any) -> Any:
        return np.where(y > 4, "high", "low")


def module(outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, outputs))


# Of networks and modules, of classes and numbers, two of the four pairs are left to the slow tests.
@pytest.mark.slow
class TestNetworksOfClasses(SelectorLaws):
    estimator = "mlp"


class TestNetworksOfNumbers(SelectorLaws):
    estimator = "mlp"

    def target(self, y: Any) -> Any:
        return y


class TestLinearSelector(SelectorLaws):
    estimator = "linear"


class TestModuleOfClasses(SelectorLaws):
    estimator = staticmethod(lambda: module(2))


@pytest.mark.slow
class TestModuleOfNumbers(SelectorLaws):
    estimator = staticmethod(lambda: module(1))

    def target(self, y: Any) -> Any:
        return y


QUICK = [
    *(L0Regressor(k=2), L0Classifier(k=2)),
    *(L0FeatureSelector(estimator=e, steps=10) for e in ("mlp", "linear")),
]
SLOW = [
    *(L0Regressor(), L0Regressor(k="cv"), L0Regressor(k="ric"), L0Regressor(loss="poisson")),
    *(L0Classifier(), L0Classifier(k="cv"), L0FeatureSelector(steps=50)),
]


@pytest.mark.filterwarnings("ignore")  # those of the checks themselves
@parametrize_with_checks(QUICK)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(SLOW)
def test_more_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)
