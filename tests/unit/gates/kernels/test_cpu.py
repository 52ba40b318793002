"""Numba's kernels on the CPU: their noise bit for bit, their gates and gradients against the formulas in float64."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kernel_product import gated_by
from philox_oracle import expected_uniforms, problem
from scipy import stats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l0hooks import GateSpec, iter_gates, param_groups, penalty, sparsify
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates import moments
from l0hooks.gates.constants import Constants
from l0hooks.gates.expected_count import expected_count
from l0hooks.gates.random import Philox, stream
from l0hooks.gates.sampling import gated_weight, sampled

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
if importlib.util.find_spec("numba") is not None:
    from l0hooks.gates.kernels import cpu as kernels
    from l0hooks.gates.kernels import threads as compiled

    BLOCK, CELL = kernels.BLOCK, 1 / kernels.CELLS

CPU, COUNT = torch.device("cpu"), 2**15
SEEDS = (0, 7, -(2**63), 2**63 - 1, -1234567890123456789)
CONSTANTS = [Constants(*c) for c in ((2 / 3, -0.1, 1.1), (0.25, -0.1, 1.1), (1.5, -0.5, 1.3))]
all_constants = pytest.mark.parametrize("constants", CONSTANTS, ids=str)


def uniforms(count: int, seed: int = 7, start: int = 0) -> Tensor:
    return kernels.fill(torch.empty(count), seed, start)


def gates(log_alpha: Tensor, constants: tuple[float, float, float], seed: int = 7, start: int = 0) -> Tensor:
    _, levels = kernels.gated(torch.ones_like(log_alpha), log_alpha, seed, start, constants)
    return kernels.gates_of(log_alpha, levels, constants)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three of them, for arrays that one would do."""
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled, "SHARE", BLOCK)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [0, 1, 4, 6, 2**31 - 3, 2**34 - 2, 2**40 + 3])
def test_the_numbers_are_philox_bit_for_bit(seed: int, start: int) -> None:
    assert torch.equal(uniforms(BLOCK + 9, seed, start).double(), expected_uniforms(seed, start, BLOCK + 9))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 4095, 4096, 4097, 8195])
@pytest.mark.parametrize("start", [0, 3])
def test_nothing_is_written_beyond_the_end(count: int, start: int) -> None:
    around = torch.full((count + 20,), -1.0)
    kernels.fill(around[10:-10], 7, start)
    assert torch.equal(around[10:-10].double(), expected_uniforms(7, start, count))
    assert (around[:10] == -1).all()
    assert (around[-10:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_get_the_same_numbers(dtype: torch.dtype) -> None:
    drawn, logits = (kernels.fill(torch.empty(2000, dtype=dtype), 7, 0, scale) for scale in (None, 1.5))
    expected = expected_uniforms(7, 0, 2000)
    assert torch.equal(drawn, expected.to(dtype))
    torch.testing.assert_close(logits, (1.5 * torch.logit(expected)).to(dtype))


def test_logistic_numbers_are_logits_of_the_uniform_ones() -> None:
    drawn = kernels.fill(torch.empty(50_000), 7, 2, 1.5)
    expected = 1.5 * torch.logit(expected_uniforms(7, 2, 50_000))
    torch.testing.assert_close(drawn.double(), expected, rtol=4e-7, atol=3e-7)


def test_the_numbers_are_uniform() -> None:
    drawn = uniforms(1 << 20, seed=11).double()
    assert stats.kstest(drawn[:200_000].numpy(), "uniform").pvalue > 1e-3
    counts = torch.bincount((drawn * 65536).long(), minlength=65536)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


# --- the polynomials --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_exp2", "_log2"])
def test_powers_and_logarithms_are_as_exact_as_they_say(name: str) -> None:
    x = np.linspace(-126, 126, 1_000_001, dtype=np.float32)
    if name == "_log2":
        x = np.exp2(x)
    found = np.array([getattr(kernels, name)(value) for value in x[::10]], dtype=np.float64)
    expected = getattr(np, name[1:])(x[::10].astype(np.float64))
    off = np.abs(found - expected) / np.maximum(np.abs(expected), 1e-30)
    assert off.max() < 3e-7


# --- the gated weight -------------------------------------------------------------------------------------------------


@all_constants
@pytest.mark.parametrize(("count", "start"), [(1, 0), (7, 3), (4096, 0), (100_005, 1)])
def test_gates_are_the_formula_s_in_float64(constants: tuple[float, float, float], count: int, start: int) -> None:
    weight, log_alpha, _ = problem(count)
    product, levels = kernels.gated(weight, log_alpha, -5, start, constants)
    exact = hc.sample(log_alpha.double(), expected_uniforms(-5, start, count), *constants)
    z = kernels.gates_of(log_alpha, levels, constants)
    torch.testing.assert_close(z.double(), exact, rtol=0, atol=0.55 * CELL)
    assert torch.equal(product, weight * z)
    for end in (0, 1):  # atoms are not rounded; at most what float32 makes of the formula may differ
        near = ((exact - end).abs() < 3e-7) | (exact == end)
        assert torch.equal((z == end) & ~near, torch.zeros_like(near))
        assert ((z == end) != (exact == end)).sum() <= 2


@all_constants
@pytest.mark.parametrize(("count", "start"), [(1, 0), (7, 3), (4096, 0), (100_005, 1)])
def test_gradients_are_the_formula_s_at_the_gates(
    constants: tuple[float, float, float], count: int, start: int
) -> None:
    weight, log_alpha, cotangent = problem(count)
    temperature, gamma, zeta = constants
    _, levels = kernels.gated(weight, log_alpha, -5, start, constants)
    by_weight, by_location = kernels.gated_backward(cotangent, weight, log_alpha, levels, constants)
    z = kernels.gates_of(log_alpha, levels, constants).double()
    slope = torch.where((z > 0) & (z < 1), (z - gamma) * (zeta - z) / ((zeta - gamma) * temperature), 0)
    assert by_weight is not None
    assert by_location is not None
    assert torch.equal(by_weight, cotangent * kernels.gates_of(log_alpha, levels, constants))
    torch.testing.assert_close(by_location.double(), cotangent.double() * weight.double() * slope, rtol=2e-5, atol=2e-6)
    # and, but for the rounding, those of the unrounded gates
    wide = [t.double().requires_grad_() for t in (weight, log_alpha)]
    exact = wide[0] * hc.sample(wide[1], expected_uniforms(-5, start, count), *constants)
    _, expected = torch.autograd.grad(exact, wide, cotangent.double())
    size = cotangent.double().abs() * weight.double().abs()
    assert ((by_location.double() - expected).abs() <= 3 * CELL / temperature * size + 1e-6).double().mean() > 0.9999


def test_the_gradient_of_a_count_is_added_in_the_same_pass() -> None:
    weight, log_alpha, cotangent = problem(30_000)
    log_alpha[:4] = torch.tensor([80.0, -80.0, 20.0, -20.0])
    _, levels = kernels.gated(weight, log_alpha, 3, 0, CONSTANTS[0])
    arguments = (weight, log_alpha, levels, CONSTANTS[0])
    _, alone = kernels.gated_backward(cotangent, *arguments)
    _, both = kernels.gated_backward(cotangent, *arguments, (2.5, -1.6))
    assert alone is not None
    assert both is not None
    p = torch.sigmoid(log_alpha.double() + 1.6)
    torch.testing.assert_close((both - alone).double(), 2.5 * p * (1 - p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_is_wanted_is_computed(wanted: tuple[bool, bool]) -> None:
    weight, log_alpha, cotangent = problem(10_000)
    _, levels = kernels.gated(weight, log_alpha, 3, 0, CONSTANTS[0])
    arguments = (cotangent, weight, log_alpha, levels, CONSTANTS[0], (1.0, -1.6))
    both, some = kernels.gated_backward(*arguments), kernels.gated_backward(*arguments, wanted=wanted)
    for want, one, other in zip(wanted, both, some, strict=True):
        assert (other is not None) == want
        assert other is None or torch.equal(one, other)


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-3, 2 / 3, 1e3, 1e37])
def test_extremes_are_no_nan(temperature: float) -> None:
    constants = (temperature, -0.1, 1.1)
    places = [0.0, 1e-30, 5.0, 16.7, 80.0, 1e30, 3e38, math.inf]
    log_alpha = torch.tensor([sign * x for x in places for sign in (1, -1)] * 40)
    expected = hc.sample(
        log_alpha.double(), expected_uniforms(5, 0, len(log_alpha)), max(temperature, 1e-37), *constants[1:]
    )
    drawn = gates(log_alpha, constants, 5)
    torch.testing.assert_close(drawn.double(), expected, rtol=1e-5, atol=1e-5)
    ones = torch.ones_like(log_alpha)
    _, levels = kernels.gated(ones, log_alpha, 5, 0, constants)
    slopes = kernels.gated_backward(ones, ones, log_alpha, levels, constants, (1.0, -1.6))
    assert all(slope is not None and slope.isfinite().all() for slope in slopes)


def test_what_is_no_number_stays_none() -> None:
    log_alpha, weight = torch.tensor([math.nan, 0.0, 0.0]), torch.tensor([1.0, 1.0, math.nan])
    product, _ = kernels.gated(weight, log_alpha, 5, 0, CONSTANTS[0])
    assert product.isnan().tolist() == [True, False, True]
    assert kernels.count(log_alpha, -1.6).isnan()


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 500_000])
def test_the_count_is_the_sum_of_keep_probabilities(size: int) -> None:
    log_alpha = torch.randn(size + 9)[:size] * 5
    log_alpha[0] = 80.0
    expected = torch.sigmoid(log_alpha.double() + 1.6).sum()
    torch.testing.assert_close(kernels.count(log_alpha, -1.6).double(), expected, rtol=1e-6, atol=1e-6)
    assert kernels.count(torch.tensor([math.inf, -math.inf, -80.0]), -1.6) == 1


@pytest.mark.parametrize("temperature", [0.2, 2 / 3, 1.5])
@pytest.mark.parametrize("location", [-2.0, 0.0, 1.5])
def test_gates_have_the_distribution(location: float, temperature: float) -> None:
    count = 1 << 20
    where, constants = torch.tensor(location, dtype=torch.float64), (temperature, -0.1, 1.1)
    drawn = gates(torch.full((count,), location), constants, 99).double()
    for share, p in (
        ((drawn == 0), 1 - hc.keep_prob(where, *constants)),
        ((drawn == 1), hc.prob_one(where, *constants)),
    ):
        assert abs(float(share.double().mean() - p)) < 5 * math.sqrt(float(p * (1 - p)) / count)
    spread = math.sqrt(float(moments.variance(where, *constants)) / count)
    assert abs(float(drawn.mean() - moments.mean(where, *constants))) < 5 * spread
    inside = drawn[(drawn > 0) & (drawn < 1)][:100_000]
    low, high = (float(hc.cdf(torch.tensor(x, dtype=torch.float64), where, *constants)) for x in (0.0, 1 - 1e-12))

    def cdf(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = hc.cdf(torch.from_numpy(x), where, *constants).numpy()
        return (values - low) / (high - low)

    assert stats.kstest(inside.numpy(), cdf).pvalue > 1e-3


def test_threads_change_no_bit(threads: None) -> None:
    weight, log_alpha, cotangent = problem(5 * BLOCK + 11)
    numbers = CONSTANTS[0]

    def everything() -> list[Tensor]:
        product, levels = kernels.gated(weight, log_alpha, 3, 2, numbers)
        slopes = kernels.gated_backward(cotangent, weight, log_alpha, levels, numbers, (0.5, -1.6))
        drawn, count = uniforms(5 * BLOCK + 11, 3, 2), kernels.count(log_alpha, -1.6)
        return [drawn, product, levels, count, *(slope for slope in slopes if slope is not None)]

    several = everything()
    torch.set_num_threads(1)
    for one, other in zip(everything(), several, strict=True):
        assert torch.equal(one, other)


def test_a_forked_process_has_threads_of_its_own(threads: None) -> None:
    count = 5 * BLOCK
    expected = uniforms(count)  # the parent's threads run
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(uniforms(count), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- the library on them ----------------------------------------------------------------------------------------------


def node(weight: Tensor, log_alpha: Tensor) -> str:
    gated = gated_weight(weight, log_alpha, 1, Constants())
    assert gated.grad_fn is not None
    return gated.grad_fn.name()


def test_which_weights_take_the_kernels() -> None:
    log_alpha = torch.zeros(16, 24, requires_grad=True)
    assert node(torch.ones(16, 24), log_alpha) == "_GatedByKernelsBackward"
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert node(torch.ones(16, 24, dtype=dtype), log_alpha) == "_GatedWeightBackward"
    assert node(torch.ones(24, 16).t(), log_alpha) == "_GatedWeightBackward"
    assert node(torch.ones(24, 16), log_alpha.t()) == "_GatedWeightBackward"
    assert node(torch.ones(10, 24), log_alpha[:10]) == "_GatedWeightBackward"  # fewer than LEAST_FOR_NUMBA


def test_every_path_of_a_ticket_has_the_same_noise() -> None:
    _, log_alpha, _ = problem(COUNT)
    ones = torch.ones(COUNT)
    plain = hc.sample(log_alpha, stream(9, COUNT, CPU).uniform_(torch.empty(COUNT)))
    assert isinstance(stream(9, COUNT, CPU), Philox)
    torch.testing.assert_close(sampled(log_alpha, stream(9, COUNT, CPU), Constants()), plain)
    by_kernel = gated_weight(ones, log_alpha, 9, Constants())
    torch.testing.assert_close(by_kernel, plain, rtol=0, atol=0.55 * CELL)
    turned = gated_weight(ones.view(256, -1).t(), log_alpha.view(-1, 256), 9, Constants())
    torch.testing.assert_close(turned.reshape(-1), plain)


def test_sixteen_bits_of_a_gate_are_kept() -> None:
    weight, log_alpha, _ = problem(COUNT)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_weight(weight.requires_grad_(), log_alpha.requires_grad_(), 1, Constants())
    own = {weight.data_ptr(), log_alpha.data_ptr()}
    assert [t.nbytes for t in kept if t.data_ptr() not in own] == [2 * COUNT]


@all_constants
def test_second_derivatives_are_those_of_the_formula(constants: tuple[float, float, float]) -> None:
    weight, log_alpha, cotangent = problem(300)
    u = expected_uniforms(3, 0, 300)
    results = []
    for wide in (False, True):
        w, a, g = (t.double() if wide else t for t in (weight, log_alpha, cotangent))
        w, a = w.requires_grad_(), a.requires_grad_()
        product = w * hc.sample(a, u, *constants) if wide else gated_by(kernels, w, a, constants)
        first = torch.autograd.grad(product, (w, a), g, create_graph=True)
        second = torch.autograd.grad(sum(s.square().sum() for s in first), (w, a))
        results.append([t.detach().double() for t in (product, *first, *second)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_a_batch_of_gradients_and_a_graph_kept_for_a_second_pass() -> None:
    weight, log_alpha, cotangent = problem(5000)
    w, a = weight.requires_grad_(), log_alpha.requires_grad_()
    product = gated_by(kernels, w, a, CONSTANTS[0])
    once = torch.autograd.grad(product, (w, a), cotangent, retain_graph=True)
    again = torch.autograd.grad(product, (w, a), cotangent, retain_graph=True)
    batched = torch.autograd.grad(product, (w, a), torch.stack([cotangent] * 2), is_grads_batched=True)
    for one, other, many in zip(once, again, batched, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(many[1], one, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_contiguous() -> None:
    weight, log_alpha, cotangent = (t.view(50, 100) for t in problem(5000))
    w, a = weight.requires_grad_(), log_alpha.requires_grad_()
    for g in (cotangent.t().contiguous().t(), torch.tensor(1.5).expand(50, 100)):
        products = [gated_by(kernels, w, a, CONSTANTS[0]) for _ in range(2)]
        slopes = [torch.autograd.grad(p, (w, a), x) for p, x in zip(products, (g, g.contiguous()), strict=True)]
        assert all(torch.equal(one, other) for one, other in zip(*slopes, strict=True))


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 192), nn.ReLU(), nn.Linear(192, 256))
    sparsify(net, GateSpec(init_mean=0.6))
    return net


def slopes_of(net: nn.Module) -> list[Tensor]:
    found = [p.grad for p in net.parameters() if p.grad is not None]
    assert found
    net.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_gates(reentrant: bool) -> None:
    net, x = model(), torch.randn(8, 256, requires_grad=True)
    torch.manual_seed(1)
    net(x).square().sum().backward()
    expected = slopes_of(net)
    torch.manual_seed(1)
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    for one, other in zip(slopes_of(net), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_penalty_s_gradient_is_the_same_in_the_samplers_pass_and_alone() -> None:
    net, x = model(), torch.randn(8, 256)
    torch.manual_seed(1)
    (net(x).square().mean() + penalty(net, l0=0.01)).backward()
    together = slopes_of(net)
    torch.manual_seed(1)
    net(x).square().mean().backward()
    penalty(net, l0=0.01).backward()
    for one, other in zip(together, slopes_of(net), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_two_penalties_owed_at_once() -> None:
    net, x = model(), torch.randn(8, 256)
    (_, gate), *_ = iter_gates(net)
    constants = (gate.temperature, -0.1, 1.1)
    torch.manual_seed(1)
    output = net(x).square().mean()
    counts = [expected_count(gate.log_alpha, constants, gate.last_sample.node) for _ in range(2)]
    (output + 0.25 * counts[0] + 0.5 * counts[1]).backward()
    both = slopes_of(net)
    torch.manual_seed(1)
    (net(x).square().mean() + 0.75 * expected_count(gate.log_alpha, constants, None)).backward()
    for one, other in zip(both, slopes_of(net), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow  # tests/laws/test_noise.py compiles models of every granularity
def test_a_compiled_model_has_the_same_gates() -> None:
    net, x = model(), torch.randn(8, 256)
    torch.manual_seed(1)
    expected = net(x)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), expected, rtol=1e-3, atol=1e-4)


def test_training_opens_and_closes_gates_as_without_the_kernels(request: pytest.FixtureRequest) -> None:
    """The same law: mean open gates after some steps, within what seeds make of it."""
    shares = []
    for kernels_there in (True, False):
        if not kernels_there:
            request.getfixturevalue("no_kernels")
        net = model()
        optimizer = torch.optim.Adam(param_groups(net, lr=1e-3, gate_lr=0.1))
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
        for _ in range(40):
            optimizer.zero_grad()
            ((net(x) - x).square().mean() + penalty(net, l0=3e-6)).backward()
            optimizer.step()
        shares.append(float(torch.cat([g.keep_prob().detach().flatten() for _, g in iter_gates(net)]).mean()))
    assert 0.05 < shares[0] < 0.9
    assert abs(shares[0] - shares[1]) < 0.01


def test_copies_draw_noise_of_their_own() -> None:
    net, x = model(), torch.randn(8, 256)
    torch.manual_seed(1)
    expected = net(x)
    twin = copy.deepcopy(net)
    torch.manual_seed(1)
    torch.testing.assert_close(twin(x), expected)


@pytest.mark.slow
def test_without_a_folder_to_write_to_they_are_compiled_each_time(tmp_path: Path) -> None:
    script = (
        "import numba.core.caching as c\n"
        "for kind in c.CacheImpl._locator_classes: kind.from_function = classmethod(lambda *_: None)\n"
        "import torch\n"
        "from l0hooks.gates.kernels import cpu\n"
        "print(cpu.fill(torch.empty(3), 7, 0).tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(uniforms(3).tolist())
