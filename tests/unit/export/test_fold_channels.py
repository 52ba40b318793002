"""Closed channels of single layers: cut if that is exact, else kept as zeros with a reason."""

import copy
import io
import types

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from parameters import slow
from torch import nn

from l0hooks import iter_gates, load_pruned, prune, save_pruned, sparsify
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.export.comparison import Comparison
from l0hooks.export.constant_inputs import constant_inputs
from l0hooks.export.fold_channels import closed_channels, cut_closed

IMAGE = (2, 3, 7, 7)
CLOSED = (1, 3)


def warmed(model, x):
    """The model in evaluation mode, with random statistics and scales instead of the defaults."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5), module.bias.normal_()
    return model.eval()


def close(model, names=None, members=CLOSED):
    """Open all gates by random amounts, and close ``members`` of those at ``names``."""
    with torch.no_grad():
        for name, gate in iter_gates(model):
            gate.log_alpha.uniform_(0, 3)
            if names is None or any(name.startswith(f"{n}.") for n in names):
                gate.log_alpha[list(members)] = -4


def gated(model, spec, x, names=None, members=CLOSED):
    sparsify(warmed(model, x), spec)
    close(model, names, members)
    return model.eval()


def constants(model, inputs):
    """The constant inputs of every layer."""
    training = model.training
    program = torch.export.export(model.eval(), inputs, strict=False)
    model.train(training)
    return constant_inputs(model, program, inputs)


def size(model):
    return sum(p.numel() for n, p in model.named_parameters() if not n.endswith("log_alpha"))


def fresh(x):
    return torch.randn(5, *x.shape[1:], dtype=x.dtype) * 3 if x.is_floating_point() else x.flip(0)


@torch.no_grad()
def assert_same(model, pruned, x):
    for batch in (x, fresh(x), fresh(x)[:1]):
        expected, got = model(batch), pruned(batch)
        assert float((expected - got).abs().max()) <= 1e-5 * float(expected.abs().max())


def shrunk(model, x):
    """Prune and compare on other inputs: the result, its note, and the number of parameters that are gone."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense = prune(model)
    pruned, report = prune(model, example_inputs=(x,), return_report=True)
    assert_same(model, pruned, x)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    return pruned, report.note, size(dense) - size(pruned)


class Net(nn.Module):
    """Parts by name, and a function of them as forward."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


# --- models that get smaller: build, specification, gates to close, parameters that go, what the note says ------------


def mlp(activation, bias=True):
    return nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2))


def conv(second, norm=None, bias=True, activation=None):
    parts = [nn.Conv2d(3, 6, 3, bias=bias), norm or nn.BatchNorm2d(6), activation or nn.ReLU(), second]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def zero_norm():
    return nn.BatchNorm2d(6, affine=False, track_running_stats=True)


def mobile():
    """An inverted residual block without its residual connection."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 49, 2),
    )


def residual():
    def run(net, x):
        y = torch.relu(net.stem(x))
        return net.head(torch.relu(y + net.norm(net.conv(y))).mean((2, 3)))

    parts = {"stem": nn.Conv2d(3, 6, 3), "conv": nn.Conv2d(6, 6, 1), "norm": nn.BatchNorm2d(6)}
    return Net(run, **parts, head=nn.Linear(6, 2))


def concat():
    def run(net, x):
        return net.head(torch.cat([torch.sigmoid(net.a(x)), torch.relu(net.b(x))], 1))

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(4, 5), head=nn.Linear(11, 2))


def flatten():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Softplus(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Flatten(),
        nn.Linear(6 * 49, 2),
    )


def two_readers():
    def run(net, x):
        y = torch.relu(net.up(x))
        return net.a(y) + net.b(y).tanh()

    return Net(run, up=nn.Linear(4, 6), a=nn.Linear(6, 2), b=nn.Linear(6, 2))


def by_keyword():
    def run(net, x):
        return net.down(input=torch.sigmoid(net.up(input=x)))

    return Net(run, up=nn.Linear(4, 6), down=nn.Linear(6, 2))


class Conditional(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, x, torch.zeros_like(x))


# build, spec, x, names to close, parameters that go
SMALLER = {
    "relu": (lambda: mlp(nn.ReLU()), {"0": "output"}, (3, 4), 2 * (4 + 1 + 5)),
    "sigmoid": (lambda: mlp(nn.Sigmoid()), {"0": "output"}, (3, 4), 2 * (4 + 1 + 5)),
    "softplus": (lambda: mlp(nn.Softplus()), {"0": "output"}, (3, 4), 2 * (4 + 1 + 5)),
    "where": (lambda: mlp(Conditional()), {"0": "output"}, (3, 4), 2 * (4 + 1 + 5)),
    "gained": (lambda: mlp(nn.Softplus(), bias=False), {"0": "output"}, (3, 4), 2 * (4 + 1 + 5) - 5),
    "gained and cut": (
        lambda: mlp(nn.Sigmoid(), bias=False),
        {"0": "output", "2": "output"},
        (3, 4),
        6 * 4 + 6 + 6 * 5 + 5 * 2 - (4 * 4 + 4 + 4 * 3 + 3 + 3 * 2),
    ),
    "conv 1x1": (lambda: conv(nn.Conv2d(6, 4, 1)), {"0": "output"}, IMAGE, 2 * (27 + 1 + 2 + 4)),
    "conv 1x1 gained": (
        lambda: conv(nn.Conv2d(6, 4, 1, bias=False), activation=nn.Sigmoid()),
        {"0": "output"},
        IMAGE,
        2 * 34 - 4,
    ),
    "conv same": (lambda: conv(nn.Conv2d(6, 4, 1, padding="same")), {"0": "output"}, IMAGE, 2 * 34),
    "conv valid": (lambda: conv(nn.Conv2d(6, 4, 3, padding="valid")), {"0": "output"}, IMAGE, 2 * (30 + 36)),
    "conv 3x3": (lambda: conv(nn.Conv2d(6, 4, 3)), {"0": "output"}, IMAGE, 2 * (30 + 36)),
    **{
        mode: (
            lambda mode=mode: conv(nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode)),
            {"0": "output"},
            IMAGE,
            2 * (30 + 36),
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "strided, dilated": (
        lambda: conv(nn.Conv2d(6, 4, 2, stride=2, dilation=2)),
        {"0": "output"},
        IMAGE,
        2 * (30 + 16),
    ),
    "constant 0, padded": (
        lambda: conv(nn.Conv2d(6, 4, 3, padding=1), nn.Identity(), bias=False),
        {"0": "output"},
        IMAGE,
        2 * (27 + 36),
    ),
    "constant 0, transposed": (
        lambda: conv(nn.ConvTranspose2d(6, 4, 3), nn.Identity(), bias=False),
        {"0": "output"},
        IMAGE,
        2 * (27 + 36),
    ),
    "transposed writes": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.Sigmoid(), nn.Conv2d(6, 4, 2)),
        {"0": "output"},
        IMAGE,
        2 * (12 + 1 + 16),
    ),
    "depthwise": (mobile, {"3": "output"}, IMAGE, 2 * (3 + 2 + 9 + 2 + 4) - 4),
    "depthwise input": (mobile, {"3": "input"}, IMAGE, 2 * (3 + 2 + 9 + 2 + 4) - 4),
    "flatten": (flatten, {"0": "output"}, IMAGE, 2 * (28 + 10 + 98)),
    "residual, both": (residual, {"stem": "output", "conv": "output"}, IMAGE, None),
    "concat": (concat, {"a": "output"}, (3, 4), 2 * (4 + 1 + 2)),
    "all readers": (two_readers, {"a": "input", "b": "input"}, (3, 4), 2 * (5 + 4)),
    "by keyword": (by_keyword, {"up": "output"}, (3, 4), 2 * (4 + 1 + 2)),
    "kernels": (lambda: conv(nn.Conv2d(6, 4, 3)), {"0": "kernel"}, IMAGE, 2 * (30 + 36)),
    "blocks": (lambda: mlp(nn.GELU()), {"0": (1, 4)}, (3, 4), 2 * (4 + 1 + 5)),
}


IN_FLOAT64 = ("relu", "gained", "conv 1x1 gained", "depthwise", "residual, both", "concat")  # one of each kind


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in SMALLER), *((name, torch.float64) for name in IN_FLOAT64)],
    ids=str,
)
def test_closed_channels_are_cut_out_exactly(name, dtype):
    build, spec, shape, gone = SMALLER[name]
    x = torch.randn(shape, dtype=dtype)
    model = gated(build().to(dtype), spec, x)
    pruned, note, less = shrunk(model, x)
    assert note == ""
    assert less > 0
    assert gone is None or less == gone
    assert type(pruned) is type(build())
    assert {p.dtype for p in pruned.parameters()} == {dtype}


def test_a_reader_that_gets_a_bias_keeps_its_flags():
    x = torch.randn(3, 4)
    model = mlp(nn.Sigmoid(), bias=False)
    model[2].requires_grad_(False)
    pruned, _, _ = shrunk(gated(model, {"0": "output"}, x), x)
    assert list(dict(pruned[2].named_parameters())) == ["weight", "bias"]
    assert [p.requires_grad for p in pruned[2].parameters()] == [False, False]
    assert not gated_names(pruned)


def gated_names(model):
    return [name for name, _ in iter_gates(model)]


# --- models in which channels stay ------------------------------------------------------------------------------------


def squeeze():
    def run(net, x):
        y = torch.relu(net.conv(x))
        scale = torch.sigmoid(net.up(torch.relu(net.down(y.mean((2, 3))))))
        return net.head((y * scale[:, :, None, None]).flatten(1))

    parts = {"conv": nn.Conv2d(3, 6, 3), "down": nn.Linear(6, 3), "up": nn.Linear(3, 6)}
    return Net(run, **parts, head=nn.Linear(6 * 25, 2))


def twice():
    def run(net, x):
        y = torch.sigmoid(net.up(x))
        return net.down(y) + net.down(y**2)

    return Net(run, up=nn.Linear(4, 6), down=nn.Linear(6, 2))


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def tied_bias():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    model[4].bias = model[2].bias
    return model


class Doubling(nn.Linear):
    """A layer of the user's own."""

    def forward(self, x):
        return super().forward(2 * x)


def bare():
    def run(net, x):
        return F.linear(torch.sigmoid(net.up(x)), net.down.weight)

    return Net(run, up=nn.Linear(4, 6), down=nn.Linear(6, 2))


def patched():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    model[2].forward = types.MethodType(lambda layer, x: F.linear(2 * x, layer.weight), model[2])
    return model


def beside():
    def run(net, x):
        y = torch.sigmoid(net.up(x))
        return net.down(y) + F.linear(y, net.matrix)

    net = Net(run, up=nn.Linear(4, 6), down=nn.Linear(6, 2))
    net.register_buffer("matrix", torch.randn(2, 6))
    return net


# build, spec, x, note
STAYING = {
    "padded": (
        lambda: conv(nn.Conv2d(6, 4, 3, padding=1)),
        {"0": "output"},
        IMAGE,
        "closed output channels stay as zeros: 0 (its reader 3 pads with zeros)",
    ),
    "padded as a word": (
        lambda: conv(nn.Conv2d(6, 4, 3, padding="same")),
        {"0": "output"},
        IMAGE,
        "its reader 3 pads with zeros",
    ),
    "transposed": (lambda: conv(nn.ConvTranspose2d(6, 4, 3)), {"0": "output"}, IMAGE, "3 is a transposed convolution"),
    "output": (
        lambda: nn.Sequential(nn.Linear(4, 6)),
        {"0": "output"},
        (3, 4),
        "closed output channels stay as zeros: 0 (an output of the model)",
    ),
    "model input": (
        lambda: nn.Sequential(nn.Linear(4, 6)),
        {"0": "input"},
        (3, 4),
        "closed input channels stay as zeros: 0 (what it reads cannot be removed)",
    ),
    "residual, one": (residual, {"conv": "output"}, IMAGE, "conv (conv reads varying numbers there)"),
    "squeeze": (squeeze, {"conv": "output"}, IMAGE, "conv (head reads varying numbers there)"),
    "one of two readers": (two_readers, {"a": "input"}, (3, 4), "a (b reads varying numbers there)"),
    "twice": (twice, {"up": "output"}, (3, 4), "up (down reads varying numbers there)"),
    "tied": (tied, {"0": "output", "2": "output"}, (3, 6), "0 (an input of the model)"),
    "tied bias": (tied_bias, {"0": "output"}, (3, 4), "0 (its reader 2 shares its bias)"),
    "own class": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), Doubling(6, 2)),
        {"0": "output"},
        (3, 4),
        "0 (2 is not called as a layer of torch)",
    ),
    "bare": (bare, {"up": "output"}, (3, 4), "up (down is not called as a layer of torch)"),
    "patched": (patched, {"0": "output"}, (3, 4), "0 (2 is not called as a layer of torch)"),
    "a buffer reads": (beside, {"up": "output"}, (3, 4), "up (matrix is read without calling a layer)"),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
        {"0": "output"},
        (3, 4),
        "0 (residual stream of layer_norm",
    ),
}


@pytest.mark.parametrize("name", STAYING)
def test_channels_that_something_needs_stay_and_the_note_says_why(name):
    build, spec, shape, expected = STAYING[name]
    x = torch.randn(shape)
    model = gated(build(), spec, x)
    pruned, note, less = shrunk(model, x)
    assert less == 0
    assert expected in note
    dense = prune(model)
    assert all(torch.equal(v, pruned.state_dict()[k]) for k, v in dense.state_dict().items())


def test_some_go_and_some_stay():
    x = torch.randn(IMAGE)
    model = conv(nn.Conv2d(6, 4, 3, padding=1), nn.Identity())
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, -1, 1, 1, 1, 1]))  # behind the ReLU, channel 1 is 0 and channel 3 is not
    _, note, less = shrunk(gated(model, {"0": "output"}, x), x)
    assert less == 27 + 1 + 36
    assert note == "closed output channels stay as zeros: 0 (1 of 2: its reader 3 pads with zeros)"


def test_one_channel_stays_where_all_are_closed():
    x = torch.randn(3, 4)
    pruned, note, _ = shrunk(gated(mlp(nn.Sigmoid()), {"0": "output"}, x, members=range(6)), x)
    assert pruned[0].out_features == 1
    assert note == "closed output channels stay as zeros: 0 (1 of 6: one member has to stay)"


def test_the_note_stays_short():
    x = torch.randn(2, 3)
    model = nn.ModuleList(nn.Linear(3, 4) for _ in range(7))
    net = Net(lambda net, x: torch.cat([m(x) for m in net.all], 1), all=model)
    _, note, _ = shrunk(gated(net, "output", x), x)
    assert note.count("an output of the model") == 4
    assert note.endswith("and 3 more")


# --- what could be mistaken for a constant ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_comparison_does_not_make_a_constant(seed):
    """After ``where``, a channel that is negative on every example is 0, and so is NaN."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), Conditional(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    with torch.no_grad():
        model[0].weight[2] /= 100
        model[0].bias[2] = -0.5  # other inputs give other values
        assert float(model[1](model[0](x))[:, 2].abs().max()) == 0
    assert constants(model, (x,))["2"].isnan().all()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64], ids=str)
def test_a_mask_of_ones_does_not_make_a_constant(kind):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x, mask):
            return self.down(torch.sigmoid(self.up(x)) * mask[..., None])

    model = Masked()
    sparsify(model, {"up": "output"})
    close(model)
    model.eval()
    x = torch.randn(2, 3, 4)
    pruned, report = prune(model, example_inputs=(x, torch.ones(2, 3, dtype=kind)), return_report=True)
    assert "down reads varying numbers there" in report.note
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(kind)
    torch.testing.assert_close(pruned(x, mask), model(x, mask))


class Integers(nn.Module):
    """Whole numbers in many forms, and layers whose outputs are closed behind them."""

    def __init__(self, form):
        super().__init__()
        self.form, self.embed = form, nn.Embedding(10, 4)
        self.up, self.mid, self.down = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, ids):
        x = self.form(self, ids)
        scale = (ids != 1).float().mean(-1, keepdim=True) if ids.dim() > 1 else (ids != 1).float()
        return self.down(torch.tanh(self.mid(torch.relu(self.up(x)) * scale[..., None])))


FORMS = {
    "scaled": lambda net, ids: ids[..., None].float().expand(*ids.shape, 4) / 9,
    "one-hot": lambda net, ids: F.one_hot(ids % 4, 4).float(),
    "thresholded": lambda net, ids: torch.stack([(ids > n).float() for n in range(4)], -1),
    "embedded": lambda net, ids: net.embed(ids),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(5))
def test_whole_numbers_do_not_make_constants(form, seed):
    """The examples hold no 1, the token that is masked."""
    torch.manual_seed(seed)
    ids = torch.randint(2, 10, (8, 6))
    model = gated(Integers(FORMS[form]), {"up": "output"}, ids)
    pruned = prune(model, example_inputs=(ids,))
    others = torch.randint(0, 10, (64, 6))
    others[:, 3:] = 1
    with torch.no_grad():
        torch.testing.assert_close(pruned(others), model(others), rtol=1e-5, atol=1e-5)


def test_a_draw_does_not_make_a_constant():
    net = Net(lambda net, x: net.down(net.up(x) * torch.rand(1)), up=nn.Linear(4, 6), down=nn.Linear(6, 2))
    with torch.no_grad():
        net.up.weight.zero_()
    assert constants(net, (torch.randn(2, 4),))["down"].isnan().all()


def test_hooks_of_the_user_count():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with torch.no_grad():
        model[0].weight[1].zero_()
    found = constants(model, (torch.randn(3, 4),))["1"]
    assert found.isnan().tolist() == [i != 1 for i in range(6)]
    assert float(found[1]) == pytest.approx(3 * model[0].bias[1].item() + 1)


def test_zero_weights_stop_what_does_not_depend_on_them():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[:2].zero_()
        model[2].weight[3, 2:].zero_()
    found = constants(model, (torch.randn(3, 4),))["3"]
    expected = model[2].bias[3] + model[2].weight[3, :2] @ torch.sigmoid(model[0].bias[:2])
    assert found.isnan().tolist() == [True, True, True, False, True]
    torch.testing.assert_close(found[3], expected.double(), check_dtype=True, rtol=1e-6, atol=0)


def test_looking_for_constants_changes_nothing():
    model = conv(nn.Conv2d(6, 4, 3)).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    constants(model, (torch.ones(IMAGE),))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_reader_used_twice_with_the_same_constant_takes_it_up_once():
    def run(net, x):
        y = torch.sigmoid(net.up(x))
        return net.down(y) + net.down(y).tanh()

    x = torch.randn(3, 4)
    _, note, less = shrunk(gated(Net(run, up=nn.Linear(4, 6), down=nn.Linear(6, 2)), {"up": "output"}, x), x)
    assert (note, less) == ("", 2 * (5 + 2))


def test_a_weight_that_is_used_without_its_layer_too_keeps_its_channels():
    def run(net, x):
        y = net.up(x)
        return net.down(torch.sigmoid(y)) + F.linear(y, net.down.weight)

    x = torch.randn(3, 4)
    model = gated(Net(run, up=nn.Linear(4, 6), down=nn.Linear(6, 2)), {"up": "output"}, x)
    _, note, less = shrunk(model, x)
    assert less == 0
    assert "up (down is not called as a layer of torch)" in note


def test_features_of_an_embedding_are_channels():
    tokens = torch.randint(9, (3, 4))
    model = nn.Sequential(nn.Embedding(9, 6), nn.ReLU(), nn.Linear(6, 2))
    pruned, note, less = shrunk(gated(model, {"0": "output"}, tokens), tokens)
    assert (note, less) == ("", 2 * (9 + 2))
    assert pruned[0].embedding_dim == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    x = torch.randn(3, 4, dtype=dtype)
    model = gated(mlp(nn.Sigmoid()).to(dtype), {"0": "output"}, x)
    pruned = prune(model, example_inputs=(x,))
    assert pruned[0].out_features == 4
    torch.testing.assert_close(pruned(x), model(x), rtol=0.02, atol=0.02)


def test_an_image_without_a_batch_axis():
    x = torch.randn(IMAGE)
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, 3))
    model = gated(Net(lambda net, x: net.body(x[0])[None], body=body), {"body.0": "output"}, x)
    pruned, note, _ = shrunk(model, x)
    assert (note, pruned.body[0].out_channels) == ("", 4)


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:.*nested tensor.*:UserWarning")
def test_the_inside_of_an_encoder_layer_is_cut(bias):
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0, bias=bias, activation="gelu")
    x = torch.randn(2, 5, 8)
    model = gated(model, {"linear1": "output"}, x)
    _, note, less = shrunk(model, x)
    assert note == ""
    assert less == 2 * (16 + bias)


def test_attention_stays_whole():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    x = torch.randn(2, 5, 8)
    _, note, less = shrunk(gated(Attentive(), {"attention": "output", "head": "input"}, x), x)
    assert less >= 0
    assert "attention" in note


# --- when nothing is cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"sparse_format": "csr"}], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_without_inputs_in_place_or_sparse_the_shapes_stay(options):
    x = torch.randn(3, 4)
    model = gated(mlp(nn.Sigmoid()), {"0": "output"}, x)
    expected = model(x).detach()
    pruned, report = prune(model, **options, **({"example_inputs": (x,)} if options else {}), return_report=True)
    assert pruned[0].out_features == 6
    assert report.note == ""
    torch.testing.assert_close(pruned(x), expected)


def test_gates_on_single_weights_keep_the_shapes():
    x = torch.randn(3, 4)
    model = mlp(nn.Sigmoid())
    sparsify(model, "weight")
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha[1] = -4
    assert size(prune(model, example_inputs=(x,))) == size(prune(model))


def test_a_model_that_cannot_be_exported_keeps_its_zeros():
    def run(net, x):
        y = net.up(x)
        return net.down(y if y.sum() > 0 else -y)

    x = torch.randn(3, 4)
    model = gated(Net(run, up=nn.Linear(4, 6), down=nn.Linear(6, 2)), {"up": "output"}, x)
    pruned, report = prune(model, example_inputs=(x,), return_report=True)
    assert report.note.startswith("closed channels stay as zeros: ")
    assert "export" in report.note
    assert pruned.up.out_features == 6
    assert torch.equal(pruned(x), model(x))


def test_a_smaller_model_that_computes_something_else_is_not_returned():
    x = torch.randn(3, 4)
    model = gated(mlp(nn.Sigmoid()), {"0": "output"}, x)
    closed = closed_channels(iter_sites(model))
    plain = prune(model)
    before = copy.deepcopy(plain.state_dict())

    class Strict(Comparison):
        def wrong(self, model, *, accepts=None, folded=False):
            return "sizes" if size(model) < size(plain) else ""

    found, note = cut_closed(plain, closed, Strict(plain, (x,)), (x,))
    assert found is plain
    assert note == "closed channels stay as zeros: without them the model would compute something else"
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


class Sized(nn.Module):
    """Hard-codes a size, so that no attribute can correct it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2, bias=False)

    def forward(self, x):
        return self.down(torch.sigmoid(self.up(x)).view(-1, 6))


def test_code_that_hard_codes_sizes_becomes_a_graph_that_can_be_saved(tmp_path):
    x = torch.randn(3, 4)
    model = gated(Sized(), {"up": "output"}, x)
    pruned, report = prune(model, example_inputs=(x,), return_report=True)
    assert report.note.startswith("a GraphModule for evaluation")
    assert size(pruned) == size(prune(model)) - 2 * 7 + 2
    assert_same(model, pruned, x)
    save_pruned(pruned, tmp_path / "small")
    assert torch.equal(load_pruned(Sized, tmp_path / "small")(x), pruned(x))


def test_pruning_twice_gives_the_same_and_once_more_nothing():
    x = torch.randn(IMAGE)
    model = gated(mobile(), {"0": "output", "3": "output"}, x)
    first, second = prune(model, example_inputs=(x,)), prune(model, example_inputs=(x,))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    sparsify(first, {"0": "output"})
    assert size(prune(first, example_inputs=(x,))) == size(second)


def test_the_mode_and_training_survive():
    x = torch.randn(IMAGE)
    model = gated(mobile(), {"0": "output", "3": "output"}, x).train()
    pruned = prune(model, example_inputs=(x,))
    assert pruned.training
    pruned(x).square().sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_coupled_gates_go_first_and_the_others_follow():
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 7), nn.Sigmoid(), nn.Linear(7, 2))
    sparsify(model, {"0": "coupled"}, example_inputs=(x,))
    sparsify(model, {"4": "input"})
    close(model)
    pruned, report = prune(model.eval(), example_inputs=(x,), return_report=True)
    assert_same(model, pruned, x)
    assert [m.out_features for m in pruned if isinstance(m, nn.Linear)] == [4, 5, 2]
    assert report.note == ""


def test_behind_coupled_gates_the_writers_channels_are_counted_anew():
    """The coupled cut takes inputs from a layer whose outputs have gates of their own."""
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 7), nn.Sigmoid(), nn.Linear(7, 2))
    sparsify(model, {"4": "coupled"}, example_inputs=(x,))
    sparsify(model, {"2": (1, 1), "0": "output"})
    close(model)
    pruned, report = prune(model.eval(), example_inputs=(x,), return_report=True)
    assert_same(model, pruned, x)
    assert [m.out_features for m in pruned if isinstance(m, nn.Linear)] == [4, 5, 2]
    assert report.note == ""


def test_a_graph_cut_by_coupled_gates_keeps_the_other_zeros():
    x = torch.randn(3, 4)
    model = Sized()
    sparsify(model, {"down": "coupled"}, example_inputs=(x,))
    sparsify(model, {"up": "output"})
    close(model)
    pruned, report = prune(model.eval(), example_inputs=(x,), return_report=True)
    assert_same(model, pruned, x)
    assert report.note.endswith("channels that gates on single layers closed stay as zeros in it")


# --- files and exports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gained", "gained and cut", "conv 1x1 gained", "depthwise", "residual, both"])
def test_a_model_and_its_copy_come_back_from_their_files(name, tmp_path):
    build, spec, shape, _ = SMALLER[name]
    x = torch.randn(shape)
    pruned, _, _ = shrunk(gated(build(), spec, x), x)
    for small in (pruned, copy.deepcopy(pruned)):
        save_pruned(small, tmp_path / "small")
        loaded = load_pruned(build, tmp_path / "small").eval()
        assert list(loaded.state_dict()) == list(pruned.state_dict())
        assert torch.equal(loaded(x), pruned(x))


def test_a_result_exports():
    x = torch.randn(IMAGE)
    pruned, _, less = shrunk(gated(mobile(), {"0": "output", "3": "output"}, x), x)
    assert less > 0
    exported = torch.export.export(pruned, (x,)).module()
    torch.testing.assert_close(exported(x), pruned(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_result_runs_in_onnx_runtime():
    x = torch.randn(IMAGE)
    pruned, _, _ = shrunk(gated(conv(nn.Conv2d(6, 4, 3)), {"0": "output"}, x), x)
    file = io.BytesIO()
    torch.onnx.export(pruned, (x,), file, dynamo=False)
    (got,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"input.1": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), pruned(x), rtol=1e-4, atol=1e-5)


# --- random networks: the oracle is the dense model with zeros --------------------------------------------------------


def random_net(pick):
    """A few convolutions with what may stand between them, at times a residual connection, then a linear layer."""

    def one_of(*choices):
        return choices[int(pick.randint(len(choices)))]

    width, layers = 3, []
    for _ in range(int(pick.randint(1, 4))):
        out, kernel = int(pick.randint(2, 7)), one_of(1, 3)
        mode = one_of("zeros", "zeros", "reflect")
        padding = one_of(0, kernel // 2)
        layers.append(nn.Conv2d(width, out, kernel, padding=padding, padding_mode=mode, bias=bool(pick.randint(2))))
        if pick.randint(2):
            layers.append(nn.BatchNorm2d(out, affine=bool(pick.randint(2))))
        layers.append(one_of(nn.ReLU(), nn.Sigmoid(), nn.SiLU(), Conditional(), nn.Identity(), nn.MaxPool2d(1)))
        if pick.randint(2):
            layers += [nn.Conv2d(out, out, 3, padding=one_of(0, 1), groups=out), nn.Hardswish()]
        if not pick.randint(3):
            layers.append(Skip(out))
        width = out
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5), nn.Softplus(), nn.Linear(5, 2, bias=False)]
    return nn.Sequential(*layers, *head)


class Skip(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("seed", [*range(4), *slow(range(4, 25))])
def test_random_networks(seed):
    pick = np.random.RandomState(seed)
    x = torch.randn(2, 3, 16, 16)
    model = warmed(random_net(pick), x)
    sparsify(model, str(pick.choice(["output", "output", "input"])))
    with torch.no_grad():
        for _, gate in iter_gates(model):
            shut = torch.rand_like(gate.log_alpha) < 0.4
            gate.log_alpha.copy_(torch.where(shut, -4.0, torch.empty_like(gate.log_alpha).uniform_(0, 3)))
    shrunk(model.eval(), x)
