"""``Summary``: how sparse a model is, as figures; readable when printed, a table when asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from l0hooks.errors import import_extra
from l0hooks.gates.progress import Progress
from l0hooks.structure.layers import Granularity

if TYPE_CHECKING:
    import pandas as pd

_BAR = 20


@dataclass(frozen=True)
class SummaryRow:
    """One gated weight (tied ones together), or one standalone gate.

    Attributes
    ----------
    name, kind : str
        Qualified name and type of the module.
    granularity : str or (int, int) or None
        None for a standalone gate.
    gates : int
    expected_sparsity, sparsity : float in [0, 1]
        Share of the gates that are zero: in expectation, and in evaluation (what ``prune`` removes).
    parameters, parameters_kept : int
        Weights behind the gates, and those that evaluation keeps.
    macs, macs_kept : int or None
        Multiply-adds for one example; None if no example inputs were given.

    Examples
    --------
    >>> from torch import nn
    >>> from l0hooks import Gate, summary
    >>> row = summary(nn.ModuleDict({"samples": Gate(4)})).rows[0]
    >>> row.name, row.gates, row.sparsity
    ('samples', 4, 0.0)
    """

    name: str
    kind: str
    granularity: Granularity | None
    gates: int
    expected_sparsity: float
    sparsity: float
    parameters: int
    parameters_kept: int
    macs: int | None
    macs_kept: int | None


@dataclass(frozen=True)
class CoupledTotals:
    """What coupled groups cost together: tensors that several of them run through counted once.

    Attributes
    ----------
    parameters, parameters_kept : int
        Of the tensors the groups run through.
    macs, macs_kept : int or None
    memory, memory_kept : int
        Bytes of these tensors.
    """

    parameters: int
    parameters_kept: int
    macs: int | None
    macs_kept: int | None
    memory: int
    memory_kept: int


@dataclass(frozen=True)
class Summary:
    """A model's gates at one moment; ``print`` it, or take ``to_dict()`` and ``to_frame()``.

    Attributes
    ----------
    rows : tuple of SummaryRow
    model_parameters : int
        All parameters of the model, the gates' own not counted.
    ungated : tuple of str
        Modules with matrices or kernels that carry no gates.
    coupled : tuple of CoupledTotals
        What the rows of coupled groups, which share tensors, come to together.
    note : str
        What else there is to know about a pruned model.
    exported_parameters : int or None
        Of a pruned model: the parameters it has, without the zeros of weights that had gates.
    exported_zeros : int or None
        Of a pruned model: these zeros, where they are stored. They are parameters like others, which the next step of
        an optimiser changes; of the gated model closed gates stay closed once a budget has ended.
    model_macs : int or None
        Multiply-adds of all layers for one example, those without gates as well: what a budget in ``"macs"`` counts.
        None unless example inputs were given to ``summary``.
    model_memory : int
        Bytes of all parameters of the model, the gates' own not counted.
    budgets : tuple of Progress
        Step, size and target of every budget, and the parameters that were cut while training. Printed while its
        target is not reached.

    Examples
    --------
    >>> from torch import nn
    >>> from l0hooks import sparsify
    >>> report = sparsify(nn.Sequential(nn.Linear(8, 4)), "output")
    >>> report.gates, report.parameters_kept, report.model_parameters
    (4, 32, 36)
    """

    rows: tuple[SummaryRow, ...]
    model_parameters: int
    ungated: tuple[str, ...] = ()
    coupled: tuple[CoupledTotals, ...] = ()
    note: str = ""
    exported_parameters: int | None = None
    exported_zeros: int | None = None
    model_macs: int | None = None
    budgets: tuple[Progress, ...] = ()
    model_memory: int = 0

    @property
    def gates(self) -> int:
        """Number of gates."""
        return sum(row.gates for row in self.rows)

    @property
    def expected_sparsity(self) -> float:
        """Expected share of the gated weights (of the gates, if there are no weights) that are zero."""
        return self._share([row.expected_sparsity for row in self.rows])

    @property
    def sparsity(self) -> float:
        """Share of the gated weights (of the gates, if there are no weights) that evaluation sets to zero."""
        return self._share([row.sparsity for row in self.rows])

    @property
    def parameters(self) -> int:
        """Number of gated weights."""
        return sum(part.parameters for part in self._parts)

    @property
    def parameters_kept(self) -> int:
        """Number of gated weights that evaluation keeps."""
        return sum(part.parameters_kept for part in self._parts)

    @property
    def model_parameters_kept(self) -> int:
        """All parameters of the model less those that evaluation sets to zero."""
        return self.model_parameters - self.parameters + self.parameters_kept

    @property
    def macs(self) -> int | None:
        """Multiply-adds of the gated layers for one example; None unless counted for every row."""
        return _sum(part.macs for part in self._parts)

    @property
    def macs_kept(self) -> int | None:
        """Those with weights that evaluation keeps."""
        return _sum(part.macs_kept for part in self._parts)

    @property
    def model_macs_kept(self) -> int | None:
        """Multiply-adds of all layers less those with weights that evaluation sets to zero."""
        if self.model_macs is None or self.macs is None or self.macs_kept is None:
            return None
        return self.model_macs - self.macs + self.macs_kept

    @property
    def model_memory_kept(self) -> int:
        """Bytes of all parameters less those that coupled gates remove; zeros in a weight that stays take theirs."""
        return self.model_memory - sum(part.memory - part.memory_kept for part in self.coupled)

    def to_dict(self) -> dict[str, Any]:
        """Totals and rows as plain data, ready for JSON."""
        totals = (
            *("gates", "expected_sparsity", "sparsity", "parameters", "parameters_kept"),
            *("model_parameters", "model_parameters_kept", "macs", "macs_kept", "model_macs", "model_macs_kept"),
            *("model_memory", "model_memory_kept"),
        )
        values: dict[str, Any] = {name: self.__getattribute__(name) for name in totals}
        rest: dict[str, Any] = {"ungated": list(self.ungated), "note": self.note}
        rest |= {"exported_parameters": self.exported_parameters, "exported_zeros": self.exported_zeros}
        rest |= {"budgets": [asdict(one) for one in self.budgets]}
        return {**values, **rest, "rows": [asdict(row) for row in self.rows]}

    def to_frame(self) -> pd.DataFrame:
        """The rows as a pandas frame, indexed by name.

        Raises
        ------
        MissingExtraError
            If pandas is not installed.
        """
        pandas = import_extra("pandas", extra="examples", where="Summary.to_frame")
        columns = [field.name for field in fields(SummaryRow)]
        frame: pd.DataFrame = pandas.DataFrame([asdict(row) for row in self.rows], columns=columns).set_index("name")
        return frame

    def bars(self) -> str:
        """What each row keeps, as one bar a line."""
        width = max((len(row.name) for row in self.rows), default=0)
        return "\n".join(
            f"{row.name:<{width}}  {_bar(row.sparsity)}  {1 - row.sparsity:7.2%} kept" for row in self.rows
        )

    def __str__(self) -> str:
        header = ("layer", "type", "gates on", "gates", "expected", "evaluated", "weights kept", "MACs kept")
        cells = [header, *(_cells(row) for row in self.rows)]
        cells.append(
            (
                *("total", "", "", f"{self.gates:,}", f"{self.expected_sparsity:.2%}", f"{self.sparsity:.2%}"),
                *(_of(self.parameters_kept, self.parameters), _of(self.macs_kept, self.macs)),
            )
        )
        if self.macs is None:
            cells = [row[:-1] for row in cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(_pad(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in cells
        ]
        rule = "─" * max(map(len, lines))
        lines[1:1] = [rule]
        lines[-1:] = [rule, lines[-1]]
        whole = f"whole model: {_of(self.model_parameters_kept, self.model_parameters)} parameters"
        macs = _of(self.model_macs_kept, self.model_macs)
        lines.append(whole + (f", {macs} MACs" if macs else ""))
        if self.exported_parameters is not None:
            zeros = f", and {self.exported_zeros:,} zeros, which training changes" if self.exported_zeros else ""
            lines.append(f"exported: {self.exported_parameters:,} parameters{zeros}")
        cut = sum(one.cut for one in self.budgets)
        if cut:
            lines.append(f"cut while training: {cut:,} parameters, which are not counted above")
        lines += [f"budget not reached: {one}" for one in self.budgets if one.missed]
        if self.ungated:
            lines.append("not gated: " + ", ".join(self.ungated))
        if self.note:
            lines.append(f"note: {self.note}")
        return "\n".join(lines)

    @property
    def _parts(self) -> tuple[SummaryRow | CoupledTotals, ...]:
        """Rows that add up: coupled groups by their totals."""
        return *(row for row in self.rows if row.granularity != "coupled"), *self.coupled

    def _share(self, shares: list[float]) -> float:
        weights = [row.parameters for row in self.rows]
        if not any(weights):
            weights = [row.gates for row in self.rows]
        total = sum(weights)
        return sum(s * w for s, w in zip(shares, weights, strict=True)) / total if total else 0.0


def _cells(row: SummaryRow) -> tuple[str, ...]:
    return (
        *(row.name or "(root)", row.kind, str(row.granularity or "–"), f"{row.gates:,}"),
        *(f"{row.expected_sparsity:.2%}", f"{row.sparsity:.2%}"),
        *(_of(row.parameters_kept, row.parameters), _of(row.macs_kept, row.macs)),
    )


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum; None if one of them is unknown."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def _of(kept: int | None, total: int | None) -> str:
    return "" if kept is None or total is None else f"{kept:,} of {total:,}"


def _pad(cell: str, width: int, column: int) -> str:
    return f"{cell:<{width}}" if column < 3 else f"{cell:>{width}}"


def _bar(sparsity: float) -> str:
    full = round((1 - sparsity) * _BAR)
    return "█" * full + "░" * (_BAR - full)
