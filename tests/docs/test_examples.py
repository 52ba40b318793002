"""The main job: what ``examples/retrofit_digits.py`` promises, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "retrofit_digits.py"


def run(output: Path, *options: str) -> dict:
    command = [sys.executable, str(EXAMPLE), "--quiet", "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "whole model:" in done.stdout
    assert (output / "report.png").stat().st_size > 10_000
    return json.loads((output / "report.json").read_text())


def check_files(output: Path) -> None:
    """The saved model is the dense class, sparse, and the ONNX file computes the same."""
    spec = importlib.util.spec_from_file_location("retrofit_digits", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.make_model().eval()
    model.load_state_dict(torch.load(output / "pruned.pt", weights_only=True))
    x = torch.rand(2, 1, 8, 8)
    session = onnxruntime.InferenceSession(output / "pruned.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-4)


def test_the_example_runs_and_writes_what_it_says(tmp_path: Path) -> None:
    report = run(tmp_path, "--epochs", "1")
    assert 0 <= report["sparsity"] < 1
    check_files(tmp_path)


@pytest.mark.slow
def test_ninety_percent_sparse_at_no_more_than_one_point_of_accuracy(tmp_path: Path) -> None:
    reports = [run(tmp_path / seed, "--seed", seed) for seed in "012"]
    for seed, report in zip("012", reports, strict=True):
        assert report["sparsity"] >= 0.9
        check_files(tmp_path / seed)
    assert sum(r["dense_accuracy"] - r["accuracy"] for r in reports) / 3 <= 0.01
