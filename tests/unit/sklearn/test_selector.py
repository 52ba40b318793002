"""L0FeatureSelector beyond the laws of estimators: the features it finds, its options, and kinds of modules."""

import contextlib
import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from l0hooks.errors import InvalidValueError, L0HooksWarning, StateError, UnsupportedModuleError
from l0hooks.sklearn import L0FeatureSelector
from l0hooks.sklearn.targets import task_of

ESTIMATORS = ("mlp", "linear", "module")


def table(n=120, d=9, seed=0):
    """Two features matter, 3 and 6, each by itself and for every kind of model."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    return x, (x[:, 3] + x[:, 6] > 0).astype(int)


def make(estimator, k, d=9, outputs=2, **options):
    options = {"steps": 60, "random_state": 0, "gate_lr": 0.1, "lr": 0.01} | options
    if estimator == "module":
        torch.manual_seed(0)
        estimator = nn.Sequential(nn.Linear(d, 16), nn.ReLU(), nn.Linear(16, outputs))
    return L0FeatureSelector(k, estimator, **options)


@pytest.mark.parametrize("kind", ["noise", "constant", "copies", "one"])
@pytest.mark.parametrize("estimator", ["mlp", "linear"])
def test_exactly_k_also_where_there_is_nothing_to_choose_by(estimator, kind):
    rng = np.random.default_rng(0)
    x = {
        "noise": rng.standard_normal((30, 6)),
        "constant": np.ones((30, 6)),
        "copies": np.repeat(rng.standard_normal((30, 1)), 6, axis=1),
        "one": rng.standard_normal((30, 1)),
    }[kind]
    k = min(3, x.shape[1])
    tied = pytest.warns(L0HooksWarning, match="6 gates that are equal, of which 3 stay")
    with tied if (estimator, kind) == ("mlp", "constant") else contextlib.nullcontext():
        fitted = make(estimator, k, steps=10).fit(x, rng.integers(0, 3, 30))
    assert fitted.get_support().sum() == k


def test_another_random_state_gives_other_importances():
    x, y = table()
    one, other = (make("mlp", 3, random_state=seed).fit(x, y) for seed in (1, 2))
    assert not np.array_equal(one.feature_importances_, other.feature_importances_)


def test_importances_are_keep_probabilities_and_the_ranking_follows_them():
    x, y = table()
    selector = make("mlp", 3).fit(x, y)
    assert selector.feature_importances_.sum() == pytest.approx(3, rel=1e-4)
    assert sorted(selector.ranking_) == [1, 1, 1, 2, 3, 4, 5, 6, 7]
    by_rank = selector.feature_importances_[np.argsort(selector.ranking_, kind="stable")]
    assert by_rank[:3].min() >= by_rank[3]
    assert (np.diff(by_rank[3:]) <= 0).all()


def test_the_module_is_copied_and_never_changed():
    x, y = table()
    selector = make("module", 2)
    before = copy.deepcopy(selector.estimator.state_dict())
    selector.fit(x, y)
    for name, tensor in selector.estimator.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert selector.estimator_ is not selector.estimator


@pytest.mark.parametrize("seed", range(3))
def test_features_that_matter_only_together_are_found_among_five_hundred(seed):
    rng = np.random.default_rng(seed)
    x = rng.choice([-1.0, 1.0], (600, 500))
    selector = L0FeatureSelector(2, steps=60, random_state=seed).fit(x, x[:, 17] * x[:, 401] > 0)
    assert selector.get_support(indices=True).tolist() == [17, 401]


@pytest.mark.parametrize("estimator", ["mlp", "module"])
def test_a_regression_finds_features_without_linear_effect(estimator):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 8))
    y = 100 * np.cos(2 * x[:, 1]) + 50 * np.abs(x[:, 5]) + rng.standard_normal(400)
    selector = make(estimator, 2, d=8, outputs=1, steps=200).fit(x, y)
    assert selector.task_ == "regression"
    assert selector.get_support(indices=True).tolist() == [1, 5]


@pytest.mark.slow
def test_three_way_parity_needs_the_networks_because_no_pair_is_informative():
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 1.0], (2000, 10))
    selector = L0FeatureSelector(3, random_state=0).fit(x, x[:, 1] * x[:, 4] * x[:, 7] > 0)
    assert selector.get_support(indices=True).tolist() == [1, 4, 7]


def test_a_loss_of_the_users_own_gets_the_target_as_given():
    x, _ = table(n=200)
    y = np.random.default_rng(0).poisson(np.exp(x[:, 3] + x[:, 6])).astype(float)
    seen = []

    def poisson(output, target):
        seen.append(target)
        return nn.functional.poisson_nll_loss(output[:, 0], target)

    selector = make("module", 2, outputs=1, task="regression", loss=poisson).fit(x, y)
    assert selector.get_support(indices=True).tolist() == [3, 6]
    assert seen[0].dtype == torch.float32
    assert set(seen[0].tolist()) <= set(y.tolist())


def test_text_labels_and_many_classes():
    x, _ = table(n=300)
    y = np.array(["left", "middle", "right"])[np.digitize(x[:, 3], [-0.5, 0.5])]
    for estimator in ESTIMATORS:
        selector = make(estimator, 1, outputs=3).fit(x, y)
        assert selector.get_support(indices=True).tolist() == [3]
        assert selector.classes_.tolist() == ["left", "middle", "right"]


def test_auto_distinguishes_classes_from_numbers():
    assert task_of(load_diabetes().target) == "regression"  # whole numbers, but hundreds of them
    assert task_of(np.arange(10) % 3) == "classification"
    assert task_of(np.array([True, False])) == "classification"
    assert task_of(np.linspace(0, 1, 5)) == "regression"


def test_pipeline_grid_search_and_pandas_output():
    frame, y = load_breast_cancer(return_X_y=True, as_frame=True)
    frame, y = frame.iloc[:200, :8], y[:200]
    pipe = make_pipeline(StandardScaler(), make("mlp", 2, steps=20), LogisticRegression()).set_output(
        transform="pandas"
    )
    search = GridSearchCV(pipe, {"l0featureselector__k": [1, 3]}, cv=2, error_score="raise").fit(frame, y)
    chosen = search.best_estimator_[:-1].transform(frame)
    assert list(chosen.columns) == list(search.best_estimator_[:-1].get_feature_names_out())
    assert len(chosen.columns) == search.best_params_["l0featureselector__k"]
    assert set(chosen.columns) <= set(frame.columns)


def test_column_transformer_gives_named_columns():
    x, y = table()
    frame = pd.DataFrame(x, columns=[f"f{i}" for i in range(9)])
    halves = ColumnTransformer(
        [("low", make("mlp", 1), [f"f{i}" for i in range(5)]), ("high", make("linear", 1), ["f5", "f6", "f7", "f8"])]
    ).set_output(transform="pandas")
    assert list(halves.fit_transform(frame, y).columns) == ["low__f3", "high__f6"]


def test_a_module_gets_its_inputs_in_its_own_dtype():
    x = np.random.default_rng(0).standard_normal((200, 6))
    selector = L0FeatureSelector(2, nn.Linear(6, 1).bfloat16(), steps=150, lr=0.03, gate_lr=0.1, random_state=0)
    assert selector.fit(x, 3 * x[:, 1] - 2 * x[:, 4]).get_support(indices=True).tolist() == [1, 4]


def test_half_of_the_features_by_default():
    x, y = table()
    assert L0FeatureSelector(steps=5).fit(x, y).get_support().sum() == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be a positive number\.\n  expected: an integer >= 1\n  got: 0"),
        ({"k": -3}, "k must be a positive number"),
        ({"k": 2.0}, r"an integer >= 1\n  got: 2\.0"),
        ({"k": True}, "an integer >= 1"),
        ({"k": 10}, r"k must not exceed the number of features\.\n  expected: at most 9\n  got: 10"),
        ({"steps": 0}, "steps must be a positive number"),
        ({"batch_size": 0.5}, "batch_size must be a positive number"),
        ({"lr": 0}, "lr must be positive"),
        ({"gate_lr": float("nan")}, "gate_lr must be positive"),
        ({"estimator": "tree"}, r"the estimator must be known.*\n  expected: .*\n  got: 'tree'"),
        ({"estimator": RandomForestClassifier()}, "the estimator must be known"),
        ({"task": "ranking"}, "the task must be known"),
        ({"loss": nn.MSELoss()}, "loss= needs a torch module"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidValueError, match=message):
        L0FeatureSelector(**{"k": 2, **options}).fit(*table())


def test_targets_that_do_not_fit_the_task_are_refused():
    x, y = table()
    with pytest.raises(InvalidValueError, match=r"at least two classes.*\n.*\n  got: 1 class"):
        make("mlp", 2).fit(x, np.zeros(len(x)))
    with pytest.raises(InvalidValueError, match="a regression needs a numeric target"):
        make("mlp", 2, task="regression").fit(x, np.array(["a", "b"])[y])
    with pytest.raises(ValueError, match="Unknown label type"):
        make("mlp", 2, task="classification").fit(x, x[:, 0])
    with pytest.raises(ValueError, match="zero"):  # scikit-learn's message, or ours
        make("mlp", 2).fit(x, y, sample_weight=np.zeros(len(x)))


@pytest.mark.parametrize(
    ("outputs", "task", "wanted"), [(3, "classification", r"\(2, 2\)"), (2, "regression", r"\(2,\) or \(2, 1\)")]
)
def test_a_module_with_another_output_is_refused(outputs, task, wanted):
    x, y = table()
    with pytest.raises(UnsupportedModuleError, match=rf"shape {wanted}\n  got: \(2, {outputs}\)"):
        make("module", 2, outputs=outputs, task=task).fit(x, y.astype(float))


def test_gates_that_are_nan_are_not_ranked_by_the_selector():
    x, y = table()
    selector = L0FeatureSelector(2, nn.Linear(9, 2), loss=lambda output, _: output.sum() * math.nan, steps=3)
    with pytest.raises(
        StateError, match=r"gates that are NaN cannot be ranked\.\n  got: NaN\n  try: a smaller gate_lr"
    ):
        selector.fit(x, y)
