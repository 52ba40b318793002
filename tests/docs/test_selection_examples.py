"""What ``examples/select_features.py`` and ``examples/choose_rank.py`` promise, and what they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, output: Path, *options: str) -> tuple[dict, str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quiet", "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return json.loads((output / "report.json").read_text()), done.stdout


def test_features_are_selected(tmp_path: Path) -> None:
    report, out = run("select_features", tmp_path, "--quick", "--keep", "4")
    assert len(set(report["features"])) == 4
    assert ", ".join(report["features"]) in out


def test_a_rank_is_chosen(tmp_path: Path) -> None:
    report, out = run("choose_rank", tmp_path, "--quick", "--factors", "6")
    assert report["rank"] in (2, 4)
    assert report["rank_of_the_result"] == report["rank"]
    assert report["svd"] <= report["error"] < 1
    assert "truncated SVD" in out


@pytest.mark.slow
def test_five_features_of_thirty_are_as_good_as_all_and_better_than_random_ones(tmp_path: Path) -> None:
    reports = [run("select_features", tmp_path, "--seed", str(seed))[0] for seed in range(3)]
    mean = {name: sum(r[name] for r in reports) / 3 for name in ("all", "gated", "random")}
    assert mean["gated"] >= mean["all"] - 0.02
    assert mean["gated"] > mean["random"] + 0.01


@pytest.mark.slow
def test_the_error_is_that_of_the_best_factorisation_of_the_same_rank(tmp_path: Path) -> None:
    report, _ = run("choose_rank", tmp_path, "--keep", "10")
    assert report["rank"] == report["rank_of_the_result"] == 10
    assert report["error"] <= 1.01 * report["svd"]
