"""``ItemGate``: gates over n items under a budget of k, and the choice of k of them."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor, nn

from l0hooks.errors import InvalidValueError, StateError, explain, near_names
from l0hooks.gates.families import FamilyName
from l0hooks.gates.gate import Gate
from l0hooks.gates.log_odds import Estimator
from l0hooks.gates.progress import warn_if_tied
from l0hooks.schedules import MakeSchedule, ScheduleName
from l0hooks.select.containers import check_counts, indices_like, indices_of, length, take
from l0hooks.training._set_budget import set_budget
from l0hooks.training.budget import Budget
from l0hooks.training.budget_rule import BudgetRule
from l0hooks.training.size import Size

Noise = Literal["step", "example"]
_ALWAYS_OPEN = 40.0  # with this log_alpha the gate of every family is exactly 1


class Options(TypedDict, total=False):
    """The options of every gate over items; see :class:`ItemGate`."""

    steps: int
    schedule: ScheduleName | MakeSchedule
    automatic: bool
    noise: Noise
    family: FamilyName
    init_mean: float | None
    init_keep_prob: float | None
    temperature: float | None
    estimator: Estimator
    device: torch.device | str | None


class ItemGate(nn.Module):
    """The base class of gates over items: one :class:`Gate` under a budget of ``k``.

    One shift common to all log-odds keeps the expected number of open gates, Σ P(z ≠ 0), exactly on schedule at every
    step of the optimiser. After ``steps`` steps the items with the k largest ``log_alpha`` are fixed. With k = n all
    items stay: the gates are 1 from the start and do not change.

    Exactly k items are chosen at any time, also before the schedule has ended, and nothing is sampled: those with the
    largest ``log_alpha``. Ties go to the first, with a warning: gates that were not trained are all equal.

    Parameters
    ----------
    n : int, >= 1
    k : int, 1 <= k <= n
    axis : int
        The axis of the data that holds the items; a call may name another.
    steps : int, >= 1
        Optimiser steps until k is reached.
    schedule : "cubic", "linear", "cosine", "exponential" or callable
        How the expected number falls from n to k, as in :class:`Budget`.
    automatic : bool
        Count the steps of the optimiser; else the schedule moves only by ``rule.advance()``.
    noise : "step" or "example"
        One draw for a whole call, or one for each index along the first axis of the data.
    family, init_mean, init_keep_prob, temperature, estimator, device
        As in :class:`Gate`.

    Attributes
    ----------
    gate : Gate, shape (n,)

    Raises
    ------
    InvalidValueError
        If a number is out of range, or the noise or the schedule is unknown.

    Examples
    --------
    >>> from l0hooks import FeatureGate
    >>> features = FeatureGate(4, k=2)
    >>> _ = features.gate.log_alpha.data.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0]))  # in place of training
    >>> isinstance(features, ItemGate), features.select(torch.zeros(5, 4))[1]
    (True, tensor([1, 3]))
    """

    gate: Gate

    def __init__(
        self,
        n: int,
        k: int,
        *,
        axis: int,
        steps: int = 1000,
        schedule: ScheduleName | MakeSchedule = "cubic",
        automatic: bool = True,
        noise: Noise = "step",
        family: FamilyName = "hard_concrete",
        init_mean: float | None = None,
        init_keep_prob: float | None = None,
        temperature: float | None = None,
        estimator: Estimator = "median",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.n, self.k = check_counts(type(self).__name__, n, k)
        if noise not in get_args(Noise):
            near = near_names(str(noise), get_args(Noise))
            raise InvalidValueError(
                explain(type(self).__name__, "the noise must be known.", got=repr(noise), hint=near)
            )
        self.axis = axis
        self.noise = noise
        self.gate = Gate(
            self.n,
            family=family,
            init_mean=init_mean,
            init_keep_prob=init_keep_prob,
            temperature=temperature,
            estimator=estimator,
            device=device,
        )
        # with min_keep > 0 the budget would break ties by a rule of its own
        budget = Budget(keep=self.k, steps=steps, schedule=schedule, automatic=automatic, min_keep=0)
        if self.k < self.n:
            set_budget(self.gate, budget)
        else:
            _keep_all(self.gate, budget)

    # --- training --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, dim: int | None = None) -> Tensor:
        """``x`` times the gates along one axis: sampled gates in training, test-time gates in evaluation.

        Every call draws new gates. To use one draw in several places, call ``z = module.gate()`` once.

        Parameters
        ----------
        x : Tensor
            n items along ``dim``; dense. Floating point keeps its dtype, integers become float32.
        dim : int, optional
            The axis that holds the items; by default the axis of this class.

        Returns
        -------
        Tensor, shape of ``x``

        Raises
        ------
        InvalidValueError
            If ``x`` does not have n items along that axis, or if ``noise="example"`` and the items lie along axis 0.
        UnsupportedModuleError
            If ``x`` is not a dense tensor.
        """
        where = type(self).__name__
        axis = self.axis if dim is None else dim
        self.check(x, axis, where, tensor=True)
        axis %= x.ndim
        z = self._gates(x, axis, where)
        z = z.reshape([n if d == axis or (d == 0 and z.ndim == 2) else 1 for d, n in enumerate(x.shape)])
        return _times(x, z)

    def weights(self, w: Tensor) -> Tensor:
        """The weights ``w`` of the items times one draw of the gates, shape (n,); differentiable in both."""
        where = f"{type(self).__name__}.weights"
        self.check(w, 0, where, tensor=True, weights=True)
        return _times(w, self.gate())

    def _gates(self, x: Tensor, axis: int, where: str) -> Tensor:
        if self.noise == "step" or not self.gate.training:
            z: Tensor = self.gate()
            return z
        if axis == 0:
            raise InvalidValueError(
                explain(
                    where,
                    "noise for each example needs the examples along the first axis.",
                    expected="items along another axis than 0",
                    got=f"shape {tuple(x.shape)}, dim=0",
                    hint='dim=1, or noise="step"',
                )
            )
        return self.gate.sample(x.shape[0])

    # --- selecting -------------------------------------------------------------------------------------------------

    @property
    def rule(self) -> BudgetRule:
        """The rule of the budget: ``expected()``, ``scheduled``, ``target``, ``step``, ``finished``, ``advance()``."""
        rule = self.gate.rule
        if not isinstance(rule, BudgetRule):
            raise StateError(explain(type(self).__name__, "the gates must have their budget.", got=rule))
        return rule

    def chosen(self) -> Tensor:
        """Which items are chosen: boolean, shape (n,), exactly k true; after the schedule it is ``gate.support()``.

        Raises
        ------
        StateError
            If a gate is NaN because training diverged.
        """
        if bool(self.gate.log_alpha.detach().isnan().any()):
            must = "gates that are NaN cannot be ranked."
            raise StateError(explain(type(self).__name__, must, got="NaN", hint="a smaller gate_lr"))
        masks = self.rule.support_at(self.rule.target)
        warn_if_tied(type(self).__name__, self.rule.ties(masks))
        return masks[0]

    @torch.no_grad()
    def final(self) -> Tensor:
        """The test-time gates of the chosen items, and zero for all others: float32, shape (n,), without gradient."""
        chosen = self.chosen()
        return self.gate.final() if self.rule.finished else self.gate.value(support=chosen)

    def importances(self) -> Tensor:
        """The probability P(z ≠ 0) that each item is kept: float32, shape (n,), in [0, 1], without gradient."""
        return self.gate.keep_prob().detach()

    def select(self, x: Any) -> Any:
        """The k chosen items of ``x`` and their indices.

        Parameters
        ----------
        x : Tensor, NumPy array, pandas DataFrame or Series, scipy.sparse array or matrix
            n items along the axis of this class, of any dtype.

        Returns
        -------
        selected : the kind of ``x``
            The items in the order of ``x``, not multiplied by their gates. A tensor keeps its gradient; sparse data
            stay sparse (BSR, DIA and DOK become CSR).
        indices : int64, shape (k,)
            Ascending; a tensor for a tensor, else a NumPy array.

        Raises
        ------
        InvalidValueError
            If ``x`` does not have n items.
        UnsupportedModuleError
            If ``x`` is of another kind.
        StateError
            If a gate is NaN.
        """
        self.check(x, self.axis, f"{type(self).__name__}.select")
        indices = indices_of(self.chosen())
        return take(x, indices, self.axis), indices_like(x, indices, self.gate.log_alpha.device)

    def check(self, x: Any, axis: int, where: str, *, tensor: bool = False, weights: bool = False) -> None:
        """Raise an error if data are not of a known kind or do not hold n items along ``axis``."""
        if tensor and not isinstance(x, Tensor):
            raise InvalidValueError(
                explain(where, "gates multiply tensors.", expected="a Tensor", got=type(x).__name__, hint="select(x)")
            )
        found = length(where, x, axis)
        if weights and x.ndim != 1:
            raise InvalidValueError(
                explain(where, "each item must have one weight.", expected=f"shape ({self.n},)", got=tuple(x.shape))
            )
        if found != self.n:
            must = f"there must be one {'weight' if weights else 'item'} for each gate."
            expected, got = f"{self.n} along axis {axis}", f"{found}, shape {tuple(x.shape)}"
            raise InvalidValueError(explain(where, must, expected=expected, got=got))

    def get_extra_state(self) -> Tensor:
        """The counts n and k; a gate loads only a state with the same counts."""
        return torch.tensor(list(self._counts().values()))

    def set_extra_state(self, state: Tensor) -> None:
        """Raise an error, before anything is loaded, if the state has other counts."""
        own = self._counts()
        if state.tolist() != list(own.values()):
            expected = ", ".join(f"{name}={value}" for name, value in own.items())
            got = ", ".join(f"{name}={value}" for name, value in zip(own, state.tolist(), strict=False))
            raise InvalidValueError(
                explain(f"{type(self).__name__}.load_state_dict", "the counts must agree.", expected=expected, got=got)
            )

    def _counts(self) -> dict[str, int]:
        return {"n": self.n, "k": self.k}

    def extra_repr(self) -> str:
        """n and k."""
        return f"{self.n}, k={self.k}"


def _times(x: Tensor, z: Tensor) -> Tensor:
    return x * (z.to(x.dtype) if x.is_floating_point() else z)


def _keep_all(gate: Gate, budget: Budget) -> None:
    """Give all gates a finished budget, because no finite shift makes the expected number equal to n."""
    with torch.no_grad():
        gate.log_alpha.fill_(_ALWAYS_OPEN)
    count = gate.log_alpha.numel()
    gate.rule = BudgetRule(budget, [gate], Size(np.array([count]), 0.0, np.ones(1), np.zeros((1, 1))))
    gate.rule.step = budget.steps
