"""Sample and feature gates: the laws of gates over items, and what each adds to them."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from item_gate_laws import AllGatedLaws, finish, scattered

from l0hooks import FeatureGate, HybridGate, SampleGate, penalty, set_temperature
from l0hooks.errors import InvalidValueError


class TestSampleGate(AllGatedLaws):
    axis = 0

    def make(self, n, k, **options):
        return SampleGate(n, k, **options)


class TestFeatureGate(AllGatedLaws):
    axis = -1

    def make(self, n, k, **options):
        return FeatureGate(n, k, **options)


def test_a_schedule_that_starts_below_k_selects_k():
    gate, wanted = scattered(SampleGate(20, 15, steps=5, init_keep_prob=0.1, automatic=False))
    weights = gate.select_weighted(torch.zeros(20), torch.ones(20))[1]
    assert gate.select(np.arange(20))[1].tolist() == wanted
    assert bool((weights > 0).all())
    assert len(weights) == 15


def test_each_class_has_its_own_axis():
    x = torch.ones(3, 5)
    assert torch.equal(SampleGate(3, 1).eval()(x)[:, 0] > 0, SampleGate(3, 1).gate.support())
    assert torch.equal(FeatureGate(5, 1).eval()(x)[0] > 0, FeatureGate(5, 1).gate.support())
    assert HybridGate(3, 2)(x).shape == (3, 5)
    assert SampleGate(4, 2, noise="example")(torch.ones(5, 4, 2), dim=1).shape == (5, 4, 2)


def test_a_model_with_a_feature_gate_has_a_penalty_and_a_temperature():
    model = torch.nn.Sequential(FeatureGate(8, 2, init_keep_prob=0.5), torch.nn.Linear(8, 1))
    value = penalty(model, l0=1.0)
    assert value.item() == pytest.approx(4.0, rel=1e-5)
    value.backward()
    assert bool((model[0].gate.log_alpha.grad > 0).all())
    set_temperature(model, 0.3)
    assert model[0].gate.temperature == 0.3


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
def test_weights_are_those_of_evaluation_and_keep_their_total_when_asked(finished, preserve):
    gate, wanted = scattered(SampleGate(8, 3, steps=2, automatic=False, init_keep_prob=0.6))
    if finished:
        finish(gate)
    w = torch.linspace(1, 4, 8, dtype=torch.float64)
    gated = (gate.gate.final() if finished else gate.gate.value(support=gate.chosen())).detach().double() * w
    expected = gated[wanted] * (w.sum() / gated[wanted].sum() if preserve else 1)
    x = np.arange(8)
    for weights in (w, w.numpy(), pd.Series(w.numpy(), index=list("abcdefgh"))):
        selected, got, indices = gate.select_weighted(x, weights, preserve_total=preserve)
        assert type(got) is type(weights)
        assert selected.tolist() == indices.tolist() == wanted
        np.testing.assert_allclose(np.asarray(got), expected.numpy(), rtol=1e-6)
    assert list(got.index) == [list("abcdefgh")[i] for i in wanted]
    if finished:
        assert torch.equal(gate.eval().weights(w)[wanted], gate.select_weighted(w, w)[1])
    if preserve:
        assert got.sum() == pytest.approx(float(w.sum()), rel=1e-12)


def test_weights_that_do_not_fit():
    gate = SampleGate(4, 2)
    with torch.no_grad():
        gate.gate.log_alpha -= torch.arange(4)
    x = np.zeros(4)
    for w in (np.ones(3), np.ones((4, 1)), sp.csr_array(np.ones((4, 1)))):
        with pytest.raises(InvalidValueError, match="weight"):
            gate.select_weighted(x, w)
    for w in (np.zeros(4), np.array([0.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, -3.0, -3.0]), np.full(4, np.nan)):
        with pytest.raises(InvalidValueError, match="positive factor"):
            gate.select_weighted(x, w, preserve_total=True)
    assert gate.select_weighted(x, np.array([0.0, 0.0, 1.0, 1.0]))[1].tolist() == [0, 0]
    assert gate.select_weighted(x, np.array([2, 2, 1, 1]), preserve_total=True)[1].tolist() == [3, 3]


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_in_and_out():
    frame = pd.DataFrame(np.zeros((2, 4)), columns=["a", "b", "c", "d"])
    named, plain = FeatureGate(4, 2, feature_names=frame.columns), FeatureGate(4, 2)
    for gate in (named, plain):
        with torch.no_grad():
            gate.gate.log_alpha[[1, 3]] += 1
        assert list(gate.select(frame)[0].columns) == gate.feature_names_out(frame.columns) == ["b", "d"]
    assert named.feature_names_out() == ["b", "d"]
    assert plain.feature_names_out() == ["x1", "x3"]
    with pytest.raises(InvalidValueError, match=r"columns must be those(.|\n)*got: \['d', 'c', 'b', 'a'\]"):
        named.select(frame[["d", "c", "b", "a"]])
    with pytest.raises(InvalidValueError, match="columns must be those"):
        named.feature_names_out(["a", "b", "c", "e"])
    with pytest.raises(InvalidValueError, match=r"must have a name(.|\n)*expected: 4(.|\n)*got: 3"):
        plain.feature_names_out(["a", "b", "c"])
    with pytest.raises(InvalidValueError, match="must have a name"):
        FeatureGate(4, 2, feature_names=["a"])
