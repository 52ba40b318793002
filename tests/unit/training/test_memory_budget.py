"""Budgets in bytes: what the parameters of a model take, each by its dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from l0hooks import Budget, Tracker, iter_gates, param_groups, penalty, prune, set_budget, sparsify, summary
from l0hooks.errors import SpecError


class Mixed(nn.Module):
    """Hidden neurons in float32 and in float64, with tied and ungated parameters beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6))
        self.second = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 6)).double()
        self.norm = nn.LayerNorm(6)
        self.tied = self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x + self.first(self.norm(x))
        return hidden.to(torch.float64) + self.second(self.tied(hidden).to(torch.float64))


X = (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),)


def bytes_of(model: nn.Module) -> int:
    own = {id(p) for _, gate in iter_gates(model) for p in gate.parameters()}
    return sum(p.untyped_storage().nbytes() for p in model.parameters() if id(p) not in own)


@pytest.mark.parametrize("method", ["shift", "lagrangian"])
def test_the_pruned_model_takes_the_bytes_asked_for(method: str) -> None:
    torch.manual_seed(0)
    model = Mixed()
    whole = bytes_of(model)
    budget = Budget(sparsity=0.4, unit="memory", steps=10, method=method)  # type: ignore[arg-type]
    sparsify(model, "coupled", example_inputs=X, budget=budget)
    tracker = Tracker(model, unit="memory")
    optimizer = torch.optim.SGD(param_groups(model, lr=0.01, gate_lr=0.5))
    (rule,) = {id(gate.rule): gate.rule for _, gate in iter_gates(model)}.values()
    assert rule is not None
    assert rule.size.whole == whole
    for _ in range(10):
        (model(torch.randn(8, 6)).square().mean() + penalty(model, budget=1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        tracker.log()
        if method == "shift" and not rule.finished:
            assert tracker.rows[-1]["expected"] == pytest.approx(rule.scheduled, rel=1e-5)
    report = summary(model)
    small = prune(model, example_inputs=X)
    left, member = bytes_of(small), 8 * (6 + 1 + 6)
    assert 0.6 * whole - member < left <= 0.6 * whole
    assert left == report.model_memory_kept == tracker.rows[-1]["evaluated"] == tracker.exported(small)
    assert report.model_memory == report.to_dict()["model_memory"] == whole


def test_the_expected_bytes_are_those_of_the_products_by_hand() -> None:
    model = Mixed()
    sparsify(model, "coupled", example_inputs=X)
    probabilities = {}
    for name, gate in iter_gates(model):
        with torch.no_grad():
            gate.log_alpha.copy_(torch.randn(gate.log_alpha.shape, generator=torch.Generator().manual_seed(len(name))))
        probabilities[int(gate.log_alpha.numel())] = gate.keep_prob().sum().item()
    members = 4 * 13 * probabilities[20] + 8 * 13 * probabilities[30]
    by_hand = members + 4 * 6 + 8 * 6 + 4 * 12  # biases of the last layers, and the norm
    assert Tracker(model, unit="memory")._measure()["expected"] == pytest.approx(by_hand, rel=1e-5)


def test_bytes_follow_the_dtype_that_the_model_has_now() -> None:
    model = Mixed().double()
    sparsify(model, "coupled", example_inputs=(X[0].double(),))
    before = Tracker(model, unit="memory")._measure()
    model.float()
    model.double()
    assert Tracker(model, unit="memory")._measure() == before
    halved = Tracker(model.float(), unit="memory")._measure()
    assert halved["expected"] == pytest.approx(np.float64(before["expected"]) / 2, rel=1e-5)


def test_other_gates_are_refused_for_their_zeros_take_bytes() -> None:
    model = Mixed()
    sparsify(model, {"first.*": "weight"})
    with pytest.raises(SpecError, match="the zeros of other gates take theirs") as error:
        set_budget(model, Budget(sparsity=0.5, unit="memory"))
    assert "other gates on 'first.0'" in str(error.value)
    assert all(gate.rule is None for _, gate in iter_gates(model))
