"""The options of a ``Calibrator``: checked when given, read and changed by name."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Self, get_args

import numpy as np
import torch

from l0hooks.calibration.fit.candidates import Method, Options
from l0hooks.calibration.fit.polished import Objective
from l0hooks.calibration.fit.progress import Callback
from l0hooks.calibration.numerics.dual import Distance
from l0hooks.calibration.numerics.problem import BoundsOn, ClusterDistance, Loss, Precision
from l0hooks.errors import InvalidValueError, explain

_LONGEST_SHOWN = 60  # characters of an option in repr
_CHOICES: dict[str, tuple[object, ...]] = {
    "bounds_on": get_args(BoundsOn),
    "distance": get_args(Distance),
    "cluster_distance": get_args(ClusterDistance),
    "loss": get_args(Loss),
    "method": get_args(Method),
    "objective": get_args(Objective),
    "dtype": get_args(Precision),
}


class Settings:
    """All options, under the names of :class:`~l0hooks.calibration.Calibrator`, which describes them."""

    def __init__(
        self,
        k: int | None = None,
        *,
        l0: float | None = None,
        bounds: tuple[Any, Any] = (0.0, math.inf),
        bounds_on: BoundsOn = "ratio",
        distance: Distance = "chi_square",
        rescale_design: bool = False,
        cluster_distance: ClusterDistance = "once",
        loss: Loss = "relative",
        error_offset: float = 1.0,
        method: Method = "auto",
        objective: Objective = "auto",
        groups: object = None,
        group_multipliers: Mapping[Any, float] | None = None,
        normalize_groups: bool = True,
        hierarchy: Mapping[Any, Any] | None = None,
        consistency: float = 1.0,
        importance: object = None,
        tolerance: float = 1e-6,
        max_epochs: int = 200,
        patience: int | None = None,
        device: str | torch.device = "cpu",
        dtype: Precision = "float32",
        random_state: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_interval: float = 60.0,
        keep_checkpoint: bool = False,
        callbacks: Iterable[Callback] = (),
        progress: bool | None = None,
    ) -> None:
        self.k, self.l0 = k, l0
        self.bounds, self.bounds_on = bounds, bounds_on
        self.distance, self.loss, self.method, self.objective = distance, loss, method, objective
        self.error_offset, self.rescale_design = error_offset, rescale_design
        self.cluster_distance = cluster_distance
        self.groups, self.group_multipliers, self.normalize_groups = groups, group_multipliers, normalize_groups
        self.hierarchy, self.consistency, self.importance = hierarchy, consistency, importance
        self.tolerance, self.max_epochs, self.patience = tolerance, max_epochs, patience
        self.device, self.dtype, self.random_state = device, dtype, random_state
        self.checkpoint, self.checkpoint_interval = checkpoint, checkpoint_interval
        self.keep_checkpoint = keep_checkpoint
        self.callbacks = tuple(callbacks)
        self.progress = progress
        self._check_options()

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The options by name, as scikit-learn wants them."""
        return {name: vars(self)[name] for name in _defaults()}

    def set_params(self, **params: Any) -> Self:
        """Change options.

        Raises
        ------
        InvalidValueError
            If one is unknown or outside its range; then nothing is changed.
        """
        unknown = [name for name in params if name not in _defaults()]
        if unknown:
            raise InvalidValueError(explain("set_params", "options must be known.", got=unknown))
        vars(self).update(vars(type(self)(**{**self.get_params(), **params})))
        return self

    def __repr__(self) -> str:
        """The options that differ from their defaults."""
        defaults = _defaults()
        given = {name: value for name, value in self.get_params().items() if not _same(value, defaults[name])}
        return f"{type(self).__name__}({', '.join(f'{name}={_shortened(value)}' for name, value in given.items())})"

    def solver_options(self) -> Options:
        """What the solver is asked to do, without the number of households."""
        return Options(
            l0=self.l0,
            method=self.method,
            epochs=int(self.max_epochs),
            objective=self.objective,
            distance=self.distance,
            tolerance=self.tolerance,
            rescale_design=bool(self.rescale_design),
            random_state=int(self.random_state),
            patience=None if self.patience is None else int(self.patience),
        )

    def problem_options(self) -> dict[str, Any]:
        """What the numerical problem depends on, beside the data."""
        return {
            "loss": self.loss,
            "consistency": self.consistency,
            "offset": self.error_offset,
            "cluster_distance": self.cluster_distance,
        }

    def _check_options(self) -> None:
        for name, known in _CHOICES.items():
            if vars(self)[name] not in known:
                raise InvalidValueError(explain(name, "it must be known.", expected=known, got=repr(vars(self)[name])))
        if self.k is not None and self.l0 is not None:
            raise InvalidValueError(explain("Calibrator", "give either k or l0, not both.", got="both"))
        if str(self.device) not in ("cpu", "cpu:0"):
            raise InvalidValueError(
                explain("device", "the fit runs on the CPU.", expected="'cpu'", got=repr(self.device))
            )
        for name, least in (("max_epochs", 1), ("random_state", 0), ("patience", 1)):
            value = vars(self)[name]
            if value is None and name == "patience":
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
                raise InvalidValueError(explain(name, f"it must be an integer >= {least}.", got=repr(value)))
        positive = {"tolerance": self.tolerance, "error_offset": self.error_offset}
        for name, value in (positive if self.l0 is None else {**positive, "l0": self.l0}).items():
            if not _real(value) or not 0 < value < math.inf:
                raise InvalidValueError(explain(name, "it must be positive and finite.", got=repr(value)))
        if not _real(self.consistency) or not 0 <= self.consistency < math.inf:
            raise InvalidValueError(
                explain("consistency", "it must be finite and not negative.", got=repr(self.consistency))
            )
        if self.checkpoint is not None and not isinstance(self.checkpoint, (str, os.PathLike)):
            raise InvalidValueError(explain("checkpoint", "it must be a path.", got=repr(self.checkpoint)))
        if not _real(self.checkpoint_interval) or not self.checkpoint_interval >= 0:
            got = repr(self.checkpoint_interval)
            raise InvalidValueError(explain("checkpoint_interval", "it must not be negative.", got=got))
        if self.l0 is not None and self.method not in ("auto", "gates"):
            raise InvalidValueError(explain("method", "a price l0 needs gates.", got=repr(self.method), hint="k="))
        if not all(callable(one) for one in self.callbacks):
            raise InvalidValueError(explain("callbacks", "they must be callable.", got=repr(self.callbacks)))


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"<{type(value).__name__}>"


def _same(value: object, default: object) -> bool:
    return value is default or (isinstance(value, (str, int, float, tuple)) and bool(np.all(value == default)))


def _defaults() -> dict[str, Any]:
    parameters = inspect.signature(Settings).parameters
    return {name: parameter.default for name, parameter in parameters.items()}
