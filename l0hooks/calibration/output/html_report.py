"""One self-contained page about a calibration: pictures within, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from l0hooks._files import replacing
from l0hooks.calibration.fit.progress import percent
from l0hooks.calibration.output.group_errors import group_means
from l0hooks.calibration.output.plots import history_plot
from l0hooks.calibration.output.result import CalibrationResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORST_SHOWN = 50  # targets in the table
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
img { max-width: 100%; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 9rem; }
.warn { background: #fff4e0; border-left: 4px solid #e69f00; padding: .5rem 1rem; white-space: pre-line; }
"""


def write_report(
    result: CalibrationResult,
    path: str | os.PathLike[str],
    *,
    title: str = "Calibration",
    notes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the page, whole or not at all.

    Parameters
    ----------
    result : CalibrationResult
    path : path-like
    title : str
    notes : sequence of str
        Shown at the top: warnings, say.
    settings : mapping, optional
        Shown at the end.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from l0hooks.calibration import Calibrator
    >>> result = Calibrator(2, progress=False).fit(np.ones((1, 4)), [8.0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(result, Path(folder, "report.html"), title="Two households")
    ...     "<title>Two households</title>" in Path(folder, "report.html").read_text(encoding="utf-8")
    True
    """
    page = report_html(result, title=title, notes=notes, settings=settings)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def report_html(
    result: CalibrationResult,
    *,
    title: str = "Calibration",
    notes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; arguments as for :func:`write_report`."""
    pictures = [_picture(result.plot(), "errors by group, and weights")]
    if result.rows:
        pictures.append(_picture(history_plot(result.rows), "error and households over time"))
    warnings = [*notes]
    if not result.converged:
        what = "The fit did not converge" if result.verdict == "met" else "Targets are missed"
        warnings.insert(0, f"{what}: {result.reason}")
    if result.unreachable:
        names = ", ".join(str(name) for name in result.unreachable[:20])
        warnings.append(f"{len(result.unreachable):,} targets that no allowed weights can meet: {names}")
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="warn">{escape(note)}</p>' for note in warnings),
        _table(("", ""), _figures(result)),
        f"<h2>Errors and weights</h2>\n{pictures[0]}",
        *_groups(result),
        f"<h2>The {min(_WORST_SHOWN, result.inputs.targets.count)} targets met worst</h2>",
        _worst(result),
        *(f"<h2>Progress of the fit</h2>\n{picture}" for picture in pictures[1:]),
    ]
    if settings:
        rows = [(name, str(value)) for name, value in settings.items()]
        parts.append("<h2>Settings</h2>\n" + _table(("", ""), rows))
    head = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
    )
    return head + "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"


def _figures(result: CalibrationResult) -> list[tuple[str, str]]:
    errors = np.abs(result.relative_errors)
    quantiles = result.ratio_quantiles((0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0))
    spread = ", ".join(f"{value:.3g} ({share:.0%})" for share, value in quantiles.items())
    return [
        ("targets", f"{result.inputs.targets.count:,}"),
        ("households with weight", f"{result.active:,} of {result.inputs.households.count:,}"),
        (
            "mean, median, largest |relative error|",
            ", ".join(percent(float(f(errors))) for f in (np.mean, np.median, np.max)),
        ),
        (
            "targets within 0.1 %, 1 %, 10 %",
            ", ".join(percent(float((errors <= s).mean())) for s in (0.001, 0.01, 0.1)),
        ),
        ("sum of weights", f"{result.weights.sum():,.6g}"),
        ("design effect (Kish)", f"{result.deff:.3g}"),
        ("effective sample size", f"{result.effective_sample_size:,.0f}"),
        ("weight / design weight", spread),
        ("best candidate", result.stage),
        ("errors of all candidates", ", ".join(f"{name} {percent(e)}" for name, e in result.candidates.items())),
        ("converged", f"{'yes' if result.converged else 'no'}: {result.reason}"),
    ]


def _groups(result: CalibrationResult) -> list[str]:
    groups = result.inputs.groups
    if groups is None:
        return []
    errors = np.abs(result.relative_errors)
    largest: dict[Any, float] = {}
    count: dict[Any, int] = {}
    for label, error in zip(groups, errors.tolist(), strict=True):
        largest[label] = max(largest.get(label, 0.0), error)
        count[label] = count.get(label, 0) + 1
    means = group_means(errors, groups)
    rows = [
        (str(label), f"{count[label]:,}", percent(means[label]), percent(largest[label]))
        for label in sorted(means, key=lambda label: -means[label])
    ]
    return ["<h2>Groups</h2>", _table(("group", "targets", "mean |error|", "largest"), rows)]


def _worst(result: CalibrationResult) -> str:
    columns = result.columns("targets")
    order = np.argsort(-np.abs(columns["relative_error"]), kind="stable")[:_WORST_SHOWN]
    numeric = [name for name in ("value", "lower", "upper", "estimate") if name in columns]
    header = ["target", *(["group"] if "group" in columns else []), *numeric, "relative error", "support", "chosen"]
    rows = []
    for place in order.tolist():
        group = [str(columns["group"][place])] if "group" in columns else []
        values = [f"{columns[name][place]:,.6g}" for name in numeric]
        counts = [f"{columns[name][place]:,}" for name in ("support", "chosen")]
        mark = "" if columns["reachable"][place] else " (out of reach)"
        error = percent(float(columns["relative_error"][place]))
        rows.append((f"{columns['target'][place]}{mark}", *group, *values, error, *counts))
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    top = f"<thead><tr>{head}</tr></thead>\n" if any(header) else ""
    return f'<div class="wide"><table>\n{top}<tbody>\n{body}\n</tbody></table></div>'


def _picture(figure: Figure, description: str) -> str:
    """A figure as an image of its own within the page, so that its identifiers cannot clash with others."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'
