"""``recipe``: settings for a run of some length, and the schedule of its learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l0hooks
from l0hooks.errors import InvalidValueError, SpecError
from l0hooks.training import recipe

X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))


@pytest.mark.parametrize("granularity", ["weight", "coupled"])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_one_line_each_makes_a_model_of_the_size_asked_for(granularity: Any, make: type[torch.optim.Optimizer]) -> None:
    model, plan = network(), recipe(steps=60, granularity=granularity)
    examples = (X[:4],) if granularity == "coupled" else None
    l0hooks.sparsify(model, plan.spec, example_inputs=examples, budget=plan.budget(sparsity=0.6))
    optimizer = make(plan.param_groups(model, lr=1e-2))
    scheduler = plan.scheduler(optimizer)
    before = F.cross_entropy(model.eval()(X), Y).item()
    model.train()
    for _ in range(60):
        loss = F.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    small, report = l0hooks.prune(model, example_inputs=examples, return_report=True)
    assert not report.budgets[0].missed
    left = sum(int(p.count_nonzero()) for p in small.parameters() if p.dim() > 1)
    assert left <= 0.4 * (8 * 32 + 32 * 2)
    assert F.cross_entropy(small.eval()(X), Y).item() < before
    assert optimizer.param_groups[0]["lr"] == 0
    assert optimizer.param_groups[1]["lr"] == plan.gate_lr


def test_the_optimiser_starts_anew_once_the_support_is_fixed() -> None:
    model, plan = network(), recipe(steps=10)
    l0hooks.sparsify(model, plan.spec, budget=plan.budget(keep=100))
    optimizer = torch.optim.Adam(plan.param_groups(model, lr=1e-2))
    scheduler = plan.scheduler(optimizer)
    counts = []
    for _ in range(10):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        counts.append(int(optimizer.state[model[0].bias]["step"]))
        scheduler.step()
    assert counts == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]


def test_a_scheduler_resumes() -> None:
    plan = recipe(steps=20)
    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0) for _ in range(2)]
    first, second = map(plan.scheduler, optimizers)
    for _ in range(15):
        optimizers[0].step()
        first.step()
    second.load_state_dict(first.state_dict())
    optimizers[1].step()
    first.step()
    second.step()
    assert second.get_last_lr() == first.get_last_lr()
    assert 0 < second.get_last_lr()[0] < 1


def test_settings_of_the_budget_can_be_changed() -> None:
    budget = recipe(steps=1000, granularity="coupled").budget(keep=5000, unit="macs", cut_every=None)
    assert (budget.keep, budget.unit, budget.cut_every, budget.steps) == (5000, "macs", None, 700)
    assert recipe(steps=1000).budget(sparsity=0.5).cut_every is None
    assert recipe(steps=1000, granularity="coupled").budget(sparsity=0.5).cut_every == 46


def test_gates_learn_faster_in_a_short_run() -> None:
    rates = [recipe(steps=steps).gate_lr for steps in (100, 600, 2814, 100_000)]
    assert rates == pytest.approx([0.3, 90 / 420, 90 / 1969, 0.02])
    assert recipe(steps=600, granularity="coupled").gate_lr == 0.1


@pytest.mark.parametrize("steps", [1, 0, -5, 2.5, "100"])
def test_a_run_without_steps_is_refused(steps: Any) -> None:
    with pytest.raises(InvalidValueError, match="steps must be those of the whole run"):
        recipe(steps=steps)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="granularity"):
        recipe(steps=10, granularity="rows")  # type: ignore[arg-type]
    model = network()
    l0hooks.sparsify(model)
    with pytest.raises(InvalidValueError, match="in groups of their own"):
        recipe(steps=10).scheduler(torch.optim.Adam(model.parameters()))
