"""Every block of the README and the docs runs, every link leads somewhere, and CI does what the README promises."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from l0hooks.training import penalties

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
LINKED = [*PAGES, ROOT / "benchmarks" / "README.md", ROOT / "CHANGELOG.md"]
# they fit models, train, compile or start commands; of guides and migrations a few are fast
SLOW = {
    *("docs/calibration.md", "docs/calibration_migration.md", "docs/selection.md", "docs/sklearn.md"),
    *("docs/guides/onnx.md", "docs/guides/transformers.md", "docs/guides/distributed.md", "docs/guides/precision.md"),
    *("docs/guides/cnns.md", "docs/guides/checkpoints.md", "docs/guides/strength_or_budget.md"),
    *("docs/quickstart.md", "docs/installation.md", "docs/integrations.md", "docs/lagrangian.md", "docs/tracking.md"),
    *("docs/migration.md", "docs/migration_amlab.md", "docs/migration_l0_python.md"),
}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
INSTALL = re.compile(r'pip install -c constraints\.txt -e ("\.\[\w+\]"|\.)')


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """The language of each block, what it says, and the line where that begins."""
    text = page.read_text()
    return [(m[1], m[2], text.count("\n", 0, m.start(2))) for m in FENCE.finditer(text)]


def python(page: Path) -> list[str]:
    return [source for language, source, _ in blocks(page) if language == "python"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def marked(page: Path) -> Any:
    return pytest.param(page, marks=pytest.mark.slow if name_of(page) in SLOW else ())


def run(page: Path) -> Iterator[str]:
    """Run the blocks of a page one after the other; what each of them prints."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for language, source, line in blocks(page):
        printed = io.StringIO()
        if language == "python":
            with contextlib.redirect_stdout(printed):  # empty lines in front: errors name the line of the page
                exec(compile("\n" * line + source, str(page), "exec"), namespace)
        elif language == "sh" and page.name != "README.md" and not INSTALL.fullmatch(source.strip()):
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(source, shell=True, env=environment, capture_output=True, text=True, check=True)
            printed.write(done.stdout)
        yield printed.getvalue()


def shown(text: str) -> re.Pattern[str]:
    """What is shown of an output; … stands for anything."""
    return re.compile(".*?".join(map(re.escape, text.strip().split("…"))), re.DOTALL)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support:UserWarning")  # torch says so once a process
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # and so, of l0-python's sparse tensors
@pytest.mark.filterwarnings("ignore:.*(LeafSpec|does not have many workers|Found .* module)")  # lightning's own
@pytest.mark.parametrize("page", [marked(page) for page in PAGES if blocks(page)], ids=name_of)
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "_registry", dict(penalties._registry))  # pages register their own
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    output = ""
    for (language, source, line), printed in zip(blocks(page), run(page), strict=True):
        output += printed
        if language == "text" and not source.startswith("# AMLab"):  # its code, which cannot be installed
            assert shown(source).search(output), f"{page.name}:{line} shows what was not printed:\n{output[-4000:]}"


def test_there_is_no_block_that_is_not_run() -> None:
    """A fence that the expression for blocks does not see, or in another language, would never be run."""
    for page in LINKED:
        text = page.read_text()
        fences = re.findall(r"^[ \t>]*(?:```|~~~).*$", text, re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), page
        assert page in PAGES or not fences, f"{page} is not run"
        languages = {language for language, _, _ in blocks(page)}
        assert languages <= {"python", "sh", "text"} | ({"bibtex"} if page.name == "README.md" else set()), page
        assert not re.search(r"<pre|^\t", text, re.MULTILINE), page


def test_slow_pages_exist() -> None:
    assert {name_of(page) for page in PAGES} >= SLOW


def test_text_blocks_are_output_not_code() -> None:
    for page in PAGES:
        for language, source, line in blocks(page):
            looks = re.search(r"^(import|from|def|class|python|pip|\$|>>>) ?", source, re.MULTILINE)
            assert language != "text" or not looks, f"{page}:{line}"


def test_the_readme_example_is_short() -> None:
    example = python(ROOT / "README.md")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    commands = [source for language, source, _ in blocks(ROOT / "README.md") if language == "sh"]
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    install, test = (part.strip() for part in commands[1].split("&&")[2:])
    assert install.replace("pip install", "pip install -q") in ci
    assert test in ci
    main_job = Path(commands[0].split()[-1])  # .ci/run runs it as a slow test
    assert f'"{main_job.name}"' in (ROOT / "tests" / "docs" / "test_examples.py").read_text()
    assert '-m "slow or not slow"' in ci


def headings(page: Path) -> set[str]:
    """The anchors of a page: its headings as GitHub and MkDocs write them, and its own ones."""
    text = FENCE.sub("", page.read_text())
    found = set(re.findall(r'id="([^"]+)"|\{ ?#([\w-]+)', text))
    anchors = {one for pair in found for one in pair if one}
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", title.lower()).strip()
        anchors.add(re.sub(r"\s", "-", plain))
        anchors.add(re.sub(r"[\s-]+", "-", plain))
    return anchors


def generated() -> set[Path]:
    """What the site's build adds to the docs."""
    source = (DOCS / "assets" / "figures.py").read_text()
    names = re.findall(r'^    "([\w-]+)": \(\w+, \(', source, re.MULTILINE)
    return {DOCS / "figures" / f"{name}-{scheme}.svg" for name in names for scheme in ("light", "dark")}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = LINK.findall(FENCE.sub("", page.read_text())) + re.findall(r'(?:src|srcset)="([^"]+)"', page.read_text())
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() or there in generated(), f"{target} in {page}"
        if anchor and there.suffix == ".md":
            assert anchor in headings(there), f"{target} in {page}"
