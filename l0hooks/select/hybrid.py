"""``HybridGate``: choose k items, a part by learned gates and the rest at random."""

from __future__ import annotations

import math
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch

from l0hooks.errors import InvalidValueError, explain
from l0hooks.select.containers import check_counts, check_generator, indices_like, scaled, take, total
from l0hooks.select.item_gate import ItemGate, Options
from l0hooks.select.weighted import check_weighted, gated_weights, scale_to_total

Origins = npt.NDArray[np.str_]


class HybridGate(ItemGate):
    """Choose k of n items: a part by learned gates, and the rest at random among all other items.

    The gates choose ``round(k · gated_fraction)`` items (halves are rounded up). Training uses the gates only:
    ``module(x)`` and ``module.weights(w)`` multiply by them, and their expected number follows the schedule.

    Parameters
    ----------
    n_items : int, >= 1
    k : int, 1 <= k <= n_items
        How many items are chosen in all.
    gated_fraction, random_fraction : float in [0, 1]
        Shares of k; they sum to 1. At least one item must be gated.
    **options
        As in :class:`~l0hooks.select.ItemGate`.

    Attributes
    ----------
    n_gated, n_random : int
        How many of the k items are chosen by the gates, and how many at random.

    Raises
    ------
    InvalidValueError
        If a value is out of range, or the fractions do not sum to 1.

    Examples
    --------
    >>> gate = HybridGate(10, k=4, gated_fraction=0.25, random_fraction=0.75)
    >>> _ = gate.gate.log_alpha.data[0].add_(1.0)  # in place of training
    >>> _, indices, origin = gate.select(torch.arange(10), generator=torch.Generator().manual_seed(1))
    >>> indices.tolist(), origin.tolist()
    ([0, 1, 5, 7], ['gated', 'random', 'random', 'random'])
    """

    def __init__(
        self,
        n_items: int,
        k: int,
        gated_fraction: float = 0.5,
        random_fraction: float = 0.5,
        **options: Unpack[Options],
    ) -> None:
        where = type(self).__name__
        n_items, k = check_counts(where, n_items, k)
        fractions = gated_fraction, random_fraction
        if not (min(fractions) >= 0 and math.isclose(sum(fractions), 1.0, abs_tol=1e-9)):
            raise InvalidValueError(
                explain(
                    where,
                    "the fractions must be shares of k.",
                    expected="two numbers in [0, 1] that sum to 1",
                    got=fractions,
                )
            )
        gated = math.floor(k * gated_fraction + 0.5)
        if gated < 1:
            raise InvalidValueError(
                explain(
                    where,
                    "at least one item must be gated.",
                    got=f"{gated_fraction} of {k}",
                    hint="a larger gated_fraction",
                )
            )
        super().__init__(n_items, gated, axis=0, **options)
        self.k, self.n_gated, self.n_random = k, gated, k - gated

    def select(self, x: Any, *, generator: torch.Generator | None = None) -> Any:
        """Exactly k items of ``x``: the gated ones, and others drawn at random with equal probabilities.

        Parameters
        ----------
        x : Tensor, NumPy array, pandas DataFrame or Series, scipy.sparse array or matrix
            n items along the first axis.
        generator : torch.Generator, optional
            For the random items; by default torch's global generator.

        Returns
        -------
        selected : the kind of ``x``
        indices : int64, shape (k,)
            Ascending; a tensor for a tensor, else a NumPy array.
        origin : str, NumPy array, shape (k,)
            How each item was chosen: "gated" or "random".

        Raises
        ------
        InvalidValueError
            If ``x`` does not have n items.
        UnsupportedModuleError
            If ``x`` is of another kind.
        """
        self.check(x, self.axis, "HybridGate.select")
        indices, origin = self._draw(generator)
        return take(x, indices, 0), indices_like(x, indices, self.gate.log_alpha.device), origin

    def select_weighted(
        self, x: Any, w: Any, *, preserve_total: bool = False, generator: torch.Generator | None = None
    ) -> Any:
        """Exactly k items of ``x``, their weights, indices and origins.

        Parameters
        ----------
        x : Tensor, NumPy array, pandas DataFrame or Series, scipy.sparse array or matrix
        w : Tensor, NumPy array or pandas Series, shape (n,)
        preserve_total : bool
            Scale the weights of the random items such that all weights sum to the sum of ``w``. Without random items
            the weights of the gated ones are scaled.
        generator : torch.Generator, optional

        Returns
        -------
        selected, weights, indices, origin
            Weights of gated items are ``w`` times their gates, those of random ones ``w``.

        Raises
        ------
        InvalidValueError
            If ``x`` or ``w`` does not have n entries, or if no positive factor preserves the total.
        """
        where = "HybridGate.select_weighted"
        check_weighted(self, x, w, where)
        indices, origin = self._draw(generator)
        random = torch.from_numpy(origin == "random")
        weights = gated_weights(self, w, indices, random)
        if preserve_total:
            free = random if self.n_random else ~random
            fixed = 0.0 if not self.n_random else total(take(weights, np.flatnonzero(~free.numpy()), 0))
            factor = scale_to_total(where, total(w) - fixed, total(take(weights, np.flatnonzero(free.numpy()), 0)))
            weights = scaled(weights, torch.where(free, factor, 1.0).double())
        return take(x, indices, 0), weights, indices_like(x, indices, self.gate.log_alpha.device), origin

    def _draw(self, generator: torch.Generator | None) -> tuple[npt.NDArray[np.int64], Origins]:
        check_generator(type(self).__name__, generator)
        gated = self.chosen().cpu().numpy()
        rest = np.flatnonzero(~gated)
        if self.n_random:
            device = "cpu" if generator is None else generator.device
            order = torch.randperm(len(rest), generator=generator, device=device)
            rest = rest[order[: self.n_random].cpu().numpy()]
        else:  # nothing is drawn
            rest = rest[:0]
        indices = np.sort(np.concatenate([np.flatnonzero(gated), rest]))
        return indices, np.where(gated[indices], "gated", "random")

    def _counts(self) -> dict[str, int]:
        return {**super()._counts(), "gated": self.n_gated}

    def extra_repr(self) -> str:
        """n, k, and the numbers of gated and random items."""
        return f"{self.n}, k={self.k}, gated={self.n_gated}, random={self.n_random}"
