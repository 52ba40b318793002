"""``Tracker``: the size of a gated model while it trains, beside what the user measures."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from l0hooks import plots
from l0hooks._files import replacing, save_figure
from l0hooks.attach._summary import summary
from l0hooks.attach.measured_size import Unit, evaluated_size, expected_size, exported_size
from l0hooks.attach.spec import check_one_of
from l0hooks.errors import InvalidValueError, SpecError, StateError, explain, import_extra
from l0hooks.gates.gate import iter_gates
from l0hooks.structure.example_inputs import ExampleInputs
from l0hooks.training.metrics import Number, Row, ScalarWriter, is_integer, is_number, plain_numbers
from l0hooks.training.penalties import Strength, penalty

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_OWN = ("step", "expected", "evaluated", "exported", "temperature")


class Tracker:
    """Records how a gated model shrinks while it trains; each :meth:`log` is one row.

    Logging reads the gates and nothing else: it draws no random numbers, records no gradients, and changes neither
    tensors nor modes. On a GPU it waits for the gates' values, so a larger ``every`` saves time there.

    Parameters
    ----------
    model : nn.Module
        With gates.
    unit : "params", "gates", "macs" or "memory"
        What sizes count: parameters of the whole model or their bytes, gates, or multiply-adds of the gated layers for
        one of the example inputs of ``sparsify``.
    penalties : names, or mapping from name to strength
        Recorded as ``penalty_<name>``; strength 1 if only named.
    every : int, > 0
        Record every n-th call of :meth:`log`, beginning with the first.
    writer : ScalarWriter, optional
        Gets every number as well, those of the gates under ``l0hooks/``: a TensorBoard ``SummaryWriter``, say.

    Raises
    ------
    StateError
        If there is no gate, or ``macs`` is asked for and no example inputs were ever given.
    SpecError
        If the unit or a penalty is unknown.
    InvalidValueError
        If ``every`` is not positive.

    Examples
    --------
    >>> from l0hooks import GateSpec, sparsify
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> _ = sparsify(model, GateSpec(init_keep_prob=0.75))
    >>> tracker = Tracker(model)
    >>> tracker.log(loss=0.5)
    True
    >>> {name: round(value, 3) for name, value in tracker.rows[0].items()}
    {'step': 0, 'expected': 28.0, 'evaluated': 36, 'temperature': 0.667, 'penalty_l0': 24.0, 'loss': 0.5}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        unit: Unit = "params",
        penalties: Iterable[str] | Mapping[str, Strength] = ("l0",),
        every: int = 1,
        writer: ScalarWriter | None = None,
    ) -> None:
        if not is_integer(every) or every < 1:
            raise InvalidValueError(explain("Tracker", "every must be a positive integer.", got=repr(every)))
        self.model = model
        check_one_of("Tracker's unit", unit, get_args(Unit))
        self.unit = unit
        self.penalties = dict(penalties) if isinstance(penalties, Mapping) else dict.fromkeys(penalties, 1.0)
        self.every = every
        self.writer = writer
        self._rows: list[Row] = []
        self._calls = 0
        self._step: int | None = None
        if not any(iter_gates(model)):
            raise StateError(explain("Tracker", "the model must hold gates.", got="none", hint="sparsify(model, ...)"))
        self._measure()  # what cannot be measured is said now, not an epoch later

    @property
    def rows(self) -> list[dict[str, Number]]:
        """The history, oldest first; a copy."""
        return [dict(row) for row in self._rows]

    def log(self, step: int | None = None, **metrics: object) -> bool:
        """Record the model as it is now, and ``metrics``, at every n-th call; after an error nothing has changed.

        Parameters
        ----------
        step : int, optional
            Greater than the last; one more than it (0 at first) if not given.
        **metrics : int, float or Tensor of shape ()
            What was measured elsewhere. One named ``target`` is drawn among the sizes.

        Returns
        -------
        bool
            Whether it was recorded.

        Raises
        ------
        InvalidValueError
            If the step does not grow, or a metric is no number.
        SpecError
            If a metric has the name of a column that the tracker fills itself.

        Examples
        --------
        >>> from l0hooks import Gate
        >>> tracker = Tracker(Gate(4), unit="gates", every=2)
        >>> [tracker.log(loss=loss) for loss in (3.0, 2.0, 1.0)]
        [True, False, True]
        """
        now = self._next_step(step)
        self._check_metrics(metrics)
        turn = self._calls % self.every == 0
        row, values = ({"step": now, **self._measure()}, plain_numbers(metrics)) if turn else ({}, {})
        self._calls += 1
        self._step = now
        if turn:
            self._add(row, values)
        return turn

    def exported(
        self, pruned_model: nn.Module, *, example_inputs: ExampleInputs | None = None, **metrics: object
    ) -> int:
        """Record the size that a pruned model really has, and ``metrics`` of it, as a row at the last step.

        Exact zeros in weights that had gates do not count, whether or not they are stored.

        Parameters
        ----------
        pruned_model : nn.Module
            From ``prune(model)``, fine-tuned or not.
        example_inputs : sequence, optional
            As given to ``sparsify``; needed for ``macs``.
        **metrics : int, float or Tensor of shape ()

        Raises
        ------
        StateError
            If the model has gates, the unit is gates, or multiply-adds cannot be counted; for metrics as :meth:`log`.

        Examples
        --------
        >>> from l0hooks import prune, sparsify
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = sparsify(model, "weight")
        >>> Tracker(model).exported(prune(model))
        36
        """
        self._check_metrics(metrics)
        size, values = exported_size(self.model, pruned_model, self.unit, example_inputs), plain_numbers(metrics)
        self._step = 0 if self._step is None else self._step
        self._add({"step": self._step, "exported": size}, values)
        return size

    def to_frame(self) -> pd.DataFrame:
        """The history as a pandas frame, indexed by step; NaN where a row lacks a column."""
        pandas = import_extra("pandas", extra="examples", where="Tracker.to_frame")
        frame: pd.DataFrame = pandas.DataFrame(self._rows, columns=self._columns()).set_index("step")
        return frame

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the history, one line for each row; a file that was there is replaced only by a whole one."""
        with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, self._columns())
            table.writeheader()
            table.writerows(self._rows)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Sizes over the steps, and the metrics beneath, those of different scale in panels of their own.

        Parameters
        ----------
        path : path, optional
            Where to save it; the suffix says in which format.

        Returns
        -------
        matplotlib.figure.Figure
            Without pyplot, hence no display is needed.
        """
        figure = plots.history_plot(self._rows, unit=self.unit)
        if path is not None:
            save_figure(figure, path, dpi=120)
        return figure

    def state_dict(self) -> dict[str, Any]:
        """The history as plain data, for a checkpoint."""
        return {"unit": self.unit, "rows": self.rows, "calls": self._calls, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the history of a :meth:`state_dict`.

        Raises
        ------
        StateError
            If it is none, or counts sizes in another unit.
        """
        if not {"unit", "rows", "calls", "step"} <= set(state):
            raise StateError(explain("Tracker", "the state must come from state_dict.", got=sorted(state)))
        if state["unit"] != self.unit:
            raise StateError(
                explain("Tracker", "sizes must be counted alike.", expected=repr(self.unit), got=repr(state["unit"]))
            )
        self._rows = [dict(row) for row in state["rows"]]
        self._calls, self._step = state["calls"], state["step"]

    @torch.no_grad()
    def _measure(self) -> Row:
        report = summary(self.model)
        temperatures = [gate.temperature for _, gate in iter_gates(self.model)]
        agree = len(set(temperatures)) == 1
        row: Row = {
            "expected": expected_size(self.model, report, self.unit),
            "evaluated": evaluated_size(report, self.unit),
            "temperature": temperatures[0] if agree else sum(temperatures) / len(temperatures),
        }
        for name, strength in self.penalties.items():
            row[f"penalty_{name}"] = float(penalty(self.model, **{name: strength}))
        return row

    def _next_step(self, step: int | None) -> int:
        last = self._step
        if step is None:
            return 0 if last is None else last + 1
        if not is_integer(step) or (last is not None and step <= last):
            after = "" if last is None else f" after {last}"
            raise InvalidValueError(
                explain("Tracker.log", f"the step must be an integer{after}.", got=repr(step), hint="no step at all")
            )
        return int(step)

    def _check_metrics(self, metrics: Mapping[str, object]) -> None:
        own = {*_OWN, *(f"penalty_{name}" for name in self.penalties)}
        for name, value in metrics.items():
            if name in own:
                raise SpecError(
                    explain("Tracker.log", "the tracker fills this column itself.", got=repr(name), hint="another name")
                )
            if not is_number(value):
                got = f"Tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise InvalidValueError(
                    explain(f"Tracker.log metric {name!r}", "a metric must be one number.", got=got, hint="float(...)")
                )

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(["step", *(name for row in self._rows for name in row)]))

    def _add(self, row: Row, values: Row) -> None:
        self._rows.append({**row, **values})
        if self.writer is not None:
            step, own = int(row["step"]), {f"l0hooks/{name}": value for name, value in row.items() if name != "step"}
            for tag, number in {**own, **values}.items():
                self.writer.add_scalar(tag, number, step)
