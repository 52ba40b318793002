"""Best subsets for losses without a closed form: a quadratic model proposes exchanges, and exact fits decide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from l0hooks.sklearn.subset.design import Design, Floats, Ints
from l0hooks.sklearn.subset.least_squares import best_subsets
from l0hooks.sklearn.subset.losses import MIN_CURVATURE, Fit, Loss, NewtonFit
from l0hooks.sklearn.subset.refit import on_columns
from l0hooks.sklearn.subset.results import Subset, SubsetPath
from l0hooks.sklearn.subset.support_gains import SquaresProblem

MAX_MODELS = 25  # quadratic models formed for one size
MAX_EXCHANGES = 6  # single exchanges fitted exactly when the model's own optimum is no better
MIN_GAIN = 1e-9  # share of the null loss that an exchange must gain

Items = tuple[int, ...]


class GlmSearch:
    """Best subsets of one design for a loss of the linear predictor.

    Around a fit with predictor η the loss is the weighted least squares of the working response η + (y − μ)/ω, with ω
    the curvature (for several outputs its mean over them). The best subset of that model is fitted exactly and kept if
    it is better; else the exchanges with the largest gain in the model are tried one by one.

    Parameters
    ----------
    design : Design
    y : float64 array, shape (n, c)
        Rows as in ``design.rows``.
    loss : Loss
    alpha : float, >= 0
        Ridge: ``alpha/2`` times the sum of squares of the unscaled coefficients.
    groups : sequence of int64 array, optional
    """

    def __init__(
        self, design: Design, y: Floats, loss: Loss, *, alpha: float = 0.0, groups: Sequence[Ints] | None = None
    ) -> None:
        self.design, self.y, self.loss, self.alpha, self.groups = design, y, loss, alpha, groups
        self.weight = design.weighted(np.ones(design.n))
        self.newton = NewtonFit(loss, y, self.weight, intercept=design.center)
        self.null = self.newton.null()
        self.fits: dict[Items, Fit] = {(): self.null}
        self.steps = 0

    def columns(self, items: Items) -> Ints:
        """The columns of ``items``."""
        if self.groups is None:
            return np.array(items, dtype=np.int64)
        return np.concatenate([np.zeros(0, np.int64), *(self.groups[i] for i in items)])

    def fit(self, items: Iterable[int]) -> tuple[Items, Fit]:
        """The sorted items and the exact fit on them; each fit is computed once."""
        key = tuple(sorted(int(i) for i in items))
        if key not in self.fits:
            columns = self.columns(key)
            ridge = self.alpha / self.design.scale[columns] ** 2
            self.fits[key] = self.newton.fit(self.design.standardized(columns), ridge)
            self.steps += self.fits[key].steps
        return key, self.fits[key]

    def model(self, fit: Fit) -> SquaresProblem:
        """The quadratic model around a fit."""
        curvature = np.maximum(self.loss.curvature(fit.eta), MIN_CURVATURE * self.newton.unit)
        response = fit.eta + (self.y - self.loss.mean(fit.eta)) / curvature[:, None]
        mean = float(self.weight @ curvature)
        return SquaresProblem(self.design.reweighted(curvature), response, alpha=self.alpha / mean, groups=self.groups)

    def improve(self, items: Items) -> Items:
        """Exchange ``items`` until neither the model's optimum nor one of its best single exchanges is better."""
        least = MIN_GAIN * self.null.loss
        items, fit = self.fit(items)
        for _ in range(MAX_MODELS):
            if not items or fit.loss <= least:
                break
            model = self.model(fit)
            proposal = best_subsets(model, [len(items)], {len(items): items})[len(items)].items
            better = self._better(proposal, fit.loss - least) or self._exchange(model, items, fit.loss - least)
            if better is None:
                break
            items, fit = better
        return items

    def _better(self, items: Items, below: float) -> tuple[Items, Fit] | None:
        key, fit = self.fit(items)
        return (key, fit) if fit.loss < below else None

    def _exchange(self, model: SquaresProblem, items: Items, below: float) -> tuple[Items, Fit] | None:
        if len(items) >= model.n_items:
            return None
        gains = model.exchanges(items)
        if len(gains) != len(items):  # dependent columns: rows of ``gains`` do not belong to single items
            return None
        for flat in np.argsort(-gains, axis=None, kind="stable")[:MAX_EXCHANGES]:
            out, item = divmod(int(flat), gains.shape[1])
            if np.isfinite(gains[out, item]):
                better = self._better((*items[:out], *items[out + 1 :], item), below)
                if better is not None:
                    return better
        return None

    def path(self, sizes: Iterable[int]) -> dict[int, Items]:
        """The best items found for each size; each size also starts from its neighbours' supports."""
        wanted = sorted(set(sizes))
        found = {k: self.improve(f.items) for k, f in best_subsets(self.model(self.null), wanted).items()}
        for low, high in pairwise(wanted):
            self._improve_from(found, high, self._resized(found[low], high))
        for low, high in reversed(list(pairwise(wanted))):
            self._improve_from(found, low, self._resized(found[high], low))
        return found

    def _improve_from(self, found: dict[int, Items], size: int, items: Items) -> None:
        """Improve ``items`` and take them as the result for ``size`` if they are better than the present ones."""
        if self.fit(items)[1].loss < self.fit(found[size])[1].loss - MIN_GAIN * self.null.loss:
            found[size] = self.improve(items)

    def _resized(self, items: Items, size: int) -> Items:
        """``items`` grown or shrunk to ``size`` by the quadratic model around their own fit."""
        model = self.model(self.fit(items)[1])
        if size > len(items):
            extra = np.argsort(-model.add_gains(items), kind="stable")[: size - len(items)]
            return (*items, *(int(i) for i in extra))
        tableau = model.tableau(list(items))
        tableau.load(list(range(len(items))))
        while len(tableau.items) > size:
            tableau.leave(tableau.items[int(tableau.drop_costs().argmin())])
        return tuple(items[i] for i in tableau.items)

    def subset(self, items: Items) -> Subset:
        """The exact fit as coefficients of the unscaled columns."""
        items, fit = self.fit(items)
        columns = self.columns(items)
        coef, intercept = on_columns(self.design, columns, fit.b, fit.offset)
        support = np.zeros(self.design.p, dtype=bool)
        support[columns] = True
        mean = float(self.weight @ self.loss.value(fit.eta, self.y))
        loss = mean + self.alpha / 2 * float((coef**2).sum())
        return Subset(len(items), support, coef, intercept, loss, 2 * self.design.total * mean)


def glm_path(
    design: Design,
    y: Floats,
    sizes: Iterable[int],
    loss: Loss,
    *,
    alpha: float = 0.0,
    groups: Sequence[Ints] | None = None,
) -> tuple[SubsetPath, int]:
    """Best subsets for a loss of the linear predictor, one for each size, and the number of Newton steps.

    Parameters
    ----------
    design : Design
    y : float64 array, shape (n, c)
    sizes : iterable of int
    loss : Loss
    alpha : float, >= 0
    groups : sequence of int64 array, optional

    Examples
    --------
    >>> from l0hooks.sklearn.subset.losses import Poisson
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 6))
    >>> path, _ = glm_path(Design(x), rng.poisson(np.exp(x[:, [4]])) * 1.0, [1, 2], Poisson())
    >>> np.flatnonzero(path[0].support).tolist()
    [4]
    """
    search = GlmSearch(design, y, loss, alpha=alpha, groups=groups)
    found = search.path(sizes)
    return SubsetPath([search.subset(found[k]) for k in sorted(found)]), search.steps
