"""What a calibration returns: weights, and how well they meet each target."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from l0hooks._files import save_figure
from l0hooks.calibration.data.frames import few
from l0hooks.calibration.data.inputs import Inputs
from l0hooks.calibration.fit.progress import percent
from l0hooks.calibration.numerics.columns import Floats, Integers
from l0hooks.calibration.numerics.problem import larger_ends
from l0hooks.calibration.output.columns import target_columns, weight_columns
from l0hooks.calibration.output.group_errors import group_lines
from l0hooks.calibration.output.plots import calibration_plot
from l0hooks.calibration.output.tables import to_frame, write_csv, write_parquet
from l0hooks.errors import InvalidValueError, explain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Table = Literal["weights", "targets", "history"]
_USUAL_SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, eq=False, repr=False)
class CalibrationResult:
    """Weights for every household, and what they achieve.

    Attributes
    ----------
    weights : float64, >= 0, shape (N,)
        Zero for households that were not chosen.
    inputs : Inputs
        The data, as they were checked.
    stage : str
        The stage whose weights these are.
    converged : bool
        Whether the last fit reached its optimum for the households chosen.
    reason : str
        Why the fit ended, in words.
    rows : sequence of mappings
        The history: stage, step, steps, error, active, seconds.
    candidates : mapping from name to float
        The error of every candidate; ``stage`` is the best of them.
    offset : float, > 0
        What is added to \\|y\\| where errors are divided by it.

    Examples
    --------
    >>> from l0hooks.calibration.data.inputs import read_inputs
    >>> from l0hooks.calibration.data.targets import GivenTargets
    >>> inputs = read_inputs([[1, 1, 0], [0, 20, 30]], GivenTargets({"people": 8, "income": 100}))
    >>> result = CalibrationResult(np.array([3.0, 5.0, 0.0]), inputs, "polish", True, "met", [])
    >>> result.error, result.active, round(result.deff, 3)
    (0.0, 2, 1.062)
    """

    weights: Floats
    inputs: Inputs
    stage: str
    converged: bool
    reason: str
    rows: Sequence[Mapping[str, Any]]
    candidates: Mapping[str, float] = field(default_factory=dict)
    offset: float = 1.0

    @cached_property
    def chosen(self) -> Integers:
        """Numbers of the households with a positive weight."""
        return np.flatnonzero(self.weights)

    @property
    def active(self) -> int:
        """How many households have a positive weight."""
        return len(self.chosen)

    @cached_property
    def estimates(self) -> Floats:
        """M w in float64: shape (T,)."""
        return np.asarray(self.inputs.matrix.astype(np.float64, copy=False) @ self.weights, np.float64)

    @cached_property
    def relative_errors(self) -> Floats:
        r"""\((\hat y - y)/(|y| + \text{offset})\), of an interval its nearest point, larger finite end: shape (T,)."""
        lower, upper = self.inputs.lower, self.inputs.upper
        misses = self.estimates - np.clip(self.estimates, lower, upper)
        errors: Floats = misses / (larger_ends(lower, upper) + self.offset)
        return errors

    @property
    def error(self) -> float:
        r"""Mean \|relative error\| over all targets."""
        return float(np.abs(self.relative_errors).mean())

    @property
    def deff(self) -> float:
        r"""Kish's design effect of unequal weights, \(n \sum w^2 / (\sum w)^2\) over the chosen households.

        References
        ----------
        Kish (1965), Survey Sampling, section 11.7.
        """
        weights = self.weights[self.chosen]
        return float(len(weights) * (weights @ weights) / weights.sum() ** 2) if len(weights) else float("nan")

    @property
    def effective_sample_size(self) -> float:
        """How many households of equal weight would be as precise: their number over the design effect."""
        return self.active / self.deff

    @property
    def ratios(self) -> Floats:
        """Weight over design weight of each chosen household: shape (K,)."""
        ratios: Floats = self.weights[self.chosen] / self.inputs.people.design[self.chosen]
        return ratios

    def ratio_quantiles(self, shares: Sequence[float] = _USUAL_SHARES) -> dict[float, float]:
        """Quantiles of :attr:`ratios`.

        Parameters
        ----------
        shares : sequence of float in [0, 1]

        Returns
        -------
        dict from share to ratio
        """
        if not self.active:
            return dict.fromkeys(shares, float("nan"))
        return dict(zip(shares, np.quantile(self.ratios, list(shares)).tolist(), strict=True))

    @cached_property
    def unreachable(self) -> tuple[Hashable, ...]:
        """Targets that no allowed weights can meet."""
        return tuple(self.inputs.targets.labels[int(place)] for place in np.flatnonzero(~self.inputs.reachable))

    def columns(self, table: Table = "targets") -> dict[str, Any]:
        """A table as columns: lists and NumPy arrays, without pandas.

        Parameters
        ----------
        table : "weights", "targets" or "history"

        Returns
        -------
        dict
            From name to values.
        """
        if table == "weights":
            return {"household": list(self.inputs.households.labels), **weight_columns(self.inputs, self.weights)}
        if table == "targets":
            return {"target": list(self.inputs.targets.labels), **self._target_columns()}
        if table == "history":
            names = ("stage", "step", "steps", "error", "active", "seconds")
            return {name: [row[name] for row in self.rows] for name in names}
        raise InvalidValueError(explain("table", "it must be known.", expected=get_args(Table), got=repr(table)))

    def _target_columns(self) -> dict[str, Any]:
        return target_columns(self.inputs, self.weights, self.estimates, self.relative_errors)

    @property
    def weights_frame(self) -> pd.DataFrame:
        """All households by name: weight, design_weight, ratio. Needs pandas."""
        return to_frame(weight_columns(self.inputs, self.weights), self.inputs.households)

    @property
    def target_report(self) -> pd.DataFrame:
        """All targets by name: value (or lower and upper), estimate, relative_error, group, support, chosen, reachable.

        ``support`` counts the households with a non-zero entry, ``chosen`` those of them that were chosen. Needs
        pandas.
        """
        return to_frame(self._target_columns(), self.inputs.targets)

    @property
    def history(self) -> pd.DataFrame:
        """One row for each step: stage, step, steps, error, active, seconds. Needs pandas."""
        return to_frame(self.columns("history"), None)

    def to_csv(self, path: str | os.PathLike[str], table: Table = "weights", *, chosen_only: bool = False) -> None:
        """Write a table as CSV, whole or not at all.

        Parameters
        ----------
        path : path-like
        table : "weights", "targets" or "history"
        chosen_only : bool
            Leave out households without weight.
        """
        write_csv(path, self._table(table, chosen_only))

    def to_parquet(self, path: str | os.PathLike[str], table: Table = "weights", *, chosen_only: bool = False) -> None:
        """Write a table as Parquet, whole or not at all.

        Parameters
        ----------
        path : path-like
        table : "weights", "targets" or "history"
        chosen_only : bool
            Leave out households without weight.

        Raises
        ------
        MissingExtraError
            If pyarrow is not installed.
        """
        write_parquet(path, self._table(table, chosen_only))

    def _table(self, table: Table, chosen_only: bool) -> dict[str, Any]:
        columns = self.columns(table)
        if table != "weights" or not chosen_only:
            return columns
        return {
            name: values[self.chosen] if isinstance(values, np.ndarray) else [values[place] for place in self.chosen]
            for name, values in columns.items()
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Errors by group, and how the weights spread.

        Parameters
        ----------
        path : path-like, optional
            Where to save it.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        MissingExtraError
            If matplotlib is not installed.
        """
        figure = calibration_plot(self.relative_errors, self.inputs.groups, self.ratios)
        if path is not None:
            save_figure(figure, path, dpi=150)
        return figure

    def __repr__(self) -> str:
        """One line."""
        return f"<CalibrationResult: {self.active:,} households, error {percent(self.error)}, {self.stage}>"

    def __str__(self) -> str:
        """The summary that ``print`` shows."""
        inputs, errors = self.inputs, np.abs(self.relative_errors)
        worst = int(errors.argmax())
        ratios = self.ratio_quantiles((0.0, 0.25, 0.5, 0.75, 1.0)).values()
        lines = [
            f"{inputs.targets.count:,} targets, {self.active:,} of {inputs.households.count:,} households",
            f"  error           {percent(self.error)} mean, {percent(float(np.median(errors)))} median, "
            f"{percent(float(errors[worst]))} largest ({inputs.targets.labels[worst]!r})",
            f"  within 1 %      {percent(float((errors <= 0.01).mean()))} of the targets",
            *group_lines(errors, inputs.groups),
            f"  design effect   {self.deff:.3g} (as {self.effective_sample_size:,.0f} households of equal weight)",
            f"  weight ratios   {' / '.join(f'{ratio:.3g}' for ratio in ratios)} (0, 25, 50, 75, 100 %)",
        ]
        if self.unreachable:
            lines.append(f"  out of reach    {len(self.unreachable):,}: {few(self.unreachable)}")
        others = [f"{name} {percent(error)}" for name, error in self.candidates.items() if name != self.stage]
        lines.append(f"  stage           {self.stage}" + (f" (others: {', '.join(others)})" if others else ""))
        lines.append(f"  converged       {'yes' if self.converged else 'no'}: {self.reason}")
        return "\n".join(lines)
