"""``SparseL0Linear`` beside ``Gate`` and ``L0Regressor``."""

import itertools

import l0
import numpy as np
import paper
import pytest
import scipy.sparse as sp
import torch

from l0hooks import Gate, penalty
from l0hooks.sklearn import L0Regressor

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch, of their tensors


def data(n=150, p=8, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) * (rng.random((n, p)) < 0.6)
    y = 3 * x[:, 1] - 2 * x[:, 4] + 0.7 * x[:, 6] + 1.5 + 0.3 * rng.normal(size=n)
    return x, y


def trained(x, y, price, epochs=250):
    torch.manual_seed(0)
    model = l0.SparseL0Linear(x.shape[1], seed=0, init_keep_prob=0.9)
    return model.fit(sp.csr_matrix(x), y, lambda_reg=price, lr=0.05, epochs=epochs)


def squared(x, y, coef, intercept):
    return float(np.square(y - x @ coef - intercept).mean())


def exact(x, y, price):
    """min over all subsets of mean squared error + price·k, by all of them."""
    best = (np.inf, ())
    for k in range(x.shape[1] + 1):
        for subset in itertools.combinations(range(x.shape[1]), k):
            design = np.column_stack([np.ones(len(y)), x[:, subset]])
            residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
            best = min(best, (float(residual @ residual) / len(y) + price * k, subset))
    return best


def test_a_gate_on_coefficients_predicts_what_it_predicted():
    x, y = data()
    theirs = trained(x, y, 0.1, epochs=30)
    gate = Gate(8, temperature=theirs.beta).eval()
    with torch.no_grad():
        gate.log_alpha.copy_(theirs.log_alpha)
    ours = torch.from_numpy(x).float() @ (theirs.weight * gate()) + theirs.bias
    torch.testing.assert_close(ours.detach(), theirs.predict(sp.csr_matrix(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gate(), theirs.get_deterministic_gates(), rtol=0, atol=1e-6)
    assert penalty(gate, l0=1.0).item() == pytest.approx(theirs.get_l0_penalty().item(), rel=1e-6)
    expected = paper.keep_prob(gate.log_alpha.detach().double().numpy()).sum()
    assert penalty(gate, l0=1.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("price", [0.02, 0.3, 3.0])
def test_half_their_price_has_the_same_optimum_and_ours_finds_it(price):
    """Theirs is mean squared error + λ‖β‖₀, ours half of that."""
    x, y = data()
    best, subset = exact(x, y, price)
    ours = L0Regressor(l0=price / 2).fit(x, y)
    assert tuple(np.flatnonzero(ours.support_)) == subset
    assert squared(x, y, ours.coef_, ours.intercept_) + price * ours.k_ == pytest.approx(best, rel=1e-9)
    theirs = trained(x, y, price)
    gates = theirs.get_deterministic_gates().detach().double().numpy()
    coef = theirs.weight.detach().double().numpy() * gates
    assert squared(x, y, coef, theirs.bias.item()) + price * (gates > 0).sum() >= best


def test_at_as_many_features_as_theirs_the_loss_is_no_larger():
    x, y = data()
    theirs = trained(x, y, 0.05)
    gates = theirs.get_deterministic_gates().detach().double().numpy()
    k = int((gates > 0).sum())
    assert 1 <= k <= 8
    ours = L0Regressor(k=k).fit(sp.csr_matrix(x), y)
    coef = theirs.weight.detach().double().numpy() * gates
    assert ours.k_ == k
    assert squared(x, y, ours.coef_, ours.intercept_) <= squared(x, y, coef, theirs.bias.item())


def test_coefficients_are_least_squares_on_the_support_in_float64():
    x, y = data()
    model = L0Regressor(k=3).fit(sp.csr_array(x), y)
    design = np.column_stack([x[:, model.support_], np.ones(len(y))])
    np.testing.assert_allclose(
        [*model.coef_[model.support_], model.intercept_], np.linalg.lstsq(design, y, rcond=None)[0], rtol=1e-9
    )


def test_without_an_intercept():
    x, y = data()
    torch.manual_seed(0)
    theirs = l0.SparseL0Linear(8, fit_intercept=False, seed=0).fit(sp.csr_matrix(x), y, epochs=2)
    assert theirs.bias is None
    assert L0Regressor(k=3, fit_intercept=False).fit(x, y).intercept_ == 0
