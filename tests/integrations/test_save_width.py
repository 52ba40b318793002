"""Narrower models of transformers in folders that ``from_pretrained`` loads."""

import pytest
import torch
from width_models import ALL_KINDS, gated, stream_model

from l0hooks import GateSpec, iter_gates, prune, sparsify

transformers = pytest.importorskip("transformers")

from l0hooks.integrations.transformers import from_pretrained, save_pretrained  # noqa: E402  needs transformers


def logits(model, inputs):
    with torch.no_grad():
        return model(*inputs)[0]


def close_every_fourth(model):
    """Leave 3 of 4 heads, and 24 of 32 channels, a multiple of the heads, as configs want it."""
    for _, gate in iter_gates(model):
        gate.log_alpha.data.uniform_(0.1, 1.5)
        gate.log_alpha.data[::4] = -9.0


@pytest.mark.slow
def test_where_norms_of_heads_have_the_same_epsilon_the_difference_decides(tmp_path):
    """Qwen3's config has one epsilon for the stream's norms, which changes, and for those of heads, which must not."""
    model, inputs = gated("Qwen3")
    close_every_fourth(model)
    small = prune(model, example_inputs=inputs)
    saved = save_pretrained(small, tmp_path, example_inputs=inputs)
    assert saved.plain or saved.why == "its config says the sizes, and its class computes something else then"
    assert torch.allclose(logits(from_pretrained(tmp_path), inputs), logits(small, inputs), atol=1e-6)


def test_transformers_loads_another_width_by_its_config(tmp_path):
    model, inputs = gated("Llama")
    close_every_fourth(model)
    small = prune(model, example_inputs=inputs)
    saved = save_pretrained(small, tmp_path, example_inputs=inputs)
    width = small.get_input_embeddings().weight.shape[1]
    assert saved.plain
    assert saved.config["hidden_size"] == (32, width)
    assert saved.config["rms_norm_eps"] == (1e-6, pytest.approx(1e-6 * 32 / width))
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert loaded.config.hidden_size == width
    assert torch.allclose(logits(loaded, inputs), logits(small, inputs), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "ViT"])
def test_heads_and_width_in_proportion_are_said_by_the_config_of_older_families(name, tmp_path):
    model, inputs = stream_model(name)
    spec = GateSpec(granularity="coupled", kinds=("head", "width"))
    sparsify(model, spec, example_inputs=inputs)
    close_every_fourth(model)
    small = prune(model.eval(), example_inputs=inputs)
    saved = save_pretrained(small, tmp_path, example_inputs=inputs)
    assert saved.plain, saved.why
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(loaded, inputs), logits(small, inputs), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "Gemma 3"])
def test_sizes_that_a_config_cannot_say_are_loaded_with_the_plan(name, tmp_path):
    model, inputs = gated(name, ALL_KINDS if name == "BERT" else ("width",))
    small = prune(model, example_inputs=inputs)
    saved = save_pretrained(small, tmp_path, example_inputs=inputs)
    assert not saved.plain  # as many heads as channels; or a factor that is the root of the dense width
    assert torch.equal(logits(from_pretrained(tmp_path), inputs), logits(small, inputs))


def test_the_plain_weights_beside_gates_cannot_say_a_mean_over_open_channels(tmp_path):
    model, _ = gated("BERT")
    with pytest.warns(UserWarning, match='closed channels of kind "width" under norms that subtract the mean'):
        model.save_pretrained(tmp_path)


def test_without_a_mean_the_plain_weights_are_exact(tmp_path):
    model, inputs = gated("Llama")
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(loaded, inputs), logits(model, inputs), atol=1e-6)
    assert not list(iter_gates(loaded))
