"""A gated model of transformers writes files that ``from_pretrained`` and a trainer that resumes both load right."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import l0hooks

transformers = pytest.importorskip("transformers")

X = torch.arange(8).view(2, 4)


def build(spec: Any, *, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    l0hooks.sparsify(model, spec, example_inputs=(X,) if "coupled" in str(spec) else None)
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            gate.log_alpha.normal_(0.5, 3)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X, use_cache=False).logits


SPECS = {"weights": {"*mlp*": "weight"}, "channels": {"*gate_proj": "output"}, "all": "weight"}


@pytest.mark.parametrize("how", ["save_pretrained", "save_model", "shards", "a given state"])
@pytest.mark.parametrize("name", SPECS)
def test_what_is_written_is_loaded_as_it_evaluates(name: str, how: str, tmp_path: Path) -> None:
    model = build(SPECS[name])
    if how == "save_model":
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        transformers.Trainer(model, arguments).save_model(str(tmp_path))
    elif how == "a given state":
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    else:
        model.save_pretrained(tmp_path, max_shard_size="5KB" if how == "shards" else "1GB")
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_a_tied_embedding_is_loaded_right(tmp_path: Path) -> None:
    model = build({"*lm_head": "weight", "*embed_tokens": "weight"}, tied=True)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_coupled_gates_are_loaded_right(tmp_path: Path) -> None:
    model = build({"*down_proj": "coupled"})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


def test_into_a_gated_model_the_gated_weights_are_loaded(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, other = build(SPECS["weights"]), build(SPECS["weights"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path)
    found = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not found.unexpected_keys
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_write_their_own_weights(way: Any, tmp_path: Path) -> None:
    model = build(SPECS["weights"])
    other = way(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(other))


def test_nothing_is_left_after_prune_or_a_failed_call() -> None:
    model = build(SPECS["weights"])
    assert "save_pretrained" not in vars(l0hooks.prune(model))
    assert "save_pretrained" in vars(model)
    plain = transformers.LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match="size"):
        l0hooks.sparsify(plain, {"*mlp*": "weight"}, budget=l0hooks.Budget(keep=10**9))
    assert "save_pretrained" not in vars(plain)
