"""The Triton kernels, run by Triton's interpreter on the CPU.

``TRITON_INTERPRET=1`` must stand in the environment before triton is imported: ``test_cuda.py`` runs this file in a
process of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kernel_product import gated_by
from philox_oracle import expected_uniforms, philox, problem
from scipy import stats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l0hooks import Budget, GateSpec, iter_gates, param_groups, penalty, prune, sparsify
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates import moments
from l0hooks.gates.constants import Constants
from l0hooks.gates.kernels import cuda as kernels
from l0hooks.gates.kernels import loading
from l0hooks.gates.kernels.agreement import disagreement
from l0hooks.gates.noise import _mixed, _uniform_op
from l0hooks.gates.random import Philox, stream
from l0hooks.gates.sampling import _GatedByKernels, gated_weight, sampled

CPU = torch.device("cpu")
SEEDS = (0, 7, -(2**63), 2**63 - 1, -1234567890123456789)
CONSTANTS = [Constants(*c) for c in ((2 / 3, -0.1, 1.1), (0.25, -0.1, 1.1), (1.5, -0.5, 1.3))]
TILE = 4 * kernels.COUNTERS
all_constants = pytest.mark.parametrize("constants", CONSTANTS, ids=str)


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """A GPU does not warn of infinities on the way; NumPy, on which the interpreter stands, would."""
    with np.errstate(all="ignore"):
        yield


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as the interpreter stores it: it cuts bfloat16 off, where a GPU rounds to the nearest."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32).to(dtype) if dtype == torch.bfloat16 else x.to(dtype)


# --- Philox by itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, (2**32 - 1,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_the_oracle_gives_the_known_answers_of_random123(
    counter: list[int], key: tuple[int, int], words: list[int]
) -> None:
    found = philox([np.array([word], dtype=np.uint64) for word in counter], key)
    assert [int(word[0]) for word in found] == words


def uniforms(count: int, seed: int = 7, start: int = 0) -> Tensor:
    return kernels.fill(torch.empty(count), seed, start)


@pytest.fixture
def wide_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger blocks, so that the interpreter has fewer to run."""
    monkeypatch.setattr(kernels, "COUNTERS", 2**13)


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [0, 1, 4, 6, 2**31 - 3, 2**34 - 2, 2**40 + 3])
def test_the_numbers_are_philox_bit_for_bit(seed: int, start: int) -> None:
    assert torch.equal(uniforms(1030, seed, start).double(), expected_uniforms(seed, start, 1030))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, TILE - 1, TILE, TILE + 1, 2 * TILE + 3])
@pytest.mark.parametrize("start", [0, 3])
def test_nothing_is_written_beyond_the_end(count: int, start: int) -> None:
    around = torch.full((count + 20,), -1.0)
    kernels.fill(around[10:-10], 7, start)
    assert torch.equal(around[10:-10].double(), expected_uniforms(7, start, count))
    assert (around[:10] == -1).all()
    assert (around[-10:] == -1).all()


def test_the_size_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = uniforms(3000)
    monkeypatch.setattr(kernels, "COUNTERS", 16)
    assert torch.equal(uniforms(3000), before)


def test_an_empty_array_is_left_alone() -> None:
    assert uniforms(0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_get_the_same_numbers_rounded(dtype: torch.dtype) -> None:
    drawn = kernels.fill(torch.empty(2000, dtype=dtype), 7, 0)
    assert torch.equal(drawn, rounded(uniforms(2000), dtype))


def test_logistic_numbers_are_logits_of_the_uniform_ones() -> None:
    drawn = kernels.fill(torch.empty(5000), 7, 2, 1.5)
    expected = 1.5 * torch.logit(expected_uniforms(7, 2, 5000))
    torch.testing.assert_close(drawn.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_ends_have_finite_logits() -> None:
    """The extreme words of Philox, which no seed can be searched for."""
    words = np.array([0, 2**32 - 1], dtype=np.uint64)
    u = torch.from_numpy(((words >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) / np.float32(2**23))
    assert u.tolist() == [2.0**-24, 1 - 2.0**-24]
    assert torch.logit(u).isfinite().all()


def test_the_numbers_are_uniform(wide_blocks: None) -> None:
    drawn = uniforms(1 << 20, seed=11).double()
    assert stats.kstest(drawn[:200_000].numpy(), "uniform").pvalue > 1e-3
    counts = torch.bincount((drawn * 65536).long(), minlength=65536)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_neighbours_lanes_and_seeds_are_uncorrelated(wide_blocks: None) -> None:
    count = 1 << 18
    drawn = uniforms(count, seed=3)
    others = [drawn.roll(lag) for lag in (1, 2, 3, 4, 5, 64, 1024)]
    others += [uniforms(count, seed=seed) for seed in (4, -(2**63) + 3)]
    others += [uniforms(count, seed=3, start=2**34)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 5 / math.sqrt(count)


def test_lanes_are_independent_in_pairs(wide_blocks: None) -> None:
    drawn = (uniforms(1 << 18, seed=9).view(-1, 4) * 16).long()
    for one, other in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        table = torch.bincount(drawn[:, one] * 16 + drawn[:, other], minlength=256)
        assert stats.chisquare(table.numpy()).pvalue > 1e-3


def test_every_bit_of_the_seed_counts() -> None:
    first = uniforms(64, seed=0)
    seeds = [1 << bit for bit in range(63)] + [-(2**63)]
    assert all((uniforms(64, seed=seed) != first).any() for seed in seeds)


# --- the gated weight -------------------------------------------------------------------------------------------------


@all_constants
@pytest.mark.parametrize(("count", "start"), [(1, 0), (7, 3), (TILE, 0), (2 * TILE + 5, 1)])
def test_values_and_gradients_are_those_of_the_plain_formulas_in_float64(
    constants: tuple[float, float, float], count: int, start: int
) -> None:
    weight, log_alpha, cotangent = problem(count)
    wide = [t.double().requires_grad_() for t in (weight, log_alpha)]
    expected = wide[0] * hc.sample(wide[1], expected_uniforms(-5, start, count), *constants)
    expected_slopes = torch.autograd.grad(expected, wide, cotangent.double())
    ours = kernels.gated(weight, log_alpha, -5, start, constants)[0]
    slopes = kernels.gated_backward(cotangent, weight, log_alpha, (-5, start), constants)
    for got, want in zip((ours, *slopes), (expected.detach(), *expected_slopes), strict=True):
        assert got is not None
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_as_the_plain_product_rounds(dtype: torch.dtype) -> None:
    weight, log_alpha, cotangent = problem(3000, dtype)
    numbers = CONSTANTS[0]
    gates = kernels.gated(None, log_alpha, 7, 0, numbers)[0]
    by_weight, by_location = kernels.gated_backward(cotangent, weight, log_alpha, (7, 0), numbers)
    z = rounded(gates, dtype).float()
    assert torch.equal(kernels.gated(weight, log_alpha, 7, 0, numbers)[0], rounded(weight.float() * z, dtype))
    assert by_weight is not None
    assert by_weight.dtype == dtype
    assert torch.equal(by_weight, rounded(cotangent.float() * z, dtype))
    location = log_alpha.double().requires_grad_()
    wide = hc.sample(location, expected_uniforms(7, 0, 3000), *CONSTANTS[0])
    (expected,) = torch.autograd.grad(wide, location, cotangent.double() * weight.double())
    assert by_location is not None
    assert by_location.dtype == torch.float32
    torch.testing.assert_close(by_location.double(), expected, rtol=1e-5, atol=1e-5)


@all_constants
def test_the_gates_of_the_backward_pass_are_those_of_the_forward_pass(constants: tuple[float, float, float]) -> None:
    _, log_alpha, _ = problem(5000)
    ones, numbers = torch.ones(5000), constants
    gates = kernels.gated(None, log_alpha, 3, 1, numbers)[0]
    by_weight, by_location = kernels.gated_backward(ones, ones, log_alpha, (3, 1), numbers)
    assert torch.equal(kernels.gated(ones, log_alpha, 3, 1, numbers)[0], gates)
    assert by_weight is not None
    assert by_location is not None
    assert torch.equal(by_weight, gates)
    assert torch.equal(by_location != 0, (gates > 0) & (gates < 1))


def test_the_same_call_gives_the_same_bits() -> None:
    weight, log_alpha, cotangent = problem(3000)
    results = [
        (
            kernels.gated(weight, log_alpha, 3, 0, CONSTANTS[0])[0],
            *kernels.gated_backward(cotangent, weight, log_alpha, (3, 0), CONSTANTS[0]),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_debt_is_paid_in_the_same_pass(dtype: torch.dtype) -> None:
    weight, log_alpha, cotangent = problem(3000, dtype)
    log_alpha[:4] = torch.tensor([80.0, -80.0, 30.0, -30.0])
    arguments = (cotangent, weight, log_alpha, (3, 0), CONSTANTS[0])
    _, alone = kernels.gated_backward(*arguments)
    _, both = kernels.gated_backward(*arguments, (torch.tensor(2.5), -1.6))
    assert alone is not None
    assert both is not None
    p = torch.sigmoid(log_alpha.double() + 1.6)
    torch.testing.assert_close((both - alone).double(), 2.5 * p * (1 - p), rtol=1e-5, atol=1e-6)
    _, far = kernels.gated_backward(torch.zeros_like(cotangent), *arguments[1:], (torch.tensor(2.5), -1.6))
    q = torch.sigmoid(-log_alpha.double() - 1.6)  # 1 − p where p is 1 in float32
    assert far is not None
    torch.testing.assert_close(far.double(), 2.5 * p * q, rtol=2e-5, atol=0)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_is_wanted_is_computed(wanted: tuple[bool, bool]) -> None:
    weight, log_alpha, cotangent = problem(100)
    arguments = (cotangent, weight, log_alpha, (3, 0), CONSTANTS[0])
    both, some = kernels.gated_backward(*arguments), kernels.gated_backward(*arguments, wanted=wanted)
    for want, one, other in zip(wanted, both, some, strict=True):
        assert (other is not None) == want
        assert other is None or torch.equal(one, other)


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-3, 2 / 3, 1e3, 1e37])
def test_extremes_are_no_nan(temperature: float) -> None:
    constants = (temperature, -0.1, 1.1)
    places = [0.0, 1e-30, 5.0, 16.7, 80.0, 1e30, 3e38, math.inf]
    log_alpha = torch.tensor([sign * x for x in places for sign in (1, -1)] * 40)
    ones = torch.ones_like(log_alpha)
    u = expected_uniforms(5, 0, len(log_alpha))
    expected = hc.sample(log_alpha.double(), u, max(temperature, 1e-37), *constants[1:])
    gates = kernels.gated(ones, log_alpha, 5, 0, constants)[0]
    torch.testing.assert_close(gates.double(), expected, rtol=1e-5, atol=1e-5)
    by_weight, by_location = kernels.gated_backward(ones, ones, log_alpha, (5, 0), constants)
    assert by_weight is not None
    assert by_location is not None
    assert torch.equal(by_weight, gates)
    assert by_location.isfinite().all()
    assert torch.equal(
        gates[log_alpha == math.inf].unique(), torch.tensor([1.0 if temperature < 1e38 else gates.max()])
    )


def test_what_is_no_number_stays_none() -> None:
    log_alpha = torch.tensor([math.nan, 0.0])
    ones = torch.ones(2)
    assert kernels.gated(ones, log_alpha, 5, 0, CONSTANTS[0])[0].isnan().tolist() == [True, False]
    slopes = kernels.gated_backward(ones, ones, log_alpha, (5, 0), CONSTANTS[0])
    assert [slope.isnan().tolist() for slope in slopes if slope is not None] == [[True, False]] * 2


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 50_000])
def test_the_count_is_the_sum_of_keep_probabilities(size: int) -> None:
    log_alpha = torch.randn(size + 9)[:size] * 5
    log_alpha[0] = 80.0
    expected = torch.sigmoid(log_alpha.double() + 1.6).sum()
    torch.testing.assert_close(kernels.count(log_alpha, -1.6).double(), expected, rtol=1e-6, atol=1e-6)
    assert kernels.count(torch.tensor([math.inf, -math.inf, -80.0]), -1.6) == 1
    assert kernels.count(torch.tensor([math.nan, 0.0]), -1.6).isnan()


@pytest.mark.parametrize("temperature", [0.2, 2 / 3, 1.5])
@pytest.mark.parametrize("location", [-2.0, 0.0, 1.5])
def test_gates_have_the_distribution(location: float, temperature: float, wide_blocks: None) -> None:
    count = 1 << 17
    where, constants = torch.tensor(location, dtype=torch.float64), (temperature, -0.1, 1.1)
    gates = kernels.gated(None, torch.full((count,), location), 99, 0, constants)[0].double()
    for share, p in (
        ((gates == 0), 1 - hc.keep_prob(where, *constants)),
        ((gates == 1), hc.prob_one(where, *constants)),
    ):
        assert abs(float(share.double().mean() - p)) < 5 * math.sqrt(float(p * (1 - p)) / count)
    spread = math.sqrt(float(moments.variance(where, *constants)) / count)
    assert abs(float(gates.mean() - moments.mean(where, *constants))) < 5 * spread
    inside = gates[(gates > 0) & (gates < 1)]
    low, high = (float(hc.cdf(torch.tensor(x, dtype=torch.float64), where, *constants)) for x in (0.0, 1 - 1e-12))

    def cdf(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = hc.cdf(torch.from_numpy(x), where, *constants).numpy()
        return (values - low) / (high - low)

    assert stats.kstest(inside.numpy(), cdf).pvalue > 1e-3


def test_they_agree_with_the_plain_formula_before_their_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert disagreement(kernels, CPU) == ""
    right = kernels.gated
    monkeypatch.setattr(kernels, "gated", lambda weight, *rest: right(weight * 1.001, *rest))
    assert disagreement(kernels, CPU).startswith("the product with the gates: a difference of")


# --- the whole library on the kernels ---------------------------------------------------------------------------------


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels on the CPU, as if it were a GPU."""
    monkeypatch.setattr(loading, "kernels_for", lambda count, device: kernels)
    monkeypatch.setattr(loading, "kernels_on", lambda device: kernels)


def test_pieces_of_a_stream_are_the_whole(everywhere: None) -> None:
    whole = stream(2**63 + 5, 50, CPU).uniform_(torch.empty(50))
    noise = stream(2**63 + 5, 50, CPU)
    assert isinstance(noise, Philox)
    parts = [noise.uniform_(torch.empty(n)) for n in (1, 0, 6, 43)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole.double(), expected_uniforms(2**63 + 5 - 2**64, 0, 50))
    turned = stream(2**63 + 5, 50, CPU).uniform_(torch.empty(10, 5).t())
    assert torch.equal(turned, whole.view(5, 10))


def test_every_path_of_a_seed_has_the_same_noise(everywhere: None) -> None:
    _, log_alpha, _ = problem(600)
    forward, ones = torch.tensor(123456789), torch.ones(600)
    noise = _uniform_op(forward, 4, log_alpha)
    seed, constants = _mixed(forward, 4), Constants()
    plain = hc.sample(log_alpha, noise)
    torch.testing.assert_close(sampled(log_alpha, stream(seed, 600, CPU), constants), plain)
    torch.testing.assert_close(gated_weight(ones, log_alpha, seed, constants), plain)
    turned = gated_weight(ones.view(20, 30).t(), log_alpha.view(30, 20), seed, constants)  # not contiguous
    torch.testing.assert_close(turned.reshape(-1), plain)


def test_which_weights_take_the_kernels(everywhere: None) -> None:
    def node(weight: Tensor, log_alpha: Tensor) -> str:
        gated = gated_weight(weight, log_alpha, 1, Constants())
        assert gated.grad_fn is not None
        return gated.grad_fn.name()

    log_alpha = torch.zeros(6, 4, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert node(torch.ones(6, 4, dtype=dtype), log_alpha) == "_GatedByKernelsBackward"
    assert node(torch.ones(6, 4, dtype=torch.float64), log_alpha) == "_GatedWeightBackward"
    assert node(torch.ones(4, 6).t(), log_alpha) == "_GatedWeightBackward"
    assert node(torch.ones(4, 6), log_alpha.t()) == "_GatedWeightBackward"
    assert node(torch.ones(6, 4), log_alpha.double()) == "_GatedWeightBackward"


def test_no_gates_are_kept(everywhere: None) -> None:
    weight, log_alpha, _ = problem(600)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_weight(weight.requires_grad_(), log_alpha.requires_grad_(), 1, Constants())
    assert {t.data_ptr() for t in kept} == {weight.data_ptr(), log_alpha.data_ptr()}


@all_constants
def test_second_derivatives_are_those_of_the_plain_formulas(constants: tuple[float, float, float]) -> None:
    weight, log_alpha, cotangent = problem(300)
    results = []
    for wide in (False, True):
        w, a, g = (t.double() if wide else t for t in (weight, log_alpha, cotangent))
        w, a = w.requires_grad_(), a.requires_grad_()
        if wide:
            product = w * hc.sample(a, expected_uniforms(3, 0, 300), *constants)
        else:
            product = gated_by(kernels, w, a, constants)
        first = torch.autograd.grad(product, (w, a), g, create_graph=True)
        second = torch.autograd.grad(sum(s.square().sum() for s in first), (w, a))
        results.append([t.detach().double() for t in (*first, *second)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_batched_gradients(everywhere: None) -> None:
    weight, log_alpha, _ = problem(30)
    product = gated_by(kernels, weight.requires_grad_(), log_alpha.requires_grad_(), CONSTANTS[0])
    batch = torch.randn(4, 30)
    together = torch.autograd.grad(product, (weight, log_alpha), batch, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(product, (weight, log_alpha), g, retain_graph=True) for g in batch]
    for got, want in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [0, 1], ids=["weight only", "log_alpha only"])
def test_a_frozen_argument_gets_no_gradient(trained: int) -> None:
    weight, log_alpha, cotangent = problem(300)
    arguments = [weight, log_alpha]
    arguments[trained].requires_grad_()
    gated_by(kernels, weight, log_alpha, CONSTANTS[0]).backward(cotangent)
    expected = kernels.gated_backward(cotangent, weight.detach(), log_alpha.detach(), (3, 0), CONSTANTS[0])
    assert arguments[1 - trained].grad is None
    torch.testing.assert_close(arguments[trained].grad, expected[trained])


def test_a_cotangent_with_strides_of_its_own() -> None:
    weight, log_alpha, _ = (t.view(15, 20) for t in problem(300))
    slopes = []
    for g in (torch.ones(()).expand(15, 20), torch.ones(15, 20)):
        w, a = weight.clone().requires_grad_(), log_alpha.clone().requires_grad_()
        slopes.append(torch.autograd.grad(gated_by(kernels, w, a, CONSTANTS[0]), (w, a), g))
    torch.testing.assert_close(*slopes)


SIDE = 182  # 33,124 gates: above the size from which the count is fused


def model_of(granularity: str = "weight", side: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(side, side), nn.Tanh(), nn.Linear(side, side))
    sparsify(model, GateSpec(granularity=granularity, init_mean=0.5), example_inputs=(torch.randn(2, side),))
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_gradient_of_a_penalty_comes_in_the_pass_of_the_kernels(everywhere: None, wide_blocks: None) -> None:
    model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False))
    sparsify(model, GateSpec(init_mean=0.5))
    ((_, gate),) = iter_gates(model)
    x = torch.randn(2, SIDE)
    torch.manual_seed(1)
    (by_loss,) = torch.autograd.grad(model(x).square().sum(), gate.log_alpha)
    torch.manual_seed(1)
    loss = model(x).square().sum()
    assert penalty(model, l0=1.0).item() == pytest.approx(hc.keep_prob(gate.log_alpha).sum().item(), rel=1e-6)
    (loss + penalty(model, l0=2.0) + penalty(model, l0=1.0)).backward()
    p = torch.sigmoid(gate.log_alpha.detach() - hc.closing_point())
    torch.testing.assert_close(gate.log_alpha.grad, by_loss + 3 * p * (1 - p))


@pytest.mark.parametrize("granularity", ["weight", "input", "coupled"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_has_the_noise_of_its_own(granularity: str, reentrant: bool, everywhere: None) -> None:
    model, x = model_of(granularity), torch.randn(3, 12, requires_grad=True)
    found = []
    for again in (False, True):
        torch.manual_seed(5)
        options = {"use_reentrant": reentrant, "preserve_rng_state": False}
        outputs = [checkpoint(model, x, **options) if again else model(x) for _ in range(2)]
        sum(outputs).square().sum().backward()
        found.append(gradients(model))
        model.zero_grad()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("granularity", ["weight", "coupled"])
def test_a_compiled_model_sees_the_gates_of_the_eager_one(granularity: str, everywhere: None) -> None:
    model, x = model_of(granularity), torch.randn(3, 12)
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        output = run(x)
        output.square().sum().backward()
        found.append([output.detach(), *gradients(model)])
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_transforms_of_functions_see_the_same_gates(everywhere: None) -> None:
    model, x = model_of(), torch.randn(3, 12)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    torch.manual_seed(5)
    slopes = torch.func.grad(loss)(parameters)
    torch.manual_seed(5)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(slopes[name], p.grad)
    stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
    torch.manual_seed(5)
    batched = torch.func.vmap(loss, randomness="same")(stacked)
    torch.manual_seed(5)
    torch.testing.assert_close(batched, loss(parameters).expand(2))


@pytest.mark.parametrize("granularity", ["weight", "coupled"])
def test_a_budget_is_trained_to_its_end_and_pruned(granularity: str, everywhere: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(16, 8)
    sparsify(model, granularity, example_inputs=(x,), budget=Budget(sparsity=0.5, steps=6))
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-2, gate_lr=0.3))
    before = copy.deepcopy(model.state_dict())
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(before[f"{name}.log_alpha"], gate.log_alpha) for name, gate in iter_gates(model))
    model.eval()
    torch.testing.assert_close(prune(model, example_inputs=(x,))(x), model(x))


def test_training_goes_through_the_kernels(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = _GatedByKernels.backward

    def counted(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        calls.append(1)
        return original(ctx, grad)

    monkeypatch.setattr(_GatedByKernels, "backward", staticmethod(counted))
    model = model_of()
    model(torch.randn(3, 12)).sum().backward()
    assert len(calls) == 2
