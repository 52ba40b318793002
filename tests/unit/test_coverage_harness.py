"""The harness that counts which architectures of other libraries can be pruned."""

import json

import pytest
import torch
from torch import Tensor, nn

from benchmarks import coverage
from benchmarks.architectures import Architecture, NotBuiltError, build, names_of


class Refused(nn.Module):
    """No weight reads what its layer writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def images(batch: int, seed: int) -> tuple[Tensor]:
    return (torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed)),)


@pytest.mark.parametrize(
    ("model", "result"),
    [
        (nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)), "exact, as modules"),
        (Refused(), "refused before training"),
    ],
)
def test_a_model_is_gated_pruned_and_compared(monkeypatch, model: nn.Module, result: str) -> None:
    monkeypatch.setattr(coverage, "build", lambda library, name: Architecture(model.eval(), images, images))
    record = coverage.examine("timm", "one")
    assert record["result"] == result
    assert record.get("removed", 0) == pytest.approx(21 / 65 if result.startswith("exact") else 0, abs=1e-3)


def test_a_wrong_result_is_inexact(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)).eval()
    monkeypatch.setattr(coverage, "build", lambda library, name: Architecture(model, images, images))
    prune = coverage.l0hooks.prune

    def wrong(*args, **kwargs):
        small, report = prune(*args, **kwargs)
        small[2].bias.data += 1
        return small, report

    monkeypatch.setattr(coverage.l0hooks, "prune", wrong)
    assert coverage.examine("timm", "one")["result"] == "inexact"


def test_a_transformer_is_built_small_and_examined_by_the_command(tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(
        coverage, "in_a_process", lambda library, name, seed, limit: coverage.examine(library, name, seed)
    )
    arguments = ["--library", "transformers", "--names", "bert", "no_such", "--json", str(tmp_path / "found.json")]
    assert coverage.main(arguments) == 0
    bert, absent = json.loads((tmp_path / "found.json").read_text())["records"]
    assert bert["result"] == "exact, as modules"
    assert bert["groups"] == 4
    assert absent["result"] == "not built"
    assert "not built: transformers no_such" in capsys.readouterr().out


def test_a_family_counts_once_and_what_cannot_be_built_says_why() -> None:
    pytest.importorskip("transformers")
    names = names_of("transformers")
    assert len(names) == len(set(names)) > 100
    with pytest.raises(NotBuiltError):
        build("transformers", "no_such")


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended() -> None:
    assert coverage.in_a_process("timm", "no_such", seed=0, limit=0.01)["result"] == "out of time"
