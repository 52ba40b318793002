"""The examples of calibration meet their targets, and write what they say."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest


@pytest.mark.slow
def test_a_quarter_of_the_respondents_keeps_the_margins(run_example: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    figures, printed = run_example("calibrate_survey", "--quick", output=output)
    assert {path.name for path in output.iterdir()} == {
        *("weights.csv", "targets.csv", "report.html", "plot.png", "report.json"),
    }
    assert figures["respondents"] == 236
    assert figures["error"] < 1e-3
    weights = pd.read_csv(output / "weights.csv")
    assert len(weights) == 236
    assert weights["weight"].between(1 - 1e-6, 16 + 1e-6).all()
    assert weights["weight"].sum() == pytest.approx(944, rel=1e-3)
    assert pd.read_csv(output / "targets.csv")["relative_error"].abs().max() < 1e-2
    assert "236 of 944 households" in printed


def test_persons_in_households_meet_their_margins(run_example: Any, tmp_path: Path) -> None:
    figures, printed = run_example("calibrate_margins", output=tmp_path)
    assert (figures["targets"], figures["error"] < 1e-5) == (14, True)
    assert len(pd.read_csv(tmp_path / "weights.csv")) == 500
    assert "14 targets, 500 of 500 households" in printed


@pytest.mark.slow
def test_a_nation_adds_up_from_its_districts(run_example: Any, tmp_path: Path) -> None:
    figures, printed = run_example("calibrate_nation", "--quick", output=tmp_path)
    assert figures["chosen"]["households"] == figures["at random"]["households"] == 1000
    assert figures["chosen"]["error"] < 1e-6
    assert {path.name for path in tmp_path.iterdir()} == {"targets.csv", "report.html", "plot.png", "report.json"}
    targets = pd.read_csv(tmp_path / "targets.csv")
    assert targets["relative_error"].abs().max() < 1e-5
    for kind in ("income", "children"):
        estimates = targets.set_index("target")["estimate"].filter(like=f"{kind}, ")
        assert estimates.filter(like="district").sum() == pytest.approx(estimates[f"{kind}, nation"], rel=1e-6)
    assert "1,000 of 4,000 households" in printed
