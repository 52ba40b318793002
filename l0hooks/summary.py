"""``summary``: how sparse a gated model is, layer by layer; readable when printed, a table when asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from l0hooks.extras import import_extra
from l0hooks.gate import Gate
from l0hooks.layers import Granularity, tensors_of
from l0hooks.penalties import Coupled, Gated, iter_gated
from l0hooks.placement import same_tensor
from l0hooks.spec import named_modules
from l0hooks.structure import ChannelGroup
from l0hooks.tracing import count_positions, total_macs

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
        Multiply-adds on the example inputs; None if none were given.

    Examples
    --------
    >>> from l0hooks import Gate
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
    """

    parameters: int
    parameters_kept: int
    macs: int | None
    macs_kept: int | None


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
    model_macs : int or None
        Multiply-adds of all layers, those without gates as well: what a budget in ``"macs"`` counts. None unless
        example inputs were given to ``summary``.

    Examples
    --------
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
    model_macs: int | None = None

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
        """Multiply-adds of the gated layers; None unless counted for every row."""
        counts = [part.macs for part in self._parts if part.macs is not None]
        return sum(counts) if len(counts) == len(self._parts) else None

    @property
    def macs_kept(self) -> int | None:
        """Those with weights that evaluation keeps."""
        counts = [part.macs_kept for part in self._parts if part.macs_kept is not None]
        return sum(counts) if len(counts) == len(self._parts) else None

    @property
    def model_macs_kept(self) -> int | None:
        """Multiply-adds of all layers less those with weights that evaluation sets to zero."""
        if self.model_macs is None or self.macs is None or self.macs_kept is None:
            return None
        return self.model_macs - self.macs + self.macs_kept

    def to_dict(self) -> dict[str, Any]:
        """Totals and rows as plain data, ready for JSON."""
        totals = (
            *("gates", "expected_sparsity", "sparsity", "parameters", "parameters_kept"),
            *("model_parameters", "model_parameters_kept", "macs", "macs_kept", "model_macs", "model_macs_kept"),
        )
        values: dict[str, Any] = {name: self.__getattribute__(name) for name in totals}
        rest = {"ungated": list(self.ungated), "note": self.note, "exported_parameters": self.exported_parameters}
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
            lines.append(f"exported: {self.exported_parameters:,} parameters")
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


@torch.no_grad()
def summary(model: nn.Module, *, example_inputs: Sequence[Any] | None = None) -> Summary:
    """How sparse ``model`` is now.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    example_inputs : sequence, optional
        Positional arguments of ``model``, to count multiply-adds; those of ``sparsify`` serve if not given.

    Returns
    -------
    Summary

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> _ = sparsify(model, "weight")
    >>> report = summary(model, example_inputs=(torch.zeros(1, 8),))
    >>> report.parameters, report.macs, report.sparsity
    (192, 192, 0.0)
    >>> report.model_parameters, report.model_macs  # of layers without gates, too
    (212, 192)
    """
    positions = None if example_inputs is None else count_positions(model, example_inputs)
    rows = tuple(_row(gated, positions) for gated in iter_gated(model))
    own = {id(p) for gated in iter_gated(model) for p in gated.gate.parameters()}
    plain = {same_tensor(p): p for p in _initialised(model.parameters()) if id(p) not in own}
    total = sum(p.numel() for p in plain.values())
    firsts = (one.coupled for one in iter_gated(model) if one.coupled and one.coupled.number == 0)
    coupled = tuple(_totals(one, model, positions) for one in firsts)
    macs = None if positions is None else round(total_macs(model, positions))
    return Summary(rows, total, tuple(_ungated(model)), coupled, model_macs=macs)


def _totals(coupled: Coupled, model: nn.Module, positions: dict[tuple[int, str], float] | None) -> CoupledTotals:
    """The totals of the plan that a coupled gate belongs to; weights that are gated otherwise have rows."""
    plan, without = coupled.plan, coupled.otherwise
    if positions is not None:
        plan = replace(plan, positions=_named(positions, model, coupled.prefix))
    kept = [_kept(gate) for gate in coupled.gates]
    sizes = [group.size for group in plan.groups]
    parameters = (plan.parameters(c.__getitem__, without) for c in (sizes, kept))
    macs = (round(plan.macs(c.__getitem__, without)) for c in (sizes, kept)) if plan.positions else (None, None)
    return CoupledTotals(*parameters, *macs)


def _named(positions: dict[tuple[int, str], float], model: nn.Module, prefix: str) -> dict[str, float]:
    """By a parameter's name instead of its module; a module with several names under one of them."""
    return {
        f"{name}.{tensor_name}".removeprefix(prefix).removeprefix("."): positions[id(module), tensor_name]
        for name, module in model.named_modules()
        for tensor_name, _ in tensors_of(module)
        if (id(module), tensor_name) in positions
    }


def _kept(gate: Gate) -> int:
    """How many members of a coupled group stay: one at least."""
    return max(1, gate.kept())


def _coupled_row(gated: Gated, group: ChannelGroup) -> SummaryRow:
    """One group as if the others were kept whole."""
    kept = _kept(gated.gate)
    each = group.parameters_each
    return SummaryRow(
        name=group.name,
        kind=group.kind,
        granularity="coupled",
        gates=group.size,
        expected_sparsity=1 - gated.gate.mean_keep_prob(),
        sparsity=1 - kept / group.size,
        parameters=each * group.size,
        parameters_kept=each * kept,
        macs=None,
        macs_kept=None,
    )


def _row(gated: Gated, positions: dict[tuple[int, str], float] | None) -> SummaryRow:
    if gated.coupled is not None:
        return _coupled_row(gated, gated.coupled.plan.groups[gated.coupled.number])
    gate = gated.gate
    gates, kept, keep_prob = gate.log_alpha.numel(), gate.kept(), gate.mean_keep_prob()
    parameters = sum(site.weight.numel() for site in gated.weights())
    macs = _macs(gated, positions)
    first = gated.sites[0] if gated.sites else None
    plain = first is None or first.tensor_name == "weight"
    return SummaryRow(
        name=" = ".join(dict.fromkeys(s.module_name for s in gated.sites))
        if plain and first
        else (first.name if first else gated.name),
        kind=_kind(gated.module),
        granularity=first.gating.granularity if first else None,
        gates=gates,
        expected_sparsity=1 - keep_prob,
        sparsity=1 - kept / gates,
        parameters=parameters,
        parameters_kept=kept * parameters // gates,
        macs=macs,
        macs_kept=None if macs is None else kept * macs // gates,
    )


def _macs(gated: Gated, positions: dict[tuple[int, str], float] | None) -> int | None:
    total = 0
    for site in gated.sites:
        count = site.gating.positions if positions is None else positions.get((id(site.module), site.tensor_name), 0)
        if count is None:
            return None
        total += round(count * site.weight.numel())
    return total


def _ungated(model: nn.Module) -> Iterator[str]:
    plans = {id(one.coupled.plan): one.coupled.plan for one in iter_gated(model) if one.coupled}.values()
    coupled = {site.module for plan in plans for group in plan.groups for site in group.sites}
    for name, module in named_modules(model):
        if name not in coupled and any(p.ndim > 1 for p in _initialised(module.parameters(recurse=False))):
            yield f"{name or 'the model itself'} ({_kind(module)})"


def _initialised(parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Without those of lazy modules, which have no shape yet."""
    return (p for p in parameters if not isinstance(p, UninitializedParameter))


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")


def _cells(row: SummaryRow) -> tuple[str, ...]:
    return (
        *(row.name or "(root)", row.kind, str(row.granularity or "–"), f"{row.gates:,}"),
        *(f"{row.expected_sparsity:.2%}", f"{row.sparsity:.2%}"),
        *(_of(row.parameters_kept, row.parameters), _of(row.macs_kept, row.macs)),
    )


def _of(kept: int | None, total: int | None) -> str:
    return "" if kept is None or total is None else f"{kept:,} of {total:,}"


def _pad(cell: str, width: int, column: int) -> str:
    return f"{cell:<{width}}" if column < 3 else f"{cell:>{width}}"


def _bar(sparsity: float) -> str:
    full = round((1 - sparsity) * _BAR)
    return "█" * full + "░" * (_BAR - full)
