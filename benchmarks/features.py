"""Selecting k features: nonlinear problems, and the accuracy of classifiers on the selected features.

pip install "l0hooks[sklearn]" lassonet==0.0.21 stg==0.1.2 six h5py
python -m benchmarks.features --json features.json                                     # one thread, most of an hour
python -m benchmarks.features --problems xor20 cancer --methods l0hooks forest --seeds 2   # a quick run

Every method receives the same standardised training half and selects k features. An RBF support vector machine and a
random forest, both with default settings, are trained on these features; the score is the mean of their accuracies on
the other half, and it ranks the methods. F1 is that of the support, where the relevant features are known. Every
method has one setting for all problems; STG has two strengths, of which the better one counts for each problem.
LassoNet is slow and gets fewer seeds. Results that the ``--json`` file already holds are not measured again.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import contextlib
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC


class Problem(NamedTuple):
    """Training and test halves, how many features to choose, and which ones matter, if that is known."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    k: int
    relevant: set[int]


def xor(nuisance: int) -> Callable[[int], tuple]:
    def make(seed):
        rng = np.random.default_rng(seed)
        x = rng.choice([-1.0, 1.0], (2000, 2 + nuisance))
        return x, (x[:, 0] != x[:, 1]).astype(int), 2, {0, 1}

    return make


def madelon(k: int) -> Callable[[int], tuple]:
    """Clusters on 30 corners of a cube in five dimensions, fifteen mixtures of these, 480 features of noise.

    With all 32 corners scikit-learn would label them in order, and one feature alone would separate the classes.
    """

    def make(seed):
        x, y = make_classification(
            4000, 500, n_informative=5, n_redundant=15, n_clusters_per_class=15, class_sep=2, flip_y=0.01,
            shuffle=False, random_state=seed,
        )  # fmt: skip
        return x, y, k, set(range(20))

    return make


PROBLEMS = {
    "xor20": xor(20),
    "xor500": xor(500),
    "madelon5": madelon(5),
    "madelon20": madelon(20),
    "digits": lambda seed: (*load_digits(return_X_y=True), 10, set()),
    "cancer": lambda seed: (*load_breast_cancer(return_X_y=True), 5, set()),
}


def problem(name: str, seed: int) -> Problem:
    x, y, k, relevant = PROBLEMS[name](seed)
    x, test_x, y, test_y = train_test_split(x, y, test_size=0.5, stratify=y, random_state=seed)
    scaler = StandardScaler().fit(x)
    return Problem(scaler.transform(x), y, scaler.transform(test_x), test_y, k, relevant)


def with_l0hooks(p, seed):
    from l0hooks.sklearn import L0FeatureSelector

    return L0FeatureSelector(p.k, estimator="mlp", random_state=seed).fit(p.x, p.y).get_support(indices=True)


def with_forest(p, seed):
    return np.argsort(-RandomForestClassifier(100, random_state=seed).fit(p.x, p.y).feature_importances_)[: p.k]


def with_lassonet(p, seed):
    from lassonet import LassoNetClassifier

    model = LassoNetClassifier(
        hidden_dims=(60, 20),
        M=10,
        path_multiplier=1.1,
        n_iters=(300, 30),
        random_state=seed,
        torch_seed=seed,
        verbose=0,
    )
    model.path(p.x, p.y, return_state_dicts=False)
    return np.argsort(-np.asarray(model.feature_importances_))[: p.k]


def with_stg(strength):
    def run(p, seed):
        for name in collections.abc.__all__:  # it was written for an older Python
            if name not in vars(collections):
                setattr(collections, name, getattr(collections.abc, name))
        from stg import STG

        with contextlib.redirect_stdout(io.StringIO()):
            model = STG(
                task_type="classification", input_dim=p.x.shape[1], output_dim=int(p.y.max()) + 1, hidden_dims=[60, 20],
                activation="tanh", optimizer="Adam", learning_rate=3e-3, batch_size=256, feature_selection=True,
                sigma=0.5, lam=strength, random_state=seed, device="cpu",
            )  # fmt: skip
            model.fit(p.x, p.y, nr_epochs=200, valid_X=p.x, valid_y=p.y, print_interval=10**6)
        return np.argsort(-model.get_gates(mode="raw"))[: p.k]

    return run


METHODS = {
    "l0hooks": with_l0hooks,
    "forest": with_forest,
    "stg 0.1": with_stg(0.1),
    "stg 0.5": with_stg(0.5),
    "lassonet": with_lassonet,
}


def measure(name: str, method: str, seed: int) -> dict[str, float]:
    """CPU seconds of the choice, accuracies with the features chosen, and F1 of their support."""
    p = problem(name, seed)
    torch.manual_seed(seed)
    start = time.process_time()
    chosen = np.asarray(METHODS[method](p, seed))
    seconds = time.process_time() - start
    if len(set(chosen.tolist())) != p.k:
        raise RuntimeError(f"{method} chose {chosen}, not {p.k} features")
    x, test_x = p.x[:, chosen], p.test_x[:, chosen]
    svm = SVC().fit(x, p.y).score(test_x, p.test_y)
    forest = RandomForestClassifier(100, random_state=0).fit(x, p.y).score(test_x, p.test_y)
    f1 = 2 * len(p.relevant & set(chosen.tolist())) / (p.k + len(p.relevant)) if p.relevant else float("nan")
    return {"svm": svm, "forest": forest, "score": (svm + forest) / 2, "f1": f1, "seconds": seconds}


def show(found: dict[str, dict[str, float]], problems: list[str]) -> None:
    """A table for each problem, then the mean rank of every method over the problems."""
    ranks: dict[str, list[float]] = {}
    for name in problems:
        rows = {}
        for method in METHODS:
            seeds = [v for key, v in found.items() if key.rsplit("/", 1)[0] == f"{name}/{method}"]
            if seeds:
                rows[method] = {q: statistics.mean(v[q] for v in seeds) for q in seeds[0]} | {"seeds": len(seeds)}
        strengths = [m for m in rows if m.startswith("stg")]
        for worse in sorted(strengths, key=lambda m: -rows[m]["score"])[1:]:
            del rows[worse]
        best = max(row["score"] for row in rows.values())
        print(f"\n{name}\n{'':12}{'score':>8}{'behind':>8}{'svm':>8}{'forest':>8}{'F1':>7}{'seconds':>9}{'seeds':>7}")
        for method, row in sorted(rows.items(), key=lambda item: -item[1]["score"]):
            rank = 1 + sum(o["score"] > row["score"] for o in rows.values())
            rank += sum(o["score"] == row["score"] for o in rows.values()) / 2 - 0.5
            ranks.setdefault(method.split()[0], []).append(rank)
            print(
                f"{method:12}{row['score']:8.4f}{best - row['score']:8.4f}{row['svm']:8.4f}{row['forest']:8.4f}"
                f"{row['f1']:7.2f}{row['seconds']:9.1f}{row['seeds']:7d}"
            )
    print("\nmean rank: " + ", ".join(f"{m} {statistics.mean(r):.2f}" for m, r in ranks.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--slow-seeds", type=int, default=2, help="for LassoNet")
    parser.add_argument("--first-seed", type=int, default=100, help="the settings were chosen with seeds 0 to 2")
    parser.add_argument("--json", type=Path, help="results are kept here, and measured once")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name in options.problems:
        for method in options.methods:
            count = options.slow_seeds if method == "lassonet" else options.seeds
            for seed in range(options.first_seed, options.first_seed + count):
                key = f"{name}/{method}/{seed}"
                if key not in found:
                    found[key] = measure(name, method, seed)
                    if options.json:
                        options.json.write_text(json.dumps(found, indent=1))
    show(found, options.problems)


if __name__ == "__main__":
    main()
