"""Multiply-adds against torch's own counter."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from l0hooks import Budget, iter_gates, penalty, prune, set_budget, sparsify, summary
from l0hooks._torch.running import evaluating
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.attach.measured_size import exported_size
from l0hooks.errors import SpecError, UnsupportedModuleError
from l0hooks.structure.macs import count_positions


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.fc(x)[:, :1])


class Attending(nn.Module):
    """Attention from 5 queries to 7 keys."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, query, key, value):
        return self.attention(query, key, value=value)[0]


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(input=x)


class Router(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Listed(nn.Conv1d):
    def forward(self, images):
        return [super(Listed, self).forward(image) for image in images]


class Silent(nn.Linear):
    def forward(self, x):
        return super().forward(x).argmax(-1)


class Routed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.router = kind(4, 3)

    def forward(self, x):
        return self.router(x)[0]


def tensor(*shape):
    return torch.randn(shape)


def attention_products(queries, keys, size=8):
    """Multiply-adds of Q·Kᵀ and of the product with V, which belong to no weight."""
    return 2 * queries * keys * size


# model, inputs, multiply-adds that belong to no weight
MODELS = {
    "linear": (lambda: nn.Linear(4, 6), (tensor(3, 5, 4),), 0),
    "linear on a vector": (lambda: nn.Linear(4, 6), (tensor(4),), 0),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (tensor(2, 4, 9),), 0),
    "conv2d": (lambda: nn.Conv2d(3, 6, (3, 2), dilation=2), (tensor(2, 3, 9, 8),), 0),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), (tensor(2, 2, 3, 4, 5),), 0),
    "conv2d, no batch": (lambda: nn.Conv2d(3, 6, 3), (tensor(3, 9, 8),), 0),
    "grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3), (tensor(2, 6, 5, 6),), 0),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (tensor(2, 6, 5, 6),), 0),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (tensor(2, 4, 5, 6),), 0),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, padding=1), (tensor(2, 4, 5),), 0),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 4, 2, output_padding=0), (tensor(1, 2, 3, 4, 5),), 0),
    "hugging face conv1d": (lambda: Conv1D(6, 4), (tensor(2, 3, 4),), 0),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), (torch.zeros(2, 5).long(),), 0),
    "one layer twice": (Twice, (tensor(2, 3, 4),), 0),
    "a layer that returns a tuple": (lambda: Routed(Router), (tensor(2, 5, 4),), 0),
    "a layer that returns indices": (lambda: Routed(Silent), (tensor(2, 5, 4),), 0),
    "a layer that takes and returns a list": (lambda: Listed(4, 6, 3), ([tensor(2, 4, 9)],), 0),
    "a layer that is not used": (Unused, (tensor(2, 4),), 0),
    "self attention": (Attending, (x := tensor(5, 8), x, x), attention_products(5, 5)),
    "cross attention": (Attending, (tensor(5, 8), y := tensor(7, 8), y), attention_products(5, 7)),
    "attention, other sizes": (
        lambda: Attending(kdim=6, vdim=4),
        (tensor(5, 8), tensor(7, 6), tensor(7, 4)),
        attention_products(5, 7),
    ),
    "attention, batched": (
        lambda: Attending(batch_first=True),
        (x := tensor(3, 5, 8), x, x),
        3 * attention_products(5, 5),
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        (tensor(3, 5, 8),),
        3 * attention_products(5, 5),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        ),
        (tensor(3, 5, 8),),
        2 * 3 * attention_products(5, 5),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, stride=2),
            nn.Conv2d(8, 16, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        ),
        (tensor(2, 3, 8, 8),),
        0,
    ),
}


# how many examples the inputs are; one where there is no batch
EXAMPLES = {
    "linear": 3,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "grouped", "depthwise", "transposed", "transposed, grouped"), 2),
    **dict.fromkeys(("hugging face conv1d", "embedding", "one layer twice", "a layer that is not used", "cnn"), 2),
    **dict.fromkeys(("a layer that returns a tuple", "a layer that returns indices"), 2),
    "a layer that takes and returns a list": 2,
    **dict.fromkeys(("attention, batched", "encoder layer", "encoder"), 3),
}


def counted_by_torch(model, inputs):
    # the counter does not support the fused kernel, which is one operator
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_are_those_that_torch_counts(name):
    make, inputs, elsewhere = MODELS[name]
    model = make()
    expected = (counted_by_torch(copy.deepcopy(model), inputs) - elsewhere) / EXAMPLES.get(name, 1)
    counts = count_positions(model, inputs)
    by_id = {id(m): m for m in model.modules()}
    total = sum(
        positions * getattr(by_id[key], tensor_name).numel()
        for (key, tensor_name), positions in counts.items()
        if getattr(by_id[key], tensor_name) is not None
    )
    assert total == pytest.approx(expected, abs=1e-6)
    assert expected > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_gated_model_counts_like_the_dense_one(name):
    make, inputs, elsewhere = MODELS[name]
    model = make()
    expected = (counted_by_torch(copy.deepcopy(model), inputs) - elsewhere) / EXAMPLES.get(name, 1)
    report = sparsify(model, {"all": "weight"}, example_inputs=inputs)
    assert report.macs == expected
    assert isinstance(report.macs, int)


def test_the_uses_of_every_weight_are_counted():
    model = Unused()
    sparsify(model, "weight", example_inputs=(torch.zeros(3, 4),))
    assert {site.name: site.gating.positions for site in iter_sites(model)} == {
        "used.weight": 1,
        "unused.weight": 0,
    }


class Scaled(nn.Module):
    """Changes its input before a layer reads it."""

    def __init__(self, layer, *, stack=False):
        super().__init__()
        self.layer, self.stack = layer, stack

    def forward(self, x):
        return self.layer((torch.stack(list(x)) if self.stack else x) / 3)


class Tokens(nn.Module):
    """An encoder over embedded tokens, the sequence along the first axis or the second."""

    def __init__(self, *, batch_first):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.encode = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)

    def forward(self, tokens, mask=None):
        return self.encode(self.embed(tokens))


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, scale, x):
        return scale * self.fc(x)


class Mapping(Beside):
    def forward(self, inputs):
        return self.fc(inputs["x"])


MATRIX = 4 * 8 * 8 + 2 * 8 * 16  # of the encoder layer, for one token
PER_EXAMPLE = {  # model, inputs by the number of examples, multiply-adds of one
    "rows": (lambda: nn.Linear(4, 6), lambda n: (tensor(n, 4),), 24),
    "rows of sequences": (lambda: nn.Linear(4, 6), lambda n: (tensor(n, 5, 4),), 5 * 24),
    "images": (lambda: Scaled(nn.Conv2d(3, 6, 3)), lambda n: (tensor(n, 3, 5, 4),), 6 * 162),
    "images beside a number": (Beside, lambda n: (0.5, tensor(n, 4)), 24),
    "a mapping": (Mapping, lambda n: ({"x": tensor(n, 4)},), 24),
    "a list of images": (
        lambda: Scaled(nn.Conv2d(3, 6, 3), stack=True),
        lambda n: ([tensor(3, 5, 4) for _ in range(n)],),
        6 * 162,
    ),
    "tokens": (lambda: Tokens(batch_first=True), lambda n: (torch.zeros(n, 7).long(),), 7 * MATRIX),
    "tokens, the sequence first": (
        lambda: Tokens(batch_first=False),
        lambda n: (torch.zeros(7, n).long(),),
        7 * MATRIX,
    ),
}


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_multiply_adds_are_those_of_one_example_whatever_the_batch(name, n):
    make, inputs, expected = PER_EXAMPLE[name]
    model = make()
    sparsify(model, {"all": "weight"}, example_inputs=inputs(n))
    report = summary(model, example_inputs=inputs(n))
    assert report.macs == report.model_macs == summary(model).macs == expected
    assert exported_size(model, prune(model), "macs", inputs(n)) == expected
    (rule,) = set_budget(model, Budget(sparsity=0.5, unit="macs", min_keep=0), example_inputs=inputs(n))
    assert (rule.size.whole, rule.target) == pytest.approx((expected, expected // 2))
    assert penalty(model, macs=1.0).item() == pytest.approx(rule.expected(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Linear(4, 6), (4,), 24),
        (Scaled(nn.Linear(4, 4)), (4,), 16),
        (nn.Conv2d(3, 6, 3), (3, 5, 4), 6 * 162),
        (Scaled(nn.Conv1d(3, 6, 3)), (3, 5), 3 * 54),
        (Scaled(nn.ConvTranspose1d(3, 6, 3)), (3, 5), 5 * 54),
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (7, 8), 7 * MATRIX),
    ],
)
def test_an_input_without_a_batch_is_one_example(model, shape, expected):
    report = sparsify(copy.deepcopy(model), {"all": "weight"}, example_inputs=(tensor(*shape),))
    assert report.macs == expected


def moody():
    """Modules in different modes, with BatchNorm and Dropout."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)
    )
    model[1].eval()
    model[2][0].eval()
    return model


@pytest.mark.parametrize("fails", [False, True], ids=["passes", "fails"])
def test_counting_leaves_no_trace(fails):
    model = moody()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random_state, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    if fails:
        with pytest.raises(RuntimeError, match="channels"):
            count_positions(model, (torch.zeros(2, 5, 6, 6),))
    else:
        count_positions(model, (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_gates_keep_their_modes_too():
    model = moody()
    sparsify(model, "weight")
    model[0].eval()
    before = {name: gate.training for name, gate in iter_gates(model)}
    assert set(before.values()) == {True, False}
    count_positions(model, (torch.zeros(2, 3, 6, 6),))
    assert {name: gate.training for name, gate in iter_gates(model)} == before


def test_a_fused_attention_switched_off_by_the_user_stays_off():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        count_positions(nn.Linear(2, 2), (torch.zeros(1, 2),))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_layer_whose_calls_show_no_channels_is_refused():
    class Summed(nn.Linear):
        def forward(self, x):
            return super().forward(x.movedim(0, -1)).sum()

    with pytest.raises(UnsupportedModuleError, match=r"Summed(.|\n)*tensor with its channels"):
        count_positions(Summed(4, 6), (torch.zeros(4, 5),))


def test_a_bare_tensor_is_refused():
    with pytest.raises(SpecError, match=r"arguments must come as a tuple, or by name(.|\n)*example_inputs=\(x,\)"):
        count_positions(nn.Linear(2, 2), torch.zeros(1, 2))


def test_evaluating_switches_modes_and_gradients_off_and_restores_both():
    model = moody()
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()

    def stumble():
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        stumble()
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
