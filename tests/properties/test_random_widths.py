"""Random small transformers with random kinds gated and closed: what is cut computes the same, or is refused aloud."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from width_models import ALL_KINDS, Encoder

from l0hooks import GateSpec, iter_gates, prune, sparsify


class Root(nn.Module):
    """RMSNorm by hand, with or without Gemma's 1 + w."""

    shift = 0.0

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-3

    def forward(self, x):
        x = x.to(torch.float32)
        return (self.shift + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


class Shifted(Root):
    shift = 1.0


class Biasless(nn.LayerNorm):
    def __init__(self, width):
        super().__init__(width, bias=False)


NORMS = (nn.LayerNorm, Biasless, nn.RMSNorm, Root, Shifted)


def check(seed, norm, kinds, share, width, heads, depth, before, tied):
    torch.manual_seed(seed)
    model = Encoder(norm, width=width, heads=heads, depth=depth, before=before, tied=tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 4)
    words = torch.randint(0, 99, (2, 6))
    dense = sum(p.numel() for p in model.parameters())
    spec = GateSpec(granularity="coupled", kinds=tuple(kinds))
    sparsify(model.eval(), spec, example_inputs=(words,))
    for _, gate in iter_gates(model):
        gate.log_alpha.data.copy_(torch.where(torch.rand(gate.log_alpha.shape) < share, -9.0, torch.rand(()) * 2))
    small, double = prune(model, example_inputs=(words,)), copy.deepcopy(model).double()
    for shape in ((1, 6), (3, 4), (2, 11)):
        other = torch.randint(0, 99, shape)
        with torch.no_grad():
            expected, got, precise = model(other), small(other), double(other)
        rounding = float((expected - precise).abs().max())  # large where a norm sees nearly equal channels
        assert float((expected - got).abs().max()) <= 1e-5 * float(expected.abs().max()) + 20 * rounding
    closed = any(not bool(gate.support().all()) for _, gate in iter_gates(model))
    assert closed == (sum(p.numel() for p in small.parameters()) < dense)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:prune. modules of the smaller model are graphs")
@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    norm=st.sampled_from(NORMS),
    kinds=st.sets(st.sampled_from(ALL_KINDS[1:])).map(lambda kinds: kinds | {"width"}),
    share=st.sampled_from([0.1, 0.4, 0.8]),
    width=st.sampled_from([8, 12, 16]),
    heads=st.sampled_from([2, 3]),
    depth=st.sampled_from([1, 2]),
    before=st.booleans(),
    tied=st.booleans(),
)
def test_random_transformers_are_narrowed_exactly(seed, norm, kinds, share, width, heads, depth, before, tied):
    check(seed, norm, kinds, share, width, heads, depth, before, tied)


@pytest.mark.filterwarnings("ignore:prune. modules of the smaller model are graphs")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("before", [True, False])
def test_every_norm_before_and_after_branches(norm, before):
    check(7, norm, {"neuron", "head", "width"}, 0.4, 12, 2, 1, before, tied=before)
