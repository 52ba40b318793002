"""The main job: what ``examples/retrofit_digits.py`` promises, and what it writes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "retrofit_digits.py"


def check_files(output: Path) -> None:
    """The saved model is the dense class, sparse, and the ONNX file computes the same."""
    assert (output / "report.png").stat().st_size > 10_000
    model = runpy.run_path(str(EXAMPLE))["make_model"]().eval()
    model.load_state_dict(torch.load(output / "pruned.pt", weights_only=True))
    session = onnxruntime.InferenceSession(output / "pruned.onnx")
    for batch in (1, 2, 7):
        x = torch.rand(batch, 1, 8, 8)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_ninety_percent_sparse_at_no_more_than_one_point_of_accuracy_and_no_warning(tmp_path: Path) -> None:
    """In a process of its own, for torch gives some of its warnings once."""
    command = [sys.executable, str(EXAMPLE), "--seed", "0", "--quiet", "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "whole model:" in ended.stdout
    check_files(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sparsity"] >= 0.9
    assert report["dense_accuracy"] - report["accuracy"] <= 0.01
