"""``LogOdds``: the learnable parameter of gates, its family, its start and its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from l0hooks._torch.memory import pieces
from l0hooks._torch.modules import Traversal
from l0hooks._torch.tensors import is_meta, replace_data, start_values, whole
from l0hooks.errors import InvalidValueError, explain, near_names
from l0hooks.gates.constants import GAMMA, ZETA, Constants, check_constants
from l0hooks.gates.families import (
    DeterministicFamily,
    Family,
    FamilyName,
    HardConcreteFamily,
    initial_log_alpha,
    make_family,
)
from l0hooks.gates.registry import note_change

Estimator = Literal["median", "paper", "mean"]


class LogOdds(nn.Module):
    """Learnable log-odds of a family of gates: float32 whatever the model's dtype, with a temperature.

    On the meta device they have no data; they take their start when they get memory. ``fully_shard`` may split them
    among processes.

    Parameters
    ----------
    shape : int or sequence of int
    family : str
    start : (float or None, float or None)
        E[z] or P(z ≠ 0) at the start; at most one of them.
    constants : (float or None, float, float)
        β, γ and ζ.
    estimator : str
    device : torch.device or None

    Attributes
    ----------
    constants : Constants or None
        β, γ and ζ, if the gates are Hard Concrete: then fused functions sample them.
    noiseless : Constants or None
        β, γ and ζ, if the gates are deterministic: then no noise is drawn.
    positions : Tensor, int64, shape (gates left,), or None
        Once gates were dropped while training: the places that those left had among all ``drawn``.

    Raises
    ------
    InvalidValueError
        If a value is out of range, or both starts are given.
    """

    log_alpha: nn.Parameter
    multipliers: nn.Parameter | None
    constants: Constants | None
    noiseless: Constants | None
    positions: Tensor | None

    def __init__(
        self,
        shape: int | Sequence[int],
        family: FamilyName,
        start: tuple[float | None, float | None],
        constants: tuple[float | None, float, float],
        estimator: Estimator,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(n < 1 for n in size):
            raise InvalidValueError(explain("Gate", "every axis must be positive.", expected=">= 1", got=size))
        temperature, gamma, zeta = constants
        self.family: Family = make_family(family, gamma, zeta)
        self.temperature = self.family.default_temperature if temperature is None else temperature
        self.start = initial_log_alpha(self.family, *start, self.temperature)
        low, high = self.family.limits
        self.limits = (min(low, self.start), max(high, self.start))
        self.estimator = check_estimator_name(estimator)
        self.log_alpha = nn.Parameter(torch.full(size, self.start, dtype=torch.float32, device=device))
        self.register_parameter("multipliers", None)
        self.register_buffer("positions", None)
        self.drawn = self.log_alpha.numel()
        self._traversal = Traversal()

    @property
    def temperature(self) -> float:
        """β, the scale of the noise."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_constants("temperature", value, GAMMA, ZETA)
        self._temperature = float(value)
        family, self.constants, self.noiseless = self.family, None, None
        if type(family) is HardConcreteFamily:  # a subclass may sample in another way
            self.constants = Constants(self._temperature, family.gamma, family.zeta)
        elif type(family) is DeterministicFamily:
            self.noiseless = Constants(self._temperature, family.gamma, family.zeta)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("log_alpha", "multipliers"):
            note_change()

    def keep_prob(self) -> Tensor:
        """P(z ≠ 0) of every gate, differentiable."""
        return self.family.keep_prob(whole(self.log_alpha), self.temperature)

    @torch.no_grad()
    def mean_keep_prob(self) -> float:
        """The mean of :meth:`keep_prob`, as a number; on the meta device, at the start."""
        if is_meta(self.log_alpha):
            return float(self.family.keep_prob(torch.tensor(self.start, device="cpu"), self.temperature).double())
        location = whole(self.log_alpha)
        sums = [self.family.keep_prob(part, self.temperature).sum(dtype=torch.float64) for (part,) in pieces(location)]
        return float(torch.stack(sums).sum()) / location.numel()

    def estimate(self, log_alpha: Tensor) -> Tensor:
        """The test-time gates before any is closed by a rule, differentiable, shape of ``log_alpha``."""
        estimates: dict[Estimator, Callable[[Tensor, float], Tensor]] = {
            "median": self.family.median,
            "paper": self.family.paper,
            "mean": self.family.mean,
        }
        return estimates[self.estimator](log_alpha, self.temperature)

    def stays_alone(self, log_alpha: Tensor, median: Tensor | None = None) -> Tensor:
        """Which gates stay where no rule decides: boolean, shape of ``log_alpha``."""
        stays = (self.family.median(log_alpha, self.temperature) if median is None else median) > 0
        if self.estimator == "paper":
            stays &= self.family.paper(log_alpha, self.temperature) > 0
        return stays

    def _like(self, examples: int | None) -> Tensor:
        """An array for the noise of one forward: of all gates that there were, ``examples`` before them."""
        if examples is None and self.positions is None:
            return self.log_alpha
        shape = self.log_alpha.shape if self.positions is None else (self.drawn,)
        return self.log_alpha.new_empty(shape if examples is None else (examples, *shape))

    @torch.no_grad()
    def drop(self, stay: Tensor) -> None:
        """Keep only the gates at ``stay`` (int64, of an array of one axis), **in place**; the parameter stays the same.

        They draw the noise that they would have drawn among all.
        """
        before = torch.arange(self.drawn, device=stay.device) if self.positions is None else self.positions
        self.positions = before[stay]
        grad = None if self.log_alpha.grad is None else self.log_alpha.grad[stay]
        replace_data(self.log_alpha, self.log_alpha.detach()[stay], grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        without_data = self._traversal.fills(fn, self.log_alpha, self.start)
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        note_change()
        if without_data and not is_meta(self.log_alpha):
            with torch.no_grad():
                self.log_alpha.fill_(self.start)
        return self

    def materialise(self, device: torch.device) -> None:
        """Give log-odds on the meta device memory on ``device``, and their start; others stay as they are."""
        if is_meta(self.log_alpha):
            self.log_alpha = start_values(self.log_alpha, self.start, device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.log_alpha.dtype != torch.float32:  # load_state_dict(assign=True) takes the checkpoint's dtype
            self.log_alpha = nn.Parameter(self.log_alpha.float(), requires_grad=self.log_alpha.requires_grad)
        if self.multipliers is not None and self.multipliers.dtype != torch.float32:
            self.multipliers = nn.Parameter(self.multipliers.float(), requires_grad=self.multipliers.requires_grad)


def check_estimator_name(name: Estimator) -> Estimator:
    """``name``, if it is one of the test-time gates.

    Raises
    ------
    InvalidValueError
        If it is not.
    """
    if name not in get_args(Estimator):
        raise InvalidValueError(
            explain(
                "estimator",
                "the test-time gate must be known.",
                got=repr(name),
                hint=near_names(str(name), get_args(Estimator)),
            )
        )
    return name
