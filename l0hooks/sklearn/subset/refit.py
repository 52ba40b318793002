"""The exact least-squares fit on a support, and a path of such fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from l0hooks.sklearn.subset.design import Design, Floats, Ints
from l0hooks.sklearn.subset.least_squares import best_subsets
from l0hooks.sklearn.subset.results import EXACT_FIT, Subset, SubsetPath
from l0hooks.sklearn.subset.support_gains import SquaresProblem

RANK_TOLERANCE = 1e-13  # times the number of eigenvalues: those below this share of the largest are 0
REFINEMENTS = 2
REFINEMENT_TOLERANCE = 1e-13  # a refinement below this share of every coefficient is rounding


def on_columns(design: Design, columns: Ints, b: Floats, offset: Floats) -> tuple[Floats, Floats]:
    """Coefficients (c, p) and intercepts (c,) of the unscaled columns, from those of the standardised ones."""
    coef = np.zeros((b.shape[1], design.p))
    coef[:, columns] = (b / design.scale[columns, None]).T
    return coef, offset - coef @ design.mean


def refit_squares(problem: SquaresProblem, y: Floats, items: Sequence[int]) -> Subset:
    """Ridge least squares on the columns of ``items``; if they are dependent, the solution of least norm.

    It is computed from the eigenvectors of the small Gram matrix, then refined with the residuals of the data.

    Parameters
    ----------
    problem : SquaresProblem
    y : float64 array, shape (n, 1)
    items : sequence of int
    """
    design, columns = problem.design, problem.columns(items)
    offset = design.average(y) if design.center else np.zeros(y.shape[1])
    residual = centred = y - offset
    b = np.zeros((len(columns), y.shape[1]))
    if len(columns):
        # columns of very different units have ridges of very different size
        size = np.sqrt(np.where(problem.whole[columns] > 0, problem.whole[columns], 1.0))
        values, vectors = np.linalg.eigh(problem.gram(columns) / np.outer(size, size))
        free = values > RANK_TOLERANCE * len(values) * max(float(values[-1]), 0.0)
        inverse = (vectors[:, free] / values[free]) @ vectors[:, free].T / np.outer(size, size)
        for _ in range(1 + REFINEMENTS):
            step = inverse @ (design.cross(residual, columns) - problem.ridge[columns, None] * b)
            if (np.abs(step) <= REFINEMENT_TOLERANCE * np.abs(b)).all():  # one by one: their units may differ
                break
            b = b + step
            residual = centred - design.times(columns, b)
    rss = float(design.average(residual * residual).sum())
    coef, intercept = on_columns(design, columns, b, offset)
    support = np.zeros(design.p, dtype=bool)
    support[columns] = True
    floor = max(rss, EXACT_FIT * problem.square, np.finfo(np.float64).tiny)
    deviance = design.total * float(np.log(floor))
    loss = rss / 2 + problem.alpha / 2 * float((coef**2).sum())
    return Subset(len(items), support, coef, intercept, loss, deviance)


def squares_path(
    design: Design, y: Floats, sizes: Iterable[int], *, alpha: float = 0.0, groups: Sequence[Ints] | None = None
) -> SubsetPath:
    """Best subsets for half the mean squared error, one for each size.

    Parameters
    ----------
    design : Design
    y : float64 array, shape (n,)
        Rows as in ``design.rows``.
    sizes : iterable of int
    alpha : float, >= 0
    groups : sequence of int64 array, optional

    Returns
    -------
    SubsetPath

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> squares_path(Design(x), x[:, 2] - x[:, 5], [1, 2])[1].coef.round(6).tolist()
    [[0.0, 0.0, 1.0, 0.0, 0.0, -1.0, 0.0, 0.0]]
    """
    column = y[:, None]
    problem = SquaresProblem(design, column, alpha=alpha, groups=groups)
    found = best_subsets(problem, sizes)
    return SubsetPath([refit_squares(problem, column, found[k].items) for k in sorted(found)])
