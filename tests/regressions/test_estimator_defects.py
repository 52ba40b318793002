"""Wrong answers of the estimators and of ``match_samples`` that tests with well-scaled data did not see."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from l0hooks import HybridGate
from l0hooks.errors import InvalidValueError
from l0hooks.select.matching import match_samples
from l0hooks.select.mean_distance import fourier_features
from l0hooks.sklearn import L0Classifier, L0FeatureSelector, L0Regressor


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 8))
    return x, x[:, 2] - 0.7 * x[:, 5] + 0.3 * rng.normal(size=80)


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e7])
def test_the_unit_of_y_does_not_decide_the_size(data, scale):
    x, y = data
    for options in ({"k": "cv", "random_state": 0}, {"k": "ebic"}):
        assert L0Regressor(**options).fit(x, scale * y).k_ == L0Regressor(**options).fit(x, y).k_ >= 2
    assert L0Regressor(l0=0.01 * scale**2).fit(x, scale * y).k_ == L0Regressor(l0=0.01).fit(x, y).k_ == 2


def test_a_ridge_keeps_columns_of_very_unlike_units(data):
    x, y = data
    units = np.array([1, 1, 1e5, 1, 1, 1e-9, 1, 1])
    z = x * units - (x * units).mean(0)
    expected = np.linalg.solve(z.T @ z / 80 + np.eye(8), z.T @ (y - y.mean()) / 80)
    np.testing.assert_allclose(L0Regressor(8, alpha=1.0).fit(x * units, y).coef_, expected, rtol=1e-8)


@pytest.mark.parametrize("scale", [1e-12, 1e-6])
def test_the_unit_of_poisson_rates_moves_only_the_intercept(data, scale):
    x, y = data
    counts = np.random.default_rng(1).poisson(np.exp(y)) * 1.0
    whole, small = (L0Regressor(2, loss="poisson").fit(x, s * counts) for s in (1, scale))
    np.testing.assert_allclose(small.coef_, whole.coef_, atol=1e-7)
    assert small.intercept_ == pytest.approx(whole.intercept_ + np.log(scale))


def test_a_held_out_poisson_loss_beyond_all_numbers_is_never_chosen(data):
    x, y = data
    counts = np.random.default_rng(1).poisson(np.exp(y)) * 1.0
    x = x.copy()
    x[0] *= 1000
    model = L0Regressor("cv", loss="poisson", one_standard_error=True, random_state=0).fit(x, counts)
    assert np.isinf(model.path_.criterion).any()
    assert np.isfinite(model.path_[list(model.path_.k).index(model.k_)].criterion)


@pytest.mark.parametrize("k", ["ebic", "cv"])
def test_weights_that_sum_to_one_are_shares(data, k):
    x, y = data
    shares = L0Regressor(k, random_state=0).fit(x, y, np.full(80, 1 / 80))
    np.testing.assert_allclose(shares.coef_, L0Regressor(k, random_state=0).fit(x, y).coef_, atol=1e-12)
    labels = L0Classifier(k, random_state=0).fit(x, y > 0, np.full(80, 1 / 80))
    assert labels.k_ == L0Classifier(k, random_state=0).fit(x, y > 0).k_ > 0


@pytest.mark.parametrize("folds", [0, 1, -1, True])
def test_less_than_two_folds_are_refused(data, folds):
    with pytest.raises(InvalidValueError, match="at least two folds"):
        L0Regressor("cv", cv=folds).fit(*data)


def test_nothing_of_an_earlier_fit_is_left_in_a_selector(data):
    x, y = data
    selector = L0FeatureSelector(2, steps=2).fit(x, y > 0).set_params(k=8).fit(x, y)
    assert not {"estimator_", "classes_"} & set(vars(selector))


def test_a_missing_target_is_refused_by_the_selector(data):
    with pytest.raises(InvalidValueError, match="finite target"):
        L0FeatureSelector(2, task="regression").fit(data[0], [1.5, None] * 40)


def test_a_selector_trains_a_module_in_its_own_dtype(data):
    x, y = data
    module = nn.Linear(8, 1, dtype=torch.float64)
    assert L0FeatureSelector(2, module, steps=60, lr=0.03, random_state=0).fit(x, y).get_support().sum() == 2
    torch.set_default_dtype(torch.float64)
    try:
        assert L0FeatureSelector(2, steps=3).fit(x, y).get_support().sum() == 2
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert L0FeatureSelector(2, steps=3).fit(x, y > 0).get_support().sum() == 2


def test_a_hybrid_gate_does_not_load_the_state_of_another_split():
    with pytest.raises(InvalidValueError, match=r"gated=3\n.*gated=6"):
        HybridGate(20, 6, 0.5, 0.5).load_state_dict(HybridGate(20, 6, 1.0, 0.0).state_dict())


@pytest.mark.parametrize("objective", ["kernel_mean", "moments"])
def test_a_sample_of_weight_zero_is_as_if_it_were_not_there(objective):
    x = np.random.default_rng(0).normal(size=(50, 2))
    weight = np.where(np.arange(50) % 2, 1.0, 0.0)
    found, alone = (
        match_samples(*one, objective=objective, generator=torch.Generator().manual_seed(0), **more)
        for one, more in (((x, 8), {"sample_weight": weight}), ((x[1::2], 8), {}))
    )
    assert found.indices.tolist() == (2 * alone.indices + 1).tolist()
    assert found.distance == pytest.approx(alone.distance)
    with pytest.raises(InvalidValueError, match="1 <= k <= 25"):
        match_samples(x, 26, objective=objective, sample_weight=weight)


def test_frames_of_nullable_numbers_are_matched():
    x = np.random.default_rng(0).normal(size=(30, 2)).round(2)
    frame = pd.DataFrame(x).astype("Float64")
    same = [match_samples(one, 4, generator=torch.Generator().manual_seed(0)) for one in (x, frame)]
    assert same[0].indices.tolist() == same[1].indices.tolist()
    frame.iloc[3, 0] = pd.NA
    with pytest.raises(InvalidValueError, match="finite"):
        match_samples(frame, 4)


def test_no_random_features_are_not_the_usual_number():
    with pytest.raises(InvalidValueError, match="features must be large enough"):
        match_samples(np.eye(9), 2, features=0)


def test_random_features_do_not_depend_on_the_parts_they_are_computed_in():
    z = torch.randn(10_003, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi, last = (fourier_features(rows, 9, 1.5, torch.Generator().manual_seed(1)) for rows in (z, z[-5:]))
    assert phi.shape == (10_003, 8)
    torch.testing.assert_close(phi[-5:], last)
    torch.testing.assert_close(phi.square().sum(1), torch.ones(10_003, dtype=torch.float64))
