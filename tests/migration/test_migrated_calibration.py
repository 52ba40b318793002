"""``SparseCalibrationWeights`` beside ``Calibrator`` and a bare gate."""

import itertools

import l0
import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import nnls

from l0hooks import Gate, penalty
from l0hooks.calibration import Calibrator
from l0hooks.calibration.numerics.preparation import ErrorOptions, prepare

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch, of their tensors


def survey(targets=12, households=300, seed=0):
    rng = np.random.default_rng(seed)
    matrix = sparse.csr_matrix(sparse.random_array((targets, households), density=0.4, rng=rng))
    return matrix, matrix @ rng.lognormal(2, 0.5, households)


def trained(matrix, y, price, *, seed=0, epochs=150, **options):
    torch.manual_seed(seed)
    start = float(y.sum() / matrix.sum())
    model = l0.SparseCalibrationWeights(matrix.shape[1], init_keep_prob=0.5, init_weights=start, seed=seed)
    return model.fit(matrix, y, lambda_l0=price, lr=0.1, epochs=epochs, loss_type="relative", **options)


def numbers(model):
    return model.get_weights(deterministic=True).detach().double().numpy()


def relative_loss(matrix, y, weights, counts=1.0):
    """Σ c·((y − ŷ)/(y + 1))², as it is written there; y > 0 here."""
    return float((counts * np.square((y - matrix @ weights) / (y + 1))).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_at_as_many_households_as_theirs_the_loss_is_no_larger(seed):
    matrix, y = survey(seed=seed)
    theirs = numbers(trained(matrix, y, 1e-3, seed=seed))
    k = int((theirs > 0).sum())
    assert 0 < k < 300
    ours = Calibrator(k, progress=False).fit(matrix, y)
    assert ours.active == k
    assert relative_loss(matrix, y, ours.weights) <= relative_loss(matrix, y, theirs)


def test_at_a_price_theirs_is_no_cheaper():
    """The objective there, data loss + λ·households, at what both end with."""
    matrix, y = survey(targets=30)
    price = 1e-4
    theirs = numbers(trained(matrix, y, price))
    ours = Calibrator(l0=price, progress=False).fit(matrix, y)
    cost = {
        name: relative_loss(matrix, y, weights) + price * (weights > 0).sum()
        for name, weights in {"theirs": theirs, "ours": ours.weights}.items()
    }
    assert 0 < ours.active < 300
    assert cost["ours"] <= cost["theirs"]


def test_the_cheapest_of_a_path_is_close_to_the_cheapest_of_all():
    """By all subsets of ten households; their objective, where their descent ends at twice that and more."""
    rng = np.random.default_rng(0)
    matrix, price = rng.random((5, 10)), 0.01
    y = matrix @ rng.lognormal(2, 0.5, 10)
    scale = 1 / (y + 1)
    subsets = [s for k in range(1, 11) for s in itertools.combinations(range(10), k)]
    best = min(nnls(matrix[:, s] * scale[:, None], y * scale)[1] ** 2 + price * len(s) for s in subsets)

    def cost(weights):
        return relative_loss(matrix, y, weights) + price * (weights > 0).sum()

    path = Calibrator(progress=False).fit_path(matrix, y, ks=range(1, 6))
    assert min(cost(result.weights) for result in path.values()) < 1.1 * best
    assert best < cost(numbers(trained(sparse.csr_matrix(matrix), y, price))) / 2


def test_no_gates_is_plain_calibration():
    matrix, y = survey()
    model = l0.SparseCalibrationWeights(300, use_gates=False, init_weights=5.0)
    assert bool((model.get_weights() > 0).all())
    ours = Calibrator(progress=False).fit(matrix, y, design_weights=np.full(300, 5.0))
    assert ours.active == 300
    assert ours.error < 1e-6


GROUPS = np.array([7, 7, 7, 7, 7, 7, 2, 2, 2, 5, 5, 9])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("multipliers", [None, {2: 3.0, 9: 0.5}])
def test_groups_count_as_there(normalize, multipliers):
    """The loss at any weights is half of theirs over the mean count of a target."""
    matrix, y = survey()
    sizes = {label: int((GROUPS == label).sum()) for label in GROUPS.tolist()}
    counts = np.array([1 / sizes[g] if normalize else 1.0 for g in GROUPS.tolist()])
    counts *= [(multipliers or {}).get(g, 1.0) for g in GROUPS.tolist()]
    weights = np.random.default_rng(1).random(300)
    inputs = (
        Calibrator(
            20, groups=GROUPS, group_multipliers=multipliers, normalize_groups=normalize, max_epochs=2, progress=False
        )
        .fit(matrix, y)
        .inputs
    )
    problem = prepare(inputs.matrix, inputs.lower, errors=ErrorOptions(importance=inputs.importance), dtype="float64")
    ours = 0.5 * float(np.square(problem.scale * (matrix @ weights - y)).sum())
    assert ours == pytest.approx(relative_loss(matrix, y, weights, counts) / counts.mean() / 2, rel=1e-9)


def test_the_squared_loss_is_theirs_but_for_a_constant():
    matrix, y = survey()
    weights = np.random.default_rng(1).random(300)
    problem = prepare(matrix, y, errors=ErrorOptions("squared"), dtype="float64")
    ours = 0.5 * float(np.square(problem.scale * (matrix @ weights - y)).sum())
    theirs = float(np.square(matrix @ weights - y).sum())
    assert ours == pytest.approx(theirs / 2 / np.square((y + 1).mean()), rel=1e-9)


def test_a_bare_gate_has_their_weights_estimates_and_penalty():
    matrix, y = survey()
    theirs = trained(matrix, y, 1e-3, epochs=50)
    gate = Gate(300, temperature=theirs.beta, gamma=theirs.gamma, zeta=theirs.zeta).eval()
    with torch.no_grad():
        gate.log_alpha.copy_(theirs.log_alpha)
    weights = theirs.log_weight.exp() * gate()
    torch.testing.assert_close(weights, theirs.get_weights(deterministic=True), rtol=1e-6, atol=1e-6)
    dense = torch.from_numpy(matrix.toarray()).float()
    torch.testing.assert_close((dense @ weights).detach(), theirs.predict(matrix), rtol=1e-5, atol=1e-4)
    assert penalty(gate, l0=1.0).item() == pytest.approx(theirs.get_l0_penalty().item(), rel=1e-6)
    assert 1 - gate.support().float().mean().item() == pytest.approx(theirs.get_sparsity(), abs=1e-6)
    active = theirs.get_active_weights()
    assert torch.equal(torch.where(gate.support())[0], active["indices"])
    assert int(gate.support().sum()) == active["count"]
    torch.testing.assert_close(weights[gate.support()], active["values"])
    squares = theirs.log_weight.exp().square().sum()
    torch.testing.assert_close(theirs.get_l2_penalty(), squares)


def test_the_estimates_of_a_result_are_a_float64_product():
    matrix, y = survey()
    calibrator = Calibrator(40, max_epochs=20, progress=False)
    result = calibrator.fit(matrix, y)
    np.testing.assert_allclose(result.estimates, matrix.toarray() @ result.weights, rtol=1e-12)
    np.testing.assert_allclose(calibrator.predict(matrix), result.estimates, rtol=1e-12)
