"""Small mixtures of experts: those of transformers, and blocks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0hooks import GateSpec, iter_gates, sparsify
from l0hooks.attach.walk import iter_gated

TOKENS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
VECTORS = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(6))
ALL = GateSpec(granularity="coupled", kinds=("channel", "neuron", "head", "expert"))
_COMMON: dict[str, Any] = {
    "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 8, "moe_intermediate_size": 16,
    "intermediate_size": 48, "num_key_value_heads": 8, "topk_group": 1,
}  # fmt: skip


def _config(family: str) -> Any:
    import transformers as tr

    six: dict[str, Any] = {**_COMMON, "num_experts_per_tok": 2}
    return {
        "Mixtral": lambda: tr.MixtralConfig(**six, head_dim=8, intermediate_size=24, num_local_experts=6),
        "Qwen3Moe": lambda: tr.Qwen3MoeConfig(
            **six, head_dim=8, intermediate_size=48, moe_intermediate_size=24, num_experts=6
        ),
        "Olmoe": lambda: tr.OlmoeConfig(**six, intermediate_size=24, num_experts=6),
        "GptOss": lambda: tr.GptOssConfig(**six, head_dim=8, intermediate_size=16, num_local_experts=6),
        "DeepseekV3": lambda: tr.DeepseekV3Config(**{**_COMMON, **_LATENT}, num_experts_per_tok=3, n_group=1),
        "by groups": lambda: tr.DeepseekV3Config(**{**_COMMON, **_LATENT}, num_experts_per_tok=3, n_group=2),
    }[family]()


def pretrained(family: str) -> Any:
    """A tiny model of transformers whose weights are of ordinary size, so that every mistake shows."""
    import transformers as tr

    name = "DeepseekV3" if family == "by groups" else family
    torch.manual_seed(0)
    model = getattr(tr, f"{name}ForCausalLM")(_config(family))
    return randomised(model)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Weights and biases of ordinary size, in evaluation mode."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif not bool(parameter.all()):  # a bias that starts at zero
            parameter.normal_(std=0.3)
    return model.eval()


class Expert(nn.Module):
    """Two layers with biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class ListOfExperts(nn.Module):
    """A Linear router and experts in a list, each run on the tokens that chose it."""

    def __init__(self, width: int = 16, inner: int = 16, experts: int = 6, chosen: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, chosen
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(experts))

    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = torch.topk(F.softmax(logits, -1), self.top_k, -1)
        return weights / weights.sum(-1, keepdim=True), indices

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        weights, indices = self.weights(self.gate(x))
        out, mask = torch.zeros_like(x), F.one_hot(indices, self.num_experts).permute(2, 1, 0)
        for number in range(self.num_experts):
            position, token = torch.where(mask[number])
            out = out.index_add(0, token, self.experts[number](x[token]) * weights[token, position, None])
        return out.reshape(shape)


class HitExperts(ListOfExperts):
    """The same, but experts that no token chose are passed over, which no graph can show."""

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        weights, indices = self.weights(self.gate(x))
        out = torch.zeros_like(x)
        for number in indices.unique().tolist():
            token, position = torch.where(indices == number)
            out = out.index_add(0, token, self.experts[number](x[token]) * weights[token, position, None])
        return out.reshape(shape)


class Sigmoids(ListOfExperts):
    """Scores that a number is added to before the best are chosen: a score of 0 may be among them."""

    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        bonus = torch.arange(self.num_experts, dtype=scores.dtype)
        indices = torch.topk(scores + bonus, self.top_k, -1).indices
        return scores.gather(-1, indices), indices


class Mixture(nn.Module):
    """Two blocks of experts in a residual stream, then neurons."""

    def __init__(self, block: Callable[[], nn.Module] = ListOfExperts) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.up, self.down, self.head = nn.Linear(16, 20), nn.Linear(20, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x + self.down(F.relu(self.up(x))))


def mixture(block: Callable[[], nn.Module] = ListOfExperts) -> nn.Module:
    """The same numbers each time."""
    torch.manual_seed(0)
    return randomised(Mixture(block))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    **{name: ((lambda name=name: pretrained(name)), TOKENS) for name in ("Mixtral", "Qwen3Moe", "Olmoe")},
    "a list": (mixture, VECTORS),
    "hit experts": (lambda: mixture(HitExperts), VECTORS),
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of a language model, or what a plain model returns."""
    return model(x, use_cache=False).logits if hasattr(model, "generate") else model(x)


@torch.no_grad()
def close(model: nn.Module, *, experts: int | None = None, seed: int = 0) -> None:
    """Close a third of every group's gates, or so many experts; the others stand somewhere open."""
    generator = torch.Generator().manual_seed(seed)
    for one in iter_gated(model):
        size = one.gate.log_alpha.numel()
        group = one.coupled.group if one.coupled else None
        count = size // 3 if experts is None or group is None or group.kind != "expert" else experts
        one.gate.log_alpha.copy_(torch.rand(size, generator=generator) * 2 + 0.1)
        one.gate.log_alpha[torch.randperm(size, generator=generator)[:count]] = -5.0


def gated(name: str, spec: Any = ALL, **closing: Any) -> tuple[nn.Module, Tensor]:
    """A model with gates, some of them closed, in evaluation mode; and its input."""
    make, x = MODELS[name]
    model = make()
    sparsify(model, spec, example_inputs=(x,))
    close(model, **closing)
    assert any(True for _ in iter_gates(model))
    return model.eval(), x
