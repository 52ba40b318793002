"""Rewritten graphs: right for the sizes that they take, and refused for all others."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l0hooks import iter_gates, load_pruned, prune, save_pruned, sparsify
from l0hooks.errors import L0HooksWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:prune. the smaller model is a GraphModule"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),  # of torch, when it copies a graph
]


class Gpt(nn.Module):
    """Attention as it is usually written: the residual width is reused as the width of all heads."""

    def __init__(self, longest=8):
        super().__init__()
        self.words, self.places = nn.Embedding(10, 16), nn.Embedding(longest, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, ids):
        b, t = ids.shape
        x = self.words(ids) + self.places(torch.arange(t))
        c = x.size(2)
        q, k, v = (p.view(b, t, 2, c // 2).transpose(1, 2) for p in self.qkv(F.layer_norm(x, (c,))).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        return self.out(y)[:, -1]


class Bilinear(nn.Module):
    """Two inputs of one length, of which one may be missing, and a size by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, scale, mask=None):
        h = torch.relu(self.a(x)).view(x.shape[0], -1, 16) * scale
        h = h if mask is None else h * mask[..., None]
        return self.b(h)


class OneBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).view(4, 16))


class Divided(OneBatch):
    def forward(self, x):
        return self.b((torch.relu(self.a(x)) / x.shape[0]).view(-1, 16))


class Pieces(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        one, five = self.a(x).split((1, 5), 1)
        return self.b(torch.cat([torch.relu(one), five], 1).view(-1, 6))


class Heads(nn.Module):
    """Attention with all sizes by hand, its queries written into a tensor made for them, its keys broadcast."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, 4, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        written = q.new_empty(b, 4, t, 8)
        written[..., :4], written[..., 4:] = q[..., :4], q[..., 4:]
        k = torch.broadcast_to(k, (b, 4, t, 8))
        h = F.scaled_dot_product_attention(written, k, v).transpose(1, 2)
        return self.out(h.reshape(b, t, 32))


def pruned(model, inputs, closed):
    """The gated model in evaluation, and what comes out of it."""
    torch.manual_seed(0)
    sparsify(model, "coupled", example_inputs=inputs)
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha[:closed] = -9
    model.eval()
    small = prune(model, example_inputs=inputs)
    assert isinstance(small, torch.fx.GraphModule)
    assert not small.training
    return model, small


@torch.no_grad()
def assert_equal(model, small, *inputs):
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_a_language_model_runs_at_every_length():
    model, small = pruned(Gpt(), (torch.randint(10, (2, 8)),), 1)
    for shape in [(2, 8), (1, 8), (3, 5), (2, 2), (2, 1), (1, 1)]:
        assert_equal(model, small, torch.randint(10, shape))


def test_tensors_that_the_code_makes_shrink_with_the_heads():
    model, small = pruned(Heads(), (torch.randn(2, 5, 32),), 1)
    for shape in [(2, 5, 32), (1, 3, 32), (2, 1, 32)]:
        assert_equal(model, small, torch.randn(shape))


def test_it_generates():
    model, small = pruned(Gpt(), (torch.randint(10, (2, 6)),), 1)
    ids = [torch.tensor([[3]]), torch.tensor([[3]])]
    for _ in range(7):
        ids = [torch.cat([i, m(i).argmax(-1, keepdim=True)], 1) for i, m in zip(ids, (model, small), strict=True)]
    assert torch.equal(*ids)


@pytest.mark.parametrize("single", [False, True])
def test_a_batch_of_one_as_example_leaves_the_batch_free(single):
    model, small = pruned(Gpt(), (torch.randint(10, (1 if single else 2, 8)),), 1)
    for batch in (1, 2, 5):
        assert_equal(model, small, torch.randint(10, (batch, 8)))


def test_sizes_that_belong_together_are_checked():
    x, scale = torch.randn(2, 5, 8), 0.5
    model, small = pruned(Bilinear(), (x, scale, torch.rand(2, 5)), 8)
    assert_equal(model, small, torch.randn(3, 7, 8), scale, torch.rand(3, 7))
    with pytest.raises(AssertionError, match="input 2 has a size that the graph was not made for"):
        small(x, scale, torch.rand(2, 1))
    with pytest.raises(AssertionError, match=r"input 0(.|\n)*expected: 8 along axis 2"):
        small(torch.randn(2, 5, 1), scale, torch.rand(2, 5))


def test_an_input_that_is_missing_stays_missing():
    model, small = pruned(Bilinear(), (torch.randn(2, 5, 8), 0.5, None), 8)
    assert_equal(model, small, torch.randn(3, 2, 8), 0.5, None)


def test_a_batch_that_the_code_fixes_is_checked():
    model, small = pruned(OneBatch(), (torch.randn(4, 8),), 8)
    assert_equal(model, small, torch.randn(4, 8))
    with pytest.raises(AssertionError, match=r"pruned graph: input 0(.|\n)*expected: 4 along axis 0(.|\n)*try: prune"):
        small(torch.randn(5, 8))


@pytest.mark.parametrize(("make", "closed"), [(Divided, 8), (Pieces, 2)])
def test_what_once_ended_in_a_raw_error_is_cut(make, closed):
    model, small = pruned(make(), (torch.randn(4, 8),), closed)
    for batch in (4, 1, 3):
        assert_equal(model, small, torch.randn(batch, 8))


def test_checks_and_sizes_survive_copies_pickles_and_files(tmp_path):
    model, small = pruned(Gpt(), (torch.randint(10, (2, 8)),), 1)
    save_pruned(small, tmp_path / "small")
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), load_pruned(Gpt, tmp_path / "small")):
        for shape in [(2, 8), (3, 1)]:
            assert_equal(model, again.eval(), torch.randint(10, shape))
        with pytest.raises(AssertionError, match="pruned graph"):
            again(torch.randint(10, (0, 8)))


def test_a_graph_is_told_and_the_line_named_that_makes_it_one():
    model = OneBatch()
    sparsify(model, "coupled", example_inputs=(torch.randn(4, 8),))
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha[:8] = -9
    line = r"test_graphs\.py:\d+: return self\.b\(torch\.relu\(self\.a\(x\)\)\.view\(4, 16\)\)"
    with pytest.warns(L0HooksWarning, match=rf"a GraphModule for evaluation, (.|\n)*{line}(.|\n)*reshape\(b, t, -1\)"):
        prune(model, example_inputs=(torch.randn(4, 8),))
