"""Tables as text and Markdown, and their plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.registry import Cell, Panel, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"
PLAIN = 1000  # ticks up to here are written out, larger ones as powers of ten


def written(cell: Cell) -> str:
    """A number with three significant digits at least, without an exponent where it can be read."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if cell == int(cell) and abs(cell) < 1e12:
        return f"{int(cell):,}"
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}" if abs(cell) >= 1 else f"{cell:.3g}"


def show(table: Table) -> None:
    """Print it, with what was asked for."""
    columns = table.columns()
    cells = [[written(row.get(column)) for column in columns] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{table.title}")
    for line in (columns, *cells):
        first, *rest = (
            text.ljust(w) if n == 0 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join((first, *rest)).rstrip())
    for remark in (*table.aims, *table.notes):
        print(f"* {remark}", flush=True)


def markdown(table: Table) -> str:
    """The same for the documentation."""
    columns = table.columns()
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[written(row.get(column)) for column in columns] for row in table.rows]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    remarks = "".join(f"\n- {remark}" for remark in (*table.aims, *table.notes))
    return f"**{table.title}**\n\n{rows}\n" + (f"{remarks}\n" if remarks else "")


def plot(tables: list[Table], path: Path) -> bool:
    """One figure, a panel for each table that has one; whether there was anything to draw."""
    import matplotlib

    drawn = [table for table in tables if table.panel is not None and table.rows]
    if not drawn:
        return False
    from matplotlib.figure import Figure

    heights = [_height(table) for table in drawn]
    with matplotlib.rc_context({"svg.hashsalt": "l0hooks", "font.size": 9}):
        figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
        for axes, table in zip(
            figure.subplots(len(drawn), squeeze=False, height_ratios=heights)[:, 0], drawn, strict=True
        ):
            _draw(axes, table, table.panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def _height(table: Table) -> float:
    if table.panel is None or table.panel.kind == "lines":
        return 3.6
    return 0.8 + 0.2 * len(table.rows) * len(table.panel.y) + 0.08 * len(table.rows)


def _draw(axes: Axes, table: Table, panel: Panel | None) -> None:
    if panel is None:
        return
    (_bars if panel.kind == "bars" else _lines)(axes, table.rows, panel)
    axes.set_title(table.title, loc="left", fontsize=10)
    axes.grid(alpha=0.3, axis="x" if panel.kind == "bars" else "both")
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Axes, rows: list[Row], panel: Panel) -> None:
    """Horizontal, the first row on top; the columns of ``y`` beside each other, with their figures."""
    thick = 0.8 / len(panel.y)
    for n, column in enumerate(panel.y):
        given = [(at, row[column]) for at, row in enumerate(rows) if isinstance(row.get(column), float | int)]
        places = [at + (n - (len(panel.y) - 1) / 2) * thick for at, _ in given]
        bars = axes.barh(places, [value for _, value in given], thick * 0.92, color=COLOURS[n], label=column)
        axes.bar_label(bars, [written(value) for _, value in given], padding=2, fontsize=8)
    axes.set_yticks(range(len(rows)), [str(next(iter(row.values()))) for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel(panel.label)
    if "x" in panel.log:
        axes.set_xscale("log")
    if panel.reference is not None:
        axes.axvline(panel.reference, color="0.4", ls="--", lw=1)
    if len(panel.y) > 1:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _lines(axes: Axes, rows: list[Row], panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups = list(dict.fromkeys(row.get(panel.by) for row in rows)) if panel.by else [None]
    for g, group in enumerate(groups):
        own = [row for row in rows if not panel.by or row[panel.by] == group]
        for n, column in enumerate(panel.y):
            given = [(row[panel.x], row[column]) for row in own if isinstance(row.get(column), float | int)]
            label = column if group is None else str(group) if len(panel.y) == 1 else f"{group}: {column}"
            colour = (g if len(groups) > 1 else n) % len(COLOURS)
            style: dict[str, Any] = {"color": COLOURS[colour], "marker": MARKERS[colour], "ms": 4, "label": label}
            axes.plot(*zip(*given, strict=True), ls=("-", "--", ":")[n % 3] if len(groups) > 1 else "-", **style)
    for letter, axis in {"x": axes.xaxis, "y": axes.yaxis}.items():
        if letter not in panel.log:
            if letter == "y" and axis.get_view_interval()[0] < axis.get_view_interval()[1] / 2:
                axes.set_ylim(bottom=0)
            continue
        axes.set(**{f"{letter}scale": "log"})
        if axis.get_view_interval()[1] < PLAIN:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=panel.x, ylabel=panel.label)
    if panel.reference is not None:
        axes.axhline(panel.reference, color="0.4", ls="--", lw=1)
    axes.legend(fontsize=8, framealpha=0.7, loc="best")
