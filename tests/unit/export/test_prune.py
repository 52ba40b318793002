"""``prune``: a plain model that computes the same, and an original that is left alone."""

import collections
import copy
import io
import itertools
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from l0hooks import Gate, iter_gates, prune, sparsify, summary
from l0hooks.attach.measured_size import exported_size
from l0hooks.attach.summary_table import Summary
from l0hooks.errors import SpecError, StateError

CNN_INPUT = (2, 3, 8, 8)


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class Pair(collections.namedtuple("Pair", ["logits", "hidden"])):
    """A named tuple as output."""


class Attentive(nn.Module):
    """Attention, embeddings and several outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=8, vdim=6, batch_first=True, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x)[0]
        x = x + self.cross(x, x, x[..., :6])[0]
        return Pair(self.head(x), {"hidden": x, "length": tokens.shape[1]})


def gated_cnn(close_gates, granularity="weight"):
    model = cnn()
    model(torch.randn(CNN_INPUT))  # statistics of their own for BatchNorm
    sparsify(model, granularity)
    close_gates(model)
    return model.eval()


def shape_of(model):
    """What must be as before: names, classes, order, flags, attributes and hooks."""
    hooks = [name for name in vars(nn.Module()) if name.endswith("hooks") or name.endswith("kwargs")]
    return {
        "classes": [(name, type(m)) for name, m in model.named_modules()],
        "parameters": [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()],
        "buffers": [(n, b.shape) for n, b in model.named_buffers()],
        "state": list(model.state_dict()),
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [{name: dict(vars(m)[name]) for name in hooks if name in vars(m)} for m in model.modules()],
        "training": [m.training for m in model.modules()],
    }


@pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])
@pytest.mark.parametrize("make", [cnn, Attentive], ids=["cnn", "attention"])
def test_a_pruned_model_looks_like_the_dense_one(close_gates, make, inplace):
    dense = make()
    model = copy.deepcopy(dense)
    sparsify(model, {"*": "weight"})
    close_gates(model)
    pruned = prune(model, inplace=inplace)
    assert (pruned is model) == inplace
    assert shape_of(pruned) == shape_of(dense)
    assert repr(pruned) == repr(dense)
    fresh = make()
    assert fresh.load_state_dict(pruned.state_dict(), strict=True)


@pytest.mark.parametrize("granularity", ["weight", "input", "output", "kernel", (1, 1)], ids=str)
def test_a_pruned_model_computes_what_the_gated_one_evaluates(close_gates, granularity):
    model = gated_cnn(close_gates, granularity)
    pruned = prune(model, example_inputs=(torch.randn(CNN_INPUT),))
    for batch in (1, 5):
        x = torch.randn(batch, *CNN_INPUT[1:])
        if granularity == "output":  # it is smaller, and smaller sums round otherwise
            torch.testing.assert_close(pruned(x), model(x))
        else:
            assert torch.equal(pruned(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(close_gates, training):
    model = gated_cnn(close_gates).train(training)
    model[1].eval()
    pruned = prune(model, example_inputs=(torch.randn(CNN_INPUT),))
    assert [m.training for m in pruned] == [m.training for m in model]


def bits(model):
    return {k: (v.dtype, bytes(v.contiguous().view(-1).view(torch.uint8))) for k, v in model.state_dict().items()}


def test_the_original_stays_bit_for_bit_and_still_trains(close_gates):
    model = gated_cnn(close_gates).train()
    before, looks, ids = bits(model), shape_of(model), [id(p) for p in model.parameters()]
    random_state = torch.get_rng_state()
    pruned = prune(model, example_inputs=(torch.randn(CNN_INPUT, generator=torch.Generator().manual_seed(1)),))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert bits(model) == before
    assert shape_of(model) == looks
    assert [id(p) for p in model.parameters()] == ids
    with torch.no_grad():
        for p in pruned.parameters():
            p.fill_(torch.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(CNN_INPUT)
    assert not torch.equal(model(x), model(x))  # gates still sample
    model(x).square().sum().backward()
    optimizer.step()
    assert bits(model) != before
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_copy_of_a_copy_can_be_pruned_and_its_originals_live_on(close_gates, times):
    model = gated_cnn(close_gates)
    line = [model]
    for _ in range(times):
        line.append(copy.deepcopy(line[-1]))
    x = torch.randn(CNN_INPUT)
    expected = model(x).detach()
    pruned = prune(line.pop(), inplace=True)
    assert torch.equal(pruned(x), expected)
    for ancestor in line:
        assert len(list(iter_gates(ancestor))) == 4
        assert torch.equal(ancestor(x), expected)
        ancestor.train()(x).sum().backward()


def test_pruning_twice_gives_the_same_and_a_pruned_model_can_be_gated_again(close_gates):
    model = gated_cnn(close_gates)
    first, second = prune(model), prune(model)
    assert bits(first) == bits(second)
    sparsify(first, "output")
    assert len(list(iter_gates(first))) == 4
    x = torch.randn(CNN_INPUT)
    assert torch.equal(prune(first).eval()(x), first.eval()(x))
    assert torch.equal(second(x), model(x))


def test_in_place_the_parameters_stay_the_same_objects(close_gates):
    model = cnn()
    before = dict(model.named_parameters())
    modules = list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsify(model, "weight")
    close_gates(model)
    prune(model, inplace=True)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.modules()) == modules
    weight = after["7.weight"].detach().clone()
    model(torch.randn(CNN_INPUT)).sum().backward()
    optimizer.step()
    assert not torch.equal(after["7.weight"], weight)  # the user's optimiser still holds it


@pytest.mark.parametrize("make", [cnn, Attentive], ids=["cnn", "attention"])
def test_a_pickle_of_the_pruned_model_knows_nothing_of_this_library(close_gates, make):
    model = make()
    sparsify(model, "weight")
    close_gates(model)
    pruned = prune(model)
    data = pickle.dumps(pruned)
    assert b"l0hooks" not in data
    assert b"parametriz" not in data
    again = pickle.loads(data)
    assert bits(again) == bits(pruned)
    file = io.BytesIO()
    torch.save(pruned, file)
    assert b"l0hooks" not in file.getvalue()


@pytest.mark.parametrize(
    ("granularity", "per_gate"),
    [("weight", 1), ("input", 6), ("output", 4), ("kernel", 1), ((2, 2), 4), ((3, 1), 3)],
    ids=str,
)
def test_closed_gates_leave_exact_zeros_and_open_ones_none(close_gates, granularity, per_gate):
    model = nn.Sequential(nn.Linear(4, 6))
    sparsify(model, granularity)
    with torch.no_grad():
        model[0].parametrizations.weight.original.abs_().add_(0.1).neg_()  # −w·0 would be −0.0
    closed = close_gates(model)
    weight = prune(model)[0].weight
    zero = weight == 0
    assert int(zero.sum()) == closed * per_gate
    assert closed > 0
    assert not bool(torch.signbit(weight[zero]).any())


def test_open_gates_are_folded_into_the_weight():
    model = nn.Linear(3, 1, bias=False)
    sparsify(model, "input")
    with torch.no_grad():
        model.parametrizations.weight.original.copy_(torch.tensor([[2.0, 2.0, 2.0]]))
        next(iter_gates(model))[1].log_alpha.copy_(torch.tensor([-9.0, 0.0, 9.0]))
    assert prune(model).weight.tolist() == [[0.0, 1.0, 2.0]]


@pytest.mark.parametrize("kind", ["one parameter", "two parameters", "one layer, two names"])
@pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])
def test_tied_weights_are_folded_once_and_stay_tied(close_gates, kind, inplace):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    if kind == "one parameter":
        model[2].weight = model[0].weight
    elif kind == "two parameters":
        model[2].weight = nn.Parameter(model[0].weight.data)
    else:
        model[2] = model[0]
    sparsify(model, "weight")
    close_gates(model)
    model.eval()
    x = torch.randn(3, 4)
    expected = model(x).detach()
    pruned = prune(model, inplace=inplace)
    assert torch.equal(pruned(x), expected)
    assert torch.equal(pruned[0].weight, pruned[2].weight)
    if kind != "two parameters":
        assert pruned[0].weight is pruned[2].weight
    elif inplace:
        assert pruned[0].weight.data_ptr() == pruned[2].weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(close_gates, dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    sparsify(model, {"0": "weight", "2": "input"})
    close_gates(model)
    x = torch.randn(3, 8, dtype=dtype)
    pruned = prune(model, example_inputs=(x,))
    assert pruned[0].weight.dtype == dtype
    torch.testing.assert_close(pruned.eval()(x), model.eval()(x))  # a smaller sum rounds otherwise


def test_the_memory_format_is_kept(close_gates):
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    sparsify(model, "weight")
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    model(x).square().sum().backward()
    close_gates(model)
    pruned = prune(model, example_inputs=(x,))
    assert pruned[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pruned.eval()(x), model.eval()(x))


def test_a_submodule_can_be_pruned_by_itself(close_gates):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsify(model, "weight")
    close_gates(model)
    model.eval()
    x = torch.randn(2, 4)
    expected = model(x).detach()
    prune(model[0], inplace=True)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), expected)
    assert len(list(iter_gates(model))) == 1
    model.train()(x).sum().backward()


# ------------------------------------------------------------------------------------------- scripts and exports


@pytest.mark.filterwarnings("ignore:.torch.jit")  # a FutureWarning since torch 2.14
def test_the_pruned_model_scripts_where_the_original_did(close_gates):
    x = torch.randn(CNN_INPUT)
    torch.jit.script(cnn())
    pruned = prune(gated_cnn(close_gates))
    scripted = torch.jit.script(pruned)
    torch.testing.assert_close(scripted(x), pruned(x))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    assert b"l0hooks" not in file.getvalue()
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), pruned(x))


@pytest.mark.parametrize("make", [cnn, Attentive], ids=["cnn", "attention"])
def test_the_pruned_model_exports(close_gates, make):
    model = make()
    sparsify(model, "weight")
    close_gates(model)
    x = torch.randn(CNN_INPUT) if make is cnn else torch.randint(7, (2, 5))
    pruned = prune(model.eval())
    program = torch.export.export(pruned, (x,), strict=False)
    assert "l0hooks" not in str(program.graph)
    got = program.module()(x)
    expected = pruned(x)
    if make is Attentive:
        got, expected = got.logits, expected.logits
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # torch's own
def test_the_onnx_file_computes_the_same(close_gates, tmp_path):
    pruned = prune(gated_cnn(close_gates, "output"))
    x = torch.randn(CNN_INPUT)
    path = tmp_path / "model.onnx"
    torch.onnx.export(pruned, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, pruned(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert b"l0hooks" not in path.read_bytes()


# ------------------------------------------------------------------------------------------------- sparse formats

SPARSE = pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support is in beta state:UserWarning")


@SPARSE
@pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])
@pytest.mark.parametrize(("sparse_format", "layout"), [("csr", torch.sparse_csr), ("bsr", torch.sparse_bsr)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_weights_compute_the_same(close_gates, sparse_format, layout, dtype, inplace):
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4), nn.Linear(4, 3)).to(dtype)
    model[2].requires_grad_(False)
    sparsify(model, (4, 4) if sparse_format == "bsr" else "weight", exclude="3")
    close_gates(model)
    model.eval()
    x = torch.randn(5, 8, dtype=dtype)
    dense = prune(model)
    expected = model(x).detach()
    pruned = prune(model, inplace=inplace, sparse_format=sparse_format, example_inputs=(x,))
    assert [pruned[i].weight.layout for i in (0, 2, 3)] == [layout, layout, torch.strided]
    torch.testing.assert_close(pruned(x), expected)
    for i in (0, 2):
        assert torch.equal(pruned[i].weight.to_dense(), dense[i].weight)
        assert pruned[i].weight.requires_grad == dense[i].weight.requires_grad
    stored = pruned[0].weight.values().numel()
    assert stored == int((dense[0].weight != 0).sum())
    assert stored < dense[0].weight.numel()


@SPARSE
def test_layers_without_sparse_kernels_stay_dense(close_gates):
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 4, 3),
            "narrow": nn.Linear(4, 4).half(),
            "odd": nn.Linear(4, 6),
            "encoder": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            "fc": nn.Linear(4, 8),
        }
    )
    sparsify(model, "weight")
    close_gates(model)
    pruned = prune(model, sparse_format="bsr", block_size=(4, 4))
    found = {name: m.weight.layout for name, m in pruned.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {name for name, layout in found.items() if layout != torch.strided} == {"fc"}
    assert prune(model, sparse_format="bsr", block_size=(3, 2))["odd"].weight.layout == torch.sparse_bsr


@SPARSE
@pytest.mark.parametrize("sparse_format", [None, "csr", "bsr"])
def test_zeros_within_blocks_are_no_parameters(close_gates, sparse_format):
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, "weight")
    close_gates(model)
    pruned, report = prune(model, sparse_format=sparse_format, block_size=(4, 4), return_report=True)
    kept = int(next(iter_gates(model))[1].support().sum())
    assert kept < 64
    assert report.exported_parameters == exported_size(model, pruned, "params") == kept + 8


@SPARSE
@pytest.mark.parametrize("sparse_format", ["csr", "bsr"])
def test_a_transformer_layer_computes_the_same_beside_sparse_weights(close_gates, sparse_format):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4))
    sparsify(model, "weight")
    close_gates(model)
    x = torch.randn(2, 3, 8)
    pruned = prune(model, sparse_format=sparse_format, example_inputs=(x,))
    assert pruned[1].weight.layout != torch.strided


# ----------------------------------------------------------------------------------------- the user's own things


class Negate(nn.Module):
    def forward(self, tensor):
        return -tensor

    def right_inverse(self, tensor):
        return -tensor


def tripled(module, args, output):
    return 3 * output


def renamed(module, state_dict, prefix, *_):
    state_dict[prefix + "bias"] = state_dict.pop(prefix + "old_bias", state_dict.get(prefix + "bias"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])
def test_the_users_hooks_survive(close_gates, when, inplace):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    calls = []

    def install():
        model[0].register_forward_hook(tripled)
        model[0].register_forward_pre_hook(lambda m, args: calls.append("pre"))
        model.register_forward_hook(lambda m, args, out: calls.append("model"), always_call=True)
        model[0].register_load_state_dict_pre_hook(renamed)

    if when == "before":
        install()
    sparsify(model, "weight")
    if when == "after":
        install()
    close_gates(model)
    x = torch.randn(2, 4)
    expected = model.eval()(x).detach()
    pruned = prune(model, inplace=inplace)
    calls.clear()
    assert torch.equal(pruned(x), expected)
    assert calls == ["pre", "model"]
    assert len(pruned[0]._forward_hooks) == len(pruned[0]._forward_pre_hooks) == 1
    assert len(pruned._forward_hooks) == len(pruned._forward_hooks_always_called) == 1
    assert [hook.hook for hook in pruned[0]._load_state_dict_pre_hooks.values()] == [renamed]
    bias = torch.arange(4.0)
    pruned.load_state_dict({"0.weight": torch.zeros(4, 4), "0.old_bias": bias})
    assert torch.equal(pruned[0].bias, bias)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])
def test_a_parametrization_of_another_tensor_survives(close_gates, when, inplace):
    model = nn.Sequential(nn.Linear(4, 4))
    if when == "before":
        parametrize.register_parametrization(model[0], "bias", Negate())
    sparsify(model, "weight")
    if when == "after":
        parametrize.register_parametrization(model[0], "bias", Negate())
    twin = copy.deepcopy(model)
    close_gates(model)
    x = torch.randn(2, 4)
    expected = model.eval()(x).detach()
    pruned = prune(model, inplace=inplace)
    assert torch.equal(pruned(x), expected)
    assert parametrize.is_parametrized(pruned[0], "bias")
    assert not parametrize.is_parametrized(pruned[0], "weight")
    assert torch.equal(pruned[0].bias, -pruned[0].parametrizations.bias.original)
    assert list(pruned.state_dict()) == ["0.weight", "0.parametrizations.bias.original"]
    parametrize.remove_parametrizations(pruned[0], "bias")
    assert type(pruned[0]) is nn.Linear
    for survivor in [twin] if inplace else [model, twin]:
        assert parametrize.is_parametrized(survivor[0], "bias")
        assert torch.equal(survivor[0].bias, -survivor[0].parametrizations.bias.original)
        survivor.train()(x).sum().backward()
    if not inplace:
        assert torch.equal(model.eval()(x), expected)


class Scaled(nn.Linear):
    """A layer of the user's own, with a parameter before and after the weight."""

    def __init__(self, n):
        nn.Module.__init__(self)
        self.in_features = self.out_features = n
        self.first = nn.Parameter(torch.ones(n))
        self.weight = nn.Parameter(torch.randn(n, n))
        self.bias = nn.Parameter(torch.zeros(n))
        self.last = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return super().forward(x * self.first) * self.last


def test_layers_of_the_users_own_class_come_back_in_their_order(close_gates):
    model = nn.Sequential(Scaled(4))
    order = [name for name, _ in model.named_parameters()]
    sparsify(model, "weight")
    close_gates(model)
    pruned = prune(model)
    assert type(pruned[0]) is Scaled
    assert [name for name, _ in pruned.named_parameters()] == order == list(pruned.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(pruned(x), model.eval()(x))


def test_frozen_weights_stay_frozen():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4))
    sparsify(model, "weight")
    pruned = prune(model)
    assert [p.requires_grad for p in pruned.parameters()] == [False, False, True, True]


# ------------------------------------------------------------------------------------------------ report and errors


def test_the_report_says_what_was_removed(close_gates):
    model = gated_cnn(close_gates)
    x = torch.randn(CNN_INPUT)
    pruned, report = prune(model, example_inputs=(x,), return_report=True)
    assert isinstance(report, Summary)
    zeros = sum(int((m.weight == 0).sum()) for m in pruned if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)))
    assert report.parameters - report.parameters_kept == zeros > 0
    assert report.macs is not None
    again, in_place = prune(model, inplace=True, return_report=True)
    assert again is model
    assert in_place.parameters_kept == report.parameters_kept


class Drifting(nn.Linear):
    """Computes something else in every evaluation, by what no attribute of the model holds."""

    calls = itertools.count()

    def forward(self, x):
        return super().forward(x) + next(self.calls)


def with_nan_gates():
    model = nn.Linear(2, 2)
    sparsify(model, "weight")
    with torch.no_grad():
        next(iter_gates(model))[1].log_alpha[0, 0] = torch.nan
    return model


def with_two_parametrizations():
    model = nn.Linear(2, 2)
    sparsify(model, "weight")
    parametrize.register_parametrization(model, "weight", Negate())
    return model


def gated(model):
    sparsify(model, "weight")
    return model


def with_standalone_gate():
    return gated(nn.ModuleDict({"fc": nn.Linear(2, 2), "select": Gate(2)}))


# model, options, error, message
BAD = {
    "no gates": (lambda: nn.Linear(2, 2), {}, StateError, "prune: the model must hold gates(.|\n)*sparsify"),
    "standalone": (with_standalone_gate, {}, StateError, "prune at 'select': a standalone gate"),
    "not finite": (with_nan_gates, {}, StateError, "log-odds must be finite(.|\n)*smaller gate_lr"),
    "two": (with_two_parametrizations, {}, StateError, "'weight': gates must be the only parametrization"),
    "format": (lambda: gated(nn.Linear(2, 2)), {"sparse_format": "coo"}, SpecError, "'csr' or 'bsr'\n  got: 'coo'"),
    "drift": (
        lambda: gated(Drifting(2, 2)),
        {"example_inputs": (torch.ones(1, 2),)},
        StateError,
        "the pruned model must compute what the gated one computes(.|\n)*deterministic",
    ),
    "tensor": (
        lambda: gated(nn.Linear(2, 2)),
        {"example_inputs": torch.ones(1, 2)},
        SpecError,
        r"example_inputs=\(x,\)",
    ),
    "shape": (lambda: gated(nn.Linear(2, 2)), {"example_inputs": (torch.ones(1, 3),)}, RuntimeError, "shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_pruned_is_refused_and_left_alone(case):
    make, options, error, message = BAD[case]
    model = make()
    before, looks = bits(model), shape_of(model)["classes"]
    with pytest.raises(error, match=message):
        prune(model, **options)
    assert bits(model) == before
    assert shape_of(model)["classes"] == looks


class Masking(nn.Linear):
    """Logits with −∞ where nothing may be chosen, and NaN where nothing is known."""

    def forward(self, x):
        out = super().forward(x)
        return torch.where(torch.arange(4) == 0, -torch.inf, torch.where(torch.arange(4) == 1, torch.nan, out))


def test_infinite_outputs_are_compared_too():
    model = gated(Masking(4, 4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(prune(model, example_inputs=(x,)).eval()(x), model.eval()(x), equal_nan=True)


class Sampling(nn.Linear):
    """Draws also in evaluation."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


def test_a_model_that_draws_in_evaluation_is_compared_with_equal_draws():
    model = gated(Sampling(4, 4))
    before = torch.get_rng_state()
    assert type(prune(model, example_inputs=(torch.zeros(3, 4),))) is Sampling
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("granularity", ["weight", "output", "coupled"])
def test_a_change_that_leaves_no_trace_is_folded_and_compared(granularity):
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(3, 8)
    sparsify(model, granularity, example_inputs=(x,))
    model.eval()
    with torch.no_grad():
        model(x)  # keeps the folded weights
    for _, gate in iter_gates(model):
        gate.log_alpha.data[:1].fill_(-9.0)  # torch counts no version
    small = prune(model, example_inputs=(x,))
    model.train().eval()
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("block_size", [(0, 4), (4, 0), (-1, 4), (4,), 4], ids=str)
def test_block_sizes_must_be_two_positive_numbers(block_size):
    with pytest.raises(SpecError, match="block_size"):
        prune(gated(nn.Linear(4, 4)), sparse_format="bsr", block_size=block_size)


@SPARSE
@pytest.mark.parametrize("options", [{}, {"sparse_format": "csr"}, {"inplace": True}], ids=str)
def test_the_report_says_how_many_parameters_the_pruned_model_has(options):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    sparsify(model, {"0": "weight"})
    with torch.no_grad():
        model[0].parametrizations.weight[0].gate.log_alpha.view(-1)[:13] = -5
    _, report = prune(model, return_report=True, **options)
    assert report.exported_parameters == report.model_parameters_kept == 30 - 13 + 5 + 24
    assert f"exported: {30 - 13 + 5 + 24} parameters" in str(report)
    stored = 0 if "sparse_format" in options else 13
    assert report.exported_zeros == report.to_dict()["exported_zeros"] == stored
    assert ("and 13 zeros, which training changes" in str(report)) == bool(stored)
    assert summary(nn.Linear(2, 2)).exported_parameters is None


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("sparse_format", [None, "csr"])
def test_a_failed_prune_in_place_leaves_the_gated_model(sparse_format):
    model = gated(Drifting(2, 2))
    before, classes = bits(model), shape_of(model)["classes"]
    weight = model.parametrizations.weight.original
    with pytest.raises(StateError, match="must compute what the gated one computes"):
        prune(model, example_inputs=(torch.ones(1, 2),), inplace=True, sparse_format=sparse_format)
    assert bits(model) == before
    assert shape_of(model)["classes"] == classes
    assert model.parametrizations.weight.original is weight
    assert next(iter_gates(model), None) is not None
    sound = gated(nn.Linear(2, 2))
    weight = sound.parametrizations.weight.original
    pruned = prune(sound, example_inputs=(torch.ones(1, 2),), inplace=True)
    assert pruned is sound
    assert pruned.weight is weight
    assert next(iter_gates(pruned), None) is None


class Adapter(nn.Module):
    """As in peft: it holds the layer under another name and shows its weight."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("wrapped", [(0,), (1,), (0, 1)])
def test_a_layer_that_was_wrapped_after_gating_is_named_and_can_be_unwrapped(wrapped):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)
    sparsify(model, "coupled", example_inputs=(x,))
    with torch.no_grad():
        next(iter_gates(model))[1].log_alpha[::2] = -20
    layers = list(model)
    for number in wrapped:
        model[number] = Adapter(model[number])
    with pytest.raises(StateError, match=r"(?s)'[01]\.weight'.*take adapters out"):
        prune(model, example_inputs=(x,))
    for number, layer in enumerate(layers):
        model[number] = layer
    assert prune(model, example_inputs=(x,))[0].out_features == 4


def test_a_layer_that_was_replaced_by_one_of_another_size_is_named():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)
    sparsify(model, "coupled", example_inputs=(x,))
    model[0] = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 8))
    with pytest.raises(StateError, match=r"'0\.weight'(.|\n)*no tensor of that name"):
        prune(model, example_inputs=(x,))
    model[0] = nn.Linear(4, 6)
    with pytest.raises(StateError, match=r"expected: a tensor of shape \(8, 4\)\n  got: shape \(6, 4\)"):
        prune(model, example_inputs=(x,))
