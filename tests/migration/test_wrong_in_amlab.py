"""What is wrong in AMLab's research code by its own equations, and right here.

The code does not install: the tests compute what it computes. Every test stands in the table of
docs/migration_amlab.md; test_tables.py sees to it.
"""

import math

import numpy as np
import paper
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from l0hooks import Gate, GateSpec, iter_gates, penalty, sparsify
from l0hooks.errors import L0HooksError


def test_half_of_the_inputs_dropped_are_a_sixth():
    """``droprate_init=0.5`` sets log α = 0."""
    assert 1 - paper.keep_prob(math.log(1 - 0.5) - math.log(0.5)) == pytest.approx(0.168, abs=1e-3)
    ours = Gate(1, init_keep_prob=0.5).log_alpha.detach().double().numpy()
    assert 1 - paper.keep_prob(ours)[0] == pytest.approx(0.5, abs=1e-6)


def test_no_dropping_is_taken_for_one_half():
    """``droprate_init=0.`` becomes 0.5, also as the default of ``BasicBlock``."""
    assert paper.keep_prob(math.log(1 - 0.5) - math.log(0.5)) < 0.84  # where all were to be kept
    with pytest.raises(L0HooksError, match="strictly between 0 and 1"):
        Gate(1, init_keep_prob=1.0)


def test_a_convolutions_bias_is_there_in_evaluation_only():
    """Without ``local_rep`` training convolves without it: with gates that are 1 the two modes differ by the bias."""
    rng = np.random.default_rng(0)
    x, weights, bias = rng.normal(size=(2, 3, 5, 5)), rng.normal(size=(4, 3, 3, 3)), rng.normal(size=4)
    training = paper.convolution(x, weights * 1.0, np.zeros(4))
    evaluation = paper.gated_convolution(x, weights, bias, np.full(4, 9.0))
    np.testing.assert_allclose(evaluation - training, np.broadcast_to(bias[:, None, None], evaluation.shape))
    layer = nn.Conv2d(3, 4, 3)
    sparsify(layer, "output")
    (gate,) = (gate for _, gate in iter_gates(layer))
    with torch.no_grad():
        gate.log_alpha.fill_(40.0)
    batch = torch.tensor(x).float()
    torch.testing.assert_close(layer.train()(batch), layer.eval()(batch))


def test_a_bias_is_paid_for_being_kept():
    """In ``L0Conv2d`` the price λ of a bias has the sign of a reward: −λ·Σ keep."""
    price, decay = 0.7, 0.3
    rng = np.random.default_rng(0)
    weights, bias, log_alpha = rng.normal(size=(5, 2, 3, 3)), rng.normal(size=5), rng.uniform(-3, 3, 5)
    keep = paper.keep_prob(log_alpha)
    behind = (price + decay / 2 * np.square(weights)).sum((1, 2, 3))
    theirs = keep @ behind + keep @ (decay / 2 * np.square(bias) - price)
    right = paper.expected(lambda z: float(z @ (behind + price + decay / 2 * np.square(bias))), keep)
    assert right - theirs == pytest.approx(2 * price * keep.sum())
    layer = nn.Conv2d(2, 5, 3)
    sparsify(layer, "output")
    (gate,) = (gate for _, gate in iter_gates(layer))
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor(log_alpha))
        layer.parametrizations.weight.original.copy_(torch.tensor(weights))
    ours = penalty(layer, l0l2=(price, decay)).item()  # of weights; biases are free
    assert ours == pytest.approx(paper.expected(lambda z: float(z @ behind), keep), rel=1e-5)


def test_flops_take_channels_for_rows():
    """``input_shape`` begins with the batch; entries 1 and 2 are channels and rows, not rows and columns."""
    shape, outputs, size = (1, 3, 32, 16), 8, 3
    rows, columns = shape[1] - size + 1, shape[2] - size + 1  # their rows and columns
    theirs = rows * columns * size * size * shape[1] * outputs
    right = (32 - 2) * (16 - 2) * size * size * 3 * outputs
    assert theirs == 6480 != right
    layer = nn.Conv2d(3, outputs, size)
    sparsify(layer, GateSpec(granularity="output", init_keep_prob=0.75), example_inputs=(torch.zeros(shape),))
    assert penalty(layer, macs=1.0).item() == pytest.approx(0.75 * right, rel=1e-5)


def test_grouped_convolutions_are_counted_as_if_they_were_not():
    """The vector length there is k²·in_channels, whatever the groups."""
    theirs = 3 * 3 * 8 * 8
    layer = nn.Conv2d(8, 8, 3, groups=4)
    sparsify(layer, GateSpec(granularity="output", init_keep_prob=0.5))
    assert penalty(layer, params=1.0).item() == pytest.approx(layer.weight.numel() / 2, rel=1e-5)
    assert theirs == 4 * layer.weight.numel()


def test_gates_cannot_be_closed_below_five_percent():
    """``constrain_parameters`` clamps log α to ±ln 100: no layer falls below 4.7 % of its gates in expectation."""
    assert paper.keep_prob(math.log(1e-2)) == pytest.approx(0.0472, abs=1e-4)
    gate = Gate(1)
    optimizer = torch.optim.SGD(gate.parameters(), lr=1e6)
    gate.expected_l0().backward()
    optimizer.step()
    assert paper.keep_prob(gate.log_alpha.detach().double().numpy())[0] < 3e-4


def test_averages_of_the_first_steps_are_many_times_too_large():
    """Theirs starts at the parameters and is divided as if it had started at zero: a constant 1 becomes 10.5."""
    average, steps, beta = 1.0, 10, 0.99
    for _ in range(steps):
        average = beta * average + (1 - beta) * 1.0
    assert average / (1 - beta**steps) == pytest.approx(10.46, abs=0.01)
    model = nn.Linear(3, 2)
    sparsify(model, "input")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(beta))
    for _ in range(steps):
        averaged.update_parameters(model)
    for mine, other in zip(averaged.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    x = torch.randn(4, 3)
    torch.testing.assert_close(averaged.eval()(x), model.eval()(x))


def test_multiply_adds_that_cannot_be_counted_are_left_out():
    """``L0WideResNet.get_exp_flops_l0`` passes over every error; here one says what is missing."""
    layer = nn.Conv2d(3, 4, 3)
    sparsify(layer, "output")
    with pytest.raises(L0HooksError, match=r"multiply-adds are known only for example inputs"):
        penalty(layer, macs=1.0)
