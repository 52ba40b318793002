"""Settings and helpers that every test shares."""

import gc
from collections.abc import Callable

import pytest
import torch
from heavy_structures import mark_heavy, mark_oldest
from torch import nn

from l0hooks import iter_gates
from l0hooks.gates.kernels import loading

for _helper in (
    *("coupled_models", "family_laws", "granularity_laws", "penalty_laws", "structure_oracle", "traced_models"),
    *("estimator_laws", "item_gate_laws", "interpreted_kernels"),
):
    pytest.register_assert_rewrite(_helper)  # their asserts explain themselves, too
torch.set_num_threads(1)
pytest.register_assert_rewrite("calibration_stages")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no process is left with one when the others have ended."""
    mark_heavy(items)
    mark_oldest(items)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Leave what imports and collection made out of every later search for garbage: it is large, and it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Numba were not installed."""
    monkeypatch.setattr(loading, "kernels_for", lambda count, device: None)
    monkeypatch.setattr(loading, "kernels_on", lambda device: None)
    monkeypatch.setattr(loading, "median_kernels_for", lambda count, device: None)


@pytest.fixture(params=["by Numba", "by torch"])
def both_ways(request: pytest.FixtureRequest) -> None:
    """Gates with Numba's kernels, if it is installed, and without."""
    if request.param == "by torch":
        request.getfixturevalue("no_kernels")


@pytest.fixture(scope="session")
def close_gates() -> Callable[..., int]:
    """A function that closes about a third of a model's gates at random, in place, and says how many."""

    @torch.no_grad()
    def close(model: nn.Module, share: float = 1 / 3) -> int:
        closed = 0
        for _, gate in iter_gates(model):
            shut = torch.rand_like(gate.log_alpha) < share
            # open gates between about 0.4 and 1, closed ones well below one half
            gate.log_alpha.copy_(torch.where(shut, -4.0, torch.empty_like(gate.log_alpha).uniform_(-0.2, 3.0)))
            closed += int(shut.sum())
        return closed

    return close
