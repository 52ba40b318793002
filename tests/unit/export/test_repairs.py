"""Sizes that a model's own code holds, in attributes, tuples and configurations, follow the cut; its file says them."""

import types
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l0hooks import iter_gates, prune, sparsify
from l0hooks.export.save import load_pruned, save_pruned


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Grouped(nn.Module):
    """Grouped queries: the number of query heads is a multiple of that of members, which are the key heads."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv, self.hidden, self.size = 4, 2, 32, 8
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o = nn.Linear(32, 32)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.num_heads, self.size).transpose(1, 2)
        k, v = (f(x).view(b, t, self.num_kv, self.size).transpose(1, 2) for f in (self.k, self.v))
        h = attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        return self.o(h.reshape(b, t, self.hidden))


class Fused(nn.Module):
    """A fused projection; subclasses say where the sizes are."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

    def sizes(self):
        raise NotImplementedError

    def forward(self, x):
        parts = self.qkv(x).split(self.sizes(), -1)
        return self.o(attend(*(p.reshape(*x.shape[:2], -1, 8).transpose(1, 2) for p in parts)))


class FromConfig(Fused):
    def __init__(self, config=None):
        super().__init__()
        self.config = types.SimpleNamespace(num_attention_heads=4, size=8) if config is None else config

    def sizes(self):
        return [self.config.num_attention_heads * self.config.size] * 3


@dataclass
class Settings:
    attention: dict[str, int]


class FromNestedConfig(Fused):
    def __init__(self):
        super().__init__()
        self.settings = Settings({"inner": 32})

    def sizes(self):
        return [self.settings.attention["inner"]] * 3


class FromTuple(Fused):
    def __init__(self):
        super().__init__()
        self.split_sizes = (32, 32, 32)

    def sizes(self):
        return self.split_sizes


class FromList(Fused):
    def __init__(self):
        super().__init__()
        self.widths = [[4, 8]]

    def sizes(self):
        return [self.widths[0][0] * self.widths[0][1]] * 3


class FromOtherName(Fused):
    def __init__(self):
        super().__init__()
        self.all_head_size = 32

    def sizes(self):
        return self.all_head_size


class UnequalParts(nn.Module):
    """One projection of three query heads, a key and a value head for each of two members."""

    def __init__(self):
        super().__init__()
        self.parts = (48, 16, 16)
        self.qkv, self.o = nn.Linear(16, 80), nn.Linear(48, 16)

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (-1, 8)).transpose(1, 2) for p in self.qkv(x).split(self.parts, -1))
        return self.o(attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)))


class Blurred(nn.Module):
    """A kernel of its own, as anti-aliased networks have it, with the number of channels beside it."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.register_buffer("kernel", torch.ones(channels, 1, 3, 3) / 9)

    def forward(self, x):
        return F.conv2d(x, self.kernel, padding=1, groups=self.channels)


class BlurredNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.blur, self.two = nn.Conv2d(3, 8, 3, padding=1), Blurred(8), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.two(self.blur(F.relu(self.one(x))))


def two_layers():
    """Two layers with one configuration, which lose different numbers of heads."""
    config = types.SimpleNamespace(num_attention_heads=4, size=8)
    return nn.Sequential(FromConfig(config), nn.Tanh(), FromConfig(config))


def tokens():
    return torch.randn(2, 6, 32)


CASES = {
    "grouped queries": (Grouped, tokens),
    "a configuration": (FromConfig, tokens),
    "a nested configuration": (FromNestedConfig, tokens),
    "one configuration for two layers": (two_layers, tokens),
    "a tuple": (FromTuple, tokens),
    "a list of lists": (FromList, tokens),
    "another name": (FromOtherName, tokens),
    "unequal parts": (UnequalParts, lambda: torch.randn(2, 6, 16)),
    "channels beside a buffer": (BlurredNetwork, lambda: torch.randn(2, 3, 6, 6)),
}


def closed(build, x):
    torch.manual_seed(0)
    model = build().double()
    sparsify(model, "coupled", example_inputs=(x,))
    for number, (_, gate) in enumerate(iter_gates(model)):
        gate.log_alpha.data[: number + 1] = -9.0
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_the_model_stays_its_own_and_so_does_what_is_loaded(name, tmp_path):
    build, inputs = CASES[name]
    x = inputs().double()
    model = closed(build, x)
    small, report = prune(model, example_inputs=(x,), return_report=True)
    assert report.note == ""
    assert type(small) is type(model)
    save_pruned(small, tmp_path / "small")
    loaded = load_pruned(lambda: build().double(), tmp_path / "small").eval()
    for given in (x, torch.randn_like(x[:1]), torch.cat([x, x], -1 if x.dim() > 3 else 1)):
        torch.testing.assert_close(small(given), model(given), rtol=0, atol=1e-12)
        torch.testing.assert_close(loaded(given), model(given), rtol=0, atol=1e-12)


def test_a_configuration_that_others_hold_stays_as_it_was():
    config = types.SimpleNamespace(num_attention_heads=4, size=8)
    x = tokens().double()
    model = closed(lambda: FromConfig(config), x)
    small = prune(model, example_inputs=(x,))
    assert (config.num_attention_heads, model.config.num_attention_heads) == (4, 4)
    assert small.config.num_attention_heads == 3


def test_a_place_that_need_not_change_is_left_alone():
    class WithLimit(FromConfig):
        def __init__(self):
            super().__init__()
            self.longest, self.window = 32, 4  # equal to sizes that change

    x = tokens().double()
    small = prune(closed(WithLimit, x), example_inputs=(x,))
    assert (small.longest, small.window, small.config.num_attention_heads) == (32, 4, 3)
