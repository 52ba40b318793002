"""DDP and ``fully_shard`` on two processes: one budget, one support, everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import l0hooks
from l0hooks.errors import StateError

pytestmark = pytest.mark.slow  # spawning two processes takes their import of torch
STEPS = 6
WAYS = [(nested, penalise) for nested in (False, True) for penalise in (False, True)]


def build(spec: str = "output", sparsity: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 15), nn.LayerNorm(15), nn.ReLU(), nn.Linear(15, 4)]
    model = nn.Sequential(*layers)
    budget = l0hooks.Budget(sparsity=sparsity, steps=STEPS)
    l0hooks.sparsify(model, spec, budget=budget, example_inputs=(torch.randn(2, 8),))
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            gate.log_alpha.add_(0.1 * torch.randn(gate.log_alpha.shape))  # no ties for rounding to decide
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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for child in model if nested else ():
        if isinstance(child, nn.Linear):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_each(rank: int, spec: str) -> list[dict[str, Any]]:
    return [fsdp(rank, spec, nested, penalise) for nested, penalise in WAYS]


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
def test_fully_sharded_training_is_that_of_one_process(spec: str) -> None:
    for (_, penalise), one, other in zip(WAYS, *in_processes(fsdp_each, spec), strict=True):
        check_sharded(spec, penalise, one, other)


def uniform(rank: int | None) -> list[Tensor]:
    """Log-odds after some steps of a budget that keeps two groups equal; sharded, or in one process without a rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    spec = l0hooks.GateSpec(granularity="coupled", family="deterministic")
    budget = l0hooks.Budget(sparsity=0.4, unit="params", steps=6, uniform=True)
    l0hooks.sparsify(model, spec, example_inputs=(batch(0, 0),), budget=budget)
    if rank is not None:
        shard(model, nested=False)
    optimizer = torch.optim.SGD(l0hooks.param_groups(model, lr=0.05, gate_lr=2.0))
    for step in range(5):
        x = torch.cat([batch(step, 0), batch(step, 1)]) if rank is None else batch(step, rank)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [odds if rank is None else odds.full_tensor() for odds in log_odds(model)]


def test_sharded_gates_that_must_stay_equal_train_as_in_one_process() -> None:
    one, other = in_processes(uniform)
    assert all(map(torch.equal, one, other))
    for sharded, alone in zip(one, uniform(None), strict=True):
        torch.testing.assert_close(sharded, alone, atol=2e-4, rtol=1e-4)


def check_sharded(spec: str, penalise: bool, one: dict[str, Any], other: dict[str, Any]) -> None:
    _, history = single(spec, penalise)
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


def fsdp_mixed(rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    found = {}
    for spec in ("output", "coupled"):
        model = build(spec)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model, mp_policy=policy)
        optimizer = optimizer_for(model)
        for step in range(STEPS + 3):
            model(batch(step, rank)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            found[spec, step] = supports(model)
        model.eval()(batch(0, 0))
        found[spec, "eval"] = supports(model)
        model.reshard()
        found[spec, "dtype"] = [odds.dtype for odds in log_odds(model)]
    return found


def test_sharded_gates_in_mixed_precision_and_shared_by_several_layers() -> None:
    one, other = in_processes(fsdp_mixed)
    for spec in ("output", "coupled"):
        for step in range(STEPS + 3):
            assert all(map(torch.equal, one[spec, step], other[spec, step]))
        final = one[spec, STEPS + 2]
        assert all(map(torch.equal, final, one[spec, STEPS - 1]))
        assert all(map(torch.equal, final, one[spec, "eval"]))
        assert sum(int(mask.sum()) for mask in final) == sum(mask.numel() for mask in final) // 2
        assert set(one[spec, "dtype"]) == {torch.float32}


def hugging_face(rank: int, folder: str) -> dict[str, Any]:
    from test_transformers import SparsifyCallback, arguments, trainer_of
    from test_transformers import build as build_llama

    model = build_llama(budget=l0hooks.Budget(sparsity=0.75, steps=STEPS))
    callback = SparsifyCallback(gate_lr=0.1, penalties={"l2": 1e-3})
    args = arguments(folder, ddp_backend="gloo", gradient_accumulation_steps=2)
    trainer = trainer_of(model, args, callback)
    trainer.train()
    wrapped = type(trainer.model_wrapped).__name__
    return {"odds": log_odds(model), "supports": supports(model), "wrapped": wrapped, "pruned": callback.pruned is None}


def lightning(rank: int, folder: str) -> dict[str, Any]:
    import os

    from test_lightning import Module, SparsifyCallback, Spy, loader, trainer_of

    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}  # as torchrun does
    module, spy = Module(budget=l0hooks.Budget(sparsity=0.75, steps=STEPS)), Spy()
    callback = SparsifyCallback(part="net", penalties={"l2": 1e-3})
    trainer = trainer_of(folder, callback, spy, devices=2, strategy="ddp", max_steps=8)
    trainer.fit(module, loader())
    odds, kept = spy.history[-1][1:]
    return {"odds": [odds], "supports": [kept], "wrapped": spy.wrapped, "pruned": callback.pruned is None}


@pytest.mark.parametrize("work", [hugging_face, lightning])
def test_trainers_on_two_processes_end_with_one_support(work: Any, tmp_path: Any) -> None:
    pytest.importorskip("accelerate" if work is hugging_face else "lightning")
    one, other = in_processes(work, str(tmp_path))
    assert one["wrapped"] == other["wrapped"] == "DistributedDataParallel"
    assert all(map(torch.equal, one["odds"], other["odds"]))
    assert all(map(torch.equal, one["supports"], other["supports"]))
    assert (one["pruned"], other["pruned"]) == (False, True)
    assert (tmp_path / "pruned.safetensors").exists()


def from_meta(rank: int) -> dict[str, Any]:
    """A model that was sparsified and sharded on the meta device, beside one that was loaded first."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    found = {}
    for spec in ("weight", "output", "coupled"):
        models, state = [], {}
        for device in ("cpu", "meta"):
            torch.manual_seed(0)
            with torch.device(device):
                model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 15), nn.ReLU(), nn.Linear(15, 4))
            l0hooks.sparsify(model, spec, example_inputs=(torch.zeros(2, 8),))
            state = state or {name: value.clone() for name, value in model.state_dict().items()}  # of the first one
            fully_shard(model)
            if device == "meta":
                model._apply(lambda t: torch.full_like(t, 77, device="cpu"))  # to_empty, as memory may well be
                found[spec, "start"] = all(
                    bool((gate.log_alpha.to_local() == gate.start).all()) for _, gate in l0hooks.iter_gates(model)
                )
                weights = {name: value for name, value in state.items() if "log_alpha" not in name}
                options = StateDictOptions(full_state_dict=True, strict=False)
                set_model_state_dict(model, weights, options=options)
            models.append(model)
        outputs = []
        for model in models:
            torch.manual_seed(5)
            outputs.append(model(batch(0, rank)))
        found[spec, "output"] = bool(torch.equal(*outputs))
    return found


def test_a_model_sharded_on_the_meta_device_is_the_one_that_was_loaded() -> None:
    for found in in_processes(from_meta):
        assert found == {(spec, what): True for spec in ("weight", "output", "coupled") for what in ("start", "output")}
