"""What ``examples/select_features.py`` and ``examples/choose_rank.py`` promise, and what they write."""

from __future__ import annotations

from typing import Any

import pytest


def test_features_are_selected(run_example: Any) -> None:
    report, out = run_example("select_features", "--quick", "--keep", "4")
    assert len(set(report["features"])) == 4
    assert ", ".join(report["features"]) in out


def test_a_rank_is_chosen(run_example: Any) -> None:
    report, out = run_example("choose_rank", "--quick", "--factors", "6")
    assert report["rank"] in (2, 4)
    assert report["rank_of_the_result"] == report["rank"]
    assert report["svd"] <= report["error"] < 1
    assert "truncated SVD" in out


@pytest.mark.slow
def test_five_features_of_thirty_are_as_good_as_all_and_better_than_random_ones(run_example: Any) -> None:
    reports = [run_example("select_features", "--seed", str(seed))[0] for seed in range(2)]
    mean = {name: sum(r[name] for r in reports) / 2 for name in ("all", "gated", "random")}
    assert mean["gated"] >= mean["all"] - 0.02
    assert mean["gated"] > mean["random"] + 0.01


@pytest.mark.slow
def test_the_error_is_that_of_the_best_factorisation_of_the_same_rank(run_example: Any) -> None:
    report, _ = run_example("choose_rank", "--keep", "10")
    assert report["rank"] == report["rank_of_the_result"] == 10
    assert report["error"] <= 1.01 * report["svd"]
