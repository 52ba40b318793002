"""Which measurements of a tumour are enough? Exactly k features in a pipeline, with k chosen by cross-validation.

python examples/select_in_pipeline.py                  # half a minute
python examples/select_in_pipeline.py --k 2 4 --estimator linear

Prints the cross-validated accuracy of each k, the features of the smallest k within one standard error of the best,
and the accuracy on held-out patients with these and with all features.
"""

from __future__ import annotations

import argparse
import math

import pandas as pd
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from l0hooks.sklearn import L0FeatureSelector


def make_pipeline(estimator: str, steps: int, seed: int) -> Pipeline:
    selector = L0FeatureSelector(1, estimator, steps=steps, random_state=seed)
    pipeline = Pipeline([("scale", StandardScaler()), ("select", selector), ("classify", SVC())])
    return pipeline.set_output(transform="pandas")


def smallest_good(search: GridSearchCV, folds: int) -> int:
    """The smallest k within one standard error of the best."""
    results = pd.DataFrame(search.cv_results_)
    best = results.loc[results.mean_test_score.idxmax()]
    enough = results.mean_test_score >= best.mean_test_score - best.std_test_score / math.sqrt(folds)
    return int(results.param_select__k[enough].min())


def run(options: argparse.Namespace) -> None:
    frame, y = load_breast_cancer(return_X_y=True, as_frame=True)
    frame, test, y, test_y = train_test_split(frame, y, test_size=0.3, stratify=y, random_state=options.seed)
    pipeline = make_pipeline(options.estimator, options.steps, options.seed)
    search = GridSearchCV(pipeline, {"select__k": options.k}, cv=options.folds, refit=False, error_score="raise")
    search.fit(frame, y)
    for k, mean, std in zip(
        options.k, search.cv_results_["mean_test_score"], search.cv_results_["std_test_score"], strict=True
    ):
        print(f"k = {k:2d}: accuracy {mean:.3f} ± {std / math.sqrt(options.folds):.3f}")

    k = smallest_good(search, options.folds)
    pipeline.set_params(select__k=k).fit(frame, y)
    chosen = pipeline[:-1].transform(frame)  # a frame with the names of the features
    importances = pd.Series(pipeline["select"].feature_importances_, frame.columns)
    print(f"\n{k} of {frame.shape[1]} features:")
    for name in importances[chosen.columns].sort_values(ascending=False).index:
        print(f"  {name:25} importance {importances[name]:.2f}")
    every = Pipeline([("scale", StandardScaler()), ("classify", SVC())]).fit(frame, y)
    print(f"held-out accuracy {pipeline.score(test, test_y):.3f}, with all features {every.score(test, test_y):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3, 5, 8])
    parser.add_argument("--estimator", choices=["mlp", "linear"], default="mlp")
    parser.add_argument("--steps", type=int, default=500, help="of the gates")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())
