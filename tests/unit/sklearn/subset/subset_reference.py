"""Data for best subsets, and their losses by dense algebra."""

from __future__ import annotations

from typing import Any

import numpy as np

from l0hooks.sklearn.subset.size_choice import (
    Task,
    fit_path,
)


def data(seed: int, n: int = 30, p: int = 9, rho: float = 0.7) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    for j in range(1, p):
        x[:, j] += rho * x[:, j - 1]
    return x, x[:, [1, p // 2, p - 2]].sum(1) + rng.normal(size=n)


def loss_of(x: Any, y: Any, columns: Any, weight: Any = None, alpha: float = 0.0) -> float:
    """Half the mean squared residual with ridge, by dense algebra on centred columns."""
    w = np.ones(len(y)) if weight is None else weight
    z, t = x[:, list(columns)] - np.average(x[:, list(columns)], axis=0, weights=w), y - np.average(y, weights=w)
    root = np.sqrt(w / w.sum())
    rows = np.vstack([z * root[:, None], np.sqrt(alpha) * np.eye(len(columns))])
    b = np.linalg.lstsq(rows, np.append(t * root, np.zeros(len(columns))), rcond=None)[0]
    return float(np.sum((np.append(t * root, np.zeros(len(columns))) - rows @ b) ** 2) / 2)


def path_of(x: Any, y: Any, sizes: Any, weight: Any = None, **task: Any) -> Any:
    return fit_path(x, y, weight, Task("squared", **task), sizes)[0]


def columns_of(subset: Any) -> list[int]:
    return np.flatnonzero(subset.support).tolist()
