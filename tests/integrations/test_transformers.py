"""Hugging Face's Trainer with gates: its own optimiser, log, checkpoints and folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import l0hooks
from l0hooks.errors import InvalidValueError, StateError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from l0hooks.integrations.transformers import SparsifyCallback  # noqa: E402

STEPS = 6


def data(count: int = 64) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 50, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def build(spec: Any = "weight", budget: l0hooks.Budget | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    l0hooks.sparsify(model, {"*mlp*": spec}, budget=budget)
    return model


def arguments(folder: Path, **options: Any) -> Any:
    given = {"max_steps": 8, "per_device_train_batch_size": 4, "weight_decay": 0.1, "learning_rate": 1e-3}
    given |= {"logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    given |= {"seed": 3, "dataloader_pin_memory": False}
    return transformers.TrainingArguments(output_dir=str(folder), **given | options)


def trainer_of(model: nn.Module, args: Any, callback: SparsifyCallback, **options: Any) -> Any:
    return transformers.Trainer(
        model,
        args,
        train_dataset=data(),
        callbacks=[callback],
        optimizer_cls_and_kwargs=callback.optimizer(args),
        **options,
    )


def rule_of(model: nn.Module) -> Any:
    return next(l0hooks.iter_gates(model))[1].rule


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.0}], ids=str
)
def test_a_budget_runs_to_its_end_and_the_model_is_pruned_and_saved(tmp_path: Path, options: dict[str, Any]) -> None:
    model = build(budget=l0hooks.Budget(sparsity=0.75, steps=STEPS))
    callback = SparsifyCallback(gate_lr=0.1)
    trainer = trainer_of(model, arguments(tmp_path, **options), callback)
    trainer.train()
    assert rule_of(model).step == STEPS
    gates, rest = trainer.optimizer.param_groups[-1], trainer.optimizer.param_groups[:-1]
    assert (gates["weight_decay"], gates["initial_lr"]) == (0.0, 0.1)
    assert {group["weight_decay"] for group in rest} == {0.0, 0.1}  # norms and biases are still the trainer's
    assert {id(p) for p in gates["params"]} == {id(gate.log_alpha) for _, gate in l0hooks.iter_gates(model)}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["l0_budget_step"] for entry in history] == [1, 2, 3, 4, 5, 6, 6, 6]
    assert history[0]["l0_expected_sparsity"] < history[-1]["l0_expected_sparsity"]
    assert history[-1]["l0_sparsity"] == pytest.approx(0.75)
    weight = callback.pruned.model.layers[0].mlp.down_proj.weight
    assert type(weight) is nn.Parameter
    assert 0.2 < float((weight == 0).float().mean())
    example = torch.stack([row["input_ids"] for row in data(2)])
    again = l0hooks.load_pruned(
        lambda: transformers.LlamaForCausalLM(model.config), tmp_path / "pruned.safetensors"
    ).eval()
    assert torch.equal(again(example).logits, callback.pruned(example).logits)
    assert "forward" not in vars(callback.pruned)
    callback.pruned.save_pretrained(tmp_path / "plain")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(example).logits, callback.pruned(example).logits)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_penalty_counts_once_a_step_whatever_is_accumulated(tmp_path: Path, accumulate: int) -> None:
    model = build()
    callback = SparsifyCallback(gate_lr=0.1, penalties={"l0": 0.5}, filename=None)
    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=accumulate)
    trainer = trainer_of(model, args, callback)
    before = [gate.log_alpha.detach().clone() for _, gate in l0hooks.iter_gates(model)]
    expected = l0hooks.penalty(model, l0=0.5).item()
    seen = []
    spy = lambda optimizer, *_: seen.extend(p.grad.clone() for p in optimizer.param_groups[-1]["params"])  # noqa: E731
    handle = register_optimizer_step_pre_hook(spy)
    trainer.train()
    handle.remove()
    assert trainer.state.log_history[0]["l0_penalty"] == pytest.approx(expected)
    for grad, odds in zip(seen, before, strict=True):
        keep = torch.sigmoid(odds + 2 / 3 * torch.tensor(11.0).log())
        torch.testing.assert_close(grad.mean(), (0.5 * keep * (1 - keep)).mean(), rtol=0.05, atol=0.0)
    assert not (tmp_path / "pruned.safetensors").exists()


def test_a_checkpoint_of_the_trainer_continues_the_budget(tmp_path: Path) -> None:
    ends = []
    for resume in (False, True):
        model = build(budget=l0hooks.Budget(sparsity=0.75, steps=STEPS))
        callback = SparsifyCallback(gate_lr=0.1, penalties={"l2": 1e-3})
        args = arguments(tmp_path, save_strategy="steps", save_steps=4)
        trainer = trainer_of(model, args, callback)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        history = [e["l0_budget_step"] for e in trainer.state.log_history if "l0_budget_step" in e]
        assert history == [1, 2, 3, 4, 5, 6, 6, 6]
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], msg=key)


def test_a_model_in_bfloat16_with_gradient_checkpointing(tmp_path: Path) -> None:
    model = build("output", budget=l0hooks.Budget(sparsity=0.5, steps=STEPS)).to(torch.bfloat16)
    callback = SparsifyCallback(gate_lr=0.1)
    trainer_of(model, arguments(tmp_path, activation_checkpointing=True), callback).train()
    assert rule_of(model).finished
    gates = [gate for _, gate in l0hooks.iter_gates(model)]
    assert sum(int(g.support().sum()) for g in gates) == sum(g.log_alpha.numel() for g in gates) // 2
    assert {p.dtype for p in callback.pruned.parameters()} == {torch.bfloat16}


def test_coupled_gates_are_trained_saved_and_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.BertForSequenceClassification(config)
    example = (torch.randint(0, 50, (2, 8)),)
    l0hooks.sparsify(model, "coupled", example_inputs=example, budget=l0hooks.Budget(sparsity=0.5, steps=STEPS))
    callback = SparsifyCallback(gate_lr=0.1, example_inputs=example)
    args = arguments(tmp_path, save_strategy="steps", save_steps=4)
    trainer = transformers.Trainer(
        model, args, train_dataset=[{**row, "labels": 1} for row in data()], callbacks=[callback],
        optimizer_cls_and_kwargs=callback.optimizer(args),
    )  # fmt: skip
    trainer.train()
    count = sum(p.numel() for p in callback.pruned.parameters())
    assert count < 0.95 * sum(p.numel() for p in transformers.BertForSequenceClassification(config).parameters())


def test_gates_that_decay_or_stand_still_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    with pytest.raises(StateError, match=r"must not decay(?s:.)*callback\.optimizer\(args\)"):
        transformers.Trainer(build(), args, train_dataset=data(), callbacks=[SparsifyCallback()]).train()
    model = build()
    weights = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    with pytest.raises(StateError, match="must move the gates"):
        transformers.Trainer(
            model, args, train_dataset=data(), callbacks=[SparsifyCallback()], optimizers=(weights, None)
        ).train()
    plain = l0hooks.prune(model)
    with pytest.raises(StateError, match="must hold gates"):
        trainer_of(plain, args, SparsifyCallback()).train()
    with pytest.raises(InvalidValueError, match="gate_lr"):
        SparsifyCallback(gate_lr=0.0)


@pytest.mark.parametrize(("clip", "times"), [(1.0, 1.0), (0.0, 8.0)])
def test_a_penalty_joins_gradients_at_the_scale_they_have(tmp_path: Path, clip: float, times: float) -> None:
    """float16 needs a GPU here: the optimiser only says what scaler it has, and clipping takes the scale out."""
    model = build()
    callback = SparsifyCallback(penalties={"l0": 1.0})
    optimizer = SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    optimizer.scaler.scale(torch.zeros(()))  # makes the scale
    callback.on_pre_optimizer_step(
        arguments(tmp_path, max_grad_norm=clip), None, None, model=model, optimizer=optimizer
    )
    for _, gate in l0hooks.iter_gates(model):
        (plain,) = torch.autograd.grad(gate.expected_l0(), gate.log_alpha)
        torch.testing.assert_close(gate.log_alpha.grad, times * plain)
