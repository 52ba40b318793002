"""DDP and ``fully_shard`` on two processes: one budget, one support, everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import l0hooks
from l0hooks.errors import StateError

from processes import in_processes

pytestmark = pytest.mark.slow  # spawning two processes takes their import of torch
STEPS = 6


def build(spec: str = "output", sparsity: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 15), nn.ReLU(), nn.Linear(15, 4))
    l0hooks.sparsify(model, spec, budget=l0hooks.Budget(sparsity=sparsity, steps=STEPS))
    return model


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(l0hooks.param_groups(model, lr=1e-2, gate_lr=0.1, weight_decay=0.1))


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 8, generator=generator)


def supports(model: nn.Module) -> list[Tensor]:
    return [gate.support().clone() for _, gate in l0hooks.iter_gates(model)]


def log_odds(model: nn.Module) -> list[Tensor]:
    return [gate.log_alpha.detach().clone() for _, gate in l0hooks.iter_gates(model)]


def ddp(rank: int, spec: str) -> dict[str, Any]:
    model = build(spec)
    torch.manual_seed(rank)
    wrapped = DistributedDataParallel(model, broadcast_buffers=True)
    optimizer = optimizer_for(wrapped)
    history = []
    for step in range(STEPS + 3):
        wrapped(batch(step, rank)).square().mean().backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append((log_odds(model), supports(model)))
    plain = l0hooks.prune(model.eval(), example_inputs=(batch(0, 0),))
    return {"history": history, "pruned": plain.state_dict(), "weights": model.state_dict()}


@pytest.mark.parametrize("spec", ["output", "weight"])
def test_ddp_keeps_the_gates_of_every_process_equal_to_the_end_of_a_budget_and_beyond(spec: str) -> None:
    one, other = in_processes(ddp, spec)
    for (odds, mask), (other_odds, other_mask) in zip(one["history"], other["history"], strict=True):
        assert all(map(torch.equal, odds, other_odds))
        assert all(map(torch.equal, mask, other_mask))
    assert all(map(torch.equal, one["history"][STEPS - 1][1], one["history"][-1][1]))  # fixed
    assert not torch.equal(one["history"][0][0][0], one["history"][STEPS - 1][0][0])
    gates = one["history"][-1][1]
    assert sum(int(mask.sum()) for mask in gates) == sum(mask.numel() for mask in gates) // 2
    assert one["pruned"].keys() == other["pruned"].keys()
    assert all(torch.equal(one["pruned"][k], other["pruned"][k]) for k in one["pruned"] if "running" not in k)
