"""What MkDocs is asked to do beside Markdown: draw the figures, and set mathematics without a script or a network."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

import ziamath
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import figures  # beside this file, which MkDocs loads by its path

ziamath.config.svg2 = False  # paths: symbols' identifiers would clash on a page
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>([,.;:)]?)', re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr):\s*<code>~?([\w.]+)</code>")  # docstrings are for Sphinx, too
_BEFORE = re.compile(r"(?<=[a-z])(?=\\(?:operatorname|log|ln)\b)")  # β ln x, not βlnx
_AFTER = re.compile(r"(\\operatorname\{\w+\}|\\log|\\ln)\s*(?=[\\a-zA-Z])")
_CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
_CODE = re.compile(r"<code>([^<]{16,})</code>")
_BREAK = re.compile(r"(?<=[_.(=,])(?=[^\W\d])")
_DISPLAY, _INLINE = 17, 15.5  # pixels


def on_files(files: Files, config: Any) -> Files:
    """Add ``figures/<name>-light.svg`` and ``-dark.svg``."""
    for name in figures.FIGURES:
        for scheme in figures.INK:
            uri = f"figures/{name}-{scheme}.svg"
            files.append(File.generated(config, uri, content=figures.svg(name, scheme)))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Names as links, breakable in tables; formulas as SVG in the text's colour, with their source to be read aloud."""
    linked = _ROLE.sub(_link, content)
    return _FORMULA.sub(_typeset, _CELL.sub(lambda cell: _CODE.sub(_breakable, cell[0]), linked))


def _breakable(found: re.Match[str]) -> str:
    """A long name in a table, which a phone may break where a reader would."""
    return f"<code>{_BREAK.sub('<wbr>', found[1])}</code>"


def _link(found: re.Match[str]) -> str:
    name = found[1]
    return f'<autoref identifier="{html.escape(name)}" optional><code>{name.rpartition(".")[2]}</code></autoref>'


def _typeset(found: re.Match[str]) -> str:
    tag, bracket, source, stop = found.groups()
    inline, tex = bracket == "(", html.unescape(source).strip()
    spaced = _AFTER.sub(r"\1\\,", _BEFORE.sub(r"\\,", tex))
    formula = ziamath.Latex(spaced, size=_INLINE if inline else _DISPLAY, color="currentColor", inline=inline)
    drawn = formula.svg()
    label = f'role="img" aria-label="{html.escape(tex)}"'
    style = f' style="vertical-align:{formula.getyofst():.2f}px"' if inline else ""
    drawn = drawn.replace("<svg ", f"<svg {label}{style} ", 1)
    return f'<{tag} class="formula">{drawn}{stop}</{tag}>'
