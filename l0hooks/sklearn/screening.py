"""The evidence for every feature, alone and in pairs, before training. It sets the start of the gates."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_ndtr

from l0hooks.sklearn.standardised import MAX_DEVIATION, Floats, Indices, Rows

MAX_PAIRED = 1000  # features of which all products of two are tested
MAX_CONTRASTS = 16  # classes that are tested against the rest
_MIN_VARIANCE = 1e-12  # a smaller variance of a product is rounding


def contrasts(target: Floats, classes: int | None, weights: Floats) -> Floats:
    """The contrasts that features are tested on: each class against the rest, or the values of a regression.

    Parameters
    ----------
    target : ndarray of float64, shape (n_samples,)
        Class numbers, or the values of a regression.
    classes : int or None
        The number of classes; None for a regression.
    weights : ndarray of float64, shape (n_samples,)

    Returns
    -------
    ndarray of float64, shape (n_samples, n_contrasts)
        Each of weighted mean 0. Two classes have one contrast; of many, only the 16 of largest weight have one.

    Examples
    --------
    >>> contrasts(np.array([0.0, 1.0]), 2, np.ones(2))
    array([[-0.5],
           [ 0.5]])
    """
    if classes is None:
        values = target[:, None]
    else:
        heaviest = np.argsort(-np.bincount(target.astype(int), weights, classes), kind="stable")[:MAX_CONTRASTS]
        values = (target[:, None] == (np.array([1]) if classes == 2 else np.sort(heaviest))).astype(np.float64)
    centred: Floats = values - weights @ values / weights.sum()
    if classes is None:
        spread = math.sqrt(float(weights @ centred[:, 0] ** 2 / weights.sum())) or 1.0
        centred = (centred / spread).clip(-MAX_DEVIATION, MAX_DEVIATION)
        centred -= weights @ centred / weights.sum()
    return centred


def evidence(rows: Rows, contrast: Floats) -> Floats:
    r"""The evidence that each feature, alone or in a product with another, is associated with the target.

    For one standardised feature v = z_i, or a product v = z_i z_j of two, and a contrast c the statistic is
    t = Σ w c v / √(Σ w c² v²). The evidence is −log₁₀ of the p-value of the largest \|t\|, multiplied by the number of
    statistics computed (Bonferroni's correction).

    Parameters
    ----------
    rows : Rows
    contrast : ndarray of float64, shape (n_rows, n_contrasts)
        Contrasts of weighted mean 0.

    Returns
    -------
    ndarray of float64, shape (n_features,)
        Above about 1.3 it is significant at 5 %. Pairs are formed of the 1,000 features with the most evidence alone.

    Examples
    --------
    >>> x = np.random.default_rng(0).choice([-1.0, 1.0], (200, 3))
    >>> y = x[:, :1] * x[:, 1:2]  # neither feature is associated with y alone
    >>> rows = Rows(x, y[:, 0], np.ones(200))
    >>> (evidence(rows, y - y.mean()) > 3).tolist()
    [True, True, False]
    """
    alone = _single_statistics(rows, contrast)
    n, q = rows.n_features, contrast.shape[1]
    found = _bonferroni_evidence(alone, n * q)
    paired: Indices = np.argsort(-alone, kind="stable")[:MAX_PAIRED]
    together = np.zeros(len(paired))
    for column in contrast.T:
        np.maximum(together, _pair_statistics(rows, column, paired), out=together)
    found[paired] = np.maximum(found[paired], _bonferroni_evidence(together, len(paired) * (len(paired) + 1) / 2 * q))
    return found


def _single_statistics(rows: Rows, contrast: Floats) -> Floats:
    sums = np.zeros((contrast.shape[1], rows.n_features))
    squares = np.zeros_like(sums)
    for part in rows.slices():
        z, c, w = rows.clipped(part), contrast[part], rows.weights[part, None]
        sums += (w * c).T @ z
        squares += (w * c**2).T @ z**2
    return np.asarray(_t_statistics(sums, squares).max(axis=0))


def _pair_statistics(rows: Rows, contrast: Floats, columns: Indices) -> Floats:
    sums = np.zeros((len(columns), len(columns)))
    squares = np.zeros_like(sums)
    for part in rows.slices():
        z, c, w = rows.clipped(part, columns), contrast[part, None], rows.weights[part, None]
        sums += (w * c * z).T @ z
        squares += (w * c**2 * z**2).T @ z**2
    return np.asarray(_t_statistics(sums, squares).max(axis=0))


def _t_statistics(sums: Floats, squares: Floats) -> Floats:
    return np.abs(sums) / np.sqrt(np.where(squares > _MIN_VARIANCE, squares, np.inf))


def _bonferroni_evidence(statistic: Floats, tests: float) -> Floats:
    return np.asarray(-(log_ndtr(-statistic) + math.log(2 * tests)) / math.log(10))
