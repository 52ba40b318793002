"""Autocast, loss scaling, accelerate and the compiler around a budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import l0hooks

STEPS = 4


def build(spec: str = "weight", steps: int = STEPS) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    budget = l0hooks.Budget(sparsity=0.5, steps=steps)
    l0hooks.sparsify(model, spec, budget=budget, example_inputs=(torch.randn(2, 8),))
    return model


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(l0hooks.param_groups(model, lr=1e-2, gate_lr=0.1, weight_decay=0.1))


def step_of(model: nn.Module) -> int:
    rule = next(l0hooks.iter_gates(model))[1].rule
    assert rule is not None
    return rule.step


def kept(model: nn.Module) -> float:
    masks = [gate.support().flatten() for _, gate in l0hooks.iter_gates(model)]
    return float(torch.cat(masks).float().mean())


@pytest.mark.parametrize("spec", ["weight", "output", "coupled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_scaling_under_autocast_counts_only_the_steps_that_are_taken(dtype: torch.dtype, spec: str) -> None:
    model = build(spec)
    optimizer, scaler = optimizer_for(model), torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for batch in range(STEPS + 3):
        with torch.autocast("cpu", dtype):
            loss = model(torch.randn(4, 8)).float().square().mean()
        scaler.scale(loss if batch != 1 else loss * torch.inf).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert step_of(model) == min(batch + 1 - (batch >= 1), STEPS)
    assert kept(model) == 0.5
    assert all(gate.log_alpha.dtype == torch.float32 for _, gate in l0hooks.iter_gates(model))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.slow
def test_accelerate_accumulates_saves_and_resumes(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # another test's
    for resume in (False, True):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        accelerator.free_memory()
        model = build()
        model, optimizer = accelerator.prepare(model, optimizer_for(model))
        if resume:
            accelerator.load_state(tmp_path / "state")
            assert step_of(model) == 2
        for batch in range(4 if resume else 0, 2 * STEPS + 2):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(4, 8)).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            assert step_of(model) == min((batch + 1) // 2, STEPS)
            if batch == 3 and not resume:
                accelerator.save_state(tmp_path / "state")
        assert kept(model) == 0.5


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "spec"),
    [
        ("aot_eager", "coupled"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("aot_eager", "weight"), ("aot_eager", "output"), ("inductor", "coupled"))
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own use of torch.jit
def test_a_compiled_model_runs_a_budget_to_its_end_and_beyond(backend: str, spec: str) -> None:
    steps, ends = 10, []  # more than the compiler would recompile
    for compiled in (False, True):
        model = build(spec, steps)
        call = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        optimizer = optimizer_for(model)
        torch.manual_seed(2)
        for _ in range(steps + 3):
            call(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
        model.eval()
        ends.append((kept(model), call(torch.ones(4, 8)).detach(), model.state_dict()))
    assert ends[0][0] == ends[1][0] == 0.5
    torch.testing.assert_close(ends[0][1], ends[1][1], atol=1e-4, rtol=1e-4)
    for key in ends[0][2]:
        torch.testing.assert_close(ends[0][2][key], ends[1][2][key], atol=1e-4, rtol=1e-4, msg=key)
