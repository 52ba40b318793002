"""Penalties and counts of both libraries, beside sums that know neither."""

import l0
import numpy as np
import paper
import pytest
import torch
from counterparts import LAYERS, MLP, from_l0_python, pair, trained
from torch import nn

from l0hooks import GateSpec, iter_gates, penalty, sparsify, summary


def both(**options):
    old = trained(l0.SparseMLP(5, 4, 3, temperature=0.5, **options))
    new = MLP(5, 4, 3)
    sparsify(new, GateSpec(temperature=0.5))
    new.load_state_dict(from_l0_python(old.state_dict(), new))
    return old, new


def log_odds(model):
    return np.concatenate([gate.log_alpha.detach().double().numpy().ravel() for _, gate in iter_gates(model)])


def squares(model):
    weights = (layer.parametrizations.weight.original.detach().double() for layer in (model.fc1, model.fc2, model.fc3))
    return sum(float(weight.square().sum()) for weight in weights)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2 / 3, 2.0])
@pytest.mark.parametrize("case", LAYERS)
def test_the_expected_l0_of_a_layer_is_theirs_and_the_truth(case, temperature):
    old, new, _ = pair(case, temperature)
    ours, theirs = penalty(new, l0=1.0), old.get_l0_penalty()
    assert ours.item() == pytest.approx(paper.keep_prob(log_odds(new), temperature).sum(), rel=1e-6)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)
    ours.backward()
    theirs.backward()
    (gate,) = (gate for _, gate in iter_gates(new))
    (logits,) = (p for name, p in old.named_parameters() if name.endswith("qz_logits"))
    torch.testing.assert_close(gate.log_alpha.grad.flatten(), logits.grad.flatten(), rtol=1e-5, atol=1e-7)


def test_the_expected_l0_of_a_network_is_theirs():
    old, new = both()
    expected = paper.keep_prob(log_odds(new), 0.5).sum()
    assert penalty(new, l0=1.0).item() == pytest.approx(expected, rel=1e-6)
    assert l0.compute_l0_penalty(old).item() == pytest.approx(expected, rel=1e-6)
    assert old.get_l0_loss().item() == pytest.approx(expected, rel=1e-6)


def test_the_expected_l0_is_what_sampling_finds():
    _, new = both()
    u = np.random.default_rng(0).uniform(size=(20_000, len(log_odds(new))))
    counts = (paper.gate_at(u, log_odds(new), 0.5) > 0).sum(1)
    assert abs(penalty(new, l0=1.0).item() - counts.mean()) < 4 * counts.std() / np.sqrt(len(u))


def test_the_l2_of_the_layers_is_theirs_where_it_is_switched_on():
    old, new = both(use_l2=True)
    assert penalty(new, l2=1.0).item() == pytest.approx(squares(new), rel=1e-6)
    assert old.get_l2_loss().item() == pytest.approx(squares(new), rel=1e-6)
    assert old.fc1.get_l2_penalty().item() == pytest.approx(penalty(new, l2={"fc1": 1.0}).item(), rel=1e-6)
    without, _ = both(use_l2=False)
    assert without.get_l2_loss().item() == 0


def test_l0l2_is_theirs_without_the_gates_logits():
    old, new = both()
    ours = penalty(new, l0=1e-3, l2=1e-4).item()
    assert ours == pytest.approx(1e-3 * paper.keep_prob(log_odds(new), 0.5).sum() + 1e-4 * squares(new), rel=1e-6)
    excess = l0.compute_l0l2_penalty(old, l0_lambda=1e-3, l2_lambda=1e-4).item() - ours
    assert excess == pytest.approx(1e-4 * np.square(log_odds(new)).sum(), rel=1e-4)


def test_one_strength_for_each_layer():
    old, new = both()
    theirs = 3 * old.fc1.get_l0_penalty() + old.fc3.get_l0_penalty()
    assert penalty(new, l0={"fc1": 3.0, "fc3": 1.0}).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_statistics_by_layer_are_theirs():
    old, new = both()
    rows = {row.name: row for row in summary(new).rows}
    theirs = l0.get_sparsity_stats(old)
    assert set(rows) == set(theirs) == set(old.get_sparsity_stats())
    for name, row in rows.items():
        assert row.expected_sparsity == pytest.approx(theirs[name]["sparsity"], abs=1e-6)
        assert row.parameters == theirs[name]["total_params"]
        expected = (1 - row.expected_sparsity) * row.gates
        assert expected == pytest.approx(theirs[name]["active_params"], rel=1e-5)
        assert old.get_sparsity_stats()[name]["active_params"] == theirs[name]["active_params"]


def test_the_penalty_can_be_asked_for_in_parameters():
    """Structured gates: theirs counts channels, and so does ``l0``; ``params`` counts what lies behind them."""
    old, new, _ = pair("channels", 0.5)
    assert penalty(new, l0=1.0).item() == pytest.approx(old.get_l0_penalty().item(), rel=1e-6)
    assert penalty(new, params=1.0).item() == pytest.approx(27 * old.get_l0_penalty().item(), rel=1e-6)


def test_a_step_of_the_optimiser_moves_weights_as_there():
    """One step on the penalty alone: L0 moves the log-odds, L2 the weights."""
    old, new = both(use_l2=True)
    for model, value in ((old, old.get_l0_loss() + 0.1 * old.get_l2_loss()), (new, penalty(new, l0=1.0, l2=0.1))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        value.backward()
        optimizer.step()
    for name, module in new.named_children():
        there = old.get_submodule(name)
        torch.testing.assert_close(module.parametrizations.weight.original, there.weight)
        torch.testing.assert_close(module.parametrizations.weight[0].gate.log_alpha, there.weight_gates.qz_logits)


def test_a_model_without_gates_costs_nothing_there_and_is_an_error_here():
    assert l0.compute_l0_penalty(nn.Linear(2, 2)).item() == 0
    with pytest.raises(RuntimeError, match="the model must hold gates"):
        penalty(nn.Linear(2, 2), l0=1.0)
