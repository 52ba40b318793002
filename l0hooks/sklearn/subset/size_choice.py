"""Best subsets of several sizes for one of the four losses, and the rules that choose a size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from l0hooks.sklearn.subset.design import Design, Floats, Ints
from l0hooks.sklearn.subset.glm import glm_path
from l0hooks.sklearn.subset.losses import Logistic, Loss, Multinomial, Poisson
from l0hooks.sklearn.subset.refit import squares_path
from l0hooks.sklearn.subset.results import SubsetPath, ebic, smallest

LossName = Literal["squared", "logistic", "multinomial", "poisson"]
LOSSES: dict[str, Loss] = {"logistic": Logistic(), "multinomial": Multinomial(), "poisson": Poisson()}
MAX_SIZE = 100  # the largest size that is tried unless the user asks for more
MIN_RIC_FACTOR, MAX_RIC_FACTOR, N_RIC_FACTORS = 1.5, 2.5, 41  # the risk inflation criterion itself has the factor 2
HELD_OUT_SLACK = 0.5  # standard errors by which the held-out loss of a larger size may exceed the least


@dataclass(frozen=True)
class Task:
    """The loss, the ridge, the groups and the intercept of a fit.

    Parameters
    ----------
    loss : {"squared", "logistic", "multinomial", "poisson"}
    alpha : float, >= 0
        Ridge: ``alpha/2`` times the sum of squared coefficients is added to the mean loss.
    groups : tuple of int64 array, optional
        The columns of each item.
    intercept : bool
    """

    loss: LossName
    alpha: float = 0.0
    groups: tuple[Ints, ...] | None = None
    intercept: bool = True


def largest_size(n: float, n_columns: int, groups: Sequence[Ints] | None = None) -> int:
    """The largest size that is tried if a rule chooses the size: about n/(1.5·log p) columns, at most n/3 and 100.

    Examples
    --------
    >>> largest_size(500, 1000), largest_size(500, 8), largest_size(12, 8)
    (48, 8, 3)
    """
    items = n_columns if groups is None else len(groups)
    rows = n * items / n_columns
    return max(1, min(items, MAX_SIZE, int(rows / 3), int(rows / (1.5 * np.log(max(items, 3))))))


def fit_path(
    x: Any, y: Floats, sample_weight: Floats | None, task: Task, sizes: Iterable[int]
) -> tuple[SubsetPath, int, float]:
    """The best subset found for each size.

    Parameters
    ----------
    x : array or scipy.sparse, shape (n, p)
    y : float64 array, shape (n,) or, for "multinomial", (n, classes)
        Counts for "poisson", 0 and 1 for "logistic", unit vectors for "multinomial".
    sample_weight : float64 array, shape (n,), optional
    task : Task
    sizes : iterable of int

    Returns
    -------
    path : SubsetPath
    steps : int
        The number of Newton steps; 0 for squared loss, which has a closed form.
    total : float
        The sum of the weights.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(40, 5))
    >>> path, steps, total = fit_path(x, 2 * x[:, 3], None, Task("squared"), [1])
    >>> np.flatnonzero(path[0].support).tolist(), steps, total
    ([3], 0, 40.0)
    """
    design = Design(x, sample_weight, center=task.intercept)
    target = y[design.rows]
    if task.loss == "squared":
        return squares_path(design, target, sizes, alpha=task.alpha, groups=task.groups), 0, design.total
    matrix = target if target.ndim == 2 else target[:, None]
    path, steps = glm_path(design, matrix, sizes, LOSSES[task.loss], alpha=task.alpha, groups=task.groups)
    return path, steps, design.total


def ebic_gamma(n: float, n_items: int) -> float:
    """max(0, 1 − ¾ log n/(2 log p)): a quarter of the way from the least γ with which EBIC is consistent to 1.

    Examples
    --------
    >>> round(ebic_gamma(500, 1000), 3), ebic_gamma(500, 10)
    (0.663, 0.0)

    References
    ----------
    Chen & Chen (2008), Biometrika 95(3), section 3.
    """
    return float(max(0.0, 1 - 0.375 * np.log(max(n, 2.0)) / np.log(max(n_items, 2))))


def with_ebic(path: SubsetPath, task: Task, total: float, gamma: float | None = None) -> SubsetPath:
    """The path with EBIC as its criterion.

    Parameters
    ----------
    path : SubsetPath
    task : Task
    total : float
        The number of samples.
    gamma : float, in [0, 1], optional
        By default that of :func:`ebic_gamma`.
    """
    items = path[0].support.size if task.groups is None else len(task.groups)
    deviance = np.array([s.deviance for s in path])
    weight = ebic_gamma(total, items) if gamma is None else gamma
    values = ebic(deviance, path.k, _parameters(path, task), total, items, weight)
    return SubsetPath([replace(s, criterion=float(v)) for s, v in zip(path, values, strict=True)])


def ric_indices(path: SubsetPath, task: Task, total: float) -> Ints:
    """The indices of the sizes that minimise deviance + k·c·log p + 2·(parameters − k) for some c from 1.5 to 2.5.

    c = 2 is the risk inflation criterion: the best of p useless columns lowers the deviance by about 2·log p. A
    further parameter of the same item costs 2, as in AIC, and an item never costs less than log n, as in BIC.

    Parameters
    ----------
    path : SubsetPath
        In order of size.
    task : Task
    total : float
        The number of samples.

    Returns
    -------
    int64 array, ascending

    References
    ----------
    Foster & George (1994), Annals of Statistics 22(4), section 3.
    """
    items = path[0].support.size if task.groups is None else len(task.groups)
    further = _parameters(path, task) - path.k
    deviance = np.array([s.deviance for s in path])
    prices = np.maximum(
        np.linspace(MIN_RIC_FACTOR, MAX_RIC_FACTOR, N_RIC_FACTORS) * np.log(max(items, 2)), np.log(max(total, 2.0))
    )
    return np.unique([smallest(deviance + price * path.k + 2 * further) for price in prices])


def with_ric(path: SubsetPath, indices: Ints, folds: Sequence[tuple[Floats, float]]) -> tuple[SubsetPath, int]:
    """The path with held-out losses at ``indices``, and the index of the size that they choose.

    That is the largest size whose held-out loss exceeds the least one by at most half a standard error of their
    difference over folds.

    Parameters
    ----------
    path : SubsetPath
    indices : int64 array, ascending
    folds : sequence of (losses, weight)
        The results of :func:`held_out` for these sizes on each fold.

    Examples
    --------
    >>> path, _, _ = fit_path(np.eye(4), np.arange(4.0), None, Task("squared"), [0, 1, 2])
    >>> folds = [(np.array([3.0, 2.1]), 2.0), (np.array([3.0, 1.9]), 2.0)]
    >>> path, index = with_ric(path, np.array([0, 2]), folds)
    >>> path.criterion.tolist(), index
    ([3.0, nan, 2.0], 2)
    """
    tried = with_held_out(SubsetPath([path[int(i)] for i in indices]), folds)
    filled = dict(zip(indices.tolist(), tried, strict=True))
    losses, mass = np.array([fold for fold, _ in folds]), np.array([m for _, m in folds])
    best = int(np.argmin(tried.criterion))
    known = np.isfinite(tried.criterion)
    lost = losses[:, known] - losses[:, [best]]
    mean = mass @ lost / mass.sum()
    error = np.sqrt(mass @ (lost - mean) ** 2 / mass.sum() / max(len(folds) - 1, 1))
    index = int(indices[known][np.flatnonzero(mean <= HELD_OUT_SLACK * error)[-1]]) if known[best] else int(indices[0])
    return SubsetPath([filled.get(i, s) for i, s in enumerate(path)]), index


def _parameters(path: SubsetPath, task: Task) -> Ints:
    parameters = path.support.sum(1)
    return np.asarray(parameters * (path[0].coef.shape[0] - 1) if task.loss == "multinomial" else parameters)


def held_out(path: SubsetPath, x: Any, y: Floats, sample_weight: Floats | None, task: Task) -> tuple[Floats, float]:
    """The mean loss of each fit of a path on other data, shape (len,), and the total weight of these data.

    Parameters
    ----------
    path : SubsetPath
    x, y, sample_weight
        As for :func:`fit_path`.
    task : Task
    """
    weight = np.ones(len(y)) if sample_weight is None else sample_weight
    mass = float(weight.sum())
    counts = weight > 0  # the loss of a row of weight zero may be infinite
    losses = np.empty(len(path))
    target = y if y.ndim == 2 else y[:, None]
    for i, subset in enumerate(path):
        columns = np.flatnonzero(subset.support)
        eta = np.asarray(x[:, columns] @ subset.coef[:, columns].T) + subset.intercept
        squared = task.loss == "squared"
        value = (target - eta)[:, 0] ** 2 / 2 if squared else LOSSES[task.loss].value(eta, target)
        losses[i] = weight[counts] @ value[counts] / mass if mass else 0.0
    return losses, mass


def with_held_out(path: SubsetPath, folds: Sequence[tuple[Floats, float]]) -> SubsetPath:
    """The path with the mean held-out loss of the folds as its criterion, and the standard error of that mean.

    Parameters
    ----------
    path : SubsetPath
    folds : sequence of (losses, weight)
        The results of :func:`held_out` on each fold.
    """
    losses = np.array([fold for fold, _ in folds])
    mass = np.array([m for _, m in folds])
    error = np.full(len(path), np.inf)
    with np.errstate(over="ignore"):  # far from the training data a Poisson loss can overflow
        mean = mass @ losses / mass.sum()
        known = np.isfinite(mean)
        error[known] = np.sqrt(mass @ (losses[:, known] - mean[known]) ** 2 / mass.sum() / max(len(folds) - 1, 1))
    rows = zip(path, mean, error, strict=True)
    return SubsetPath([replace(s, criterion=float(m), spread=float(e)) for s, m, e in rows])


def chosen(path: SubsetPath, *, one_standard_error: bool = False) -> int:
    """The index of the least criterion, or of the smallest size within one standard error of it."""
    return smallest(path.criterion, path.spread if one_standard_error else None)


def with_price(path: SubsetPath, l0: float) -> SubsetPath:
    """The path with loss + ``l0``·k as its criterion.

    Parameters
    ----------
    path : SubsetPath
    l0 : float, >= 0
    """
    return SubsetPath([replace(s, criterion=s.loss + l0 * s.k) for s in path])
