"""``examples/shrink_transformer.py`` runs, writes what it says, and reaches its figures in half its epochs."""

from pathlib import Path
from typing import Any

import pytest
import torch

FIGURES = {"parameters", "layers", "encoder_parameters", "macs", "accuracy", "milliseconds"}


@pytest.mark.slow
def test_half_of_the_encoder_goes_and_the_accuracy_stays(run_example: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report, _ = run_example("shrink_transformer", "--seed", "0", "--epochs", "14", output=output)
    assert {path.name for path in output.iterdir()} == {"pruned.pt", "report.json", "report.png"}
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    state = torch.load(output / "pruned.pt", weights_only=True)
    assert not any("parametrizations" in name for name in state)
    assert report["seed"] == 0
    dense, pruned = report["dense"], report["pruned"]
    assert set(dense) == set(pruned) == FIGURES
    assert sum(tensor.numel() for tensor in state.values()) == pruned["parameters"]
    assert dense["accuracy"] > 0.95
    assert pruned["accuracy"] >= dense["accuracy"] - 0.015
    assert pruned["encoder_parameters"] <= 0.5 * dense["encoder_parameters"]
    assert pruned["macs"] <= 0.6 * dense["macs"]
