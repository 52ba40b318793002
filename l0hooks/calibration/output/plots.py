"""Pictures of a calibration: errors by group, weights, and progress. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from l0hooks.calibration.numerics.columns import Floats
from l0hooks.errors import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_GROUPS = 30  # groups shown, those with the largest errors
_SMALLEST_DRAWN, _SMALLEST_DRAWN_SHARE = 1e-9, 1e-4  # errors below this, or this share of the largest, are drawn there
_LONGEST_NAME = 28  # characters of a group's name


def calibration_plot(errors: Floats, groups: Sequence[Hashable] | None, ratios: Floats) -> Figure:
    r"""Errors by group beside the distribution of the weights.

    Parameters
    ----------
    errors : float64, shape (T,)
        Relative errors.
    groups : sequence, length T, optional
    ratios : float64, > 0, shape (K,)
        Weight over design weight of the chosen households.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.

    Examples
    --------
    >>> figure = calibration_plot(np.array([0.1, 0.01, 0.0]), ["a", "a", "b"], np.array([1.0, 2.0]))
    >>> [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    ['a (2)', 'b (1)']
    """
    parts = _by_group(np.abs(errors), groups)
    figure = _figure(10.5, max(3.4, 1.5 + 0.26 * len(parts)))
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.35, 1]})
    _draw_errors(left, parts, total=0 if groups is None else len(set(groups)))
    _draw_ratios(right, ratios)
    return figure


def history_plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Error and number of households over time, stage by stage.

    Parameters
    ----------
    rows : sequence of mappings
        With stage, step, error, active and seconds.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.

    Examples
    --------
    >>> rows = [{"stage": "gates", "step": t, "error": 0.1, "active": 9, "seconds": t} for t in (1, 2)]
    >>> [axes.get_ylabel() for axes in history_plot(rows).axes]
    ['mean |relative error|', 'households with weight']
    """
    figure = _figure(10.5, 3.4)
    left, right = figure.subplots(1, 2)
    stages = list(dict.fromkeys(row["stage"] for row in rows if math.isfinite(row["error"])))
    waiting = set(stages)  # for a line of the legend
    for run in _runs([row for row in rows if math.isfinite(row["error"])]):
        stage, seconds = run[0]["stage"], [row["seconds"] for row in run]
        label = stage if stage in waiting else None
        waiting.discard(stage)
        style = {"marker": "o" if len(run) <= 40 else "", "markersize": 3, "linewidth": 1.4}
        if len(run) == 1:
            style = {"marker": "*", "markersize": 9, "linewidth": 0}
        style["color"] = f"C{stages.index(stage) % 10}"
        left.plot(seconds, [max(row["error"], _SMALLEST_DRAWN) for row in run], label=label, **style)
        right.plot(seconds, [row["active"] for row in run], **style)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(_matplotlib("ticker").FuncFormatter(_short_percent))
    left.set(xlabel="seconds", ylabel="mean |relative error|")
    right.set(xlabel="seconds", ylabel="households with weight")
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (left, right):
        _plain(axes)
    if stages:
        left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(5, len(stages)), frameon=False, fontsize=9)
    return figure


def _runs(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows that follow one another in one stage; a stage may run more than once."""
    runs: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if runs and runs[-1][-1]["stage"] == row["stage"] and row["step"] > runs[-1][-1]["step"]:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _by_group(errors: Floats, groups: Sequence[Hashable] | None) -> list[tuple[str, Floats]]:
    """Names and errors of the groups, largest mean first."""
    if groups is None:
        return [(f"all targets ({len(errors):,})", errors)]
    members: dict[Hashable, list[int]] = {}
    for place, label in enumerate(groups):
        members.setdefault(label, []).append(place)
    parts = [(f"{_short(str(label))} ({len(places):,})", errors[places]) for label, places in members.items()]
    return sorted(parts, key=lambda part: -float(part[1].mean()))[:_MOST_GROUPS]


def _draw_errors(axes: Any, parts: Sequence[tuple[str, Floats]], total: int) -> None:
    """A line from the median to the largest error of each group, with marks at the median, the mean and the largest."""
    places = list(range(len(parts)))
    floor = max(_SMALLEST_DRAWN, _SMALLEST_DRAWN_SHARE * max(float(errors.max()) for _, errors in parts))
    shown = [np.maximum(errors, floor) for _, errors in parts]
    medians, largest = [float(np.median(part)) for part in shown], [float(part.max()) for part in shown]
    means = [max(float(errors.mean()), floor) for _, errors in parts]
    axes.hlines(places, medians, largest, color="0.75", linewidth=3)
    several = [place for place, part in zip(places, shown, strict=True) if len(part) > 1]
    style = {"color": "C0", "markersize": 11, "markeredgewidth": 2.5, "label": "median"}
    axes.plot([medians[place] for place in several], several, "|", **style)
    axes.plot([means[place] for place in several], several, "D", color="C1", markersize=5, label="mean")
    axes.plot(largest, places, "o", color="C3", markersize=4, label="largest")
    axes.set_xscale("log")
    low, high = min(medians), max(largest)
    low, high = low / 2, max(high * 2, low * 20)
    axes.set_xlim(low, high)
    _name_ticks(axes.xaxis, high / low, _short_percent)
    axes.set_yticks(places, [name for name, _ in parts], fontsize=8)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    more = f"; the worst {len(parts)} of {total} groups" if total > len(parts) else ""
    axes.set_xlabel(f"|relative error|{more}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)
    _plain(axes)
    axes.tick_params(axis="y", length=0)


def _draw_ratios(axes: Any, ratios: Floats) -> None:
    positive = ratios[ratios > 0]
    axes.set(xlabel="weight / design weight", ylabel="households")
    if len(positive):
        low, high = float(positive.min()), float(positive.max())
        if high <= low * 1.01:
            low, high = low / 1.5, high * 1.5
        counts, edges = np.histogram(positive, np.geomspace(low, high * (1 + 1e-9), 41))
        axes.stairs(counts, edges, fill=True, color="C0")
        middle = float(np.median(positive))
        axes.axvline(middle, color="C3", linewidth=1.2, linestyle="--")
        axes.set_title(f"median {middle:.3g} (dashed)", loc="left", fontsize=9)
        axes.set_xscale("log")
        _name_ticks(axes.xaxis, high / low, lambda x, _: f"{x:g}")
    axes.yaxis.set_major_locator(_matplotlib("ticker").MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _plain(axes)


def _name_ticks(axis: Any, span: float, text: Callable[[float, object], str]) -> None:
    """Names at powers of ten, and at 2 and 5 where there are few powers of ten."""
    ticker = _matplotlib("ticker")
    if span < 300:
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0, 3.0)))
    axis.set_major_formatter(ticker.FuncFormatter(text))
    axis.set_minor_formatter(ticker.NullFormatter())


def _short_percent(share: float, _: object = None) -> str:
    return f"{100 * share:g} %"


def _plain(axes: Any) -> None:
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    cut = (
        name
        if len(name) <= _LONGEST_NAME
        else f"{name[: _LONGEST_NAME // 3]}…{name[_LONGEST_NAME // 3 + 1 - _LONGEST_NAME :]}"
    )
    return cut.replace("$", r"\$")  # or it would be read as mathematics


def _figure(width: float, height: float) -> Figure:
    """Not pyplot's: no global state, no display."""
    figure: Figure = _matplotlib("figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def _matplotlib(part: str) -> ModuleType:
    return import_extra(f"matplotlib.{part}", extra="calibration", where="plots")
