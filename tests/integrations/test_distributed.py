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
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 15), nn.ReLU(), nn.Linear(15, 4))
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


def shard(model: nn.Sequential, nested: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for child in model if nested else ():
        if isinstance(child, nn.Linear):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(rank: int, spec: str, nested: bool, penalise: bool) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = shard(build(spec), nested)
    torch.manual_seed(5)  # the same noise everywhere, as in one process
    optimizer = optimizer_for(model)
    history = []
    for step in range(STEPS + 3):
        loss = model(batch(step, rank)).square().mean()
        if penalise:
            loss = loss + l0hooks.penalty(model, l0=1e-3, expected_l2=1e-3)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(([odds.full_tensor() for odds in log_odds(model)], supports(model)))
        model.eval()(batch(step, rank))
        model.train()
    report = l0hooks.summary(model)
    output = model.eval()(batch(0, 0)).detach()
    with pytest.raises(StateError, match="get_model_state_dict"):
        l0hooks.prune(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    kept = report.parameters_kept, report.sparsity, report.expected_sparsity
    return {"history": history, "state": state, "output": output, "kept": kept}


def single(spec: str, penalise: bool) -> tuple[nn.Module, list[Any]]:
    model = build(spec)
    torch.manual_seed(5)
    optimizer = optimizer_for(model)
    history = []
    for step in range(STEPS + 3):
        loss = model(torch.cat([batch(step, 0), batch(step, 1)])).square().mean()
        if penalise:
            loss = loss + l0hooks.penalty(model, l0=1e-3, expected_l2=1e-3)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append((log_odds(model), supports(model)))
    return model, history


@pytest.mark.parametrize("spec", ["output", "weight"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("penalise", [False, True])
def test_fully_sharded_training_is_that_of_one_process(spec: str, nested: bool, penalise: bool) -> None:
    one, other = in_processes(fsdp, spec, nested, penalise)
    model, history = single(spec, penalise)
    for mine, (odds, mask), (other_odds, other_mask) in zip(history, one["history"], other["history"], strict=True):
        assert all(map(torch.equal, odds, other_odds))
        assert all(map(torch.equal, mask, other_mask))
        for a, b in zip(mine[0], odds, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
        assert all(map(torch.equal, mine[1], mask))
    whole = build(spec)  # a model of the same kind takes what the processes hold, and is pruned
    whole.load_state_dict(one["state"])
    torch.testing.assert_close(whole.eval()(batch(0, 0)), one["output"])
    assert all(map(torch.equal, supports(whole), one["history"][-1][1]))
    report = l0hooks.summary(whole)
    assert one["kept"][:2] == (report.parameters_kept, report.sparsity)
    plain = l0hooks.prune(whole, example_inputs=(batch(0, 0),))
    torch.testing.assert_close(plain(batch(0, 0)), one["output"])
