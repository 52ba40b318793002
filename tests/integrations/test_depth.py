"""Whole layers of transformers gated and pruned: the law, generation, files, and folders that load plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l0hooks
from l0hooks import Budget, GateSpec, load_pruned, prune, save_pruned, sparsify
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import StateError

tr = pytest.importorskip("transformers")
from tiny_transformers import FAMILIES  # noqa: E402

from l0hooks.integrations.transformers import from_pretrained, save_pretrained  # noqa: E402

DEPTH = GateSpec(granularity="coupled", kinds=("layer",))
ALL = GateSpec(granularity="coupled", kinds=("head", "neuron", "layer"))
LAYERS = 4
_NUMBERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def deep(family: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """A model of ``family`` with four layers, a function that makes another one, and inputs."""
    name, make, inputs = FAMILIES[family]

    def factory() -> Any:
        config = make()
        for number in _NUMBERS:
            if number in vars(config):
                setattr(config, number, LAYERS)
        if vars(config).get("layer_types") is not None:
            config.layer_types = ["full_attention", config.layer_types[0]] * 2
        torch.manual_seed(0)
        return getattr(tr, name)(config).eval()

    return factory(), factory, inputs


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(model(*inputs))
    return [one for one in found if isinstance(one, Tensor) and one.is_floating_point()]


def gap(first: nn.Module, second: nn.Module, inputs: tuple[Any, ...]) -> float:
    pairs = zip(outputs(first, inputs), outputs(second, inputs), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def close(model: nn.Module, *ends: str) -> list[str]:
    """Close the gates of the blocks whose names end so; the names of all that have gates."""
    layers = [one for one in iter_gated(model) if one.layer]
    for one in layers:
        one.gate.log_alpha.data.fill_(-9.0 if one.name.endswith(ends) else 4.0)
    return [one.name for one in layers]


CLOSED = (".0", ".2")
EXPECTED = {
    "Llama": 4, "Qwen3": 4, "Gemma 3": 4, "GPT-2": 4, "BERT": 4, "ViT": 4, "T5": 6, "BART": 8, "Whisper": 8,
}  # fmt: skip


@pytest.mark.parametrize("family", EXPECTED)
def test_the_pruned_model_computes_what_the_gated_one_does_and_can_be_saved(family: str, tmp_path: Path) -> None:
    model, factory, inputs = deep(family)
    sparsify(model, DEPTH, example_inputs=inputs)
    assert len(close(model, *CLOSED)) == EXPECTED[family]
    small = prune(model, example_inputs=inputs)
    assert gap(model, small, inputs) == 0
    assert sum(p.numel() for p in small.parameters()) == l0hooks.summary(model).model_parameters_kept
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(factory, tmp_path / "small.safetensors").eval()
    assert gap(small, again, inputs) == 0
    assert [n for n, _ in small.named_modules()] == [n for n, _ in again.named_modules()]
    saved = save_pretrained(small, tmp_path / "folder", example_inputs=inputs)
    loaded = type(small).from_pretrained(tmp_path / "folder") if saved.plain else from_pretrained(tmp_path / "folder")
    assert saved.plain, saved
    assert gap(small, loaded, inputs) == 0


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT-2", "T5", "BART"])
def test_generation_is_that_of_the_gated_model_with_and_without_a_cache(family: str) -> None:
    model, _, inputs = deep(family)
    sparsify(model, DEPTH, example_inputs=inputs)
    close(model, *CLOSED)
    small = prune(model, example_inputs=inputs)
    found = [
        one.generate(inputs[0], max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for one in (model, small)
        for cached in (True, False)
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    numbers = [m.layer_idx for m in small.modules() if "layer_idx" in vars(m) and m.layer_idx is not None]
    assert sorted(set(numbers)) == list(range(max(numbers) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "BERT", "GPT-2", "ViT"])
def test_heads_neurons_and_layers_end_on_one_budget(family: str, tmp_path: Path) -> None:
    model, factory, inputs = deep(family)
    sparsify(model, ALL, example_inputs=inputs, budget=Budget(sparsity=0.5, unit="params", steps=12))
    optimizer = torch.optim.Adam(l0hooks.param_groups(model, lr=1e-3, gate_lr=0.1))
    model.train()
    rule = next(iter_gated(model)).gate.rule
    for _ in range(13):
        model(*inputs)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert rule.finished or rule.expected() == pytest.approx(rule.scheduled, rel=1e-4)
    model.eval()
    small, report = prune(model, example_inputs=inputs, return_report=True)
    assert 0.95 * rule.target <= report.exported_parameters <= rule.target
    assert report.exported_parameters == report.model_parameters_kept
    assert gap(model, small, inputs) < 1e-5
    save_pruned(small, tmp_path / "small.safetensors")
    assert gap(small, load_pruned(factory, tmp_path / "small.safetensors").eval(), inputs) == 0


def test_a_pruned_model_is_pruned_again(tmp_path: Path) -> None:
    model, factory, inputs = deep("Llama")
    sparsify(model, DEPTH, example_inputs=inputs)
    close(model, ".1")
    small = prune(model, example_inputs=inputs)
    sparsify(small, DEPTH, example_inputs=inputs)
    assert close(small, ".0") == [f"model.layers.{n}" for n in range(3)]
    smaller = prune(small, example_inputs=inputs)
    assert gap(small, smaller, inputs) == 0
    assert smaller.model.layers.kept_blocks == (4, (2, 3))
    assert smaller.config.num_hidden_layers == 2
    assert small.config.num_hidden_layers == 3
    save_pruned(smaller, tmp_path / "small.safetensors")
    assert gap(smaller, load_pruned(factory, tmp_path / "small.safetensors").eval(), inputs) == 0


def test_layers_whose_number_scales_their_attention_keep_their_scale(tmp_path: Path) -> None:
    """No config says the scales of the layers that are left: the file's plan does, and the folder is refused."""
    name, make, inputs = FAMILIES["GPT-2"]

    def factory() -> Any:
        config = make()
        config.n_layer, config.scale_attn_by_inverse_layer_idx = 3, True
        return getattr(tr, name)(config).eval()

    model = factory()
    for parameter in model.parameters():
        parameter.data *= 8  # for attention that is far from even
    sparsify(model, DEPTH, example_inputs=inputs)
    close(model, ".0")
    small = prune(model, example_inputs=inputs)
    assert gap(model, small, inputs) == 0
    save_pruned(small, tmp_path / "small.safetensors")
    assert gap(small, load_pruned(factory, tmp_path / "small.safetensors"), inputs) == 0
    with pytest.raises(StateError, match="what is loaded again must compute what the model computes"):
        save_pretrained(small, tmp_path / "folder", example_inputs=inputs)


def test_a_file_that_keeps_impossible_layers_is_refused(tmp_path: Path) -> None:
    model, factory, inputs = deep("Llama")
    sparsify(model, DEPTH, example_inputs=inputs)
    close(model, ".1")
    small = prune(model, example_inputs=inputs)
    for kept in ((4, (0, 2, 1)), (4, (0, 2, 4)), (7, (0, 1, 2, 3))):
        small.model.layers.kept_blocks = kept
        save_pruned(small, tmp_path / "bad.safetensors")
        with pytest.raises(l0hooks.L0HooksError, match=r"model\.layers"):
            load_pruned(factory, tmp_path / "bad.safetensors")
