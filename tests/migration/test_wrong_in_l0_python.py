"""What is wrong in l0-python 0.6.2's layers, gates and penalties, seen there, and right here.

Every test stands in a table of docs/migration.md; test_tables.py sees to it.
"""

import l0
import numpy as np
import paper
import pytest
import scipy.sparse as sp
import torch
from counterparts import pair, trained
from torch import nn

import l0hooks
from l0hooks import FeatureGate, Gate, GateSpec, HybridGate, SampleGate, penalty, prune, set_temperature, sparsify
from l0hooks.errors import L0HooksError
from l0hooks.sklearn import L0Regressor

ONCE = "ignore:Sparse invariant checks:UserWarning"  # torch says so once a process, of l0-python's sparse tensors

# which of untrained gates stay is not asked here
pytestmark = pytest.mark.filterwarnings("ignore:.*gates with equal log_alpha")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_start_asked_for_is_not_the_start_given(p):
    theirs = l0.HardConcrete(1, temperature=2 / 3, init_mean=p)
    log_alpha = theirs.qz_logits.detach().double().numpy()
    assert paper.keep_prob(log_alpha)[0] > p + 0.05  # neither the keep probability
    if p != 0.5:  # at one half the mean is right by symmetry
        assert abs(paper.mean(log_alpha)[0] - p) > 0.015  # nor the mean
    by_keep_prob, by_mean = Gate(1, init_keep_prob=p), Gate(1, init_mean=p)
    assert paper.keep_prob(by_keep_prob.log_alpha.detach().double().numpy())[0] == pytest.approx(p, abs=1e-6)
    assert paper.mean(by_mean.log_alpha.detach().double().numpy())[0] == pytest.approx(p, abs=1e-5)


def test_a_dense_start_divides_by_zero():
    with pytest.raises(ZeroDivisionError):
        l0.L0Linear(4, 4, init_sparsity=0.0)
    with pytest.raises(L0HooksError, match="strictly between 0 and 1"):
        GateSpec(init_keep_prob=1.0)
    layer = nn.Linear(4, 4)
    sparsify(layer, GateSpec(init_mean=0.999))
    assert bool((layer.eval().weight != 0).all())


def test_a_sample_gate_asked_for_a_thousand_selects_none():
    assert len(l0.SampleGate(20_000, 1000).eval().get_active_indices()) == 0
    assert len(SampleGate(20_000, 1000).select(torch.arange(20_000))[1]) == 1000


def test_all_samples_divide_by_zero():
    with pytest.raises(ZeroDivisionError):
        l0.SampleGate(10, 10)
    assert len(SampleGate(10, 10).select(torch.arange(10))[1]) == 10


def test_a_maximum_of_features_is_not_one():
    theirs, ours = l0.FeatureGate(20, 5).eval(), FeatureGate(20, 5)
    with torch.no_grad():
        theirs.gates.qz_logits.fill_(2.0)  # as training may leave them
        ours.gate.log_alpha.fill_(2.0)
    x = torch.randn(3, 20)
    assert theirs.select_features(x)[0].shape == (3, 20)
    assert ours.select(x)[0].shape == (3, 5)


def test_selecting_in_training_mode_is_a_lottery():
    theirs, ours = l0.SampleGate(200, 100), SampleGate(200, 100)
    x = torch.arange(200)
    assert theirs.training
    assert ours.training
    drawn = [theirs.select_samples(x)[1] for _ in range(2)]
    assert len(drawn[0]) != len(drawn[1]) or not torch.equal(*drawn)
    assert torch.equal(ours.select(x)[1], ours.select(x)[1])


def test_small_weights_are_not_selected():
    """Shares of a million households are below its threshold of 1e-8."""
    theirs, ours = l0.SampleGate(4, 2).eval(), SampleGate(4, 2)
    with torch.no_grad():
        theirs.gates.qz_logits.copy_(torch.tensor([5.0, -5.0, 5.0, -5.0]))
        ours.gate.log_alpha.copy_(theirs.gates.qz_logits)
    w = torch.full((4,), 1e-9)
    assert len(theirs.select_weighted_samples(torch.arange(4), w)[2]) == 0
    assert ours.select_weighted(torch.arange(4), w)[2].tolist() == [0, 2]


def test_a_hybrid_of_seven_has_six():
    theirs = l0.HybridGate(40, target_items=7)  # a quarter and three quarters
    assert theirs.n_l0 + theirs.n_random == 6
    ours = HybridGate(40, 7, gated_fraction=0.25, random_fraction=0.75)
    assert ours.n_gated + ours.n_random == len(ours.select(torch.arange(40))[1]) == 7


def test_a_hybrids_seed_is_everybodys():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    l0.HybridGate(40, target_items=8).eval().select(torch.arange(40), random_seed=7)
    assert not torch.equal(torch.rand(1), expected)
    torch.manual_seed(1)
    HybridGate(40, 8).select(torch.arange(40), generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.rand(1), expected)


def test_the_penalty_of_a_model_with_a_feature_gate_is_zero():
    old = nn.ModuleList([l0.FeatureGate(20, 10), nn.Linear(20, 1)])
    new = nn.ModuleList([FeatureGate(20, 10, init_keep_prob=0.5), nn.Linear(20, 1)])
    assert l0.compute_l0_penalty(old).item() == 0
    assert l0.get_sparsity_stats(old) == {}
    assert penalty(new, l0=1.0).item() == pytest.approx(10, rel=1e-5)
    assert l0hooks.summary(new).gates == 20


def test_l2_counts_the_gates_logits_as_weights():
    """And its gradient draws them to zero: open gates towards closed, closed ones towards open."""
    old, new = l0.L0Linear(3, 3), nn.Linear(3, 3)
    sparsify(new, "weight")
    with torch.no_grad():
        old.weight.fill_(0.5)
        old.weight_gates.qz_logits.fill_(4.0)
        new.parametrizations.weight.original.fill_(0.5)
        new.parametrizations.weight[0].gate.log_alpha.fill_(4.0)
    theirs, ours = l0.compute_l2_penalty(old), penalty(new, l2=1.0)
    assert ours.item() == 9 * 0.25
    assert theirs.item() == 9 * 0.25 + 9 * 16
    theirs.backward()
    ours.backward()
    assert bool((old.weight_gates.qz_logits.grad == 8).all())
    gate = new.parametrizations.weight[0].gate
    assert gate.log_alpha.grad is None or not bool(gate.log_alpha.grad.any())


def test_l2_of_a_layer_is_zero_unless_switched_on():
    old, new = l0.L0Linear(3, 3), nn.Linear(3, 3)
    sparsify(new, "weight")
    assert float(old.weight.detach().square().sum()) > 0
    assert old.get_l2_penalty().item() == 0
    assert penalty(new, l2=1.0).item() > 0


def test_channels_are_counted_as_parameters():
    old, new, _ = pair("channels", 0.5)
    kept = int(old.channel_gates.get_active_prob().sum())
    assert l0.get_active_parameter_count(old) == kept <= 4
    (stats,) = l0.get_sparsity_stats(old).values()
    assert stats["total_params"] == 4 * 27
    assert stats["active_params"] <= 4
    counted = int((new.eval().weight != 0).sum())
    assert l0hooks.summary(new).parameters_kept == counted
    assert counted % 27 == 0
    assert counted > 4


def test_the_active_parameters_are_an_expectation_rounded_down():
    """Three layers that keep every weight, at 0.99 each, have lost three."""
    old = nn.Sequential(*[l0.L0Linear(2, 2, init_sparsity=0.01, temperature=0.5) for _ in range(3)]).eval()
    new = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    sparsify(new, GateSpec(init_keep_prob=0.99))
    assert sum(int((layer.weight * layer.weight_gates() != 0).sum()) for layer in old) == 12
    assert l0.get_active_parameter_count(old) == 9
    assert l0hooks.summary(new).parameters_kept == sum(int((m.weight != 0).sum()) for m in new.eval()) == 12


def test_pruning_keeps_weights_that_evaluation_has_closed():
    old, new = l0.L0Linear(10, 10), nn.Linear(10, 10)
    sparsify(new, GateSpec(temperature=0.5))
    with torch.no_grad():
        old.weight_gates.qz_logits.fill_(-2.0)  # P(z ≠ 0) = 0.31: closed in evaluation, above the threshold of 0.05
        new.parametrizations.weight[0].gate.log_alpha.fill_(-2.0)
    assert not bool(old.eval().weight_gates().any())
    assert int((l0.prune_model(old).weight != 0).sum()) == 100
    assert int((prune(new).weight != 0).sum()) == 0


def test_a_pruned_model_is_still_a_gated_one():
    old, new, x = pair("linear", 0.5)
    pruned = l0.prune_model(old).train()
    assert not torch.equal(pruned(x), pruned(x))
    plain = prune(new).train()
    assert torch.equal(plain(x), plain(x))
    assert type(plain) is nn.Linear


def test_pruning_a_depthwise_layer_fails():
    old, new, x = pair("depthwise", 0.5)
    expected = old(x)
    with pytest.raises(AttributeError, match="weight"):
        l0.prune_model(old)
    torch.testing.assert_close(prune(new).eval()(x), expected, rtol=0, atol=1e-6)


def test_temperatures_pass_by_linear_models_and_calibrations():
    old = nn.ModuleList([l0.L0Linear(2, 2), l0.SparseL0Linear(2), l0.SparseCalibrationWeights(2)])
    l0.update_temperatures(old, 0.3)
    assert [old[0].weight_gates.temperature, old[1].beta, old[2].beta] == [0.3, 2 / 3, 2 / 3]
    new = nn.ModuleList([nn.Linear(2, 2), Gate(2), SampleGate(2, 1)])
    sparsify(new, {"0": "weight"})
    set_temperature(new, 0.3)
    assert [gate.temperature for _, gate in l0hooks.iter_gates(new)] == [0.3] * 3


def test_a_checkpoint_forgets_the_temperature():
    old = trained(l0.L0Linear(6, 4))
    l0.update_temperatures(old, 2.0)
    again = l0.L0Linear(6, 4)
    again.load_state_dict(old.state_dict())
    x = torch.randn(3, 6)
    assert not torch.allclose(again.eval()(x), old.eval()(x), atol=1e-3)
    new, anew = nn.Linear(6, 4), nn.Linear(6, 4)
    for model in (new, anew):
        sparsify(model, "weight")
    set_temperature(new, 2.0)
    anew.load_state_dict(new.state_dict())
    assert torch.equal(anew.eval()(x), new.eval()(x))


def test_gates_beyond_a_bound_never_come_back():
    """Clamped in the forward they have no gradient; here they are brought back after the step."""
    old, new = l0.HardConcrete(1), Gate(1)
    with torch.no_grad():
        old.qz_logits.fill_(20.5)
        new.log_alpha.fill_(20.5)
    for parameter, cost in ((old.qz_logits, old.get_penalty), (new.log_alpha, new.expected_l0)):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        for _ in range(2):
            optimizer.zero_grad()
            cost().backward()
            optimizer.step()
    assert old.qz_logits.item() == 20.5
    assert old.qz_logits.grad.item() == 0
    assert new.log_alpha.item() < 10
    assert new.log_alpha.grad.item() > 0


def test_gates_in_half_precision_stop_learning():
    """bfloat16 has eight bits: a step of 0.01 from 3.0 is lost, and so is every one after it."""
    old, new = l0.L0Linear(2, 2).bfloat16(), nn.Linear(2, 2).bfloat16()
    sparsify(new, "weight")
    for log_alpha in (old.weight_gates.qz_logits, new.parametrizations.weight[0].gate.log_alpha):
        with torch.no_grad():
            log_alpha.fill_(3.0)
        optimizer = torch.optim.SGD([log_alpha], lr=0.005)
        for _ in range(50):
            log_alpha.grad = torch.ones_like(log_alpha)
            optimizer.step()
    assert bool((old.weight_gates.qz_logits == 3.0).all())
    torch.testing.assert_close(new.parametrizations.weight[0].gate.log_alpha.detach(), torch.full((2, 2), 2.75))


def test_gates_in_half_precision_close_too_often():
    """At log α = 6 and β = ½ a gate is 0 with probability 0.00075; bfloat16 noise takes four times as many."""
    n, exact = 400_000, 1 - paper.keep_prob(6.0, 0.5)
    old, new = l0.HardConcrete(n), Gate(n, temperature=0.5)
    with torch.no_grad():
        old.qz_logits.fill_(6.0)
        new.log_alpha.fill_(6.0)
    spread = 4 * np.sqrt(exact / n)
    assert abs(float((old() == 0).float().mean()) - exact) < spread  # right in float32
    assert float((old.bfloat16()() == 0).float().mean()) > 2 * exact
    assert abs(float((new.bfloat16()() == 0).float().mean()) - exact) < spread


@pytest.mark.filterwarnings(ONCE)
def test_a_second_matrix_gets_the_first_ones_predictions():
    x = sp.csr_matrix(np.eye(4))
    old = l0.SparseL0Linear(4, seed=0)
    with torch.no_grad():
        old.weight.fill_(1.0)
    first = old.predict(x)
    torch.testing.assert_close(old.predict(2 * x), first)
    new = L0Regressor(k=4).fit(x, [1.0, 2.0, 3.0, 5.0])
    np.testing.assert_allclose(new.predict(2 * x) - new.intercept_, 2 * (new.predict(x) - new.intercept_), atol=1e-9)


@pytest.mark.filterwarnings(ONCE)
def test_sparse_arrays_cannot_be_predicted():
    x, y = sp.csr_array(np.eye(4)), np.array([1.0, 2.0, 3.0, 5.0])
    old = l0.SparseL0Linear(4, seed=0).fit(x, y, epochs=1)
    with pytest.raises(TypeError, match="csr_array"):
        old.predict(x)
    new = L0Regressor(k=2).fit(x, y)
    np.testing.assert_allclose(new.predict(x), new.predict(sp.csr_matrix(x)))


@pytest.mark.filterwarnings(ONCE)
def test_features_that_predict_are_not_selected():
    """Gates between 0 and its threshold of 0.01 multiply weights, but are not in the selection."""
    old = l0.SparseL0Linear(2)
    with torch.no_grad():
        old.log_alpha.copy_(torch.tensor([3.0, -1.582]))
        old.weight.copy_(torch.tensor([1.0, 1000.0]))
    assert old.get_selected_features().tolist() == [0]
    assert old.predict(sp.csr_matrix(np.array([[0.0, 1.0]]))).item() > 1
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    new = L0Regressor(k=2).fit(x, x[:, 0] + 1e-3 * x[:, 3])
    assert np.array_equal(new.coef_ != 0, new.support_)


@pytest.mark.filterwarnings(ONCE)
def test_a_seed_of_a_linear_model_does_not_seed_its_fit():
    rng = np.random.default_rng(0)
    x, y = sp.csr_matrix(rng.normal(size=(30, 5))), rng.normal(size=30)
    old = [l0.SparseL0Linear(5, seed=0).fit(x, y, epochs=3).weight for _ in range(2)]
    assert not torch.equal(*old)
    new = [L0Regressor("cv", random_state=0).fit(x, y).coef_ for _ in range(2)]
    assert np.array_equal(*new)


def test_a_tracker_answers_for_names_it_never_saw():
    old, new = l0.PenaltyTracker(), l0hooks.Tracker(Gate(2))
    assert old.get_history("los") == []
    assert "los" in old.history
    new.log(loss=1.0)
    with pytest.raises(KeyError):
        new.to_frame()["los"]


def test_a_tracker_cannot_write_what_was_not_logged_each_time(tmp_path):
    old, new = l0.PenaltyTracker(), l0hooks.Tracker(Gate(2))
    for step in range(3):
        old.log("loss", 1.0)
        new.log(loss=1.0, **({"accuracy": 0.5} if step == 2 else {}))
    old.log("accuracy", 0.5)
    with pytest.raises(ValueError, match="same length"):
        old.save_to_csv(str(tmp_path / "old.csv"))
    new.to_csv(tmp_path / "new.csv")
    assert (tmp_path / "new.csv").read_text().count("\n") == 4
