"""How gates lie over weights, against what the layer does with its channels."""

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from l0hooks._torch.modules import tensors_of
from l0hooks.errors import SpecError, UnsupportedModuleError
from l0hooks.structure.layers import WeightLayout, gate_layout, gateable_weights, is_gateable

CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), 2),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, dilation=2), 3),
    "conv1d_grouped": (lambda: nn.Conv1d(8, 4, 3, groups=2), 1),
    "conv2d_grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3), 2),
    "conv3d_grouped": (lambda: nn.Conv3d(4, 8, 2, groups=2), 3),
    "conv1d_depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), 1),
    "conv2d_depthwise_twofold": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), 2),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), 1),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), output_padding=0), 2),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), 3),
    "conv_transpose1d_grouped": (lambda: nn.ConvTranspose1d(8, 4, 3, groups=2), 1),
    "conv_transpose2d_grouped": (lambda: nn.ConvTranspose2d(6, 12, 3, groups=3), 2),
    "conv_transpose3d_grouped": (lambda: nn.ConvTranspose3d(4, 8, 2, groups=2), 3),
    "conv_transpose2d_depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), 2),
}
MATRICES = {
    "linear": lambda: nn.Linear(6, 4),
    "linear_no_bias": lambda: nn.Linear(4, 8, bias=False),
    "hf_conv1d": lambda: Conv1D(4, 6),
    "embedding": lambda: nn.Embedding(6, 4),
    "embedding_bag": lambda: nn.EmbeddingBag(6, 4, mode="sum"),
}
LAYERS = [*CONVOLUTIONS, *MATRICES]


def build(name):
    """The layer in float64, with a random bias."""
    layer = (CONVOLUTIONS[name][0] if name in CONVOLUTIONS else MATRICES[name])().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def channels(layer):
    """(input channels, output channels, groups), from the layer's own attributes."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, 1
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf, 1
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return layer.num_embeddings, layer.embedding_dim, 1
    return layer.in_channels, layer.out_channels, layer.groups


def responses(name, layer):
    """What each output channel answers to each input channel alone, without bias: [input, output, ...]."""
    inputs, _, _ = channels(layer)
    if isinstance(layer, nn.Embedding):
        return layer(torch.arange(inputs))[:, :, None]
    if isinstance(layer, nn.EmbeddingBag):
        return layer(torch.arange(inputs)[:, None])[:, :, None]
    space = (5,) * CONVOLUTIONS[name][1] if name in CONVOLUTIONS else ()
    signal = torch.randn(inputs, *space, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = torch.zeros(inputs, inputs, *space, dtype=torch.float64)
    for channel in range(inputs):
        alone[channel, channel] = signal[channel]
    with torch.no_grad():
        return (layer(alone) - layer(torch.zeros_like(alone))).reshape(inputs, channels(layer)[1], -1)


def reads_output_first(layer):
    return isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def connection_gate(granularity, layer, z, i, o):
    """The gate that must multiply what output channel ``o`` hears of input channel ``i``."""
    inputs, outputs, groups = channels(layer)
    if granularity == "input":
        return z[i]
    if granularity == "output":
        return z[o]
    rows, cols = (1, 1) if granularity == "kernel" else granularity
    if reads_output_first(layer):
        return z[o // rows, i % (inputs // groups) // cols]
    return z[i // cols, o % (outputs // groups) // rows]


def gates_for(granularity, layer):
    (_, _, weight_layout) = gateable_weights("layer", layer)[0]
    layout = gate_layout(granularity, weight_layout, layer.weight.shape)
    return layout, torch.rand(layout.shape, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("granularity", ["input", "output", "kernel", (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", LAYERS)
def test_each_gate_scales_exactly_its_connections(name, granularity):
    layer = build(name)
    inputs, outputs, groups = channels(layer)
    if isinstance(granularity, tuple) and ((outputs // groups) % granularity[0] or (inputs // groups) % granularity[1]):
        with pytest.raises(SpecError, match="block sizes must divide"):
            gates_for(granularity, layer)
        return
    layout, z = gates_for(granularity, layer)
    before = responses(name, layer)
    with torch.no_grad():
        layer.weight.mul_(layout.spread(z))
    after = responses(name, layer)
    connected = 0
    for i, o in itertools.product(range(inputs), range(outputs)):
        same_group = i // (inputs // groups) == o // (outputs // groups)
        assert bool(before[i, o].any()) == same_group
        if same_group:
            torch.testing.assert_close(after[i, o], before[i, o] * connection_gate(granularity, layer, z, i, o))
            connected += 1
    assert connected == inputs * outputs // groups


@pytest.mark.parametrize("name", LAYERS)
def test_input_gates_are_gates_on_the_inputs(name):
    layer = build(name)
    layout, z = gates_for("input", layer)
    assert z.shape == (channels(layer)[0],)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        tokens = torch.tensor([[0, 3, 3], [5, 1, 2]])
        rows = layer.weight.detach()[tokens] * z[tokens][..., None]
        expected = rows.sum(1) if isinstance(layer, nn.EmbeddingBag) else rows
        x = tokens
    else:
        space = (5,) * CONVOLUTIONS[name][1] if name in CONVOLUTIONS else ()
        x = torch.randn(3, z.numel(), *space, dtype=torch.float64)
        expected = layer(x * z.reshape(-1, *[1] * len(space)))
    with torch.no_grad():
        layer.weight.mul_(layout.spread(z))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_output_gates_are_gates_on_the_outputs_before_the_bias(name):
    layer = build(name)
    layout, z = gates_for("output", layer)
    assert z.shape == (channels(layer)[1],)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        x, bias, expand = torch.tensor([[0, 3, 3], [5, 1, 2]]), 0.0, z
    else:
        space = (5,) * CONVOLUTIONS[name][1] if name in CONVOLUTIONS else ()
        x = torch.randn(3, channels(layer)[0], *space, dtype=torch.float64)
        bias, expand = layer(torch.zeros_like(x)), z.reshape(-1, *[1] * len(space))
    expected = (layer(x) - bias) * expand + bias
    with torch.no_grad():
        layer.weight.mul_(layout.spread(z))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_weight_gates_lie_over_the_weight_element_by_element(name):
    layer = build(name)
    layout, z = gates_for("weight", layer)
    assert layout.spread(z) is z
    assert z.shape == layer.weight.shape


def attention(module, query, key, value, weights):
    """Multi-head attention by hand, for given projection weights."""
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
def test_attention_projections_are_gated_each_for_itself(granularity):
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
    assert is_gateable(build(name))


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
    with pytest.raises(UnsupportedModuleError, match="max_norm rewrites the weight"):
        gateable_weights("table", kind(4, 2, **option))


class Identity(nn.Module):
    def forward(self, tensor):
        return tensor


def test_own_tensors_come_under_their_plain_names_also_when_parametrized():
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight, layer.bias
    nn.utils.parametrize.register_parametrization(layer, "weight", Identity())
    found = dict(tensors_of(layer))
    assert set(found) == {"weight", "bias"}
    assert found["weight"] is weight
    assert found["bias"] is bias


def test_own_tensors_of_a_weight_normed_layer_leave_out_what_has_no_single_original():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert [name for name, _ in tensors_of(layer)] == ["bias"]
