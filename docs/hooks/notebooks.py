"""Pages from the notebooks: every ``docs/notebooks/*.py`` (percent format) runs in a process of its own.

What a cell prints and draws comes after it, as in a notebook. A cell that fails or warns fails the build. Pages are
Markdown like all others, so links are checked, and pictures are drawn in the text's own colour, in light and dark mode.
Nothing is written beside the site.

    python docs/hooks/notebooks.py docs/notebooks/basic_l0.py     # what the cells print, without a site
    NOTEBOOKS="not run" mkdocs build --strict                     # pages without output, where tests run the notebooks
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

FOLDER = "notebooks/"
INK = "#010203"  # drawn with this, a line or letter takes the colour of the page's text
STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "figure.figsize": (6.0, 3.6),
    "figure.constrained_layout.use": True,
    "font.size": 11.0,
    "axes.titlesize": 11.5,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}


@dataclass
class Cell:
    """A cell of a notebook, and after it has run what it printed and its pictures as SVG."""

    text: str
    line: int
    is_code: bool
    printed: str = ""
    pictures: list[str] = field(default_factory=list)


def read_cells(source: str) -> list[Cell]:
    """The cells of a script: code after ``# %%``, text in comments after ``# %% [markdown]``."""
    cells = []
    for match in re.finditer(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source, re.MULTILINE | re.DOTALL):
        text = match[2] if match[1] is None else re.sub(r"^# ?", "", match[2], flags=re.MULTILINE)
        cells.append(Cell(text.strip("\n"), source.count("\n", 0, match.start(2)), match[1] is None))
    return cells


def run_cells(path: Path) -> list[Cell]:
    """Run all cells of a notebook in order; warnings are errors."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(STYLE)
    cells = read_cells(path.read_text())
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    for cell in cells:
        if cell.is_code:
            printed = io.StringIO()
            code = compile("\n" * cell.line + cell.text, str(path), "exec")  # tracebacks name the script's lines
            with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                warnings.simplefilter("error")
                exec(code, namespace)
            cell.printed = printed.getvalue().rstrip("\n")
            cell.pictures = list(_take_pictures(f"{path.stem}-{cell.line}"))
    return cells


def _take_pictures(name: str) -> Iterator[str]:
    """Every open pyplot figure as an ``<svg>`` of the page, then closed."""
    import matplotlib.pyplot as plt

    for number in plt.get_fignums():
        figure, file = plt.figure(number), io.StringIO()
        with plt.rc_context({"svg.hashsalt": f"{name}-{number}"}):  # the same ids in every build, others elsewhere
            figure.savefig(file, format="svg", metadata={"Date": None})
        titles = [one.get_title(loc) for one in figure.axes for loc in ("left", "center", "right")]
        label = escape("; ".join(title.replace("\n", " ") for title in titles if title), quote=True)
        width = figure.get_figwidth() / 6
        box = f"0 0 {72 * figure.get_figwidth():g} {72 * figure.get_figheight():g}"
        drawing = file.getvalue().partition("</style>")[2].partition("</defs>")[2].replace(INK, "currentColor")
        drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # nothing refers to groups
        look = f"width: 100%; max-width: {32 * width:.3g}rem; stroke-linejoin: round; stroke-linecap: butt"
        links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        yield f'<svg {links} viewBox="{box}" role="img" aria-label="{label}" style="{look}">{drawing}'
        plt.close(figure)


# --- what mkdocs calls ---------------------------------------------------------------------------------------------


class _Notebook(File):
    """A script that is a page."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: Any) -> Files:
    """Put a page in the place of every notebook, and the script beside it."""
    scripts = [file for file in files if file.src_uri.startswith(FOLDER) and file.src_uri.endswith(".py")]
    sources = [(Path(file.abs_src_path), file.content_string) for file in scripts]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        pages = list(pool.map(_page, *zip(*sources, strict=True)))
    for file, (_, source), page in zip(scripts, sources, pages, strict=True):
        files.remove(file)
        files.append(_Notebook.generated(config, file.src_uri, content=page))
        files.append(File.generated(config, f"{FOLDER}{file.name}/{file.name}.py", content=source))
    return files


def _ran(path: Path) -> list[Cell]:
    """The cells of a notebook, run in a process of its own."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, __file__, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or done.stderr.strip():
        raise PluginError(f"{path} does not run without complaint:\n{done.stderr}")
    return [Cell(**cell) for cell in json.loads(done.stdout)]


@cache  # mkdocs serve builds again and again
def _page(path: Path, source: str) -> str:
    """The Markdown of a notebook whose text is ``source``."""
    parts = []
    for cell in read_cells(source) if os.environ.get("NOTEBOOKS") == "not run" else _ran(path):
        parts.append(f"```python\n{cell.text}\n```" if cell.is_code else cell.text)
        if cell.printed:
            parts.append(f"``` {{.text .printed}}\n{cell.printed}\n```")
        parts += [f'<figure class="drawn">{picture}</figure>' for picture in cell.pictures]
    name = path.stem
    parts.append(f"*All numbers and pictures were made when this page was built, by [{name}.py]({name}/{name}.py).*")
    return "\n\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--json", action="store_true", help="all cells, as the site's build reads them")
    options = parser.parse_args()
    ran = run_cells(options.notebook)
    sys.stdout.write(json.dumps([asdict(cell) for cell in ran]) if options.json else "\n".join(c.printed for c in ran))
