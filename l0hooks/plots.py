"""Plots of keep probabilities, of the share that each layer keeps, and of a training history. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l0hooks.attach._summary import summary
from l0hooks.attach.summary_table import Summary, SummaryRow
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import StateError, explain, import_extra
from l0hooks.gates.gate import Gate, iter_gates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from l0hooks.attach.measured_size import Unit

_HISTOGRAM_BINS = 40  # even, so that one border is ½
_MAX_NAME = 36  # characters of a layer's name
_MAX_PANEL_RATIO = 5  # largest ratio of two metrics that share a panel
_MAX_HEIGHT = 300.0  # inches of a figure
_LEGEND_WIDTH = 110  # characters of a line of the legend
_UNIT_LABELS: dict[Unit, str] = {"params": "parameters", "gates": "gates", "macs": "multiply-adds", "memory": "bytes"}
_NOT_METRICS = ("step", "expected", "evaluated", "exported", "target", "temperature")


@torch.no_grad()
def gate_histogram(model: nn.Module, *, by_layer: bool = False) -> Figure:
    """The distribution of the keep probabilities of a model's gates. After training most lie near 0 or 1.

    Parameters
    ----------
    model : nn.Module
        With gates; not changed.
    by_layer : bool
        Draw a row for each layer, with shares as colours, instead of one histogram.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    StateError
        If there are no gates.
    MissingExtraError
        If matplotlib is not installed.

    Examples
    --------
    >>> gate_histogram(nn.ModuleList([Gate(4)])).axes[0].get_xlabel()
    'keep probability'
    """
    report = _with_rows(summary(model), "gate_histogram")
    counts = [_counts(one.gate) for one in iter_gated(model)]
    if by_layer:
        return _heatmap(_names(report), torch.stack(counts))
    figure = _figure(7.0, 3.6)
    axes = figure.subplots()
    total = torch.stack(counts).sum(0)
    axes.stairs(total.tolist(), torch.linspace(0, 1, _HISTOGRAM_BINS + 1).tolist(), fill=True, color="C0")
    if float(total.max()) > 100 * float(total[total > 0].min()):
        axes.set_yscale("log")
    kept = sum(int(gate.support().sum()) for _, gate in iter_gates(model))
    axes.axvline(0.5, color="C3", linestyle="--", linewidth=1, label="½: evaluation keeps the gates right of it")
    axes.set(xlabel="keep probability", ylabel="gates", xlim=(0, 1))
    axes.set_title(f"{kept:,} of {report.gates:,} gates stay", loc="left", fontsize=10)
    _legend_above(axes, anchor="right")
    return figure


def sparsity_plot(model_or_summary: nn.Module | Summary) -> Figure:
    """The share that each layer keeps: a bar for evaluation, a mark for the expectation.

    Parameters
    ----------
    model_or_summary : nn.Module or Summary

    Returns
    -------
    matplotlib.figure.Figure
        Its height grows with the number of layers.

    Raises
    ------
    StateError
        If there are no gates.
    MissingExtraError
        If matplotlib is not installed.

    Examples
    --------
    >>> from l0hooks import sparsify
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    >>> _ = sparsify(model, "weight")
    >>> [tick.get_text() for tick in sparsity_plot(model).axes[0].get_yticklabels()]
    ['0', '1']
    """
    report = model_or_summary if isinstance(model_or_summary, Summary) else summary(model_or_summary)
    rows = _with_rows(report, "sparsity_plot").rows
    figure = _figure(8.0, 1.1 + 0.24 * len(rows))
    axes = figure.subplots()
    heights = list(range(len(rows)))
    axes.barh(heights, [1.0] * len(rows), color="0.92")
    axes.barh(heights, [1 - row.sparsity for row in rows], color="C0", label="evaluated")
    expected = [1 - row.expected_sparsity for row in rows]
    axes.plot(expected, heights, "|", color="C1", markersize=9, markeredgewidth=2, label="expected", clip_on=False)
    for height, row in enumerate(rows):
        axes.text(1.015, height, _kept(row), va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_yticks(heights, _names(report), fontsize=8)
    axes.set(xlabel="share kept", xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _legend_above(axes)
    return figure


def history_plot(rows: Sequence[Mapping[str, int | float]], *, unit: Unit = "params") -> Figure:
    """The rows of a :class:`~l0hooks.Tracker`: sizes above, metrics below, over the same steps.

    Parameters
    ----------
    rows : sequence of mappings
    unit : "params", "gates", "macs" or "memory"
        What the sizes count.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    StateError
        If there are no rows.
    MissingExtraError
        If matplotlib is not installed.

    Examples
    --------
    >>> rows = [{"step": 0, "expected": 9.0, "evaluated": 9, "loss": 2.0}]
    >>> [axes.get_ylabel() for axes in history_plot(rows).axes]
    ['parameters', 'loss']
    """
    if not rows:
        raise StateError(explain("history_plot", "there must be rows.", got="no rows", hint="tracker.log()"))
    panels = _panels(rows)
    figure = _figure(8.0, 3.4 + 1.8 * len(panels))
    axes = figure.subplots(
        1 + len(panels), squeeze=False, sharex=True, gridspec_kw={"height_ratios": [1.6] + [1.0] * len(panels)}
    )[:, 0]
    _sizes(axes[0], rows, unit)
    for panel, names in zip(axes[1:], panels, strict=True):
        for number, name in enumerate(names):
            _curve(panel, rows, name, f"C{number % 10}-", final=False)
        panel.set(ylabel=_shorten(names[0], 18) if len(names) == 1 else "")
    for one in axes:
        one.grid(color="0.92")
        one.spines[["top", "right"]].set_visible(False)
        _legend_above(one)
    figure.align_ylabels()
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _sizes(axes: Any, rows: Sequence[Mapping[str, int | float]], unit: Unit) -> None:
    axes.yaxis.set_major_formatter(_matplotlib("ticker").EngFormatter(sep=" "))
    styles = {"evaluated": "C0-", "expected": "C1--", "target": "k:"}  # where both agree, both are seen
    for name, style in styles.items():
        _curve(axes, rows, name, style)
    steps, sizes = _series([row for row in rows if "exported" in row], "exported")
    if steps:
        axes.plot(steps, sizes, "*", color="C3", markersize=13, label="exported", clip_on=False, zorder=3)
    axes.set(ylabel=_UNIT_LABELS[unit])
    axes.set_ylim(bottom=0)


def _curve(axes: Any, rows: Sequence[Mapping[str, int | float]], name: str, style: str, *, final: bool = True) -> None:
    """One column over the steps; values of pruned models are stars."""
    steps, values = _series([row for row in rows if "exported" not in row], name)
    marker = "o" if len(steps) <= 40 else ""
    label = _shorten(name, 24) + (f" ({values[-1]:,.0f} at the end)" if final and values else "")
    if steps:
        axes.plot(steps, values, style + marker, markersize=3, linewidth=1.5, label=label)
    pruned = _series([row for row in rows if "exported" in row], name)
    if pruned[0]:
        label = f"{_shorten(name, 24)}, pruned"
        axes.plot(*pruned, "*", color=style.rstrip("-:"), markersize=11, label=label, clip_on=False, zorder=3)


def _series(rows: Sequence[Mapping[str, int | float]], name: str) -> tuple[list[int | float], list[int | float]]:
    having = [row for row in rows if name in row]
    return [row["step"] for row in having], [row[name] for row in having]


def _panels(rows: Sequence[Mapping[str, int | float]]) -> list[list[str]]:
    """The names of the metrics in each panel; metrics of similar scale share one."""
    scales: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NOT_METRICS and not name.startswith("penalty_"):
                scales[name] = max(scales.get(name, 0.0), abs(value) if math.isfinite(value) else 0.0)
    panels: list[list[str]] = []
    for name in sorted(scales, key=lambda name: scales[name] or 1.0):
        smallest = (scales[panels[-1][0]] or 1.0) if panels else 0.0
        if panels and (scales[name] or 1.0) <= _MAX_PANEL_RATIO * smallest:
            panels[-1].append(name)
        else:
            panels.append([name])
    return panels


def _heatmap(names: list[str], counts: Tensor) -> Figure:
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = _figure(8.0, max(2.6, 1.3 + 0.2 * len(names)))
    axes = figure.subplots()
    colours = _matplotlib("colors")
    image = axes.imshow(
        shares.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="Blues",
        norm=colours.PowerNorm(0.4, 0, 1),  # makes small shares visible
        extent=(0, 1, len(names) - 0.5, -0.5),
    )
    axes.axvline(0.5, color="C3", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="keep probability; evaluation keeps the gates right of ½")
    thin = figure.get_figheight() / 0.15
    bar = figure.colorbar(image, ax=axes, format="{x:.0%}", ticks=[0, 0.01, 0.1, 0.25, 0.5, 1], aspect=thin, pad=0.02)
    bar.set_label("share of the layer's gates")
    return figure


def _counts(gate: Gate) -> Tensor:
    return torch.histc(gate.keep_prob().float(), _HISTOGRAM_BINS, 0.0, 1.0).cpu()


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot, which has global state and may need a display."""
    size = (width, min(height, _MAX_HEIGHT))
    figure: Figure = _matplotlib("figure").Figure(figsize=size, layout="constrained")
    return figure


def _matplotlib(part: str) -> ModuleType:
    return import_extra(f"matplotlib.{part}", extra="examples", where="plots")


def _legend_above(axes: Any, anchor: str = "left") -> None:
    """A legend above the axes, in as many columns as fit."""
    lengths = sorted((len(label) + 6 for label in axes.get_legend_handles_labels()[1]), reverse=True)
    if not lengths:
        return
    columns = next((n for n in (4, 3, 2) if sum(lengths[:n]) <= _LEGEND_WIDTH), 1)
    loc, corner = {"left": ("lower left", (0, 1)), "right": ("lower right", (1, 1))}[anchor]
    spaces = {"borderaxespad": 0.2, "handlelength": 1.5, "columnspacing": 1.4}
    axes.legend(loc=loc, bbox_to_anchor=corner, ncols=columns, frameon=False, fontsize=9, **spaces)


def _with_rows(report: Summary, where: str) -> Summary:
    if not report.rows:
        raise StateError(explain(where, "the model must hold gates.", got="none", hint="sparsify(model, ...) first"))
    return report


def _kept(row: SummaryRow) -> str:
    if row.granularity in (None, "coupled"):
        return f"{round((1 - row.sparsity) * row.gates):,} of {row.gates:,} gates"
    return f"{row.parameters_kept:,} of {row.parameters:,} weights"


def _names(report: Summary) -> list[str]:
    """The names of the layers, shortened at one position that keeps different names different."""
    names = [row.name for row in report.rows]
    for longest in (_MAX_NAME, _MAX_NAME * 2):
        for head in sorted(range(4, longest - 4), key=lambda n: abs(n - longest // 3)):
            short = [_shorten(name, longest, head) for name in names]
            if len(set(short)) == len(set(names)):
                return short
    return names


def _shorten(name: str, longest: int, head: int | None = None) -> str:
    """``name``, without its middle if it is long."""
    if len(name) <= longest:
        return name or "(root)"
    front = longest // 3 if head is None else head
    return f"{name[:front]}…{name[front + 1 - longest :]}"
