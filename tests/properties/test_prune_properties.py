"""The law pruned(x) = gated.eval()(x), on random architectures with random gates."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from l0hooks import GateSpec, iter_gates, prune, sparsify, summary

SETTINGS = settings(max_examples=30, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
WIDTHS = st.sampled_from([2, 4, 6])
FAMILIES = st.sampled_from(["hard_concrete", "straight_through", "stg", "deterministic"])


@st.composite
def convolutions(draw, channels):
    """One convolution or transposed convolution over two axes, with its granularity."""
    transposed = draw(st.booleans())
    out = draw(WIDTHS)
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if channels % g == 0 and out % g == 0]))
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    size = draw(st.sampled_from([1, 2, 3]))
    options = {
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding": size // 2,
        "stride": draw(st.sampled_from([1, 2])),
    }
    layer = kind(channels, out, size, **options)
    return layer, out, draw(granularities(out // groups, channels // groups))


def granularities(rows, cols):
    """A granularity that fits a layer with so many outputs and inputs in a group."""
    divisors = [(r, c) for r in range(1, rows + 1) for c in range(1, cols + 1) if rows % r == 0 and cols % c == 0]
    return st.one_of(st.sampled_from(["weight", "input", "output", "kernel"]), st.sampled_from(divisors))


@st.composite
def architectures(draw):
    """A model, its specification, and the shape of one example."""
    channels = draw(WIDTHS)
    shape, layers, spec = (channels, 5, 6), [], {}

    def gated(layer, granularity):
        if draw(st.integers(0, 4)):  # now and then a layer is left alone
            options = {"family": draw(FAMILIES), "estimator": draw(st.sampled_from(["median", "mean", "paper"]))}
            spec[str(len(layers))] = GateSpec(granularity=granularity, **options)
        layers.append(layer)

    for _ in range(draw(st.integers(0, 3))):
        layer, channels, granularity = draw(convolutions(channels))
        gated(layer, granularity)
        layers.append(draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.Identity, lambda n=channels: nn.BatchNorm2d(n)]))())
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(draw(st.integers(1, 3))):
        out = draw(WIDTHS)
        gated(nn.Linear(channels, out, bias=draw(st.booleans())), draw(granularities(out, channels)))
        layers.append(draw(st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Identity]))())
        channels = out
    if not spec:
        spec[str(len(layers) - 2)] = GateSpec(granularity="weight")
    return nn.Sequential(*layers), spec, shape


@SETTINGS
@given(architectures(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_a_pruned_model_computes_what_the_gated_one_evaluates(architecture, seed, dtype, inplace):
    model, spec, shape = architecture
    torch.manual_seed(seed)
    model.to(dtype)
    dense_keys = list(model.state_dict())
    sparsify(model, spec)
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha.uniform_(-4, 3)
    model.train()(torch.randn(3, *shape, dtype=dtype)).sum().backward()
    model.eval()
    batches = [torch.randn(n, *shape, dtype=dtype) for n in (1, 4)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
    report = summary(model)
    pruned = prune(model, inplace=inplace)
    with torch.no_grad():
        for x, out in zip(batches, expected, strict=True):
            assert torch.equal(pruned(x), out)
            if not inplace:
                assert torch.equal(model(x), out)
    assert list(pruned.state_dict()) == dense_keys
    zeros = sum(int((pruned[int(name)].weight == 0).sum()) for name in spec)
    assert zeros == report.parameters - report.parameters_kept


@SETTINGS
@given(architectures(), st.integers(0, 2**31))
def test_a_dense_checkpoint_goes_in_and_comes_out_through_open_gates(architecture, seed):
    model, spec, _ = architecture
    torch.manual_seed(seed)
    checkpoint = {k: v.clone() for k, v in model.state_dict().items()}
    spec = {name: GateSpec(granularity=one.granularity) for name, one in spec.items()}
    sparsify(model, spec)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(10.0 if name.endswith("log_alpha") else torch.nan)
    model.load_state_dict(checkpoint, strict=True)
    restored = prune(model).state_dict()
    assert list(restored) == list(checkpoint)
    assert all(torch.equal(restored[k], checkpoint[k]) for k in checkpoint)
