"""Tiny models of families of transformers with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tr

TOKENS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(6))
_WORDS: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_LLAMA: dict[str, Any] = {**_BERT, **_WORDS, "num_attention_heads": 8, "num_key_value_heads": 4}
_SEQUENCES: dict[str, Any] = {
    **_WORDS, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1,
}  # fmt: skip
_EYES: dict[str, Any] = {"image_size": 32, "patch_size": 8}
_EARS: dict[str, Any] = {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

# family: the class, a function to its config, positional inputs
FAMILIES: dict[str, tuple[str, Callable[[], Any], tuple[Any, ...]]] = {
    "Llama": ("LlamaForCausalLM", lambda: tr.LlamaConfig(head_dim=8, **_LLAMA), (TOKENS,)),
    "Qwen3": ("Qwen3ForCausalLM", lambda: tr.Qwen3Config(head_dim=8, **_LLAMA), (TOKENS,)),
    "Mistral": ("MistralForCausalLM", lambda: tr.MistralConfig(head_dim=8, **_LLAMA), (TOKENS,)),
    "Gemma 3": ("Gemma3ForCausalLM", lambda: tr.Gemma3TextConfig(head_dim=8, **_LLAMA), (TOKENS,)),
    "Phi-3": ("Phi3ForCausalLM", lambda: tr.Phi3Config(**_LLAMA), (TOKENS,)),
    "GPT-2": ("GPT2LMHeadModel", lambda: tr.GPT2Config(n_embd=32, n_layer=2, n_head=4, **_WORDS), (TOKENS,)),
    "BERT": ("BertForMaskedLM", lambda: tr.BertConfig(**_BERT, **_WORDS), (TOKENS,)),
    "RoBERTa": ("RobertaForMaskedLM", lambda: tr.RobertaConfig(**_BERT, **_WORDS), (TOKENS,)),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        lambda: tr.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=99),
        (TOKENS,),
    ),
    "T5": (
        "T5ForConditionalGeneration",
        lambda: tr.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **_WORDS),
        (TOKENS, None, TOKENS),
    ),
    "BART": ("BartForConditionalGeneration", lambda: tr.BartConfig(**_SEQUENCES), (TOKENS,)),
    "Whisper": (
        "WhisperForConditionalGeneration",
        lambda: tr.WhisperConfig(num_mel_bins=8, max_source_positions=20, max_target_positions=30, **_SEQUENCES),
        (torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(7)), None, TOKENS),
    ),
    "ViT": ("ViTForImageClassification", lambda: tr.ViTConfig(**_BERT, **_EYES), (IMAGES,)),
    "CLIP": (
        "CLIPModel",
        lambda: tr.CLIPConfig(
            text_config={**_BERT, "vocab_size": 99}, vision_config={**_BERT, **_EYES, "intermediate_size": 56},
            projection_dim=16,
        ),
        (TOKENS, IMAGES),
    ),
    "Wav2Vec2": (
        "Wav2Vec2Model",
        lambda: tr.Wav2Vec2Config(**_BERT, **_EARS),
        (torch.randn(2, 400, generator=torch.Generator().manual_seed(8)),),
    ),
}  # fmt: skip


def tiny(family: str) -> tuple[Any, tuple[Any, ...]]:
    """A model of ``family`` in evaluation mode, and its inputs."""
    name, config, inputs = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(tr, name)(config()).eval(), inputs
