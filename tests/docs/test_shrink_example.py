"""``examples/shrink_transformer.py`` runs, writes what it says, and reaches the figures it promises."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "shrink_transformer.py"
FIGURES = {"parameters", "layers", "encoder_parameters", "macs", "accuracy", "milliseconds"}


def run(output: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    for needed in ("matplotlib", "sklearn", "tqdm", "transformers"):
        pytest.importorskip(needed)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--quiet", "--output", str(output), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return json.loads((output / "report.json").read_text())


def test_it_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(tmp_path / "out", monkeypatch, "--epochs", "1", "--seed", "3")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pruned.pt", "report.json", "report.png"}
    assert report["seed"] == 3
    assert set(report["dense"]) == set(report["pruned"]) == FIGURES
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    state = torch.load(tmp_path / "out" / "pruned.pt", weights_only=True)
    assert sum(tensor.numel() for tensor in state.values()) == report["pruned"]["parameters"]
    assert not any("parametrizations" in name for name in state)


@pytest.mark.slow
def test_half_of_the_encoder_goes_and_the_accuracy_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(tmp_path, monkeypatch, "--seed", "0")
    dense, pruned = report["dense"], report["pruned"]
    assert dense["accuracy"] > 0.95
    assert pruned["accuracy"] >= dense["accuracy"] - 0.015
    assert pruned["encoder_parameters"] <= 0.5 * dense["encoder_parameters"]
    assert pruned["macs"] <= 0.6 * dense["macs"]
