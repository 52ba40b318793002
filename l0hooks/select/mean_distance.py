"""The distance of the mean of k samples to the mean of all as a quadratic form, minimised by exact exchanges.

With a kernel K, or features Φ and K = ΦΦᵀ, the squared distance of a subset S is

    ‖(1/k) Σ_{i∈S} φᵢ − Σᵢ pᵢφᵢ‖² = (1/k²) Σ_{i,j∈S} Kᵢⱼ − (2/k) Σ_{i∈S} hᵢ + c,   h = Kp,   c = pᵀKp.

The algorithms need h, c, the diagonal of K and one column of K at a time, but never K as a whole.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

_ROWS_AT_ONCE = 10_000  # samples whose random features are computed together
_MAX_BANDWIDTH_SAMPLES = 1000  # samples whose distances decide the bandwidth
_MIN_GAIN = 1e-9  # share of the form's value; a smaller gain of an exchange is rounding
_ROUNDING_SHARE = 1e-14  # share of c; a smaller squared distance is the rounding of terms that cancel


class Quadratic(Protocol):
    """A kernel K over n samples and its mean with weights p; float64.

    Attributes
    ----------
    diagonal, h : Tensor, shape (n,)
    c : float
    """

    diagonal: Tensor
    h: Tensor
    c: float

    def column(self, i: int) -> Tensor:
        """K[:, i], shape (n,)."""
        ...

    def block(self, rows: Tensor) -> Tensor:
        """K[rows][:, rows]."""
        ...


class Kernel:
    """A kernel stored as an (n, n) matrix."""

    def __init__(self, matrix: Tensor, p: Tensor) -> None:
        self._matrix = matrix
        self.diagonal, self.h = matrix.diagonal(), matrix @ p
        self.c = float(p @ self.h)

    def column(self, i: int) -> Tensor:
        """K[:, i]: a row, because the matrix is symmetric and its rows are contiguous."""
        return self._matrix[i]

    def block(self, rows: Tensor) -> Tensor:
        """K[rows][:, rows]."""
        return self._matrix[rows][:, rows]


class Features:
    """K = ΦΦᵀ for features Φ of shape (n, D)."""

    def __init__(self, features: Tensor, p: Tensor) -> None:
        self._features = features
        mean = p @ features
        self.diagonal = torch.linalg.vector_norm(features, dim=1).square()  # needs no second matrix of that size
        self.h, self.c = features @ mean, float(mean @ mean)

    def column(self, i: int) -> Tensor:
        """ΦΦᵀ[:, i]."""
        return self._features @ self._features[i]

    def block(self, rows: Tensor) -> Tensor:
        """ΦΦᵀ[rows][:, rows]."""
        return self._features[rows] @ self._features[rows].T


class Moments:
    """K = t + t² with t = ZZᵀ: the features are the columns of Z, shape (n, d), and all their products of two.

    The squared distance is that of the means of z plus that of the means of zzᵀ (Frobenius). The d² features of a
    sample are never formed.
    """

    def __init__(self, z: Tensor, p: Tensor) -> None:
        self._z = z
        first, second = p @ z, z.T @ (p[:, None] * z)
        square = z.square().sum(1)
        self.diagonal = square + square.square()
        self.h = z @ first + ((z @ second) * z).sum(1)
        self.c = float(first @ first + second.square().sum())

    def column(self, i: int) -> Tensor:
        """K[:, i]."""
        t = self._z @ self._z[i]
        return t + t.square()

    def block(self, rows: Tensor) -> Tensor:
        """K[rows][:, rows]."""
        t = self._z[rows] @ self._z[rows].T
        return t + t.square()


def distance(form: Quadratic, rows: Tensor) -> float:
    """The distance between the mean of the samples ``rows`` and that of all."""
    squared = float(form.block(rows).mean() - 2 * form.h[rows].mean() + form.c)
    return math.sqrt(squared) if squared > _ROUNDING_SHARE * form.c else 0.0


def greedy(form: Quadratic, k: int) -> Tensor:
    """Choose k rows one by one, each time the one that brings the mean closest to that of all; the first of equal ones.

    Returns
    -------
    Tensor, int64, shape (k,)

    References
    ----------
    Chen, Welling & Smola (2010), "Super-samples from kernel herding".
    """
    chosen_sums = torch.zeros_like(form.h)  # Σ_S K[:, j]
    free = form.diagonal.clone()
    chosen: list[int] = []
    for count in range(1, k + 1):
        i = int((2 * (chosen_sums - count * form.h) + free).argmin())
        chosen.append(i)
        free[i] = math.inf
        chosen_sums += form.column(i)
    return torch.tensor(chosen)


def swap(form: Quadratic, rows: Tensor, sweeps: int) -> tuple[Tensor, int]:
    """Exchange each chosen row in turn for the best other row while that brings the mean closer.

    Every exchange is exact: row j is replaced by the row i of least 2(g − K[:, j])ᵢ + Kᵢᵢ with g = Σ_S K[:, s] − kh.
    The distance never grows.

    Parameters
    ----------
    form : Quadratic
    rows : Tensor, int64, shape (k,)
    sweeps : int, >= 0
        The largest number of passes through the chosen rows; each computes k columns and costs O(nk).

    Returns
    -------
    Tensor, int64, shape (k,)
        If the sweeps were enough, no single exchange brings the mean closer.
    int
        The number of exchanges.
    """
    chosen, k, exchanges = rows.tolist(), len(rows), 0
    g, free = -k * form.h, form.diagonal.clone()
    for j in chosen:
        g = g + form.column(j)
        free[j] = math.inf
    value = k * k * distance(form, rows) ** 2
    for _ in range(sweeps):
        before = exchanges
        for position, j in enumerate(chosen):
            without = g - form.column(j)
            scores = 2 * without + free
            i = int(scores.argmin())
            gain = float(2 * without[j] + form.diagonal[j] - scores[i])
            if gain > _MIN_GAIN * value:
                free[j], free[i], chosen[position] = form.diagonal[j], math.inf, i
                g, value = without + form.column(i), value - gain
                exchanges += 1
        if exchanges == before:
            break
    return torch.tensor(chosen), exchanges


def median_distance(z: Tensor, generator: torch.Generator | None = None) -> float:
    """The median distance between at most 1000 samples; the mean distance if that is 0, and 1 if both are."""
    sample = (
        z
        if len(z) <= _MAX_BANDWIDTH_SAMPLES
        else z[torch.randperm(len(z), generator=generator)[:_MAX_BANDWIDTH_SAMPLES]]
    )
    distances = torch.nn.functional.pdist(sample)
    if not len(distances):
        return 1.0
    return float(distances.median()) or float(distances.mean()) or 1.0


def fourier_features(z: Tensor, count: int, bandwidth: float, generator: torch.Generator | None = None) -> Tensor:
    """Random Fourier features, shape (n, 2·(count // 2)), whose products estimate exp(−‖x − y‖²/2σ²)."""
    half = count // 2
    directions = torch.randn(z.shape[1], half, generator=generator, dtype=z.dtype) / bandwidth
    phi = torch.empty(len(z), 2 * half, dtype=z.dtype)
    for start in range(0, len(z), _ROWS_AT_ONCE):  # in parts, so that no second matrix as large as phi is formed
        part = slice(start, start + _ROWS_AT_ONCE)
        projected = z[part] @ directions
        phi[part, :half], phi[part, half:] = projected.cos(), projected.sin()
    return phi.div_(math.sqrt(half))
