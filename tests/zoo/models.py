"""The models that every promise about whole models is tested on, small and with random weights."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRANULARITIES = ("weight", "input", "output", "kernel", (2, 2))
_ALL = GRANULARITIES
_NO_BLOCKS = GRANULARITIES[:-1]
_TURNED = {"input": "output", "output": "input"}


def _everything(granularity: object) -> Mapping[object, object]:
    return {"all": granularity}


@dataclass(frozen=True)
class Entry:
    """One model of the zoo: how it is made, fed and gated."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Tensor, ...], dict[str, Tensor]]]
    granularities: tuple[object, ...] = _ALL
    spec: Callable[[object], Mapping[object, object]] = _everything
    options: Mapping[str, object] = field(default_factory=dict)


def _images(*shape: int) -> Callable[[int], tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
    return lambda batch: ((torch.randn(batch, *shape),), {})


def _tokens(vocabulary: int, length: int) -> Callable[[int], tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
    return lambda batch: ((torch.randint(vocabulary, (batch, length)),), {})


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResidualCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, stride=2)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class SeparableCNN(nn.Sequential):
    """Depthwise and pointwise convolutions, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 8, 3),
            nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 24, 3, groups=12),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 4),
        )


class GroupedCNN(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 12, 3, groups=2),
            nn.GroupNorm(3, 12),
            nn.SiLU(),
            nn.Conv2d(12, 8, 3, groups=2, padding_mode="reflect", padding=1),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 4, (1, 2), dilation=2),
        )


class UNet(nn.Module):
    """Transposed convolutions and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(2, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.grouped_up = nn.ConvTranspose2d(8, 4, 3, padding=1, groups=2)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down1(x))
        x = F.relu(self.up(F.relu(self.down2(skip))))
        return self.out(F.relu(self.grouped_up(torch.cat([x, skip], 1))))


class TCN(nn.Module):
    """Causal dilated 1-d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(4, 4, 3, dilation=d) for d in (1, 2, 4)])
        self.up = nn.ConvTranspose1d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer(F.pad(x, (2 * layer.dilation[0], 0))))
        return self.up(x)


class Volumes(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 4, 2),
            nn.BatchNorm3d(4),
            nn.ReLU(),
            nn.Conv3d(4, 8, 2, groups=2),
            nn.ConvTranspose3d(8, 2, 2),
        )


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


class Decoder(nn.Module):
    """Self and cross attention, keys and values of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, *, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        attended, weights = self.cross(x, keys, values)
        return self.head(x + attended), weights


class TiedLM(nn.Module):
    """The decoder is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.body = nn.Linear(8, 8)
        self.decode = nn.Linear(8, 10, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.body(self.embed(x))))


class Recurrent(nn.Module):
    """An LSTM, which is left alone, between layers that are gated."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 6)
        self.rnn = nn.LSTM(6, 4, batch_first=True, bidirectional=True)
        self.after = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.rnn(torch.relu(self.before(x)))[0])


class Repeating(nn.Module):
    """One layer used twice, also under two names, and a weight that is read without its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.read = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.again(self.first(x)))
        return F.linear(x, self.read.weight) + x @ self.read.weight.T


class Several(nn.Module):
    """Several inputs, embeddings, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.bag = nn.EmbeddingBag(6, 4, mode="mean")
        self.numbers = nn.Linear(4, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(12, 2), "b": nn.Linear(12, 4)})

    def forward(self, words: Tensor, numbers: Tensor, *, bag: Tensor) -> dict[str, object]:
        x = torch.cat([self.words(words).mean(1), self.numbers(numbers), self.bag(bag)], -1)
        return {"heads": {name: head(x) for name, head in self.heads.items()}, "x": [x], "count": len(words)}


def _hugging_face(name: str, config: str, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers' own imports
            import transformers

            return getattr(transformers, name)(getattr(transformers, config)(**options))

    return make


_SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}

ZOO: dict[str, Entry] = {
    "mlp": Entry(MLP, _images(8)),
    "residual_cnn": Entry(ResidualCNN, _images(2, 8, 8)),
    "separable_cnn": Entry(SeparableCNN, _images(2, 8, 8), _NO_BLOCKS),
    "grouped_cnn": Entry(GroupedCNN, _images(4, 8, 8)),
    "unet": Entry(UNet, _images(2, 8, 8)),
    "tcn": Entry(TCN, _images(4, 12)),
    "volumes": Entry(Volumes, _images(2, 4, 4, 4)),
    "encoder": Entry(Encoder, _images(5, 4)),
    "decoder": Entry(
        Decoder,
        lambda batch: (
            (torch.randn(batch, 5, 8),),
            {"keys": torch.randn(batch, 7, 6), "values": torch.randn(batch, 7, 4)},
        ),
    ),
    "tied_lm": Entry(TiedLM, _tokens(10, 5), spec=lambda g: {"embed": _TURNED.get(g, g), "all": g}),
    "recurrent": Entry(Recurrent, _images(5, 4)),
    "repeating": Entry(Repeating, _images(8)),
    "several": Entry(
        Several,
        lambda batch: (
            (torch.randint(10, (batch, 3)), torch.randn(batch, 4)),
            {"bag": torch.randint(6, (batch, 2))},
        ),
        spec=lambda g: {"*": g},
    ),
    "bert": Entry(
        _hugging_face("BertForSequenceClassification", "BertConfig", max_position_embeddings=12, **_SMALL),
        _tokens(20, 6),
    ),
    "gpt2": Entry(
        _hugging_face("GPT2LMHeadModel", "GPT2Config", vocab_size=20, n_positions=12, n_embd=8, n_layer=2, n_head=2,
                      use_cache=False, bos_token_id=0, eos_token_id=0),
        _tokens(20, 6),
        spec=lambda g: {"*.wte": _TURNED.get(g, g), "all": g},
    ),
    "vit": Entry(
        _hugging_face("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, num_channels=2,
                      **{k: v for k, v in _SMALL.items() if k != "vocab_size"}),
        _images(2, 8, 8),
    ),
    "llama": Entry(
        _hugging_face("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, max_position_embeddings=12,
                      use_cache=False, bos_token_id=0, eos_token_id=0, **_SMALL),
        _tokens(20, 6),
    ),
    "t5": Entry(
        _hugging_face("T5ForConditionalGeneration", "T5Config", vocab_size=20, d_model=8, d_kv=4, d_ff=16,
                      num_layers=2, num_heads=2, use_cache=False, decoder_start_token_id=0),
        lambda batch: (
            (),
            {"input_ids": torch.randint(20, (batch, 6)), "decoder_input_ids": torch.randint(20, (batch, 4))},
        ),
        options={"exclude": "lm_head"},  # tied to embeddings that stay as they are
    ),
}  # fmt: skip
