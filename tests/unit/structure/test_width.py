"""Streams that cannot be narrowed exactly stay frozen, and say why."""

import pytest
import torch
from torch import nn
from width_models import WORDS, Encoder

from l0hooks import channel_groups
from l0hooks.errors import SpecError
from l0hooks.structure import declare_group
from l0hooks.structure.width.fold import centred

KINDS = ("width",)


class Root(nn.Module):
    """RMSNorm by hand; ``variant`` is what is unusual about it."""

    def __init__(self, variant=""):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.eps = 1e-5
        if variant == "epsilon":
            self.other_eps = 1e-5
        self.variant = variant

    def forward(self, x):
        mean = x.pow(2).mean(-1, keepdim=True)
        scaled = x * torch.rsqrt(mean + self.eps)
        if self.variant == "statistics":
            return scaled * self.weight + mean
        if self.variant == "plain":
            return scaled
        if self.variant == "shifted":
            return scaled * (1.5 + self.weight)
        if self.variant == "other x":
            return (x + 1) * torch.rsqrt(mean + self.eps) * self.weight
        return scaled * self.weight


class OwnCode(nn.LayerNorm):
    def forward(self, x):
        return super().forward(2 * x)


class Between(nn.Module):
    """A norm with something before it on the stream."""

    def __init__(self, change, norm=None):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(99, 16), norm or nn.LayerNorm(16), nn.Linear(16, 7)
        self.scale = nn.Parameter(torch.ones(16))
        self.register_buffer("table", torch.randn(9, 16))
        self.change = change

    def forward(self, words):
        return self.head(self.norm(self.change(self, self.embed(words))))


def found(model, inputs=(WORDS,)):
    return channel_groups(model.eval(), inputs, kinds=KINDS)


def with_norm(norm):
    return Between(lambda self, x: x, norm)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(16), nn.RMSNorm(16), Root(), Root("shifted"), nn.LayerNorm(16, bias=False)]
)
def test_a_stream_between_an_embedding_and_a_norm_is_found(norm):
    (group,) = found(with_norm(norm))
    assert (group.kind, group.size) == ("width", 16)
    assert ("embed.weight",) in [gate.names for gate in group.width.gates]
    assert [one.module for one in group.width.norms] == ["norm"]
    assert group.width.norms[0].offset == (1.5 if norm.__dict__.get("variant") == "shifted" else 0)
    assert [site.names for site in group.readers] == [("head.weight",)]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Root("statistics"), "mean square is used otherwise"),
        (Root("other x"), "mean square is used otherwise"),
        (Root("plain"), "a norm without a weight"),
        (Root("epsilon"), "does not hold its epsilon, 1e-05, once"),
        (nn.LayerNorm(16, elementwise_affine=False), "a norm without a weight"),
        (nn.RMSNorm(16, elementwise_affine=False), "a norm without a weight"),
        (OwnCode(16), "a module with code of its own"),
    ],
)
def test_a_norm_that_is_not_certain_freezes_the_stream(norm, reason):
    groups = found(with_norm(norm))
    assert not len(groups)
    assert any(reason in one.reason and "embed" in one.modules for one in groups.frozen), str(groups)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda self, x: x.sigmoid(), "sigmoid turns what is zero into something else"),
        (lambda self, x: x.exp(), "exp turns what is zero into something else"),
        (lambda self, x: x + 1, "add turns what is zero into something else"),
        (lambda self, x: 1 - x, "rsub turns what is zero into something else"),
        (lambda self, x: x.clamp(min=0.1), "clamp turns what is zero into something else"),
        (lambda self, x: x.masked_fill(x > 1, 3.0), "masked_fill turns what is zero into something else"),
        (lambda self, x: x**0, "pow turns what is zero into something else"),
        (lambda self, x: x.softmax(1), "softmax turns what is zero into something else"),
        (lambda self, x: x / self.scale, "div turns what is zero into something else"),
        (lambda self, x: (x >= 0).float(), "to turns what is zero into something else"),
        (lambda self, x: self.scale / (x.square() + 1), "turns what is zero into something else"),
        (lambda self, x: x + self.table, "a buffer is part of the stream, table"),
        (lambda self, x: x + self.norm.weight, "the weight of a norm is used elsewhere, norm.weight"),
        (lambda self, x: x.cumsum(-1), "cumsum"),
    ],
)
def test_what_would_not_keep_closed_channels_at_zero_freezes_the_stream(change, reason):
    groups = found(Between(change))
    assert not len(groups)
    assert any(reason in one.reason for one in groups.frozen), str(groups)


@pytest.mark.parametrize(
    "change",
    [
        lambda self, x: nn.functional.gelu(x) * 3 + x.tanh(),
        lambda self, x: x.clamp(-1, 2).pow(3),
        lambda self, x: torch.where(x > 0, x, 0.2 * x),
        lambda self, x: x.masked_fill(x > 1, 0.0),
        lambda self, x: torch.cat([x, -x], 1).roll(1, 1),
        lambda self, x: x * self.scale + self.scale,
        lambda self, x: nn.functional.pad(x, (0, 0, 1, 1)),
    ],
)
def test_what_keeps_zeros_at_zero_may_stand_on_the_stream(change):
    assert [group.kind for group in found(Between(change))] == ["width"]


def test_a_stream_that_is_an_output_is_frozen():
    model = Encoder()
    model.head = nn.Identity()
    groups = found(model)
    assert not len(groups)
    assert any("an output of the model" in one.reason for one in groups.frozen)


def test_attention_of_torch_needs_as_many_channels_as_its_heads_have():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(99, 16), nn.LayerNorm(16)
            self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

        def forward(self, words):
            x = self.norm(self.embed(words))
            return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))

    groups = found(Attending())
    assert not len(groups)
    assert any("nn.MultiheadAttention" in one.reason for one in groups.frozen), str(groups)


def test_a_norm_over_two_streams_side_by_side_freezes_both():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Embedding(99, 6), nn.Embedding(99, 10)
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

        def forward(self, words):
            return self.head(self.norm(torch.cat([self.one(words), self.two(words)], -1)))

    groups = found(Beside())
    assert not len(groups)
    assert any("channels of another kind" in one.reason for one in groups.frozen), str(groups)


def test_norms_after_branches_write_the_stream_and_norms_before_them_only_read_it():
    (after,) = found(Encoder(before=False))
    (before,) = found(Encoder())
    for group, open_only in ((after, False), (before, True)):
        gates = {gate.names[0]: gate for gate in group.width.gates}
        assert gates["blocks.0.first.weight"].open_only is open_only
        assert gates["blocks.0.first.bias"].open_only is open_only
        assert not gates["blocks.0.out.bias"].open_only


def test_without_asking_for_width_the_stream_is_frozen_as_before():
    groups = channel_groups(Encoder().eval(), (WORDS,))
    assert {group.kind for group in groups} == {"head", "neuron"}
    assert any("residual stream of layer_norm" in one.reason for one in groups.frozen)


def test_a_norm_of_each_head_does_not_make_one_head_of_all():
    class Heads(Encoder):
        def __init__(self):
            super().__init__(depth=1)
            self.norm = nn.LayerNorm(4)

        def forward(self, words):
            block = self.blocks[0]
            x = self.embed(words)
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in block.qkv(block.first(x)).chunk(3, -1))
            q = self.norm(q)
            x = x + block.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return self.head(self.last(x))

    model = Heads().eval()
    both = channel_groups(model, (WORDS,), kinds=("head", "width"))
    assert [(g.kind, g.size) for g in both if g.kind == "head"] == [
        (g.kind, g.size) for g in channel_groups(model, (WORDS,)) if g.kind == "head"
    ]
    assert [g.size for g in both if g.kind == "width"] == [16]


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_centring_is_that_over_the_open_channels(kind):
    is_open = torch.tensor([True, False, True, True])
    x = torch.randn(3, 5, 4, dtype=torch.float64) * is_open
    x = x.movedim(-1, 1) if kind == "group" else x
    got = centred(x, is_open, kind)
    channels = 1 if kind == "group" else -1
    kept, expected = (
        x.index_select(channels, is_open.nonzero()[:, 0]),
        got.index_select(channels, is_open.nonzero()[:, 0]),
    )
    axes = (1, 2) if kind == "group" else (-1,)
    assert torch.allclose(expected, kept - kept.mean(axes, keepdim=True))
    assert not got.index_select(channels, torch.tensor([1])).any()
    assert centred(0 * x, torch.zeros(4, dtype=torch.bool), kind).isfinite().all()


def test_width_is_not_declared_by_hand():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(SpecError, match="the name must be known"):
        declare_group(model, outputs="0", inputs="1", kind="width")
