"""The layers that carry gates, and how gates lie over attention's projections."""

import itertools

import pytest
import torch
from granularity_laws import LAYERS
from torch import nn

from l0hooks._torch.modules import tensors_of
from l0hooks.errors import SpecError, UnsupportedModuleError
from l0hooks.structure.layers import WeightLayout, gate_layout, gateable_weights, is_gateable


def channels(layer):
    """(input channels, output channels, groups), from the layer's own attributes."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, 1
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim, 1
    return layer.in_channels, layer.out_channels, layer.groups


def gates_for(granularity, layer):
    (_, _, weight_layout) = gateable_weights("layer", layer)[0]
    layout = gate_layout(granularity, weight_layout, layer.weight.shape)
    return layout, torch.rand(layout.shape, dtype=torch.float64) + 0.5


def attention(module, query, key, value, weights):
    """Multi-head attention written out, for given projection weights."""
    biases = module.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    size = module.embed_dim // module.num_heads
    heads = []
    for h in range(module.num_heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / size**0.5
        heads.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(heads, -1) @ module.out_proj.weight.T + module.out_proj.bias


@pytest.mark.parametrize("granularity", ["input", "output", "kernel", "weight", (2, 4)])
def test_attention_projections_are_gated_separately(granularity):
    module = nn.MultiheadAttention(8, 2, batch_first=True).double()
    nn.init.normal_(module.in_proj_bias)
    (owner, tensor_name, layout), (out_owner, out_name, out_layout) = gateable_weights("attention", module)
    assert (owner, tensor_name) == (module, "in_proj_weight")
    assert (out_owner, out_name) == (module.out_proj, "weight")
    assert layout == out_layout == WeightLayout(output_first=True)
    spread = gate_layout(granularity, layout, module.in_proj_weight.shape)
    z = torch.rand(spread.shape, dtype=torch.float64)
    dense = torch.empty(24, 8, dtype=torch.float64)
    for row, col in itertools.product(range(24), range(8)):
        by_name = {"input": (col,), "output": (row,), "kernel": (row, col), "weight": (row, col)}
        dense[row, col] = z[(row // 2, col // 4) if isinstance(granularity, tuple) else by_name[granularity]]
    weights = (module.in_proj_weight.detach() * dense).chunk(3)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = attention(module, x, x, x, weights)
    with torch.no_grad():
        module.in_proj_weight.mul_(spread.spread(z))
    torch.testing.assert_close(module(x, x, x)[0], expected)


def test_attention_with_other_key_sizes_has_three_projections():
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert [(owner, name) for owner, name, _ in gateable_weights("attention", module)] == [
        (module, "q_proj_weight"),
        (module, "k_proj_weight"),
        (module, "v_proj_weight"),
        (module.out_proj, "weight"),
    ]


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        (lambda: nn.Linear(6, 4), (3, 1)),
        (lambda: nn.Linear(6, 4), (1, 4)),
        (lambda: nn.Linear(6, 4), (8, 1)),
        (lambda: nn.Conv2d(6, 6, 3, groups=3), (3, 1)),  # divides 6 outputs, not the 2 of one group
        (lambda: nn.Conv2d(6, 6, 3, groups=3), (1, 3)),
        (lambda: nn.ConvTranspose2d(6, 6, 3, groups=3), (3, 1)),
        (lambda: nn.ConvTranspose2d(6, 6, 3, groups=3), (1, 3)),
        (lambda: nn.Embedding(6, 4), (6, 4)),
    ],
)
def test_blocks_that_do_not_divide_are_refused_with_the_sizes(layer, block):
    module = layer()
    with pytest.raises(SpecError, match="block sizes must divide") as caught:
        gates_for(block, module)
    inputs, outputs, groups = channels(module)
    assert f"{outputs // groups} outputs" in str(caught.value)
    assert f"{inputs // groups} inputs" in str(caught.value)
    assert str(block) in str(caught.value)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_carry_gates_are_known(name):
    assert is_gateable(LAYERS[name].make())


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(2, 2),
        nn.GRUCell(2, 2),
        nn.BatchNorm2d(2),
        nn.LayerNorm(2),
        nn.PReLU(),
        nn.Bilinear(2, 2, 2),
        nn.ReLU(),
        nn.Sequential(nn.Linear(2, 2)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_refused_by_name(module):
    assert not is_gateable(module)
    with pytest.raises(UnsupportedModuleError, match=f"'here'(.|\n)*got: {type(module).__name__}"):
        gateable_weights("here", module)


def test_a_module_without_weights_is_called_so_and_a_container_points_inside():
    with pytest.raises(UnsupportedModuleError, match=r"ReLU, which has no weight of its own(.|\n)*exclude it"):
        gateable_weights("act", nn.ReLU())
    with pytest.raises(UnsupportedModuleError, match="layers inside it"):
        gateable_weights("block", nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_embeddings_that_bypass_their_weight_are_refused(kind, option):
    with pytest.raises(UnsupportedModuleError, match="which rewrites the weight"):
        gateable_weights("table", kind(4, 2, **option))


class Identity(nn.Module):
    def forward(self, tensor):
        return tensor


def test_own_tensors_have_their_plain_names_also_when_parametrized():
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight, layer.bias
    nn.utils.parametrize.register_parametrization(layer, "weight", Identity())
    found = dict(tensors_of(layer))
    assert set(found) == {"weight", "bias"}
    assert found["weight"] is weight
    assert found["bias"] is bias


def test_own_tensors_of_a_weight_normed_layer_are_those_with_one_original():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert [name for name, _ in tensors_of(layer)] == ["bias"]
