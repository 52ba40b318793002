"""AMLab's layers and models beside sparsified ones.

Their code does not install: what it computes is computed here from the paper's equations, in NumPy.
"""

import numpy as np
import paper
import pytest
import torch
from conversion import from_page
from torch import nn
from torch.nn import functional as F

from l0hooks import Gate, GateSpec, HardConcrete, iter_gates, penalty, prune, sparsify, summary
from l0hooks.gates.hard_concrete import log_alpha_from_keep_prob

from_amlab = from_page("migration_amlab.md", "from_amlab")
as_they_evaluate = from_page("migration_amlab.md", "as_they_evaluate")
PAPER = {"estimator": "paper"}


def log_odds(n, rng, *, between=False):
    """Within their clamp; with gates between both rules, closed here and open there, only if asked."""
    values = rng.permutation(np.linspace(-4.6, 4.6, n))
    values[(values > -2.45) & (values < -1.55)] = 1.0
    if between:
        values[1] = -2.0
    return values


def tensors(state):
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in state.items()}


def dense_state(rng, inputs=7, outputs=5, prefix="", **options):
    return {
        f"{prefix}weights": rng.normal(size=(inputs, outputs)),
        f"{prefix}qz_loga": log_odds(inputs, rng, **options),
        f"{prefix}bias": rng.normal(size=outputs),
    }


def conv_state(rng, inputs=3, outputs=6, size=3, prefix="", **options):
    return {
        f"{prefix}weights": rng.normal(size=(outputs, inputs, size, size)),
        f"{prefix}qz_loga": log_odds(outputs, rng, **options),
        f"{prefix}bias": rng.normal(size=outputs),
    }


def close(ours, theirs):
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=2e-5, atol=2e-5)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_dense_layer_computes_what_the_equations_say(rng):
    state = dense_state(rng)
    layer, x = nn.Linear(7, 5), rng.normal(size=(4, 7))
    sparsify(layer, GateSpec(granularity="input", **PAPER))
    layer.load_state_dict(from_amlab(tensors(state), layer))
    expected = paper.dense(x, state["weights"], state["bias"], state["qz_loga"])
    close(layer.eval()(torch.tensor(x).float()), expected)
    close(prune(layer).eval()(torch.tensor(x).float()), expected)
    assert 0 < summary(layer).sparsity < 1


def test_a_convolution_computes_what_the_equations_say(rng):
    """Their gate multiplies the feature map with its bias: the conversion gates the bias too."""
    state = conv_state(rng)
    layer, x = nn.Conv2d(3, 6, 3), rng.normal(size=(2, 3, 7, 5))
    sparsify(layer, GateSpec(granularity="output", **PAPER))
    layer.load_state_dict(from_amlab(tensors(state), layer))
    expected = paper.gated_convolution(x, state["weights"], state["bias"], state["qz_loga"])
    close(layer.eval()(torch.tensor(x).float()), expected)


def test_gates_between_the_two_rules_are_closed_here_and_open_there(rng):
    """Their rule keeps a gate that is 0 in up to 69 % of the draws; the median's is one half."""
    state = dense_state(rng, between=True)
    between = np.isclose(state["qz_loga"], -2.0)
    assert between.any()
    assert ((paper.keep_prob(-2.0) > 0.31), (paper.keep_prob(-2.0) < 0.5)) == (True, True)
    layer = nn.Linear(7, 5)
    sparsify(layer, GateSpec(granularity="input", **PAPER))
    layer.load_state_dict(from_amlab(tensors(state), layer))
    (gate,) = (gate for _, gate in iter_gates(layer))
    theirs, ours = paper.at_test_time(state["qz_loga"]), gate.eval()().detach().numpy()
    assert (theirs[between] > 0).all()
    assert (ours[between] == 0).all()
    np.testing.assert_allclose(ours[~between], theirs[~between], atol=1e-6)


def test_from_a_temperature_of_one_on_the_two_rules_agree(rng):
    state = dense_state(rng, between=True)
    layer, x = nn.Linear(7, 5), rng.normal(size=(4, 7))
    sparsify(layer, GateSpec(granularity="input", temperature=1.0, **PAPER))
    layer.load_state_dict(from_amlab(tensors(state), layer))
    expected = paper.dense(x, state["weights"], state["bias"], state["qz_loga"])
    close(layer.eval()(torch.tensor(x).float()), expected)


@pytest.mark.parametrize("between", [False, True])
def test_the_model_they_evaluate_is_a_plain_one(rng, between):
    state = {**conv_state(rng, between=between, prefix="0."), **dense_state(rng, 6, 4, "3.", between=between)}
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    model.load_state_dict(as_they_evaluate(tensors(state)))
    x = rng.normal(size=(2, 3, 7, 5))
    maps = paper.gated_convolution(x, state["0.weights"], state["0.bias"], state["0.qz_loga"]).mean((2, 3))
    close(
        model.eval()(torch.tensor(x).float()),
        paper.dense(maps, state["3.weights"], state["3.bias"], state["3.qz_loga"]),
    )


def relu(x):
    return np.maximum(x, 0)


def test_the_mlp(rng):
    state = {}
    for place, (inputs, outputs) in zip((0, 2, 4), ((12, 9), (9, 6), (6, 3)), strict=True):
        state |= dense_state(rng, inputs, outputs, f"output.{place}.")
    model = nn.Module()
    model.output = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))
    sparsify(model, GateSpec(granularity="input", **PAPER))
    model.load_state_dict(from_amlab(tensors(state), model))
    x = expected = rng.normal(size=(5, 12))
    for place in (0, 2, 4):
        layer = (state[f"output.{place}.{name}"] for name in ("weights", "bias", "qz_loga"))
        expected = paper.dense(expected if place == 0 else relu(expected), *layer)
    close(model.eval().output(torch.tensor(x).float()), expected)


def pooled(x):
    """The largest of every two by two."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    return x[:, :, : 2 * rows, : 2 * columns].reshape(*x.shape[:2], rows, 2, columns, 2).max((3, 5))


def test_the_convolutional_model(rng):
    state = {**conv_state(rng, 1, 4, 5, "convs.0."), **conv_state(rng, 4, 5, 5, "convs.3.")}
    state |= {**dense_state(rng, 20, 8, "fcs.0."), **dense_state(rng, 8, 3, "fcs.2.")}
    model = nn.Module()
    model.convs = nn.Sequential(
        *(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2)), *(nn.Conv2d(4, 5, 5), nn.ReLU(), nn.MaxPool2d(2))
    )
    model.fcs = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))
    sparsify(
        model,
        {"convs.*": GateSpec(granularity="output", **PAPER), "fcs.*": GateSpec(granularity="input", **PAPER)},
    )
    model.load_state_dict(from_amlab(tensors(state), model))
    x = rng.normal(size=(2, 1, 20, 20))
    maps = x
    for place in ("convs.0.", "convs.3."):
        layer = (state[place + name] for name in ("weights", "bias", "qz_loga"))
        maps = pooled(relu(paper.gated_convolution(maps, *layer)))
    hidden = maps.reshape(2, -1)
    for place in ("fcs.0.", "fcs.2."):
        layer = (state[place + name] for name in ("weights", "bias", "qz_loga"))
        hidden = paper.dense(hidden if place == "fcs.0." else relu(hidden), *layer)
    model.eval()
    close(model.fcs(model.convs(torch.tensor(x).float()).flatten(1)), hidden)


def test_a_residual_block_and_its_plain_layers(rng):
    """``BasicBlock`` gates only its first convolution; ``MAPConv2d`` and ``MAPDense`` are plain ones."""
    state = {f"conv1.{k}": v for k, v in conv_state(rng, 4, 4).items() if k != "bias"}
    state["conv2.weight"], state["fcout.weight"] = rng.normal(size=(4, 4, 3, 3)), rng.normal(size=(4, 2))
    state["fcout.bias"] = rng.normal(size=2)
    model = nn.Module()
    model.conv1, model.conv2 = nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
    model.fcout = nn.Linear(4, 2)
    sparsify(model, {"conv1": GateSpec(granularity="output", **PAPER)})
    model.load_state_dict(from_amlab(tensors(state), model))
    x = rng.normal(size=(2, 4, 7, 7))
    maps = relu(paper.gated_convolution(x, state["conv1.weights"], np.zeros(4), state["conv1.qz_loga"]))
    maps = paper.convolution(maps, state["conv2.weight"], np.zeros(4)).mean((2, 3))
    model.eval()
    found = model.conv2(F.relu(model.conv1(torch.tensor(x).float()))).mean((2, 3))
    close(model.fcout(found), maps @ state["fcout.weight"] + state["fcout.bias"])


def test_quantile_and_cdf_are_those_of_the_distribution(rng):
    log_alpha, u = log_odds(40, rng), rng.uniform(0.01, 0.99, 40)
    ours = HardConcrete(torch.tensor(log_alpha))
    np.testing.assert_allclose(ours.icdf(torch.tensor(u)).numpy(), paper.gate_at(u, log_alpha), atol=1e-9)
    inside = torch.tensor(0.3, dtype=torch.float64)
    below = (paper.gate_at(np.linspace(0, 1, 20_001)[1:-1, None], log_alpha) <= 0.3).mean(0)
    np.testing.assert_allclose(ours.cdf(inside).numpy(), below, atol=1e-4)
    np.testing.assert_allclose(
        1 - ours.cdf(torch.zeros((), dtype=torch.float64)), paper.keep_prob(log_alpha), atol=1e-9
    )


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_their_regularisation_is_l0l2_over_n(rng, kind):
    """Σ keep·(λ + ρ/2·w²)/N: what every open gate costs, in expectation over all states of the gates."""
    price, decay, samples = 0.7, 0.3, 50_000
    state = dense_state(rng, 5, 4) if kind == "dense" else conv_state(rng, 2, 5)
    layer = nn.Linear(5, 4) if kind == "dense" else nn.Conv2d(2, 5, 3)
    granularity, axes = ("input", 1) if kind == "dense" else ("output", (1, 2, 3))
    sparsify(layer, GateSpec(granularity=granularity, **PAPER))
    layer.load_state_dict(from_amlab(tensors(state), layer))
    each = (price + decay / 2 * np.square(state["weights"])).sum(axes)
    keep = paper.keep_prob(state["qz_loga"])
    ours = penalty(layer, l0l2=(price / samples, decay / samples)).item()
    assert ours == pytest.approx(float(keep @ each) / samples, rel=1e-5)  # their formula
    assert ours == pytest.approx(paper.expected(lambda opened: float(opened @ each), keep) / samples, rel=1e-5)


def test_expected_l0_and_flops_of_a_dense_layer(rng):
    state = dense_state(rng)
    layer = nn.Linear(7, 5)
    sparsify(layer, GateSpec(granularity="input", **PAPER), example_inputs=(torch.zeros(1, 7),))
    layer.load_state_dict(from_amlab(tensors(state), layer))
    keep = paper.keep_prob(state["qz_loga"])
    theirs_l0, theirs_flops = keep.sum() * 5 + 5, (2 * keep.sum() - 1) * 5 + 5
    assert penalty(layer, params=1.0).item() + 5 == pytest.approx(theirs_l0, rel=1e-5)  # 5 biases
    assert 2 * penalty(layer, macs=1.0).item() == pytest.approx(theirs_flops, rel=1e-5)  # a multiply-add is two


def test_a_mask_for_each_example_has_the_moments_of_the_gates(rng):
    """``local_rep=True``: the paper's local reparametrisation."""
    log_alpha = log_odds(6, rng)
    gate = Gate(6)
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor(log_alpha))
    masks = gate.sample(40_000).detach().double().numpy()
    assert masks.shape == (40_000, 6)
    np.testing.assert_allclose(masks.mean(0), paper.mean(log_alpha), atol=0.01)
    np.testing.assert_allclose((masks > 0).mean(0), paper.keep_prob(log_alpha), atol=0.012)
    assert abs(np.corrcoef(masks[:-1, 2], masks[1:, 2])[0, 1]) < 0.03


def test_a_mask_for_each_example_in_a_model(rng):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.ones(64, 6)
    sparsify(model, GateSpec(granularity="coupled", noise="example", init_mean=0.5), example_inputs=(x,))
    assert len(torch.unique(model(x), dim=0)) > 10
    assert len(torch.unique(model.eval()(x), dim=0)) == 1


@pytest.mark.parametrize("droprate", [0.2, 0.3, 0.5])
def test_a_start_as_theirs(droprate):
    """logit(1 − droprate) is a keep probability of its own; ``init_keep_prob`` takes that one."""
    log_alpha = np.log((1 - droprate) / droprate)
    keep = float(paper.keep_prob(log_alpha))
    assert Gate(1, init_keep_prob=keep).log_alpha.item() == pytest.approx(log_alpha, abs=1e-5)
    assert log_alpha_from_keep_prob(keep) == pytest.approx(log_alpha, abs=1e-9)
