"""Training steps with coupled gates over the dense ones: a ResNet-18-like network and a small BERT."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import l0hooks
from benchmarks.registry import Aim, Panel, Row, Scale, Table, register
from benchmarks.timing import ratio, rounds

NAMES = {"step": "coupled, noise a step", "example": "coupled, noise an example"}


def resnet(side: int, width: int, depth: int) -> tuple[Callable[[], nn.Module], tuple[Tensor, ...]]:
    """A maker of networks, and 16 images."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width, 4 * width, 8 * width], "depths": [depth] * 4}
    config = ResNetConfig(**sizes, layer_type="basic", num_labels=10)
    return functools.partial(ResNetForImageClassification, config), (torch.randn(16, 3, side, side),)


def bert(length: int, width: int, depth: int) -> tuple[Callable[[], nn.Module], tuple[Tensor, ...]]:
    """A maker of networks, and 8 sentences."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 4 * width, "num_attention_heads": 4}
    config = BertConfig(**sizes, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return functools.partial(BertForSequenceClassification, config), (torch.randint(30_000, (8, length)),)


def step_of(model: nn.Module, inputs: tuple[Tensor, ...], *, penalty: bool = True) -> Callable[[], None]:
    """Forward, penalty if there are gates, backward, SGD."""
    optimizer = torch.optim.SGD(model.train().parameters(), 1e-3)
    y = torch.randint(10, (len(inputs[0]),))
    priced = penalty and any(True for _ in l0hooks.iter_gates(model))

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(*inputs).logits, y)
        (loss + l0hooks.penalty(model, l0=1e-6) if priced else loss).backward()
        optimizer.step()

    return step


def missing() -> str | None:
    """Why it cannot run here."""
    return None if importlib.util.find_spec("transformers") else "transformers is not installed"


@register("coupled", "training step with coupled gates over dense: ResNet-18-like, small BERT", missing=missing)
def measure(scale: Scale) -> list[Table]:
    """Dense and both kinds of noise in turn; a second dense network shows how far equal steps lie apart."""
    rows: list[Row] = []
    aims = []
    for name, (make, inputs) in {
        "ResNet-18-like": resnet(32, 8, 1) if scale.quick else resnet(64, 64, 2),
        "BERT, 4 layers of 256": bert(16, 32, 1) if scale.quick else bert(64, 256, 4),
    }.items():
        models = {"dense": make(), "dense again": make()}
        for noise, called in NAMES.items():
            models[called] = make()
            spec = l0hooks.GateSpec(granularity="coupled", noise=noise)
            l0hooks.sparsify(models[called], spec, example_inputs=(inputs[0][:2],))
        steps = {called: step_of(model, inputs) for called, model in models.items()}
        steps |= {f"{NAMES['step']}, no penalty": step_of(models[NAMES["step"]], inputs, penalty=False)}
        seconds = rounds(steps, repeats=scale.repeats(40), warmup=1 if scale.quick else 3, clock=time.process_time)
        for called, taken in seconds.items():
            over = ratio(seconds, called, "dense")
            rows.append({"model": f"{name}: {called}", "ms": statistics.median(taken) * 1e3, "over dense": over})
        aims.append(Aim(f"{name}, {NAMES['step']}, over dense", ratio(seconds, NAMES["step"], "dense"), 1.03))
    panel = Panel("bars", ("over dense",), "time over dense", reference=1.0)
    return [Table("Training step, SGD, with the penalty", rows, panel, aims)]
