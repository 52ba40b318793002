"""Best subsets for likelihoods: exact refits against scikit-learn, supports against every subset."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression, PoissonRegressor

from l0hooks.sklearn.subset.results import smallest
from l0hooks.sklearn.subset.size_choice import LOSSES, Task, fit_path, with_ebic

NAMES = ["logistic", "multinomial", "poisson"]


def data(name: str, seed: int, n: int = 120, p: int = 7) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    x[:, 1:] += 0.5 * x[:, :-1]
    eta = 0.9 * x[:, 1] - 0.9 * x[:, p - 2]
    if name == "logistic":
        return x, (rng.random(n) < 1 / (1 + np.exp(-eta))) * 1.0
    if name == "poisson":
        return x, rng.poisson(np.exp(0.5 * eta)) * 1.0
    scores = np.column_stack([eta, 0.8 * x[:, 3], np.zeros(n)]) + rng.gumbel(size=(n, 3))
    return x, np.eye(3)[scores.argmax(1)]


def reference(name: str, x: Any, y: Any, alpha: float) -> tuple[Any, Any]:
    """scikit-learn's coefficients and intercepts for the same objective."""
    if name == "poisson":
        model = PoissonRegressor(alpha=alpha, tol=1e-10, max_iter=10_000).fit(x, y)
        return model.coef_[None], np.array([model.intercept_])
    labels = y if y.ndim == 1 else y.argmax(1)
    model = LogisticRegression(C=1 / (alpha * len(x)), tol=1e-10, max_iter=10_000, solver="newton-cg").fit(x, labels)
    return model.coef_, model.intercept_


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [1e-3, 0.2])
def test_the_fit_on_all_columns_is_that_of_scikit_learn(name: Any, alpha: float) -> None:
    x, y = data(name, 0)
    fitted = fit_path(x * [1, 3, 0.1, 1, 1, 20, 1], y, None, Task(name, alpha), [7])[0][0]
    coef, intercept = reference(name, x * [1, 3, 0.1, 1, 1, 20, 1], y, alpha)
    assert fitted.coef == pytest.approx(coef, rel=1e-4, abs=1e-5)
    assert fitted.intercept - fitted.intercept.mean() == pytest.approx(intercept - intercept.mean(), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_subset_is_better_than_the_best_of_all_and_most_searches_find_it(name: Any) -> None:
    equal, task = 0, Task(name, 1e-3)
    for seed in range(4):
        x, y = data(name, seed)
        path = fit_path(x, y, None, task, range(1, 4))[0]
        for subset in path:
            columns = [list(c) for c in combinations(range(7), subset.k)]
            best = min(fit_path(x[:, c], y, None, task, [subset.k])[0][0].loss for c in columns)
            assert subset.loss >= best - 1e-9
            equal += subset.loss <= best + 1e-9
    assert equal >= 11  # of 12


@pytest.mark.parametrize("name", NAMES)
def test_sparse_weights_and_repeats_agree(name: Any) -> None:
    x, y = data(name, 3, n=60)
    x = np.where(np.random.default_rng(0).random(x.shape) < 0.5, x, 0.0)
    weight = np.random.default_rng(1).integers(0, 3, 60)
    rows = np.repeat(np.arange(60), weight)
    task = Task(name, 0.01)
    plain = fit_path(x[rows], y[rows], None, task, range(4))[0]
    for given in (x, sparse.csc_array(x), sparse.coo_matrix(x).tocsr()):
        weighted = fit_path(given, y, weight.astype(float), task, range(4))[0]
        for a, b in zip(weighted, plain, strict=True):
            assert a.support.tolist() == b.support.tolist()
            assert a.coef == pytest.approx(b.coef, rel=1e-6, abs=1e-9)
            assert a.deviance == pytest.approx(b.deviance, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_true_columns_are_found_among_many(name: Any) -> None:
    x, y = data(name, 4, n=600, p=60)
    task = Task(name)
    path = with_ebic(fit_path(x, y, None, task, range(6))[0], task, 600.0)
    assert {1, 58} <= set(np.flatnonzero(path[smallest(path.criterion)].support).tolist())
    assert (np.diff(path.loss) <= 1e-9).all()


@pytest.mark.parametrize("name", NAMES)
def test_groups_enter_together_and_dependent_columns_are_counted(name: Any) -> None:
    x, y = data(name, 5)
    wide = np.column_stack([x, x[:, 1], np.ones(len(x))])
    groups = (np.array([1, 5]), np.array([0, 2, 7]), np.array([3, 8]), np.array([4, 6]))
    path = fit_path(wide, y, None, Task(name, groups=groups), range(5))[0]
    assert path[1].support.tolist() == [j in (1, 5) for j in range(9)]
    assert path[4].support.all()
    every = fit_path(wide, y, None, Task(name), [9])[0][0]
    assert np.isfinite(every.coef).all()
    assert every.loss == pytest.approx(path[4].loss, rel=1e-6)


@pytest.mark.parametrize("name", ["logistic", "multinomial"])
def test_separated_classes_have_a_finite_fit(name: Any) -> None:
    x, _ = data(name, 6)
    label = (x[:, 2] > 0).astype(int) + (x[:, 2] > 1) * (name == "multinomial")
    y = label * 1.0 if name == "logistic" else np.eye(3)[label]
    path = fit_path(x, y, None, Task(name), range(4))[0]
    assert path[1].support.tolist() == [j == 2 for j in range(7)]
    assert np.isfinite(path[3].coef).all()
    assert path[3].loss < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_curvature_and_hessian_are_the_slopes_of_the_mean(name: Any) -> None:
    loss, rng = LOSSES[name], np.random.default_rng(0)
    c = 3 if name == "multinomial" else 1
    eta, y, step = rng.normal(size=(5, c)), np.eye(c)[rng.integers(0, c, 5)], 1e-6
    for j in range(c):
        move = step * np.eye(c)[j]
        slope = (loss.value(eta + move, y) - loss.value(eta - move, y)) / (2 * step)
        assert slope == pytest.approx((loss.mean(eta) - y)[:, j], abs=1e-8)
        assert (loss.mean(eta + move) - loss.mean(eta - move)) / (2 * step) == pytest.approx(
            loss.hessian(eta)[:, j], abs=1e-8
        )
    directions = max(c - loss.constraints, 1)
    assert loss.curvature(eta) == pytest.approx(np.trace(loss.hessian(eta), axis1=1, axis2=2) / directions)
