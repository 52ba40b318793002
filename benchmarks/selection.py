"""Best subsets on AR(1) designs (Hazimeh & Mazumder 2020): support, prediction, training loss and CPU seconds.

pip install "l0hooks[dev]" "abess==0.4.11" "skglm==0.5" "l0-python==0.6.2"
python -m benchmarks.selection --seeds 20 --json selection.json                     # the whole grid: many hours
python -m benchmarks.selection --seeds 5 --settings 500,1000,25,0.9,5 --methods l0hooks abess  # one setting

A setting is n,p,k,ρ,SNR. Methods "at k" know the true k; the others choose it from the training data. For each seed
all methods receive the same data. Seconds are CPU time of one thread for ``fit``. ``--sparse`` draws a sparse X
(density .01, n 5,000) instead, for l0hooks and abess only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
import warnings
from pathlib import Path

import numpy as np
from scipy import sparse

from l0hooks.sklearn import L0Regressor

GRID = [
    (n, p, k, rho, snr)
    for n, p, k, rho, snr in itertools.product((500, 1000), (1000, 5000), (10, 25), (0.1, 0.5, 0.9), (0.5, 1, 2, 5, 10))
]
DENSITY, SPARSE_ROWS = 0.01, 5000
PRICES = (1e-3, 3e-3, 1e-2, 3e-2)  # of l0-python's penalty; the best on held-out rows counts


def autoregressive(rng, n, p, rho):
    z = rng.standard_normal((n, p))
    for j in range(1, p):
        z[:, j] = rho * z[:, j - 1] + np.sqrt(1 - rho**2) * z[:, j]
    return z


class Instance:
    """Training and fresh data of one setting and seed, with k coefficients of 1 at equal distances."""

    def __init__(self, setting, seed, is_sparse):
        n, p, self.k, rho, snr = setting
        rng = np.random.default_rng([seed, n, p, self.k, int(100 * rho), int(100 * snr)])
        self.truth = np.linspace(0, p - 1, self.k + 2)[1:-1].round().astype(int)
        beta = np.zeros(p)
        beta[self.truth] = 1
        if is_sparse:
            self.x = sparse.random_array((SPARSE_ROWS, p), density=DENSITY, rng=rng, format="csr")
            self.fresh = sparse.random_array((2000, p), density=DENSITY, rng=rng, format="csr")
            spread = np.sqrt(np.var(self.x @ beta) / snr)
        else:
            self.x, self.fresh = autoregressive(rng, n, p, rho), autoregressive(rng, 2000, p, rho)
            covariance = rho ** np.abs(self.truth[:, None] - self.truth)
            spread = np.sqrt(covariance.sum() / snr)
        self.y = self.x @ beta + spread * rng.standard_normal(self.x.shape[0])
        self.fresh_y = self.fresh @ beta + spread * rng.standard_normal(self.fresh.shape[0])
        self.seed = seed

    def measure(self, coef, intercept, seconds):
        support = np.flatnonzero(coef)
        hits = len(np.intersect1d(support, self.truth))
        residual = self.fresh_y - self.fresh @ coef - intercept
        train = self.y - self.x @ coef - intercept
        return {
            "f1": 2 * hits / (len(support) + self.k),
            "r2": float(1 - residual @ residual / np.sum((self.fresh_y - self.fresh_y.mean()) ** 2)),
            "loss": float(train @ train / len(train)),
            "k": len(support),
            "seconds": seconds,
        }


def scikit(make):
    """A method from an estimator in scikit-learn's form."""

    def method(data):
        model = make(data)
        start = time.process_time()
        model.fit(data.x, data.y)
        seconds = time.process_time() - start
        return data.measure(np.ravel(model.coef_), float(np.ravel(model.intercept_)[0]), seconds)

    return method


def abess(**options):
    def make(data):
        from abess.linear import LinearRegression

        given = {name: data.k if value == "k" else value for name, value in options.items()}
        return LinearRegression(thread=1, **given)

    return scikit(make)


def lasso(data):
    from sklearn.linear_model import LassoCV

    return LassoCV(cv=5, random_state=data.seed)


def mcp(data):
    from skglm import GeneralizedLinearEstimator
    from skglm.datafits import Quadratic
    from skglm.penalties import MCPenalty
    from skglm.solvers import AndersonCD

    class Path:
        """Twenty penalties by held-out error, then the best on all rows."""

        def fit(self, x, y):
            mean, level = x.mean(0), y.mean()
            scale = x.std(0)
            z, t = (x - mean) / scale, y - level
            most = np.abs(z.T @ t).max() / len(t)
            order = np.random.default_rng(data.seed).permutation(len(t))
            held, kept = order[: len(t) // 5], order[len(t) // 5 :]
            fit = lambda rows, alpha: (  # noqa: E731
                GeneralizedLinearEstimator(Quadratic(), MCPenalty(alpha, gamma=3.0), AndersonCD(fit_intercept=False))
                .fit(z[rows], t[rows])
                .coef_
            )
            prices = most * np.geomspace(1, 0.02, 20)
            errors = [np.mean((t[held] - z[held] @ fit(kept, a)) ** 2) for a in prices]
            self.coef_ = fit(np.arange(len(t)), prices[int(np.argmin(errors))]) / scale
            self.intercept_ = level - mean @ self.coef_

    return Path()


def l0_python(data):
    from l0.sparse import SparseL0Linear

    class Path:
        def fit(self, x, y):
            mean, level, scale = x.mean(0), y.mean(), x.std(0)
            z, t = (x - mean) / scale, y - level
            order = np.random.default_rng(data.seed).permutation(len(t))
            held, kept = order[: len(t) // 5], order[len(t) // 5 :]
            best = np.inf
            unit = sparse.eye(z.shape[1], format="csr")
            for price in PRICES:
                model = SparseL0Linear(n_features=z.shape[1], fit_intercept=False, seed=data.seed)
                model.fit(sparse.csr_matrix(z[kept]), t[kept].astype(np.float32), lambda_reg=price, lr=0.05, epochs=300)
                w = np.asarray(model.predict(unit), dtype=float).ravel()
                error = np.mean((t[held] - z[held] @ w) ** 2)
                if error < best:
                    best, self.coef_ = error, w / scale
            self.intercept_ = level - mean @ self.coef_

    return Path()


METHODS = {
    "l0hooks at k": scikit(lambda data: L0Regressor(k=data.k)),
    "abess at k": abess(support_size="k"),
    "abess tuned at k": abess(support_size="k", important_search=0, splicing_type=1, max_iter=100, exchange_num="k"),
    "l0hooks ebic": scikit(lambda data: L0Regressor()),
    "l0hooks ric": scikit(lambda data: L0Regressor(k="ric", random_state=data.seed)),
    "l0hooks cv5": scikit(lambda data: L0Regressor(k="cv", random_state=data.seed)),
    "l0hooks cv5 1se": scikit(lambda data: L0Regressor(k="cv", one_standard_error=True, random_state=data.seed)),
    "abess cv5": abess(cv=5),
    "abess ebic": abess(),
    "LassoCV": scikit(lasso),
    "skglm MCP": scikit(mcp),
    "l0-python": scikit(l0_python),
}


def table(rows):
    """One line for each method of a setting: means, and median seconds."""
    print(f"  {'method':<18} {'F1':>6} {'R²':>6} {'loss':>9} {'k':>6} {'seconds':>8}")
    for method in METHODS:
        own = [r for r in rows if r["method"] == method]
        if own:
            f1, r2, loss, k = (np.mean([r[key] for r in own]) for key in ("f1", "r2", "loss", "k"))
            seconds = np.median([r["seconds"] for r in own])
            print(f"  {method:<18} {f1:6.3f} {r2:6.3f} {loss:9.4f} {k:6.1f} {seconds:8.3f}", flush=True)


def summary(rows):
    """The aims, over all that was run."""
    by = {(r["method"], tuple(r["setting"]), r["seed"]): r for r in rows}
    settings = sorted({key[1] for key in by})

    def pairs(one, other):
        return [(r, by[other, s, seed]) for (m, s, seed), r in by.items() if m == one and (other, s, seed) in by]

    for other in ("abess at k", "abess tuned at k"):
        both = pairs("l0hooks at k", other)
        if both:
            share = np.mean([a["loss"] <= b["loss"] * (1 + 1e-9) for a, b in both])
            print(f"training loss <= {other}: {100 * share:.1f} % of {len(both)} instances")
    for one, other in [
        ("l0hooks at k", "abess at k"),
        ("l0hooks at k", "abess tuned at k"),
        ("l0hooks ebic", "abess cv5"),
        ("l0hooks ric", "abess cv5"),
        ("l0hooks cv5", "abess cv5"),
        ("l0hooks cv5 1se", "abess cv5"),
    ]:
        for s in settings:
            both = [(a, b) for a, b in pairs(one, other) if tuple(a["setting"]) == s]
            if both:
                gap = np.mean([a["f1"] - b["f1"] for a, b in both])
                error = np.std([a["f1"] - b["f1"] for a, b in both]) / np.sqrt(max(len(both) - 1, 1))
                ratio = np.median([a["seconds"] / b["seconds"] for a, b in both])
                print(f"{one} − {other}, {s}: F1 {gap:+.3f} ± {error:.3f}, time × {ratio:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--settings", nargs="*", default=[",".join(map(str, s)) for s in GRID])
    parser.add_argument("--methods", nargs="*", default=[""], help="beginnings of the names of methods")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    methods = [m for m in METHODS if any(m.startswith(start) for start in options.methods)]
    if options.sparse:
        methods = [m for m in methods if m.startswith(("l0hooks", "abess"))]
    rows = []
    for text in options.settings:
        numbers = [float(v) for v in text.split(",")]
        setting = (int(numbers[0]), int(numbers[1]), int(numbers[2]), numbers[3], numbers[4])
        for seed in range(options.first, options.first + options.seeds):
            data = Instance(setting, seed, options.sparse)
            for method in methods:
                rows.append({"method": method, "setting": setting, "seed": seed, **METHODS[method](data)})
        print(f"n, p, k, ρ, SNR = {setting}{', sparse' if options.sparse else ''}, {options.seeds} seeds")
        table([r for r in rows if r["setting"] == setting])
        if options.json:
            options.json.write_text(json.dumps(rows))
    summary(rows)


if __name__ == "__main__":
    main()
