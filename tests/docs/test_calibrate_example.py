"""``examples/calibrate_survey.py`` runs, keeps the margins, and writes what it says."""

import json
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "calibrate_survey.py"


def test_a_quarter_of_the_respondents_keeps_the_margins(tmp_path, monkeypatch, capsys):
    for needed in ("matplotlib", "pandas", "statsmodels"):
        pytest.importorskip(needed)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--quick", "--quiet", "--output", str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {
        *("weights.csv", "targets.csv", "report.html", "plot.png", "report.json"),
    }
    figures = json.loads((output / "report.json").read_text())
    assert figures["respondents"] == 236
    assert figures["error"] < 1e-3
    weights = pd.read_csv(output / "weights.csv")
    assert len(weights) == 236
    assert weights["weight"].between(1 - 1e-6, 16 + 1e-6).all()
    assert weights["weight"].sum() == pytest.approx(944, rel=1e-3)
    assert pd.read_csv(output / "targets.csv")["relative_error"].abs().max() < 1e-2
    assert "236 of 944 households" in capsys.readouterr().out
