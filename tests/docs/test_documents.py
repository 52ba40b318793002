"""Every Python block of the README and the docs runs, and what the README promises is what CI does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from l0hooks import penalties

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


def with_code() -> list[Path]:
    return [page for page in PAGES if blocks(page)]


@pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support:UserWarning")  # torch says so once a process
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # and so, of l0-python's sparse tensors
@pytest.mark.filterwarnings("ignore:.*(LeafSpec|does not have many workers|Found .* module)")  # lightning's own
@pytest.mark.parametrize("page", with_code(), ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "_registry", dict(penalties._registry))  # pages register their own
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    source = "\n".join(blocks(page))
    exec(compile(source, str(page), "exec"), {"__name__": page.stem})


def test_every_fenced_block_is_python_or_shell() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)[::2]
        assert set(fences) <= {"python", "sh", "text"}, page  # text: what a block prints


def test_the_readme_example_is_short() -> None:
    example = blocks(ROOT / "README.md")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    commands = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    install, run = (part.strip() for part in commands[1].split("&&")[2:])
    assert install.replace("pip install", "pip install -q") in ci
    assert run in ci
    assert commands[0].split("&&")[-1].strip() in ci


def test_every_relative_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), (page, target)
