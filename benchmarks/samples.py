"""Subsets that represent all samples: how close they are, how fast, and what a classifier learns from them.

pip install "l0hooks[examples]"
python -m benchmarks.samples --seeds 5 --json samples.json      # one thread, some minutes
python -m benchmarks.samples --sizes 50 --seeds 1               # a quick run

Standardised digits: two thirds to choose from, one third to test on. The distance is always that of the mean of the
*full* Gaussian kernel (median bandwidth), also where random features or another objective were optimised; it is
divided by the mean distance of random subsets. Facility location is the plain greedy algorithm on squared distances,
with all marginal gains computed in every step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch.nn.functional import pdist

from l0hooks.select.matching import match_samples
from l0hooks.select.mean_distance import Kernel, distance


class Task:
    """Samples to choose from, others to test on, and the kernel that every method is measured by."""

    def __init__(self, seed):
        x, y = load_digits(return_X_y=True)
        self.x, self.test_x, self.y, self.test_y = train_test_split(
            x, y, test_size=1 / 3, stratify=y, random_state=seed
        )
        mean, spread = self.x.mean(0), self.x.std(0)
        spread[spread == 0] = 1
        self.x, self.test_x, self.seed = (self.x - mean) / spread, (self.test_x - mean) / spread, seed
        z = torch.from_numpy(self.x)
        squares = torch.cdist(z, z).square()
        n = len(z)
        self.squares = squares.numpy()
        self.form = Kernel((squares / (-2 * pdist(z).median() ** 2)).exp(), torch.full((n,), 1 / n, dtype=z.dtype))

    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    def distance(self, rows):
        return distance(self.form, torch.as_tensor(np.asarray(rows)))

    def accuracy(self, model, rows):
        return model.fit(self.x[rows], self.y[rows]).score(self.test_x, self.test_y)


def matched(**options):
    return lambda task, k: match_samples(task.x, k, draws=1, generator=task.generator(), **options).indices


def with_gates(task, k):
    """The same kernel mean (1024 random features) as a user's loss: gates only, no exchanges."""
    z = torch.from_numpy(task.x)
    turn = torch.randn(z.shape[1], 512, generator=task.generator(), dtype=z.dtype) / pdist(z).median()
    phi = torch.cat([(z @ turn).cos(), (z @ turn).sin()], 1).float() / 512**0.5
    mean = phi.mean(0)
    torch.manual_seed(task.seed)
    loss = lambda gates: (gates @ phi / gates.sum() - mean).square().sum()  # noqa: E731
    return match_samples(task.x, k, objective=loss, draws=1, generator=task.generator()).indices


def at_random(task, k):
    return np.random.default_rng(task.seed).choice(len(task.x), k, replace=False)


def facility_location(task, k):
    similarity, chosen = task.squares.max() - task.squares, []
    covered = np.zeros(len(similarity))
    for _ in range(k):
        gains = np.maximum(similarity - covered, 0).sum(1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        covered = np.maximum(covered, similarity[chosen[-1]])
    return np.array(chosen)


def medoids(task, k):
    """The sample nearest to each centre of k-means, none twice."""
    apart, chosen = KMeans(k, n_init=1, random_state=task.seed).fit(task.x).transform(task.x), []
    for centre in range(k):
        apart[chosen, centre] = np.inf
        chosen.append(int(apart[:, centre].argmin()))
    return np.array(chosen)


METHODS = {
    "random": at_random,
    "l0hooks, kernel mean": matched(),
    "l0hooks, 1024 random features": matched(features=1024),
    "l0hooks, moments": matched(objective="moments"),
    "l0hooks, gates alone": with_gates,
    "facility location": facility_location,
    "k-means medoids": medoids,
}


def measure(task, method, k):
    start = time.process_time()
    rows = METHODS[method](task, k)
    seconds = time.process_time() - start
    chance = statistics.mean(
        task.distance(np.random.default_rng(1000 + r).choice(len(task.x), k, replace=False)) for r in range(20)
    )
    return {
        "method": method,
        "k": k,
        "seed": task.seed,
        "distinct": len(set(rows.tolist())),
        "ratio": task.distance(rows) / chance,
        "svc": task.accuracy(SVC(C=5), rows),
        "logistic": task.accuracy(LogisticRegression(max_iter=2000), rows),
        "seconds": seconds,
    }


def show(found, k, seeds):
    print(f"\ndigits, k = {k}; medians of {seeds} seeds (accuracies: means)")
    print(f"{'':32}distance / random's      SVC  logistic   seconds")
    for method in METHODS:
        rows = [row for row in found if row["method"] == method and row["k"] == k]
        if rows:
            ratio, seconds = (statistics.median(row[name] for row in rows) for name in ("ratio", "seconds"))
            svc, logistic = (100 * statistics.mean(row[name] for row in rows) for name in ("svc", "logistic"))
            print(f"{method:32}{ratio:19.3f}{svc:9.2f}{logistic:10.2f}{seconds:10.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 500])
    parser.add_argument("--methods", nargs="+", help="only methods whose name contains one of these")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [m for m in METHODS if not options.methods or any(part in m for part in options.methods)]
    tasks, found = [Task(seed) for seed in range(options.seeds)], []
    for k in options.sizes:
        found += [measure(task, method, k) for method in chosen for task in tasks]
        show(found, k, options.seeds)
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
