"""Layers and models of l0-python beside sparsified ones with the same weights and log-odds."""

import l0
import numpy as np
import pytest
import torch
from counterparts import LAYERS, MLP, SAME, from_l0_python, pair, trained
from torch import nn

import l0hooks
from l0hooks import GateSpec, iter_gates, prune, sparsify, summary


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2 / 3, 2.0])
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_computes_what_it_computed_there(case, temperature):
    old, new, x = pair(case, temperature)
    torch.testing.assert_close(new(x), old(x), **SAME)
    assert 0 < summary(new).sparsity < 1


@pytest.mark.parametrize("case", LAYERS)
def test_a_pruned_layer_too(case):
    old, new, x = pair(case, 0.5)
    torch.testing.assert_close(prune(new).eval()(x), old(x), **SAME)


@pytest.mark.parametrize("case", LAYERS)
def test_gradients_in_evaluation_are_theirs_where_gates_are_open(case):
    """Of closed gates too: both are clamped there."""
    old, new, x = pair(case, 0.5)
    new(x).square().sum().backward()
    old(x).square().sum().backward()
    (gate,) = (gate for _, gate in iter_gates(new))
    (logits,) = (p for name, p in old.named_parameters() if name.endswith("qz_logits"))
    torch.testing.assert_close(gate.log_alpha.grad.flatten(), logits.grad.flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS)
def test_sparsity_counts_are_those_of_the_layer(case):
    old, new, _ = pair(case, 0.5)
    report = summary(new)
    assert report.rows[0].expected_sparsity == pytest.approx(old.get_sparsity(), abs=1e-6)
    (gates,) = (m for m in old.modules() if isinstance(m, l0.HardConcrete))
    assert report.gates == gates.qz_logits.numel()
    kept = round((1 - report.rows[0].sparsity) * report.gates)
    assert kept == gates.get_num_active() == int((gates.eval()() > 0).sum())


@pytest.mark.parametrize("use_l2", [False, True])
def test_a_whole_network_computes_what_it_computed_there(use_l2, tmp_path):
    old = trained(l0.SparseMLP(12, 16, 3, temperature=0.5, use_l2=use_l2)).eval()
    torch.save(old.state_dict(), tmp_path / "old.pt")
    new = MLP(12, 16, 3)
    sparsify(new, GateSpec(temperature=0.5))
    new.load_state_dict(from_l0_python(torch.load(tmp_path / "old.pt", weights_only=True), new))
    x = torch.randn(7, 3, 4)
    torch.testing.assert_close(new.eval()(x), old(x), **SAME)
    torch.testing.assert_close(prune(new, example_inputs=(x,)).eval()(x), old(x), **SAME)


def test_a_model_of_several_kinds_is_converted_by_names():
    old = trained(
        nn.Sequential(
            l0.L0Conv2d(3, 4, 3, structured=True),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            l0.L0DepthwiseConv2d(4, 3),
            nn.Flatten(),
            l0.L0Linear(36, 2),
        )
    )
    old(torch.randn(8, 3, 7, 7))  # moves the statistics of the batch norm
    new = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(36, 2)
    )
    channels = GateSpec(granularity="output", temperature=0.5)
    sparsify(new, {"[03]": channels, "5": GateSpec(temperature=0.5)})
    new.load_state_dict(from_l0_python(old.state_dict(), new))
    x = torch.randn(5, 3, 7, 7)
    torch.testing.assert_close(new.eval()(x), old.eval()(x), **SAME)


def test_a_key_that_fits_nowhere_is_still_an_error():
    new = nn.Sequential(nn.Linear(3, 2))
    sparsify(new, "weight")
    state = {**l0.L0Linear(3, 2).state_dict(prefix="0."), "other.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other\.weight"):
        new.load_state_dict(from_l0_python(state, new))


def test_training_draws_the_same_gates_from_the_same_noise():
    """Their sample is the quantile function at their noise: the distribution is one."""
    theirs = l0.HardConcrete(50, temperature=0.4, stretch=0.2)
    with torch.no_grad():
        theirs.qz_logits.uniform_(-3, 3)
    torch.manual_seed(5)
    drawn = theirs.train()()
    torch.manual_seed(5)
    noise = torch.empty(50).uniform_(1e-6, 1 - 1e-6)
    ours = l0hooks.HardConcrete(theirs.qz_logits, 0.4, gamma=-0.2, zeta=1.2)
    torch.testing.assert_close(ours.icdf(noise), drawn, rtol=0, atol=2e-5)


def test_initial_weights_are_the_users_own_here():
    """Theirs are drawn anew by Kaiming's rule; nothing is drawn here."""
    layer = nn.Linear(20, 10)
    before = layer.weight.detach().clone()
    sparsify(layer, "weight")
    assert torch.equal(layer.parametrizations.weight.original, before)
    theirs = l0.L0Linear(2000, 10)
    assert theirs.weight.std().item() == pytest.approx(np.sqrt(2 / 10), rel=0.05)
