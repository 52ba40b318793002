"""The results of a search over sizes, and the choice of a size from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from l0hooks.sklearn.subset.design import Bools, Floats

TIE_TOLERANCE = 1e-12  # criteria closer than this share of the first or the best are equal: the smaller size wins
EXACT_FIT = 1e-14  # residual squares below this share of the null model's are rounding


@dataclass(frozen=True)
class Subset:
    """The subset of one size: its columns and its fit.

    Parameters
    ----------
    k : int
        The number of columns, or of groups.
    support : bool array, shape (p,)
    coef : float64 array, shape (c, p)
    intercept : float64 array, shape (c,)
    loss : float
        Mean loss with the ridge term.
    deviance : float
        −2 × the log-likelihood of all samples up to a constant, without the ridge term.
    criterion : float
        The least one wins: extended BIC, loss + price·k, or the held-out loss; nan if none was computed.
    spread : float
        The standard error of a held-out loss; else nan.

    Examples
    --------
    >>> import numpy as np
    >>> first = Subset(1, np.array([True, False]), np.array([[2.0, 0.0]]), np.zeros(1), loss=0.5, deviance=3.0)
    >>> np.flatnonzero(first.support).tolist(), first.coef[0, first.support].tolist(), first.criterion
    ([0], [2.0], nan)
    """

    k: int
    support: Bools
    coef: Floats
    intercept: Floats
    loss: float
    deviance: float
    criterion: float = float("nan")
    spread: float = float("nan")


class SubsetPath(Sequence[Subset]):
    """The subsets of a search in order of size; prints as a table.

    Parameters
    ----------
    subsets : sequence of Subset

    Examples
    --------
    >>> import numpy as np
    >>> none = Subset(0, np.zeros(2, bool), np.zeros((1, 2)), np.zeros(1), 1.0, 7.0)
    >>> one = Subset(1, np.array([True, False]), np.ones((1, 2)), np.zeros(1), 0.5, 3.0)
    >>> path = SubsetPath([none, one])
    >>> path.k.tolist(), path.loss.tolist(), path.support.astype(int).tolist()
    ([0, 1], [1.0, 0.5], [[0, 0], [1, 0]])
    """

    def __init__(self, subsets: Sequence[Subset]) -> None:
        self._subsets = tuple(subsets)

    def __len__(self) -> int:
        return len(self._subsets)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._subsets[index]

    def __iter__(self) -> Iterator[Subset]:
        return iter(self._subsets)

    @property
    def k(self) -> np.ndarray:
        """The sizes, shape (len,)."""
        return np.array([s.k for s in self])

    @property
    def support(self) -> Bools:
        """Which columns each subset holds, shape (len, p)."""
        return np.array([s.support for s in self])

    @property
    def loss(self) -> Floats:
        """The mean losses with the ridge term, shape (len,)."""
        return np.array([s.loss for s in self])

    @property
    def criterion(self) -> Floats:
        """The criterion of each size, shape (len,); nan where it was not computed."""
        return np.array([s.criterion for s in self])

    @property
    def spread(self) -> Floats:
        """The standard errors of held-out losses, shape (len,); else nan."""
        return np.array([s.spread for s in self])

    def __repr__(self) -> str:
        lines = [f"{'k':>5} {'loss':>12} {'criterion':>12}"]
        lines += [f"{s.k:>5} {s.loss:>12.6g} {s.criterion:>12.6g}" for s in self]
        return "\n".join(lines)


def ebic(deviance: Floats, k: np.ndarray, parameters: np.ndarray, n: float, n_items: int, gamma: float) -> Floats:
    """deviance + parameters·log n + 2γ·log C(n_items, k).

    Parameters
    ----------
    deviance : float64 array, shape (len,)
        −2 × the log-likelihood; for squared loss n·log of the mean squared residual.
    k, parameters : int array, shape (len,)
        The number of items in each support, and of coefficients fitted for them.
    n : float, > 0
        The number of samples: the sum of their weights.
    n_items : int
        The number of items to choose from.
    gamma : float, in [0, 1]
        0 gives BIC.

    Returns
    -------
    float64 array, shape (len,)

    Examples
    --------
    >>> import numpy as np
    >>> ebic(np.array([5.0, 1.0]), np.array([0, 1]), np.array([0, 1]), np.e, 10, 0.0).round(6).tolist()
    [5.0, 2.0]

    References
    ----------
    Chen & Chen (2008), Biometrika 95(3), eq. 1.
    """
    choices = gammaln(n_items + 1) - gammaln(k + 1) - gammaln(n_items - k + 1)
    return np.asarray(deviance + parameters * np.log(max(n, 1.0)) + 2 * gamma * choices)


def smallest(criterion: Floats, spread: Floats | None = None) -> int:
    """The index of the least criterion; with ``spread``, of the first within one standard error of it.

    Parameters
    ----------
    criterion : float64 array, shape (len,)
    spread : float64 array, shape (len,), optional

    Examples
    --------
    >>> import numpy as np
    >>> score = np.array([3.0, 1.1, 1.0, 1.2])
    >>> smallest(score), smallest(score, np.full(4, 0.2))
    (2, 1)
    """
    best = int(np.argmin(criterion))
    first = abs(float(criterion[0]))
    slack = TIE_TOLERANCE * max(abs(float(criterion[best])), first if np.isfinite(first) else 0.0)
    if spread is not None:
        slack += float(spread[best])
    return int(np.flatnonzero(criterion <= criterion[best] + slack)[0])
