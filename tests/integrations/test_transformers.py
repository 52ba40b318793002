"""Hugging Face's Trainer with gates: its own optimiser, log, checkpoints and folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parameters import slow
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import l0hooks
from l0hooks.errors import InvalidValueError, L0HooksWarning, StateError

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402

from l0hooks.integrations.transformers import SparsifyCallback  # noqa: E402
from l0hooks.training import Distillation  # noqa: E402

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
    "options", [{}, {"gradient_accumulation_steps": 2}, *slow([{"bf16": True}, {"max_grad_norm": 0.0}])], ids=str
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_model_in_bfloat16_with_gradient_checkpointing(tmp_path: Path) -> None:
    model = build("output", budget=l0hooks.Budget(sparsity=0.5, steps=STEPS)).to(torch.bfloat16)
    callback = SparsifyCallback(gate_lr=0.1)
    trainer_of(model, arguments(tmp_path, activation_checkpointing=True), callback).train()
    assert rule_of(model).finished
    gates = [gate for _, gate in l0hooks.iter_gates(model)]
    assert sum(int(g.support().sum()) for g in gates) == sum(g.log_alpha.numel() for g in gates) // 2
    assert {p.dtype for p in callback.pruned.parameters()} == {torch.bfloat16}


@pytest.mark.slow
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


@pytest.mark.slow
def test_gates_that_decay_or_stand_still_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    with pytest.raises(StateError, match=r"must have no weight decay(?s:.)*callback\.optimizer\(args\)"):
        transformers.Trainer(build(), args, train_dataset=data(), callbacks=[SparsifyCallback()]).train()
    model = build()
    weights = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    with pytest.raises(StateError, match="must hold the gates"):
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
    """A scaler on the CPU takes the place of float16 training; clipping unscales the gradients before the callback."""
    model = build()
    callback = SparsifyCallback(penalties={"l0": 1.0})
    accelerate.Accelerator(cpu=True)  # creates the state that its optimisers need
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters()), scaler=scaler)
    scaler.scale(torch.zeros(()))  # makes the scale
    callback.on_pre_optimizer_step(
        arguments(tmp_path, max_grad_norm=clip), None, None, model=model, optimizer=optimizer
    )
    for _, gate in l0hooks.iter_gates(model):
        (plain,) = torch.autograd.grad(gate.expected_l0(), gate.log_alpha)
        torch.testing.assert_close(gate.log_alpha.grad, times * plain)


def test_training_that_is_too_short_for_a_budget_says_so_when_it_begins_and_when_it_ends(tmp_path: Path) -> None:
    model = build(budget=l0hooks.Budget(sparsity=0.75, steps=STEPS))
    callback = SparsifyCallback(gate_lr=0.1)
    trainer = trainer_of(model, arguments(tmp_path, max_steps=3), callback)
    with pytest.warns(L0HooksWarning) as caught:
        trainer.train()
    gates = sum(gate.log_alpha.numel() for _, gate in l0hooks.iter_gates(model))
    begin, end = (str(one.message) for one in caught)
    assert f"{gates // 4:,} gates after 6 steps" in begin
    assert "3 steps of training" in begin
    assert end.startswith("prune: the schedule of a budget has not ended.")
    assert f"expected: {gates // 4:,} gates after 6 steps" in end
    assert "gates at step 3" in end
    sizes = [e for e in trainer.state.log_history if "l0_budget_size" in e][-1]
    assert sizes["l0_budget_target"] == gates // 4 < sizes["l0_budget_size"]


@pytest.mark.slow
def test_an_earlier_checkpoint_loaded_at_the_end_is_named(tmp_path: Path) -> None:
    model = build(budget=l0hooks.Budget(sparsity=0.75, steps=STEPS))
    callback = SparsifyCallback(gate_lr=0.1)
    args = arguments(
        tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="worse",
    )  # fmt: skip
    trainer = trainer_of(model, args, callback, eval_dataset=data(8), compute_metrics=lambda _: next(scores))
    scores = iter([{"worse": -float(n)} for n in range(9)])
    trainer.args.greater_is_better = True
    with pytest.warns(L0HooksWarning, match=r"prune: the schedule of a budget has not ended(?s:.)*at step 2"):
        trainer.train()
    l0hooks.finish_budget(model)
    assert l0hooks.summary(model).sparsity == 0.75


def first_gradients(
    folder: Path, accumulate: int, distillation: Any
) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """The model, its batches and its gradients at the first step of the optimiser."""
    model = distillation[0]
    callback = SparsifyCallback(gate_lr=0.1, filename=None, distillation=distillation[1])
    options = {"max_steps": 1, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0}
    trainer = trainer_of(model, arguments(folder, **options), callback)
    batches: list[torch.Tensor] = []
    grads: list[torch.Tensor] = []
    first = model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"]) if module.training else None, with_kwargs=True
    )
    names = [p for p in model.parameters() if p.requires_grad]
    second = register_optimizer_step_pre_hook(
        lambda *_: grads.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in names)
    )
    try:
        trainer.train()
    finally:
        first.remove(), second.remove()
    return model, batches, grads


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_distillation_loss_is_added_once_whatever_is_accumulated(tmp_path: Path, accumulate: int) -> None:
    def make() -> tuple[nn.Module, Distillation]:
        model = build(budget=l0hooks.Budget(sparsity=0.5, steps=0))
        torch.manual_seed(1)
        teacher = transformers.LlamaForCausalLM(model.config)
        hidden = {"model.layers.0.mlp": 0.5}
        ids = torch.stack([row["input_ids"] for row in data(2)])
        return model, Distillation(model, teacher, hidden=hidden, example_inputs=(ids,))

    model, _ = make()
    _, _, without = first_gradients(tmp_path / "a", accumulate, (model, None))
    model, distillation = make()
    model, batches, with_it = first_gradients(tmp_path / "b", accumulate, (model, distillation))
    assert len(batches) == accumulate
    fresh, distillation = make()
    fresh.train()
    loss = torch.stack([distillation(input_ids=ids)[1] for ids in batches]).mean()
    expected = torch.autograd.grad(loss, [p for p in fresh.parameters() if p.requires_grad], allow_unused=True)
    for one, other, extra in zip(with_it, without, expected, strict=True):
        torch.testing.assert_close(one - other, torch.zeros_like(one) if extra is None else extra, rtol=1e-3, atol=1e-5)
    assert [len(m._forward_hooks) for m in model.modules()] == [len(m._forward_hooks) for m in fresh.modules()]


def test_projections_that_no_optimizer_holds_are_refused() -> None:
    model = build()
    narrow = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict() | {"hidden_size": 8}))
    ids = torch.stack([row["input_ids"] for row in data(2)])
    distillation = Distillation(model, narrow, hidden={"model.layers.0": 1.0}, example_inputs=(ids,))
    with pytest.raises(
        l0hooks.errors.SpecError, match=r"holds no projections of hidden states.*\n.*\n.*model/layers/0"
    ):
        SparsifyCallback(distillation=distillation)
