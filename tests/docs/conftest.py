"""What the tests of the examples share."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = ("matplotlib", "onnxruntime", "onnxscript", "pandas", "sklearn", "statsmodels", "tqdm", "transformers")


@pytest.fixture
def run_example(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run an example as a command with options: what it reports and prints. It writes to ``output``, if given."""
    for needed in NEEDED:
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")

    def run(name: str, *options: str, output: Path | None = None) -> tuple[dict[str, Any], str]:
        output = tmp_path_factory.mktemp(name) if output is None else output
        script = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), "--quiet", "--output", str(output), *options])
        runpy.run_path(str(script), run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err == ""
        return json.loads((output / "report.json").read_text()), printed.out

    return run
