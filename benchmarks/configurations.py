"""Small random configurations of transformers: fixed sizes by name, or the default's sizes divided by one number."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

VOCABULARY, FIRST_TOKEN, LAST_TOKEN = 96, 4, 64  # special tokens lie outside the range that inputs use
_LAYERS = 2
_LAYER_NAMES = (
    *("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "depth", "n_layers"),
    *("num_decoder_layers", "num_encoder_layers"),
)
_COUNTS = {
    **dict.fromkeys(_LAYER_NAMES, _LAYERS),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "n_words"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "chunk_size_feed_forward": 0},
    **{"image_size": 32, "patch_size": 8, "num_queries": 5, "max_source_positions": 60, "type_vocab_size": 2},
}
_WIDTHS = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "encoder_hidden_size", "decoder_hidden_size"), 32
    ),
    **dict.fromkeys(
        ("hidden_dim", "emb_dim", "embedding_size", "projection_dim", "out_hidden_size", "dim", "word_embed_proj_dim"),
        32,
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "mlp_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "n_inner"), 24),
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_head_dim": 16, "num_mel_bins": 16, "num_conv_pos_embeddings": 8},
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **{"num_conv_pos_embedding_groups": 2, "mamba_d_ssm": 64},
}
_SMALL = _COUNTS | _WIDTHS
_FEW = {"depths": 1, "num_attention_heads": 2, "num_heads": 2, "hidden_sizes": 16, "embed_dims": 16, "conv_dim": 32}
_FIRST = (*_LAYER_NAMES, "depths", "vocab_size")
_WIDTH = re.compile(
    r"(hidden|embed|intermediate|ffn|inner|model|proj|head|state|feat|d_|n_embd|latent|out|filter|mlp|channel|rank)"
    r".*|dims?|width|d_.*|.*(_dims?|_size|_sizes|_width|_channels|_rank|_features)"
)
_NO_WIDTH = re.compile(
    r".*(vocab|image|patch|kernel|window|position|length|seq|stride|chunk|pad|max|type|mel|bins|sample|pool|crop|group"
    r"|layer|depth|token|index|id$|scale|grid|conv_size|batch|d_conv|in_chan|_factor|merge|bits|frames|expand).*"
    r"|(.*_)?num_.*|(.*_)?n_(?!embd|inner).*|feature_size|input_dim|.*heads"
)
_HEADS = tuple(name for name, value in _WIDTHS.items() if value == 4)
_SHARED = tuple(name for name, value in _WIDTHS.items() if value == 32)  # by all heads
_FILLED = {"vocab_size": VOCABULARY, "pad_token_id": 0, "num_experts_per_tok": 2}  # where the default has none
_LEAST = 4  # a divided width


def configurations(name: str) -> Iterator[Callable[[], Any]]:
    """Makers of small configurations of one architecture, those to try first before others."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def made(change: Callable[[Any], dict[str, Any]]) -> Any:
        default = CONFIG_MAPPING[name]()
        config = type(default)(**change(default) | _MORE.get(name, {}))
        _settle(config)
        return config

    for settings in (_SMALL | _FEW, _SMALL):
        yield lambda settings=settings: made(lambda part: _small(part, settings))  # type: ignore[misc]
    yield lambda: made(lambda part: _divided(part, _divisor(part)))
    for names in (_FIRST, ()):
        chosen = {key: (_SMALL | _FEW)[key] for key in names}
        yield lambda chosen=chosen: made(lambda part: _small(part, chosen))  # type: ignore[misc]


_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "label_length": 4}
_MORE: dict[str, dict[str, Any]] = {  # what no rule finds
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1]},
    **{name: {"vocabulary_map": {"<image>": LAST_TOKEN}} for name in ("chameleon", "emu3")},
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _SERIES),
}


def _small(config: Any, settings: Mapping[str, int]) -> dict[str, Any]:
    """Arguments for a configuration of the same class, with these sizes where it has them."""
    found = _common(config, lambda part: _small(part, settings))
    for name, value in vars(config).items():
        if name in _SMALL and name in settings and type(value) is int:
            found[name] = _SMALL[name]
        elif name in _FEW and settings.get(name) == _FEW[name] and isinstance(value, (list, tuple)):
            grows = name in ("hidden_sizes", "embed_dims")
            found[name] = type(value)(_FEW[name] * (n + 1 if grows else 1) for n in range(len(value)))
    return _agreeing(config, found)


def _divided(config: Any, divisor: int) -> dict[str, Any]:
    """Arguments for a configuration of the same class, all widths divided by one number and few layers.

    What must agree in all parts still does.
    """
    found = _common(config, lambda part: _divided(part, divisor))
    for name, value in vars(config).items():
        if name in _COUNTS and type(value) is int:
            found[name] = min(value, _COUNTS[name]) if name not in ("image_size", "patch_size") else value
        elif name == "depths" and isinstance(value, (list, tuple)):
            found[name] = type(value)(1 for _ in value)
        elif _is_width(name):
            if type(value) is int and value % divisor == 0:
                found[name] = value // divisor
            elif _are_ints(value) and not any(one % divisor for one in value):
                found[name] = type(value)(one // divisor for one in value)
    return _agreeing(config, found)


def _divisor(config: Any) -> int:
    """A power of two that divides all widths of a configuration, and what each head has of them."""
    common = 0
    for part in _parts(config):
        own = vars(part)
        heads = [value for name, value in own.items() if name in _HEADS and type(value) is int and value > 0]
        for name, value in own.items():
            for width in value if _are_ints(value) else [value]:
                if _is_width(name) and type(width) is int and width >= 2 * _LEAST:
                    shared = [width // n for n in heads if name in _SHARED and width % n == 0]
                    common = math.gcd(common, width, *shared)
    return max((common & -common) // _LEAST, 1)


def _is_width(name: str) -> bool:
    return bool(_WIDTH.fullmatch(name)) and not _NO_WIDTH.fullmatch(name)


def _are_ints(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(type(one) is int for one in value)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _parts(value)


def _common(config: Any, change: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The parts of a configuration, a backbone where one is missing, and special tokens."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name == "backbone_config" and (value is None or value.model_type == "timm_backbone"):
            found[name] = _backbone()
        elif hasattr(value, "to_dict"):
            found[name] = change(value) | {"model_type": value.model_type}
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            found[name] = known.get(name, LAST_TOKEN + len(found) % 30)
        elif name in _FILLED and value is None:
            found[name] = _FILLED[name]
    return found


def _backbone() -> Any:
    make: Any = importlib.import_module("transformers").ResNetConfig
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return make(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic", out_features=stages)


def _agreeing(config: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with those that follow from others."""
    own = vars(config)
    if "num_key_value_heads" in found and own["num_key_value_heads"] == own.get("num_attention_heads"):
        found["num_key_value_heads"] = found.get("num_attention_heads", own["num_attention_heads"])
    before = {own[name] for name in _LAYER_NAMES if name in found and type(own[name]) is int}
    for name, value in own.items():
        if isinstance(value, list) and name not in found and len(value) in before and len(value) > _LAYERS:
            kinds = list(dict.fromkeys(map(repr, value)))[:_LAYERS]
            firsts = [next(one for one in value if repr(one) == kind) for kind in kinds]
            found[name] = [firsts[min(n, len(firsts) - 1)] for n in range(_LAYERS)]
    rope = own.get("rope_parameters")
    heads = found.get("num_attention_heads", own.get("num_attention_heads"))
    width = found.get("hidden_size", own.get("hidden_size"))
    if isinstance(rope, dict) and "rope_type" in rope and type(heads) is int and type(width) is int:
        head = found.get("head_dim", own.get("head_dim")) or width // heads
        half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        found["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return found


def _settle(config: Any) -> None:
    """No caches and no kernels but torch's, in all parts of a configuration."""
    for part in _parts(config):
        with contextlib.suppress(AttributeError, ValueError):
            part.use_cache = False
    for name in ("use_mambapy", "use_mamba_kernels"):
        if hasattr(config, name):
            setattr(config, name, False)
