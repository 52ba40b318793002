"""L0Regressor and L0Classifier beyond the laws of estimators: choice of a size, pipelines, and refusals."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config
from parameters import slow
from scipy import sparse
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import SelectFromModel
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from l0hooks.errors import InvalidValueError, L0HooksWarning
from l0hooks.sklearn import L0Classifier, L0FeatureSelector, L0Regressor


def data(seed: int = 0, n: int = 150, p: int = 30) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    return x, 2 * x[:, 3] - 2 * x[:, 20] + x[:, 11] + 0.5 * rng.normal(size=n) + 4


def labels(seed: int = 0) -> tuple[Any, Any]:
    x, y = data(seed)
    return x, np.where(y > 5, "high", np.where(y > 3, "middle", "low"))


RULES: list[dict[str, Any]] = [{}, {"k": "ric"}, {"k": "cv"}, {"k": "cv", "one_standard_error": True}, {"l0": 0.05}]


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize("as_sparse", [False, True])
def test_the_size_is_found(options: dict[str, Any], as_sparse: bool) -> None:
    x, y = data()
    model = L0Regressor(**options, random_state=0).fit(sparse.coo_array(x) if as_sparse else x, y)
    assert {3, 11, 20} <= set(np.flatnonzero(model.support_).tolist())
    assert model.k_ <= (5 if options == {"k": "cv"} else 4)
    assert model.score(x, y) > 0.9
    assert model.path_.criterion.argmin() >= model.k_ or not options.get("one_standard_error")
    assert model.path_.k.tolist() == list(range(len(model.path_)))


def test_one_standard_error_never_takes_more() -> None:
    x, y = data(1, n=60)
    plain, sparing = (L0Regressor("cv", one_standard_error=o, random_state=0).fit(x, y) for o in (False, True))
    assert sparing.k_ <= plain.k_
    assert sparing.path_.criterion == pytest.approx(plain.path_.criterion)


def test_ric_gives_held_out_losses_of_the_sizes_it_compared_and_no_others() -> None:
    x, y = data(1, n=60)
    one, two = (L0Regressor("ric", random_state=5).fit(x, y) for _ in range(2))
    known = np.isfinite(one.path_.criterion)
    whole = L0Regressor("cv", random_state=5).fit(x, y)
    assert one.support_.tolist() == two.support_.tolist()
    assert one.path_.k.tolist() == whole.path_.k.tolist()
    assert 1 < known.sum() < len(known)
    assert known[one.k_]
    assert one.path_.criterion[known].min() >= one.path_.criterion[one.k_] - one.path_.spread[known].max()


def test_the_price_is_a_price() -> None:
    x, y = data()
    sizes = [L0Regressor(l0=price).fit(x, y).k_ for price in (1e-9, 1e-2, 1.0, 100.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 0


@pytest.mark.parametrize("model", [L0Regressor(k="cv", random_state=3), *slow([L0Classifier(k="cv", random_state=3)])])
def test_folds_follow_the_random_state_and_jobs_change_nothing(model: Any) -> None:
    x, y = labels() if isinstance(model, L0Classifier) else data()
    one = model.set_params(max_k=4).fit(x, y).path_.criterion
    with parallel_config("threading"):
        two = model.set_params(n_jobs=2).fit(x, y).path_.criterion
    assert one.tolist() == two.tolist()


def test_folds_may_be_given() -> None:
    x, y = data()
    path = L0Regressor("cv", cv=KFold(3)).fit(x, y).path_
    first = L0Regressor("cv", cv=[next(KFold(3).split(x))], max_k=3).fit(x, y).path_
    fit = L0Regressor(3).fit(x[50:], y[50:])
    assert np.isfinite(path.criterion).all()
    assert first.criterion[3] == pytest.approx(np.mean((y[:50] - fit.predict(x[:50])) ** 2) / 2)


def test_classes_of_any_kind_and_number() -> None:
    x, y = labels()
    model = L0Classifier(k=3).fit(x, y)
    assert np.flatnonzero(model.support_).tolist() == [3, 11, 20]
    assert model.coef_.shape == (3, 30)
    assert model.predict_proba(x).sum(1) == pytest.approx(np.ones(150))
    assert np.exp(model.predict_log_proba(x)) == pytest.approx(model.predict_proba(x))
    assert model.score(x, y) > 0.85
    two = L0Classifier(k=3).fit(x, y == "high")
    assert two.coef_.shape == (1, 30)
    assert two.predict_proba(x)[:, 1] == pytest.approx(1 / (1 + np.exp(-two.decision_function(x))))
    assert np.exp(two.predict_log_proba(x)) == pytest.approx(two.predict_proba(x))


def test_poisson_predicts_means() -> None:
    x, _ = data()
    y = np.random.default_rng(0).poisson(np.exp(0.5 * x[:, 3] + 1))
    model = L0Regressor(loss="poisson").fit(x, y)
    assert model.support_[3]
    assert model.predict(x).mean() == pytest.approx(y.mean())  # follows from the equation of the intercept
    assert model.n_iter_ > 1


def test_a_pipeline_of_a_frame_with_a_factor() -> None:
    x, y = data()
    city = np.random.default_rng(0).choice(["a", "b", "c"], 150)
    frame = pd.DataFrame(x, columns=[f"x{j}" for j in range(30)]).assign(city=city)
    columns = ColumnTransformer(
        [
            ("numbers", StandardScaler(), [f"x{j}" for j in range(30)]),
            ("city", OneHotEncoder(sparse_output=False), ["city"]),
        ]
    ).set_output(transform="pandas")
    groups = [*(f"x{j}" for j in range(30)), *["city"] * 3]
    target = y + np.where(city == "a", 3.0, 0.0)
    search = GridSearchCV(make_pipeline(columns, L0Regressor(groups=groups)), {"l0regressor__k": [1, 2, 4]}, cv=3)
    model = search.fit(frame, target).best_estimator_[-1]
    assert search.best_params_ == {"l0regressor__k": 4}
    assert model.feature_names_in_[model.support_].tolist() == [
        *["numbers__x3", "numbers__x11", "numbers__x20"],
        *["city__city_a", "city__city_b", "city__city_c"],
    ]


def test_separated_classes_give_a_warning() -> None:
    x, y = data()
    with pytest.warns(ConvergenceWarning, match=r"separate the classes(.|\n)*got: alpha=0"):
        model = L0Classifier(k=1, alpha=0).fit(x, x[:, 5] > 0)
    assert np.isfinite(model.coef_).all()
    L0Classifier(k=1, alpha=0).fit(x, y > 4)  # not separated: no warning


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k must be a size or a rule"),
        ({"k": True}, "k must be a size or a rule"),
        ({"k": 2.5}, "k must be a size or a rule"),
        ({"k": "bic"}, "k must be a size or a rule"),
        ({"k": 3, "l0": 0.1}, "l0 replaces k"),
        ({"l0": -0.1}, "l0 must be finite"),
        ({"alpha": -1}, "alpha must be finite"),
        ({"alpha": np.inf}, "alpha must be finite"),
        ({"groups": [1, 2]}, "a group for each column"),
        ({"max_k": -3}, "max_k must be a size"),
        ({"loss": "absolute"}, "the loss must be known"),
    ],
)
def test_parameters_outside_their_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        L0Regressor(**options).fit(*data())


def test_data_outside_their_range() -> None:
    x, y = data()
    with pytest.raises(InvalidValueError, match="must not be negative, nor all zero"):
        L0Regressor(loss="poisson").fit(x, -np.ones(150))
    with pytest.raises(InvalidValueError, match="more than one class"):
        L0Classifier().fit(x, np.ones(150))
    with pytest.raises(InvalidValueError, match="not negative and not all zero"):
        L0Regressor().fit(x, y, sample_weight=-np.ones(150))


@pytest.mark.slow  # the errors of import_extra have fast tests
def test_the_extra_is_named_where_scikit_learn_is_missing() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import l0hooks.sklearn"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "l0hooks[sklearn]"' in result.stderr
    assert "MissingExtraError" in result.stderr


def selected(model: Any, y: Any, scale: float = 1.0, **options: Any) -> Any:
    x = np.random.default_rng(0).normal(size=(300, 20))
    selector = SelectFromModel(model, **options).fit(x * scale, y(x[:, :5] @ [5, 2, 1, 0.5, 0.3]))
    return selector, selector.get_support().sum()


@pytest.mark.parametrize(
    ("model", "y"),
    [
        (L0Classifier(k=5), lambda score: score > 0),
        (L0Classifier(k=5), lambda score: np.digitize(score, [-1, 1])),
        (L0Regressor(k=5), lambda score: score),
        (L0Regressor(k=5, loss="poisson"), lambda score: np.exp(score / 4).round()),
    ],
)
def test_select_from_model_keeps_the_whole_support_or_says_why_not(model: Any, y: Any) -> None:
    selector, kept = selected(model, y)
    assert kept == 5
    assert (selector.get_support() == selector.estimator_.support_).all()
    with pytest.warns(L0HooksWarning, match=r"the 5 features of the support(?s:.)*got: 5 of them"):
        assert selected(model, y, 1e8)[1] == 0
    assert selected(model, y, 1e8, importance_getter="support_", threshold=0.5)[1] == 5
    assert "penalty" not in model.get_params()


SCALED = [
    L0Regressor(2),
    L0Regressor(),
    L0Regressor(2, loss="poisson"),
    L0Classifier(2, alpha=0.0),  # its ridge by default is on the columns as given
    L0FeatureSelector(2, "linear"),
]


@pytest.mark.parametrize("as_sparse", [False, True])
@pytest.mark.parametrize("part", ["X", "a column", "y", "weights"])
@pytest.mark.parametrize("model", SCALED, ids=str)
def test_data_are_fitted_at_every_scale_that_can_be_squared_and_else_refused(
    model: Any, part: str, as_sparse: bool
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 20))
    score = 2 * x[:, 3] - x[:, 7] + 0.3 * rng.normal(size=100)
    y = score > 0 if isinstance(model, L0Classifier) else score
    if isinstance(model, L0Regressor) and model.loss == "poisson":
        y = np.exp(score / 3).round()
    for scale, fits in ((1e-300, False), (1e-74, True), (1e74, True), (1e155, False), (1e300, False)):
        columns = np.ones(20)
        columns[slice(None) if part == "X" else 3] = scale if part in ("X", "a column") else 1.0
        scaled = sparse.csr_array(x * columns) if as_sparse else x * columns
        target = y * scale if part == "y" and y.dtype != bool else y
        weights = np.full(100, scale) if part == "weights" else None
        shares = part == "weights" and scale < 1 and not isinstance(model, L0FeatureSelector)  # their scale is free
        if fits or shares or (part == "y" and y.dtype == bool):
            model.fit(scaled, target, sample_weight=weights)
            found = model.get_support() if isinstance(model, L0FeatureSelector) else model.support_
            assert {3, 7} <= set(np.flatnonzero(found).tolist())
        else:
            with pytest.raises(InvalidValueError, match="of a magnitude that can be squared"):
                model.fit(scaled, target, sample_weight=weights)
