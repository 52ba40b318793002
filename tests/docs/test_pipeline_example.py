"""``examples/select_in_pipeline.py`` runs, and says what it chose."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "select_in_pipeline.py"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[float]]:
    """How many features it names, and the two accuracies."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    (k,) = re.findall(r"^(\d+) of 30 features:", printed, re.MULTILINE)
    assert len(re.findall("importance", printed)) == int(k)
    (found,) = re.findall(r"held-out accuracy ([\d.]+), with all features ([\d.]+)", printed)
    return int(k), [float(accuracy) for accuracy in found]


@pytest.mark.parametrize("estimator", ["mlp", "linear"])
def test_it_runs(estimator: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--k", "2", "3", "--steps", "50", "--folds", "2", "--estimator", estimator)
    k, (few, every) = run(monkeypatch, capsys, *options)
    assert k in (2, 3)
    assert few > 0.85
    assert every > 0.95


@pytest.mark.slow
def test_a_few_features_are_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    k, (few, every) = run(monkeypatch, capsys, "--steps", "250")  # half of them, for time
    assert k <= 8
    assert few >= every - 0.04
