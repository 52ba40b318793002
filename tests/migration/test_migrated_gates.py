"""Standalone gates, selections, schedules and trackers of both libraries."""

import json

import l0
import numpy as np
import pandas as pd
import paper
import pytest
import torch

from l0hooks import FeatureGate, Gate, HybridGate, SampleGate, Tracker, penalty, schedules, set_temperature

SAME = {"rtol": 0, "atol": 1e-6}


def equal_gates(shape=(30,), temperature=0.5, stretch=0.1):
    theirs = l0.HardConcrete(*shape, temperature=temperature, stretch=stretch)
    ours = Gate(shape, temperature=temperature, gamma=-stretch, zeta=1 + stretch)
    with torch.no_grad():
        theirs.qz_logits.copy_(torch.linspace(-6, 6, theirs.qz_logits.numel()).view(shape))
        ours.log_alpha.copy_(theirs.qz_logits)
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("stretch", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2 / 3, 2.0])
@pytest.mark.parametrize("shape", [(30,), (5, 6)])
def test_the_module_is_a_gate(shape, temperature, stretch):
    theirs, ours = equal_gates(shape, temperature, stretch)
    torch.testing.assert_close(ours(), theirs(), **SAME)
    torch.testing.assert_close(ours.keep_prob(), theirs.get_active_prob(), **SAME)
    exact = paper.keep_prob(ours.log_alpha.detach().double().numpy(), temperature, -stretch, 1 + stretch)
    np.testing.assert_allclose(ours.keep_prob().detach().numpy(), exact, atol=1e-6)
    assert ours.expected_l0().item() == pytest.approx(theirs.get_penalty().item(), rel=1e-5)
    assert 1 - ours.keep_prob().mean().item() == pytest.approx(theirs.get_sparsity(), abs=1e-5)
    assert int(ours.support().sum()) == theirs.get_num_active() == int((theirs() > 0).sum())
    assert ours.log_alpha.shape == theirs.gate_size


def test_gates_are_shaped_for_images_by_hand():
    theirs, ours = equal_gates((3, 2))
    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(x * ours()[..., None, None], x * theirs(x.shape), **SAME)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_applying_gates_along_a_dimension(dim):
    theirs = l0.L0Gate(5).eval()
    ours = Gate(5, temperature=0.5).eval()
    with torch.no_grad():
        theirs.gates.qz_logits.uniform_(-4, 4)
        ours.log_alpha.copy_(theirs.gates.qz_logits)
    x = torch.randn(5, 5, 5)
    shape = [1, 1, 1]
    shape[dim] = 5
    torch.testing.assert_close(x * ours().view(shape), theirs.apply_gates(x, dim), **SAME)
    torch.testing.assert_close(ours(), theirs.get_gates(), **SAME)
    assert penalty(ours, l0=1.0).item() == pytest.approx(theirs.get_penalty().item(), rel=1e-6)


def chosen_by_both(theirs, ours, k, seed=0):
    """Their gate and ours with equal log-odds, of which k are so large that theirs selects them."""
    n = len(theirs.gates.qz_logits)
    values = torch.linspace(-6, -3, n - k).tolist() + torch.linspace(1, 6, k).tolist()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        theirs.gates.qz_logits.copy_(torch.tensor(values)[order])
        ours.gate.log_alpha.copy_(theirs.gates.qz_logits)
    set_temperature(ours, theirs.temperature)
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize(("n", "k"), [(10, 1), (50, 12), (50, 49)])
def test_samples_selected_are_theirs(n, k):
    theirs, ours = chosen_by_both(l0.SampleGate(n, k), SampleGate(n, k), k)
    x, w = torch.randn(n, 3), torch.rand(n) + 1
    for mine, other in zip(ours.select(x), theirs.select_samples(x), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(ours.select(x)[1], theirs.get_active_indices())
    for mine, other in zip(ours.select_weighted(x, w), theirs.select_weighted_samples(x, w), strict=True):
        torch.testing.assert_close(mine, other, **SAME)
    torch.testing.assert_close(x * ours.final()[:, None], theirs.apply_gates(x), **SAME)


@pytest.mark.parametrize(("n", "k"), [(10, 1), (20, 7), (20, 19)])
def test_features_selected_are_theirs(n, k):
    theirs, ours = chosen_by_both(l0.FeatureGate(n, k), FeatureGate(n, k), k)
    x, names = torch.randn(4, 3, n), [f"f{i}" for i in range(n)]
    for mine, other in zip(ours.select(x), theirs.select_features(x), strict=True):
        assert torch.equal(mine, other)
    selected, kept = theirs.select_features_with_names(x, names)
    assert torch.equal(ours.select(x)[0], selected)
    assert ours.feature_names_out(names) == kept
    torch.testing.assert_close(ours.importances(), theirs.get_feature_importance(), **SAME)
    torch.testing.assert_close(x * ours.final(), theirs.apply_gates(x, dim=-1), **SAME)


def test_a_hybrid_selection_has_their_gated_part_and_as_many_random_ones():
    theirs = l0.HybridGate(40, l0_fraction=0.25, random_fraction=0.75, target_items=16)
    ours = HybridGate(40, 16, gated_fraction=0.25, random_fraction=0.75)
    chosen_by_both(theirs.l0_gate, ours, 4)
    theirs.eval()
    x = torch.arange(40.0)
    selected, indices, kinds = theirs.select(x, random_seed=3)
    ours_selected, ours_indices, origins = ours.select(x, generator=torch.Generator().manual_seed(3))
    assert torch.equal(indices[torch.from_numpy(kinds == "l0")], ours_indices[torch.from_numpy(origins == "gated")])
    assert (len(indices), int((kinds == "random").sum())) == (len(ours_indices), int((origins == "random").sum()))
    assert torch.equal(selected, x[indices])
    assert torch.equal(ours_selected, x[ours_indices])
    assert (theirs.n_l0, theirs.n_random) == (ours.n_gated, ours.n_random) == (4, 12)


def test_random_items_of_a_hybrid_are_equally_likely_in_both():
    """Each of the 36 left is drawn with probability 12/36."""
    theirs = l0.HybridGate(40, l0_fraction=0.25, random_fraction=0.75, target_items=16)
    ours = HybridGate(40, 16, gated_fraction=0.25, random_fraction=0.75)
    chosen_by_both(theirs.l0_gate, ours, 4)
    theirs.eval()
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros((2, 40))
    for _ in range(300):
        counts[0, theirs.select(torch.arange(40))[1]] += 1
        counts[1, ours.select(torch.arange(40), generator=generator)[1]] += 1
    gated = counts[1] == 300
    assert gated.sum() == 4
    assert np.abs(counts[:, ~gated] / 300 - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 300)


@pytest.mark.parametrize("name", ["linear", "exponential", "cosine"])
@pytest.mark.parametrize(("start", "stop", "steps"), [(2.0, 0.1, 100), (0.9, 0.2, 7), (0.1, 1.0, 3)])
def test_temperatures_follow_their_schedules(name, start, stop, steps):
    theirs = l0.TemperatureScheduler(start, stop, steps, name)
    ours = {"linear": schedules.linear, "exponential": schedules.exponential, "cosine": schedules.cosine}[name]
    value = ours(start, stop, steps)
    for epoch in range(steps + 3):
        assert value(epoch) == pytest.approx(theirs.get_temperature(epoch), rel=1e-12)


def test_the_default_schedule_is_exponential_from_two_to_a_tenth():
    theirs, ours = l0.TemperatureScheduler(), schedules.exponential(2.0, 0.1, 100)
    assert [ours(n) for n in (0, 30, 100)] == pytest.approx([theirs.get_temperature(n) for n in (0, 30, 100)])


def test_histories_and_their_statistics(tmp_path):
    theirs, ours = l0.PenaltyTracker(), Tracker(Gate(4), unit="gates")
    for loss in (3.0, 1.0, 2.0):
        theirs.log("loss", loss)
        ours.log(loss=loss)
    frame = ours.to_frame()
    assert frame["loss"].tolist() == theirs.get_history("loss") == [row["loss"] for row in ours.rows]
    stats = theirs.get_stats("loss")
    found = frame["loss"].agg(["mean", "min", "max"]).to_dict()
    assert found == {name: stats[name] for name in found}
    assert frame["loss"].std(ddof=0) == pytest.approx(stats["std"])
    assert frame["loss"].iloc[-1] == stats["last"]
    theirs.save_to_csv(str(tmp_path / "theirs.csv"))
    ours.to_csv(tmp_path / "ours.csv")
    read = pd.read_csv(tmp_path / "ours.csv")
    assert read["loss"].tolist() == pd.read_csv(tmp_path / "theirs.csv")["loss"].tolist()
    assert read["penalty_l0"].tolist() == pytest.approx([penalty(ours.model, l0=1.0).item()] * 3)
    json.dumps(ours.state_dict())
    theirs.clear()
    assert theirs.get_stats("loss") == {}
    assert Tracker(Gate(4)).rows == []
