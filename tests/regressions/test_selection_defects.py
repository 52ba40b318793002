"""One test for each known defect of earlier libraries' gates over samples and features (DESIGN.md §9)."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from l0hooks import FeatureGate, HybridGate, SampleGate, penalty, set_temperature

# which of untrained gates stay is not asked here
pytestmark = pytest.mark.filterwarnings("ignore:.*gates with equal log_alpha")


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("trained", [False, True])
def test_a_sample_gate_asked_for_a_thousand_selects_a_thousand_in_either_mode(mode, trained):
    gate = SampleGate(20_000, 1000, steps=3)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(3 * trained):
        gate.weights(torch.randn(20_000)).sum().backward()
        optimizer.step()
    x = torch.arange(20_000)
    first, again = gate.train(mode).select(x)[1], gate.select(x)[1]
    assert len(first) == 1000
    assert torch.equal(first, again)


def test_as_many_as_there_are_divides_nothing_by_zero():
    for gate in (SampleGate(5, 5), FeatureGate(5, 5), HybridGate(5, 5, 1.0, 0.0), HybridGate(5, 5)):
        assert len(gate.select(torch.eye(5))[1]) == 5
        assert torch.isfinite(gate.gate.log_alpha).all()
        assert torch.isfinite(penalty(gate, l0=1.0))


def test_the_penalty_of_a_model_that_holds_a_feature_gate_is_not_zero():
    model = nn.Sequential(FeatureGate(20, 4, init_keep_prob=0.5), nn.Linear(20, 1))
    assert penalty(model, l0=1.0).item() == pytest.approx(10, rel=1e-5)


@pytest.mark.parametrize("k", range(1, 30))
def test_a_hybrid_rounds_no_item_away(k):
    """Truncating both shares of 7 at a quarter and three quarters gives 1 + 5."""
    gate = HybridGate(40, k, 0.75, 0.25)
    _, indices, origin = gate.select(np.arange(40))
    assert len(set(indices.tolist())) == k
    assert (origin == "gated").sum() == int(0.75 * k + 0.5)


def test_a_hybrid_does_not_seed_the_global_generator():
    state = torch.get_rng_state()
    HybridGate(10, 4).select(np.arange(10), generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_weighted_selection_does_not_sample_in_training_mode():
    gate = SampleGate(50, 10)
    x = np.arange(50.0)
    first, again = gate.select_weighted(x, x), gate.select_weighted(x, x)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert len(first[1]) == 10


def test_sparse_arrays_are_accepted_and_the_second_one_is_not_taken_for_the_first():
    gate = SampleGate(4, 2)
    for x in (np.diag([1.0, 2, 3, 4]), np.diag([5.0, 6, 7, 8])):
        for make in (sp.csr_array, sp.csr_matrix):
            assert np.array_equal(gate.select(make(x))[0].toarray(), x[:2])


def test_temperatures_reach_gates_over_items():
    model = nn.ModuleList([SampleGate(4, 2), FeatureGate(4, 4), HybridGate(4, 2)])
    set_temperature(model, 0.25)
    assert {gate.gate.temperature for gate in model} == {0.25}
