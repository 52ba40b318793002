"""Models with residual streams, inputs for them, and gates of which some are closed."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from tiny_transformers import tiny
from torch import Tensor, nn

from l0hooks import GateSpec, iter_gates, sparsify

ALL_KINDS = ("channel", "neuron", "head", "width")
TRANSFORMERS = ("Llama", "Qwen3", "Gemma 3", "GPT-2", "BERT", "DistilBERT", "T5", "ViT")
WORDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    """Attention and a layer of neurons, each with a norm before it, or after it."""

    def __init__(self, norm: type[nn.Module], width: int, heads: int, *, before: bool) -> None:
        super().__init__()
        self.heads = heads
        self.before = before
        self.first, self.second = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * 4 * heads), nn.Linear(4 * heads, width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b t (h d) -> b h t d", d=4) for t in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def neurons(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.attention(self.first(x))
            return x + self.neurons(self.second(x))
        x = self.first(x + self.attention(x))
        return self.second(x + self.neurons(x))


class Encoder(nn.Module):
    """A small encoder of words; its embedding may be tied to its output layer."""

    def __init__(
        self,
        norm: type[nn.Module] = nn.LayerNorm,
        *,
        width: int = 16,
        heads: int = 2,
        depth: int = 2,
        before: bool = True,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, width)
        self.position = nn.Parameter(torch.randn(1, 12, width))
        self.blocks = nn.ModuleList(Block(norm, width, heads, before=before) for _ in range(depth))
        self.last = norm(width) if before else nn.Identity()
        self.head = nn.Linear(width, 99, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.position[:, : words.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


class Pools(nn.Module):
    """Convolutions with a GroupNorm of one group before each, as in a MetaFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.norms = nn.ModuleList(nn.GroupNorm(1, 12) for _ in range(3))
        self.up, self.down = nn.Conv2d(12, 20, 1), nn.Conv2d(20, 12, 1)
        self.mix = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = x + self.mix(self.norms[0](x))
        x = x + self.down(self.up(self.norms[1](x)).relu())
        return self.head(self.norms[2](x).mean((2, 3)))


class Logits(nn.Module):
    """An encoder and a decoder that return logits alone: what the encoder returns is no output then."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, answer: Tensor) -> Tensor:
        return self.model(input_ids=words, decoder_input_ids=answer).logits


def stream_model(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model in evaluation mode, with random biases and norms, and its inputs."""
    torch.manual_seed(0)
    if name in TRANSFORMERS:
        model, inputs = tiny(name)
        if name == "T5":
            model, inputs = Logits(model), (inputs[0], inputs[2])
    else:
        model, inputs = {
            "pre LayerNorm": lambda: (Encoder(), (WORDS,)),
            "post LayerNorm": lambda: (Encoder(before=False), (WORDS,)),
            "pre RMSNorm": lambda: (Encoder(nn.RMSNorm, tied=True), (WORDS,)),
            "post RMSNorm": lambda: (Encoder(nn.RMSNorm, before=False), (WORDS,)),
            "GroupNorm": lambda: (Pools(), (torch.randn(2, 3, 16, 16),)),
        }[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape) / 2)
    return model.eval(), inputs


NAMES = (*TRANSFORMERS, "pre LayerNorm", "post LayerNorm", "pre RMSNorm", "post RMSNorm", "GroupNorm")


def gated(name: str, kinds: tuple[str, ...] = ("width",)) -> tuple[nn.Module, tuple[Any, ...]]:
    """The same model with gates: a third of each group is closed, most others lie between 0 and 1."""
    model, inputs = stream_model(name)
    sparsify(model, GateSpec(granularity="coupled", kinds=kinds), example_inputs=inputs)
    close_a_third(model)
    return model.eval(), inputs


def close_a_third(model: nn.Module) -> None:
    """Random gates, a third of each group closed."""
    generator = torch.Generator().manual_seed(3)
    for _, gate in iter_gates(model):
        count = gate.log_alpha.numel()
        location = torch.rand(count, generator=generator) * 1.5 + 0.1
        location[torch.randperm(count, generator=generator)[: -(-count // 3)]] = -9.0
        gate.log_alpha.data.copy_(location)


def resized(inputs: tuple[Any, ...], *, examples: int, length: int) -> tuple[Any, ...]:
    """Inputs for another batch and, of words, another length."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for value in inputs:
        if value.is_floating_point():
            found.append(torch.randn(examples, *value.shape[1:], generator=generator))
        else:
            found.append(torch.randint(3, 97, (examples, length), generator=generator))
    return tuple(found)
