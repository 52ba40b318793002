"""Modules whose own code holds sizes by hand become graphs; the model around them stays what it is."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l0hooks import iter_gates, load_pruned, prune, save_pruned, sparsify
from l0hooks.errors import L0HooksWarning, StateError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),  # of torch, when it copies a graph
]


class Attention(nn.Module):
    """As in many vision models: the width of the residual stream is reused as that of all heads."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.proj, self.drop = 4, nn.Linear(16, 48), nn.Linear(16, 16), nn.Dropout(0.5)

    def forward(self, x, size, scale=1.0, mask=None):
        b, n, c = x.shape
        if size[0] * size[1] != n:
            raise ValueError(size)
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q * scale, k, v, attn_mask=mask)
        return self.drop(self.proj(y.transpose(1, 2).reshape(b, n, c)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.attention, self.after = nn.LayerNorm(16), Attention(), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x, size):
        x = x + self.attention(self.before(x), size, mask=None, scale=0.5)
        return x + self.mlp(self.after(x))


class Vit(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.wide, self.stem = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 4, 4)
        self.blocks, self.head = nn.ModuleList(block() for _ in range(2)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(torch.relu(self.wide(x)))
        size = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, size)
        return self.head(x.mean(1))


def closed(model, inputs, count=1):
    torch.manual_seed(0)
    sparsify(model, "coupled", example_inputs=inputs)
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha[:count] = -9
    return model.eval()


@pytest.fixture(scope="module")
def both():
    """The gated model, and what comes out of it."""
    torch.manual_seed(0)
    gated = closed(Vit(), (torch.randn(2, 3, 16, 16),))
    return gated, prune(gated, example_inputs=(torch.randn(2, 3, 16, 16),))


SHAPES = [(2, 3, 16, 16), (1, 3, 16, 16), (5, 3, 16, 16), (3, 3, 24, 32)]


@torch.no_grad()
def assert_equal(gated, small, shapes=SHAPES):
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(small(x), gated(x), rtol=1e-5, atol=1e-5)


def graphs_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.fx.GraphModule)]


def test_only_the_modules_that_hold_sizes_are_graphs(both):
    gated, small = both
    assert graphs_of(small) == ["blocks.0.attention", "blocks.1.attention"]
    assert type(small) is Vit
    assert small.blocks[0].mlp[0].out_features == 23
    assert small.wide.out_channels == 7
    assert small.blocks[0].attention.qkv.out_features == 36
    assert_equal(gated, small)


def test_the_state_has_the_names_of_the_dense_model(both):
    assert set(both[1].state_dict()) == set(Vit().state_dict())


def test_its_layers_train(both):
    small, x = copy.deepcopy(both[1]).train(), torch.randn(2, 16, 16)
    attention = small.blocks[0].attention
    assert attention.training
    assert attention.drop.training
    one, two = (attention(x, (4, 4), mask=None, scale=0.5) for _ in range(2))
    assert not torch.equal(one, two)
    one.sum().backward()
    assert attention.qkv.weight.grad.abs().sum() > 0


def test_it_has_the_mode_of_the_model():
    model = closed(Vit(), (torch.randn(2, 3, 16, 16),)).train()
    small = prune(model, example_inputs=(torch.randn(2, 3, 16, 16),))
    assert all(module.training for module in small.modules())


@pytest.mark.slow
def test_copies_pickles_and_files_compute_the_same(both, tmp_path):
    gated, small = both
    for number, one in enumerate((copy.deepcopy(small), pickle.loads(pickle.dumps(small)))):
        assert_equal(gated, one)
        save_pruned(one, tmp_path / f"{number}.safetensors")
        loaded = load_pruned(Vit, tmp_path / f"{number}.safetensors")
        assert loaded.training
        assert loaded.blocks[0].attention.training
        assert list(loaded.state_dict()) == list(small.state_dict())
        assert_equal(gated, loaded.eval())


def test_other_plain_arguments_are_refused(both):
    attention = both[1].blocks[0].attention
    x = torch.randn(2, 16, 16)
    with pytest.raises(AssertionError, match=r"input 3 has a value that the graph was not made for.\n  expected: 0.5"):
        attention(x, (4, 4), scale=0.7, mask=None)
    with pytest.raises(AssertionError, match=r"input 4 has a value that the graph was not made for.\n  expected: None"):
        attention(x, (4, 4), scale=0.5, mask=torch.zeros(16, 16))


def test_it_is_exported_with_a_free_batch(both):
    gated, small = both
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(small, (torch.randn(2, 3, 16, 16),), dynamic_shapes={"x": {0: batch}})
    assert_equal(gated, program.module(), [(2, 3, 16, 16), (7, 3, 16, 16)])


def test_a_warning_names_the_modules_and_the_line():
    model = closed(Vit(), (torch.randn(2, 3, 16, 16),))
    with pytest.warns(L0HooksWarning, match=r"blocks\.0\.attention, blocks\.1\.attention: .*test_cut_inside\.py"):
        prune(model, example_inputs=(torch.randn(2, 3, 16, 16),))


@pytest.mark.slow
def test_it_is_pruned_again_and_saved(both, tmp_path):
    x = torch.randn(2, 3, 16, 16)
    gated = closed(copy.deepcopy(both[1]), (x,))
    small = prune(gated, example_inputs=(x,))
    assert small.blocks[0].attention.qkv.out_features == 24
    assert_equal(gated, small)
    save_pruned(small, tmp_path / "small.safetensors")
    assert_equal(gated, load_pruned(Vit, tmp_path / "small.safetensors").eval())


class Encoder(nn.Module):
    """Attention of torch itself, called with an argument by name."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        y = self.norm(x)
        return self.out(x + self.attention(y, y, y, need_weights=False)[0])


def test_arguments_left_out_have_the_defaults_of_the_module(tmp_path):
    gated = closed(Encoder(), (torch.randn(2, 6, 16),))
    small = prune(gated, example_inputs=(torch.randn(2, 6, 16),))
    assert graphs_of(small) == ["attention"]
    for shape in [(2, 6, 16), (1, 6, 16), (3, 9, 16)]:
        assert_equal(gated, small, [shape])
        assert_equal(gated, pickle.loads(pickle.dumps(copy.deepcopy(small))), [shape])
    with pytest.raises(AssertionError, match="input 4 has a value"):
        small.attention(*[torch.randn(2, 6, 16)] * 3)
    save_pruned(small, tmp_path / "small.safetensors")
    assert_equal(gated, load_pruned(Encoder, tmp_path / "small.safetensors").eval(), [(1, 4, 16)])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention()

    def forward(self, x, size):
        return x + self.attention(self.norm(x), size, mask=None)


class Shared(Vit):
    """One attention in two places."""

    def __init__(self):
        super().__init__(Residual)
        self.blocks[1].attention = self.blocks[0].attention


def test_a_module_in_two_places_is_one_graph(tmp_path):
    gated = closed(Shared(), (torch.randn(2, 3, 16, 16),))
    small = prune(gated, example_inputs=(torch.randn(2, 3, 16, 16),))
    assert graphs_of(small) == ["blocks.0.attention"]
    assert small.blocks[0].attention is small.blocks[1].attention
    assert_equal(gated, small)
    save_pruned(small, tmp_path / "small.safetensors")
    assert_equal(gated, load_pruned(Shared, tmp_path / "small.safetensors").eval())


class Batched(nn.Module):
    """Channels of a convolution cross the module that holds heads: they are cut first, and its graph has their size."""

    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.last = nn.Conv2d(3, 8, 4, 4), Inner(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.attention(torch.relu(x)))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.BatchNorm2d(8), nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        b, _, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, 2, 4, h * w).transpose(-1, -2).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.drop(self.proj(y.reshape(b, 8, h, w)))


@pytest.mark.slow
def test_channels_that_cross_a_graph_are_cut_with_it(tmp_path):
    torch.manual_seed(0)
    model = Batched()
    model.attention.norm.running_mean.normal_()
    gated = closed(model, (torch.randn(2, 3, 16, 16),))
    small = prune(gated, example_inputs=(torch.randn(2, 3, 16, 16),))
    assert graphs_of(small) == ["attention"]
    assert (small.stem.out_channels, small.attention.norm.num_features, small.attention.qkv.in_channels) == (7, 7, 7)
    assert small.attention.qkv.out_channels == 12
    assert_equal(gated, small)
    small.train()(torch.randn(2, 3, 16, 16))
    assert small.attention.norm.num_batches_tracked == 1  # the graph calls the layer itself
    small.eval()
    save_pruned(small, tmp_path / "small.safetensors")
    x = torch.randn(2, 3, 24, 16)
    assert torch.equal(load_pruned(Batched, tmp_path / "small.safetensors").eval()(x), small(x))


def test_a_foreign_graph_inside_is_not_saved(tmp_path):
    model = Vit()
    model.head = torch.fx.symbolic_trace(model.head)
    with pytest.raises(StateError, match="a graph at 'head' that prune did not make"):
        save_pruned(model, tmp_path / "small.safetensors")
