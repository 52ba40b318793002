"""Cutting parameters: each layer has the chosen slices of its tensors and computes with them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l0hooks.structure.cut_modules import _CORRECTIONS, Cut, apply_cuts, plan_cuts
from l0hooks.structure.groups import ChannelGroup, GroupSite

IN, OUT = (0, 2, 3), (1, 2, 5, 6)  # the indices kept of 5 inputs and 8 outputs


def cut(names, shape, **kept):
    """A cut of one tensor: ``axis0=…, axis1=…``."""
    return Cut(
        (names,) if isinstance(names, str) else names, tuple(shape), tuple((int(k[4:]), v) for k, v in kept.items())
    )


def pick(tensor, *kept):
    """``tensor`` with the indices in ``kept`` along its first axes; None keeps all."""
    for axis, indices in enumerate(kept):
        if indices is not None:
            tensor = tensor.index_select(axis, torch.tensor(indices))
    return tensor


def convolution(dims, transposed=False, groups=1):
    kind = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
    return kind[dims][transposed](5 if groups == 1 else 8, 8, 3, padding=1, groups=groups)


def function_of(dims, transposed=False):
    return getattr(F, f"conv{'_transpose' if transposed else ''}{dims}d")


# name: (module, cuts by tensor, input, what it computes by hand from its old tensors, attributes afterwards)
CASES = {
    "Linear": (
        lambda: nn.Linear(5, 8),
        {"weight": {"axis0": OUT, "axis1": IN}, "bias": {"axis0": OUT}},
        (2, 3),
        lambda x, w, b: F.linear(x, pick(w, OUT, IN), pick(b, OUT)),
        {"in_features": 3, "out_features": 4},
    ),
    "Linear, only read": (
        lambda: nn.Linear(5, 8),
        {"weight": {"axis1": IN}},
        (2, 3),
        lambda x, w, b: F.linear(x, pick(w, None, IN), b),
        {"in_features": 3, "out_features": 8},
    ),
    **{
        f"Conv{dims}d": (
            lambda dims=dims: convolution(dims),
            {"weight": {"axis0": OUT, "axis1": IN}, "bias": {"axis0": OUT}},
            (2, 3, *[6] * dims),
            lambda x, w, b, dims=dims: function_of(dims)(x, pick(w, OUT, IN), pick(b, OUT), padding=1),
            {"in_channels": 3, "out_channels": 4, "groups": 1},
        )
        for dims in (1, 2, 3)
    },
    **{
        f"ConvTranspose{dims}d": (
            lambda dims=dims: convolution(dims, True),
            {"weight": {"axis0": IN, "axis1": OUT}, "bias": {"axis0": OUT}},
            (2, 3, *[6] * dims),
            lambda x, w, b, dims=dims: function_of(dims, True)(x, pick(w, IN, OUT), pick(b, OUT), padding=1),
            {"in_channels": 3, "out_channels": 4, "groups": 1},
        )
        for dims in (1, 2, 3)
    },
    "Conv2d, depthwise": (
        lambda: convolution(2, groups=8),
        {"weight": {"axis0": OUT}, "bias": {"axis0": OUT}},
        (2, 4, 6, 6),
        lambda x, w, b: F.conv2d(x, pick(w, OUT), pick(b, OUT), padding=1, groups=4),
        {"in_channels": 4, "out_channels": 4, "groups": 4},
    ),
    "Conv2d, depthwise with a multiplier of two": (
        lambda: nn.Conv2d(4, 8, 3, groups=4),
        {"weight": {"axis0": (0, 1, 6, 7)}, "bias": {"axis0": (0, 1, 6, 7)}},
        (2, 2, 6, 6),
        lambda x, w, b: F.conv2d(x, pick(w, (0, 1, 6, 7)), pick(b, (0, 1, 6, 7)), groups=2),
        {"in_channels": 2, "out_channels": 4, "groups": 2},
    ),
    "Conv2d, one of two groups": (
        lambda: convolution(2, groups=2),
        {"weight": {"axis0": (4, 5, 6, 7)}, "bias": {"axis0": (4, 5, 6, 7)}},
        (2, 4, 6, 6),
        lambda x, w, b: F.conv2d(x, w[4:], b[4:], padding=1),
        {"in_channels": 4, "out_channels": 4, "groups": 1},
    ),
    "ConvTranspose2d, two of four groups": (
        lambda: nn.ConvTranspose2d(8, 12, 2, 2, groups=4),
        {"weight": {"axis0": (2, 3, 6, 7)}, "bias": {"axis0": (3, 4, 5, 9, 10, 11)}},
        (2, 4, 3, 3),
        lambda x, w, b: F.conv_transpose2d(x, pick(w, (2, 3, 6, 7)), pick(b, (3, 4, 5, 9, 10, 11)), stride=2, groups=2),
        {"in_channels": 4, "out_channels": 6, "groups": 2},
    ),
    "BatchNorm2d": (
        lambda: nn.BatchNorm2d(8),
        {n: {"axis0": OUT} for n in ("weight", "bias", "running_mean", "running_var")},
        (2, 4, 3, 3),
        lambda x, w, b, m, v: F.batch_norm(x, pick(m, OUT), pick(v, OUT), pick(w, OUT), pick(b, OUT)),
        {"num_features": 4},
    ),
    "BatchNorm1d without affine": (
        lambda: nn.BatchNorm1d(8, affine=False),
        {n: {"axis0": OUT} for n in ("running_mean", "running_var")},
        (2, 4),
        lambda x, m, v: F.batch_norm(x, pick(m, OUT), pick(v, OUT)),
        {"num_features": 4},
    ),
    "BatchNorm2d without statistics": (
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
        {n: {"axis0": OUT} for n in ("weight", "bias")},
        (2, 4, 3, 3),
        lambda x, w, b: F.batch_norm(x, None, None, pick(w, OUT), pick(b, OUT), training=True),
        {"num_features": 4},
    ),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(8, affine=True),
        {n: {"axis0": OUT} for n in ("weight", "bias")},
        (2, 4, 3, 3),
        lambda x, w, b: F.instance_norm(x, None, None, pick(w, OUT), pick(b, OUT)),
        {"num_features": 4},
    ),
    "GroupNorm": (
        lambda: nn.GroupNorm(4, 8),
        {n: {"axis0": (2, 3, 6, 7)} for n in ("weight", "bias")},
        (2, 4, 3, 3),
        lambda x, w, b: F.group_norm(x, 2, pick(w, (2, 3, 6, 7)), pick(b, (2, 3, 6, 7))),
        {"num_groups": 2, "num_channels": 4},
    ),
    "LayerNorm": (
        lambda: nn.LayerNorm(8),
        {n: {"axis0": OUT} for n in ("weight", "bias")},
        (2, 4),
        lambda x, w, b: F.layer_norm(x, (4,), pick(w, OUT), pick(b, OUT)),
        {"normalized_shape": (4,)},
    ),
    "RMSNorm": (
        lambda: nn.RMSNorm(8),
        {"weight": {"axis0": OUT}},
        (2, 4),
        lambda x, w: F.rms_norm(x, (4,), pick(w, OUT)),
        {"normalized_shape": (4,)},
    ),
    "PReLU": (
        lambda: nn.PReLU(8),
        {"weight": {"axis0": OUT}},
        (2, 4, 3),
        lambda x, w: F.prelu(x, pick(w, OUT)),
        {"num_parameters": 4},
    ),
    "Embedding": (
        lambda: nn.Embedding(5, 8),
        {"weight": {"axis1": OUT}},
        None,
        lambda x, w: F.embedding(x, pick(w, None, OUT)),
        {"embedding_dim": 4, "num_embeddings": 5},
    ),
    "EmbeddingBag": (
        lambda: nn.EmbeddingBag(5, 8, mode="sum"),
        {"weight": {"axis1": OUT}},
        None,
        lambda x, w: F.embedding(x, pick(w, None, OUT)).sum(1),
        {"embedding_dim": 4, "num_embeddings": 5},
    ),
}


def tensors_of(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("name", CASES)
def test_a_cut_layer_computes_with_its_slices_and_stores_its_sizes(name):
    build, cuts, shape, by_hand, attributes = CASES[name]
    module = build().eval()
    with torch.no_grad():
        for key, tensor in tensors_of(module).items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2) if "var" in key else tensor.normal_()
    old = {key: t.detach().clone() for key, t in tensors_of(module).items() if t.is_floating_point()}
    x = torch.randint(5, (2, 3)) if shape is None else torch.randn(shape)
    expected = by_hand(x, *old.values())

    apply_cuts(module, [cut(key, old[key].shape, **kept) for key, kept in cuts.items()])

    assert {key: getattr(module, key) for key in attributes} == attributes
    got = module(x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert all(isinstance(p, nn.Parameter) and p.is_contiguous() and p.is_leaf for p in module.parameters())
    if list(module.parameters()):
        got.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    twin = type(module)(**_arguments(module))  # a fresh layer of that size takes the tensors
    twin.load_state_dict(module.state_dict(), strict=True)


def _arguments(module):
    names = {
        nn.Linear: ("in_features", "out_features"),
        nn.GroupNorm: ("num_groups", "num_channels"),
        nn.LayerNorm: ("normalized_shape",),
        nn.RMSNorm: ("normalized_shape",),
        nn.PReLU: ("num_parameters",),
        nn.Embedding: ("num_embeddings", "embedding_dim"),
        nn.EmbeddingBag: ("num_embeddings", "embedding_dim"),
    }.get(type(module))
    if names is None and hasattr(module, "num_features"):
        names = ("num_features", "affine", "track_running_stats")
    return {n: getattr(module, n) for n in names or ("in_channels", "out_channels", "kernel_size", "groups")}


def test_every_kind_of_layer_that_is_corrected_is_tested():
    tested = {type(case[0]()) for case in CASES.values()}
    for kinds, _ in _CORRECTIONS:
        for kind in kinds:
            assert any(issubclass(t, kind) for t in tested), kind


def test_hugging_face_conv1d_stores_its_sizes():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    module = pytorch_utils.Conv1D(8, 5)  # out, in
    nn.init.normal_(module.bias)
    weight, bias, x = module.weight.detach().clone(), module.bias.detach().clone(), torch.randn(2, 7, 3)
    apply_cuts(module, [cut("weight", (5, 8), axis0=IN, axis1=OUT), cut("bias", (8,), axis0=OUT)])
    assert (module.nx, module.nf) == (3, 4)
    torch.testing.assert_close(module(x), x @ pick(weight, IN, OUT) + pick(bias, OUT))


def test_tied_tensors_stay_tied_and_frozen_ones_frozen():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 8), "head": nn.Linear(8, 7, bias=False), "other": nn.Linear(8, 2)})
    model["head"].weight = model["embed"].weight
    model["head"].weight.requires_grad_(False)
    apply_cuts(model, [cut(("embed.weight", "head.weight"), (7, 8), axis1=OUT)])
    assert model["head"].weight is model["embed"].weight
    assert not model["head"].weight.requires_grad
    assert (model["head"].in_features, model["embed"].embedding_dim) == (4, 4)
    assert model["other"].in_features == 8


def test_dtype_device_and_persistence_are_kept():
    model = nn.Linear(5, 8, dtype=torch.bfloat16)
    model.register_buffer("scale", torch.rand(8), persistent=False)
    expected = pick(model.scale, OUT)
    apply_cuts(model, [cut("weight", (8, 5), axis0=OUT), cut("bias", (8,), axis0=OUT), cut("scale", (8,), axis0=OUT)])
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.scale, expected)
    assert not isinstance(model.scale, nn.Parameter)
    assert "scale" not in model.state_dict()


def test_parameters_of_the_model_itself_are_cut():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 8))

    model = Bare()
    expected = pick(model.w.detach(), IN)
    apply_cuts(model, [cut("w", (5, 8), axis0=IN)])
    assert torch.equal(model.w, expected)


def test_tensors_that_no_cut_names_are_the_same_objects():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = copy.copy(dict(model.named_parameters()))
    apply_cuts(model, [cut("0.weight", (8, 5), axis1=IN)])
    after = dict(model.named_parameters())
    assert [name for name in before if before[name] is not after[name]] == ["0.weight"]


def group(size, *sites):
    return ChannelGroup("neuron", size, tuple(sites))


def site(name, shape, axis, indices, reads=False):
    return GroupSite((name,), shape, axis, np.asarray(indices).reshape(len(indices), -1), reads, False)


def test_a_plan_keeps_what_every_group_keeps_along_every_axis():
    first = group(3, site("w", (6, 5), 0, [[0, 1], [2, 3], [4, 5]]), site("b", (6,), 0, [[0, 1], [2, 3], [4, 5]]))
    second = group(2, site("w", (6, 5), 1, [0, 3], reads=True))
    third = group(2, site("w", (6, 5), 1, [1, 4], reads=True))
    masks = [np.array(m, bool) for m in ([1, 0, 1], [0, 1], [1, 0])]
    plan = plan_cuts(list(zip((first, second, third), masks, strict=True)))
    assert plan == [
        Cut(("w",), (6, 5), ((0, (0, 1, 4, 5)), (1, (1, 2, 3)))),
        Cut(("b",), (6,), ((0, (0, 1, 4, 5)),)),
    ]


def test_a_plan_without_losses_is_empty():
    assert plan_cuts([(group(2, site("w", (2, 5), 0, [0, 1])), np.ones(2, bool))]) == []
