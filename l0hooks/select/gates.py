"""``SampleGate`` and ``FeatureGate``: gates that choose exactly k of n samples or features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from l0hooks.errors import InvalidValueError, explain
from l0hooks.select.containers import indices_like, indices_of, is_pandas, take, total
from l0hooks.select.item_gate import ItemGate, Options
from l0hooks.select.weighted import check_weighted, gated_weights, scale_to_total


class SampleGate(ItemGate):
    r"""Learn which k of n samples stay: minimise E L(z ⊙ x) with Σ P(zᵢ ≠ 0) = k at the end, and exactly k chosen.

    The gates multiply the samples along the first axis of the data, or the weights of the samples. The loss decides
    what they learn. :class:`~l0hooks.select.ItemGate` describes what all gates over items have in common.

    Parameters
    ----------
    n_samples : int, >= 1
    k : int, 1 <= k <= n_samples
        How many stay.
    **options
        ``steps``, ``schedule``, ``automatic``, ``noise``, ``family``, ``init_mean``, ``init_keep_prob``,
        ``temperature``, ``estimator``, ``device``, as in :class:`~l0hooks.select.ItemGate`. With ``noise="example"``
        the samples must lie along another axis than the first: ``gate(x, dim=1)``.

    Raises
    ------
    InvalidValueError
        If a value is out of range.

    Examples
    --------
    >>> import torch
    >>> age = torch.arange(8.0)
    >>> gate = SampleGate(8, k=3, steps=100)
    >>> optimizer = torch.optim.SGD(gate.parameters(), lr=0.5)
    >>> for _ in range(100):
    ...     loss = -gate.weights(age).sum()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    >>> gate.select(age)
    (tensor([5., 6., 7.]), tensor([5, 6, 7]))

    References
    ----------
    Louizos, Welling & Kingma (2018), section 2.2, for the gates.
    """

    def __init__(self, n_samples: int, k: int, **options: Unpack[Options]) -> None:
        super().__init__(n_samples, k, axis=0, **options)

    def select_weighted(self, x: Any, w: Any, *, preserve_total: bool = False) -> Any:
        """The k chosen samples of ``x``, their weights, and their indices.

        Parameters
        ----------
        x : Tensor, NumPy array, pandas DataFrame or Series, scipy.sparse array or matrix
            Samples along the first axis.
        w : Tensor, NumPy array or pandas Series, shape (n,)
        preserve_total : bool
            Scale the weights so that they sum to the sum of ``w``.

        Returns
        -------
        selected : the kind of ``x``
        weights : the kind of ``w``, shape (k,)
            ``w`` times the gates, as :meth:`weights` gives them in evaluation.
        indices : int64, shape (k,)
            Ascending.

        Raises
        ------
        InvalidValueError
            If ``x`` or ``w`` does not have n entries, or the total is to be preserved and cannot be.

        Examples
        --------
        >>> import torch
        >>> SampleGate(3, k=3).select_weighted(torch.eye(3), torch.ones(3))[1]
        tensor([1., 1., 1.])
        """
        where = f"{type(self).__name__}.select_weighted"
        check_weighted(self, x, w, where)
        indices = indices_of(self.chosen())
        weights = gated_weights(self, w, indices)
        if preserve_total:
            weights = weights * scale_to_total(where, total(w), total(weights))
        return take(x, indices, 0), weights, indices_like(x, indices, self.gate.log_alpha.device)


class FeatureGate(ItemGate):
    """Learn which k of n features stay: the gates multiply the last axis of the data, or the axis given by ``dim``.

    :class:`~l0hooks.select.ItemGate` describes what all gates over items have in common.

    Parameters
    ----------
    n_features : int, >= 1
    k : int, 1 <= k <= n_features
        How many stay.
    feature_names : sequence of str, optional
        One for each feature. Data frames given to ``select`` must then have these columns in this order.
    **options
        As in :class:`~l0hooks.select.ItemGate`; with ``noise="example"`` every example (the first axis) has its own
        mask.

    Raises
    ------
    InvalidValueError
        If a value is out of range, or the names do not fit.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(200, 4)
    >>> y = x[:, 1] - 2 * x[:, 3]
    >>> gate, linear = FeatureGate(4, k=2, feature_names=["a", "b", "c", "d"], steps=50), torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.Adam([*gate.parameters(), *linear.parameters()], lr=0.1)
    >>> for _ in range(50):
    ...     loss = (linear(gate(x)).squeeze() - y).square().mean()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    >>> gate.feature_names_out()
    ['b', 'd']

    References
    ----------
    Louizos, Welling & Kingma (2018), section 2.2, for the gates.
    """

    def __init__(
        self, n_features: int, k: int, *, feature_names: Sequence[str] | None = None, **options: Unpack[Options]
    ) -> None:
        super().__init__(n_features, k, axis=-1, **options)
        self.feature_names = None if feature_names is None else self._names(feature_names)

    def select(self, x: Any) -> Any:
        """The k chosen features of ``x`` and their indices; see :meth:`l0hooks.select.ItemGate.select`.

        Raises
        ------
        InvalidValueError
            Also if ``x`` is a data frame whose columns are not the gate's ``feature_names``.
        """
        if is_pandas(x) and x.ndim == 2 and self.feature_names is not None:
            self._check_names("FeatureGate.select", list(x.columns))
        return super().select(x)

    def feature_names_out(self, feature_names: Sequence[str] | None = None) -> list[str]:
        """The names of the chosen features, in the order of the columns.

        Parameters
        ----------
        feature_names : sequence of str, optional
            One for each of the n features, such as ``frame.columns``. By default the names of the gate, or ``x0``,
            ``x1``, … if it has none.

        Raises
        ------
        InvalidValueError
            If there are not n names, or they differ from those of the gate.
        """
        names = self.feature_names
        if feature_names is not None:
            names = self._names(feature_names)
            self._check_names("FeatureGate.feature_names_out", names)
        return [f"x{i}" if names is None else names[i] for i in indices_of(self.chosen())]

    def _names(self, names: Sequence[str]) -> list[str]:
        found = list(names)
        if len(found) != self.n:
            raise InvalidValueError(
                explain("feature_names", "each feature must have a name.", expected=self.n, got=len(found))
            )
        return found

    def _check_names(self, where: str, names: Sequence[object]) -> None:
        if self.feature_names is not None and list(names) != self.feature_names:
            raise InvalidValueError(
                explain(where, "the columns must be those of the gate.", expected=self.feature_names, got=list(names))
            )
