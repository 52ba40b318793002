"""One test for each known defect of earlier libraries (DESIGN.md §9) that belongs to these rooms."""

import math

import pytest
import torch
from torch import nn

from l0hooks import Gate, GateSpec, iter_gates, param_groups, penalty, prune, set_temperature, sparsify, summary
from l0hooks.errors import InvalidValueError


def test_the_start_asked_for_as_a_keep_probability_is_not_taken_for_a_mean():
    """log_alpha = logit(p) gives P(z > 0) = 0.832 for p = 0.5 at β = 2/3."""
    torch.manual_seed(0)
    by_probability = Gate(100_000, init_keep_prob=0.5)
    by_mean = Gate(100_000, init_mean=0.5)
    z = by_probability.sample().detach()
    assert abs(float((z > 0).float().mean()) - 0.5) < 4 * 0.5 / math.sqrt(100_000)
    assert float(z.mean()) < 0.4
    assert abs(float(by_mean.sample().detach().mean()) - 0.5) < 4 * 0.5 / math.sqrt(100_000)
    assert by_mean.keep_prob()[0].item() == pytest.approx(0.8318, abs=1e-4)


def test_a_pretrained_model_loses_five_percent_at_the_start_and_not_37():
    """A start with keep probability 0.9 would multiply every weight by 0.63 on average."""
    torch.manual_seed(0)
    model = nn.Linear(300, 300, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    sparsify(model, "weight")
    assert model.weight.detach().mean().item() == pytest.approx(0.95, abs=0.005)
    assert Gate(1, init_keep_prob=0.9).family.mean(Gate(1, init_keep_prob=0.9).log_alpha, 2 / 3).item() < 0.65


def test_the_penalty_of_a_model_with_a_standalone_gate_is_not_zero():
    class Selecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = Gate(8, init_keep_prob=0.5)
            self.fc = nn.Linear(8, 1)

        def forward(self, x):
            return self.fc(x * self.features())

    model = Selecting()
    value = penalty(model, l0=1.0)
    assert value.item() == pytest.approx(4.0, rel=1e-5)
    value.backward()
    assert bool((model.features.log_alpha.grad > 0).all())


def test_l2_does_not_count_gate_logits():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    sparsify(model, "weight")
    with torch.no_grad():
        model[0].parametrizations.weight.original.fill_(0.5)
        for _, gate in iter_gates(model):
            gate.log_alpha.fill_(9.0)
    value = penalty(model, l2=1.0)
    assert value.item() == 16 * 0.25
    value.backward()
    gate = next(gate for _, gate in iter_gates(model))
    assert gate.log_alpha.grad is None or not bool(gate.log_alpha.grad.any())


def test_weight_decay_does_not_reach_the_gates():
    model = nn.Linear(4, 4)
    sparsify(model, "weight")
    gate = next(gate for _, gate in iter_gates(model))
    before = gate.log_alpha.detach().clone()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, gate_lr=0.1, weight_decay=1.0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(gate.log_alpha, before)


@pytest.mark.parametrize("granularity", ["weight", "input", "output", "kernel"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv1d(6, 6, 3, groups=6),
        lambda: nn.Conv2d(6, 12, 3, groups=6),
        lambda: nn.Conv3d(6, 6, 2, groups=6),
        lambda: nn.ConvTranspose2d(6, 6, 3, groups=6),
    ],
    ids=["1d", "2d, twofold", "3d", "transposed"],
)
def test_pruning_a_depthwise_layer_works(layer, granularity, close_gates):
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.ReLU())
    sparsify(model, granularity)
    closed = close_gates(model)
    dimensions = model[0].parametrizations.weight.original.ndim - 2
    x = torch.randn(2, 6, *[5] * dimensions)
    pruned = prune(model, example_inputs=(x,))
    assert torch.equal(pruned.eval()(x), model.eval()(x))
    assert int((pruned[0].weight == 0).sum()) >= closed > 0


@pytest.mark.parametrize("granularity", ["weight", "input", "output", (2, 2)], ids=str)
@pytest.mark.parametrize("estimator", ["median", "paper", "mean"])
def test_pruning_removes_exactly_what_evaluation_has_closed(estimator, granularity):
    """Also where the estimator's own zeros would differ from the support."""
    torch.manual_seed(0)
    model = nn.Linear(8, 6)
    sparsify(model, GateSpec(granularity=granularity, estimator=estimator))
    gate = next(gate for _, gate in iter_gates(model))
    with torch.no_grad():
        gate.log_alpha.copy_(torch.linspace(-4, 1, gate.log_alpha.numel()).view_as(gate.log_alpha))
    model.eval()
    evaluated = model.weight != 0
    report = summary(model)
    pruned = prune(model).weight != 0
    assert torch.equal(pruned, evaluated)
    assert report.parameters_kept == int(evaluated.sum())
    assert int(gate.support().sum()) * (48 // gate.log_alpha.numel()) == int(evaluated.sum())
    assert 0 < report.parameters_kept < 48
    half = gate.keep_prob() > 0.5
    assert torch.equal(gate.support(), half)


def test_temperature_updates_reach_every_gate():
    class Fitter(nn.Module):
        def __init__(self):
            super().__init__()
            self.samples = Gate(5)
            self.parts = nn.ModuleList([Gate(2), nn.ModuleDict({"deep": Gate(3)})])
            self.net = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))

    model = Fitter()
    sparsify(model, "weight")
    set_temperature(model, 0.2)
    every = [module for module in model.modules() if isinstance(module, Gate)]
    assert len(every) == 6
    assert [gate.temperature for gate in every] == [0.2] * 6
    with torch.no_grad():
        for gate in every:
            gate.log_alpha.zero_()
            expected = torch.full_like(gate.log_alpha, 1 / (1 + math.exp(0.2 * math.log(0.1 / 1.1))))
            torch.testing.assert_close(gate.keep_prob(), expected)


@pytest.mark.parametrize("start", [1.0, 1, 0.0, 0])
@pytest.mark.parametrize("option", ["init_keep_prob", "init_mean"])
@pytest.mark.parametrize("family", ["hard_concrete", "straight_through", "stg", "deterministic"])
def test_a_start_of_one_or_zero_is_a_clear_error(family, option, start):
    with pytest.raises(InvalidValueError, match=r"strictly between 0 and 1(.|\n)*infinite log-odds"):
        Gate(3, family=family, **{option: start})
    with pytest.raises(InvalidValueError, match=r"strictly between 0 and 1(.|\n)*infinite log-odds"):
        sparsify(nn.Linear(2, 2), GateSpec(family=family, **{option: start}))


@pytest.mark.parametrize("start", [1e-12, 1e-6, 1 - 1e-6, 1 - 1e-12])
@pytest.mark.parametrize("option", ["init_keep_prob", "init_mean"])
def test_extreme_starts_have_finite_log_odds_that_still_learn(option, start):
    gate = Gate(3, **{option: start})
    assert bool(torch.isfinite(gate.log_alpha).all())
    gate.expected_l0().backward()
    assert bool(torch.isfinite(gate.log_alpha.grad).all())


@pytest.mark.parametrize(
    ("granularity", "gates"), [("input", 5), ("output", 7), ("weight", 35), ((7, 1), 5), ((1, 5), 7)], ids=str
)
def test_a_structured_penalty_counts_parameters_or_gates_as_asked(granularity, gates):
    model = nn.Linear(5, 7)
    sparsify(model, GateSpec(granularity=granularity, init_keep_prob=0.5))
    assert penalty(model, l0=1.0).item() == pytest.approx(gates / 2, rel=1e-5)
    assert penalty(model, params=1.0).item() == pytest.approx(35 / 2, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_penalty_of_a_gpu_model_lies_on_the_gpu():
    moved, gated_there = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)).cuda()
    x = torch.randn(2, 4)
    sparsify(moved, "weight", example_inputs=(x,))
    moved.append(Gate(3)).cuda()
    sparsify(gated_there, "output", example_inputs=(x.cuda(),))
    for model, macs in ((moved, {}), (gated_there, {"macs": 1.0})):
        value = penalty(model, l0=1.0, l2=1.0, expected_l2=1.0, params=1.0, l0l2=(1.0, 1.0), **macs)
        assert value.device.type == "cuda"
        (value + model[0](x.cuda()).sum()).backward()
        assert all(gate.log_alpha.grad.is_cuda for _, gate in iter_gates(model))
        torch.optim.Adam(param_groups(model, lr=0.1, gate_lr=0.1), fused=True).step()
    assert torch.equal(prune(gated_there).eval()(x.cuda()), gated_there.eval()(x.cuda()))
