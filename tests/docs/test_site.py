"""What the site is made of beside Markdown: figures, mathematics, the front page's picture and the README's figures."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # ziamath, reading its font
ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "docs" / "assets"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ASSETS))
    spec = importlib.util.spec_from_file_location(name, ASSETS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_every_figure_is_drawn_in_both_inks_and_stands_on_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures = load("figures", monkeypatch)
    theory = (ROOT / "docs" / "theory.md").read_text()
    for name in figures.FIGURES:
        light, dark = (figures.svg(name, scheme) for scheme in ("light", "dark"))
        assert ElementTree.fromstring(light).tag.endswith("svg")
        assert figures.INK["light"] in light
        assert figures.INK["dark"] in dark
        assert name != "start" or light == figures.svg(name, "light")
        for scheme in ("light", "dark"):
            assert f"figures/{name}-{scheme}.svg#only-{scheme}" in theory


def test_formulas_become_pictures_with_their_source_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziamath")
    hooks = load("hooks", monkeypatch)
    page = r'x <span class="arithmatex">\(a &lt; \beta\ln b\)</span>, <div class="arithmatex">\[\frac12\]</div>'
    found = hooks.on_page_content(page)
    assert "arithmatex" not in found
    assert r'aria-label="a &lt; \beta\ln b"' in found
    assert found.count("<svg") == 2
    assert re.search(r"</svg>,</span>", found)  # a line never begins with the comma


def test_long_names_in_tables_break_where_a_reader_would(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziamath")
    convert = load("hooks", monkeypatch).on_page_content
    assert convert("<td><code>a_name(of=&quot;x&quot;)</code>") == "<td><code>a_name(of=&quot;x&quot;)</code>"
    assert convert("<td><code>a_name(of=&quot;x&quot;)</code></td>") == (
        "<td><code>a_<wbr>name(<wbr>of=&quot;x&quot;)</code></td>"
    )
    assert convert("<td><code>short_name</code></td>") == "<td><code>short_name</code></td>"


def test_names_in_docstrings_become_links(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziamath")
    found = load("hooks", monkeypatch).on_page_content("see :func:<code>l0hooks.set_budget</code>")
    assert found == 'see <autoref identifier="l0hooks.set_budget" optional><code>set_budget</code></autoref>'


def test_parameters_that_share_an_entry_get_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("griffe")
    split = load("docstrings", monkeypatch).split
    assert split("a, b : float\n    Ends.\nc : int\n") == "a : float\n    Ends.\nb : float\n    Ends.\nc : int\n"


def test_nothing_on_the_site_is_loaded_from_elsewhere() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text()
    assert "http" not in configuration
    assert "font: false" in configuration


def test_the_picture_is_that_of_its_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    example = ROOT / "examples" / "draw_network.py"
    monkeypatch.setattr(sys, "argv", [str(example), "--epochs", "2", "--output", str(tmp_path)])
    runpy.run_path(str(example), run_name="__main__")
    report = json.loads((tmp_path / "report.json").read_text())
    committed = json.loads((ROOT / "docs" / "images" / "report.json").read_text())
    assert report["weights"] == committed["weights"] == [2368, 236]
    assert committed["accuracy"][1] > committed["accuracy"][0] - 0.01  # as the README says beneath it
    for scheme in ("light", "dark"):
        assert 20_000 < (tmp_path / f"network-{scheme}.png").stat().st_size < 200_000


def test_the_readmes_figures_are_those_of_the_benchmarks() -> None:
    readme, measured = ((ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md"))
    table = readme[readme.index("## Measured") : readme.index("## Coming from")]
    rows = [row.split("|")[2:5] for row in table.splitlines() if row.startswith("| ")][2:]
    assert len(rows) >= 8
    sections = measured.split("\n## ")[1:]
    for ours, theirs, command in rows:
        words = f"`python -m {command.strip(' `')}"
        (section,) = (one for one in sections if re.search(rf"{re.escape(words)}[ `]", one.splitlines()[0]))
        for number in re.findall(r"(?<![\w-])\d*\.?\d+(?![\w.])", ours + theirs):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\.?\d)", section), f"{number}, {words}"


def test_the_page_of_examples_lists_them_all() -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "docs" / "examples.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    assert all(len((ROOT / "examples" / name).read_text().splitlines()) < 140 for name in listed)


def test_the_laws_name_tests_that_exist() -> None:
    contributing = (ROOT / "docs" / "contributing.md").read_text()
    named = re.findall(r"`(tests/[\w/.]+?)(?:::(\w+))?`", contributing)
    assert len(named) > 15
    for path, test in named:
        assert (ROOT / path).exists(), path
        assert f"def {test}(" in (ROOT / path).read_text() if test else True, test
