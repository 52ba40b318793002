"""The kernels of a GPU: interpreted on the CPU, compiled ahead for GPUs that are not here, run where there is one."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l0hooks import Budget, GateSpec, iter_gates, param_groups, penalty, prune, sparsify
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates import moments
from l0hooks.gates.expected_count import expected_count
from l0hooks.gates.kernels.loading import kernels_on
from l0hooks.gates.random import Philox, stream
from l0hooks.gates.sampling import Constants, gated_weight

ROOT = Path(__file__).parents[4]
INTERPRETED = [
    Path(__file__).with_name("interpreted_kernels.py"),
    ROOT / "l0hooks" / "gates" / "kernels" / "cuda.py",
]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def gpu(test: Any) -> Any:
    """Only on a GPU that the kernels run on."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needs_triton(skip(test)))


@needs_triton
@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own: triton reads the environment once, and other tests want its compiler."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--doctest-modules"]
    result = subprocess.run(
        [*command, "-o", "addopts=--strict-markers --strict-config", *map(str, INTERPRETED)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
    (passed,) = re.findall(r"(\d+) passed", result.stdout)
    assert int(passed) > 100
    assert "skipped" not in result.stdout


# --- compiled ahead ---------------------------------------------------------------------------------------------------

NUMBERS = {"n": "i32", "seed": "i64", "first": "i32"}
FLOATS = dict.fromkeys(("scale", "steepness", "gamma", "width", "shift"), "fp32")
FILL = {"out": "*fp32"}


def forward(dtype: str) -> dict[str, str]:
    return {"weight": f"*{dtype}", "log_alpha": "*fp32", "out": f"*{dtype}"}


def backward(dtype: str) -> dict[str, str]:
    return {
        **forward(dtype),
        "grad": f"*{dtype}",
        "grad_weight": f"*{dtype}",
        "grad_log_alpha": "*fp32",
        "deferred": "*fp32",
    }


# kernel → name, pointers and what is fixed when it is compiled; widest accesses to global memory: loads, stores
COMPILED: dict[str, tuple[str, dict[str, str], dict[str, Any], int, int]] = {
    "uniform": ("fill_kernel", FILL, {"logistic": False}, 0, 1),
    "logistic": ("fill_kernel", FILL, {"logistic": True}, 0, 1),
    "count": ("count_kernel", {"log_alpha": "*fp32", "out": "*fp32"}, {}, 4, 0),
    "gates": ("forward_kernel", {"log_alpha": "*fp32", "out": "*fp32"}, {"weight": None}, 1, 1),
    **{f"forward {t}": ("forward_kernel", forward(t), {}, 2, 1) for t in ("fp32", "bf16", "fp16")},
    **{f"backward {t}": ("backward_kernel", backward(t), {}, 3, 2) for t in ("fp32", "bf16", "fp16")},
}


FAST = {("logistic", 90), ("count", 80), ("gates", 90), ("forward bf16", 80), ("backward fp32", 90)}


@needs_triton
@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in itertools.product(COMPILED, [80, 90])
    ],
)
def test_each_kernel_compiles_without_spills_and_with_wide_accesses(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from l0hooks.gates.kernels import cuda as kernels

    kernel_name, pointers, fixed, loads, stores = COMPILED[name]
    kernel = vars(kernels)[kernel_name]
    fixed = {"skip": 0, "counters": kernels.COUNTERS, "summed": kernels.SUMMED, **fixed}
    types = {arg: "constexpr" if arg in fixed else {**NUMBERS, **FLOATS, **pointers}[arg] for arg in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (arg, t) in enumerate(types.items()) if t[0] == "*" or arg == "n"}
    constants = {(i,): fixed[arg] for i, arg in enumerate(types) if arg in fixed}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.OPTIONS)
    ptx = compiled.asm["ptx"]
    use = resources(ptx, tmp_path)
    assert use["spilled"] == 0
    assert use["registers"] <= 32  # a multiprocessor then holds as many threads as it can
    assert len(re.findall(r"ld\.global\S*\.v[248]", ptx)) == loads
    assert len(re.findall(r"st\.global\S*\.v[248]", ptx)) == stores
    if name != "count":
        assert compiled.metadata.shared == 0  # nothing goes from one thread to another
        # twenty products make one Philox: one for the four elements of a thread, not one for each
        assert 15 <= len(re.findall(r"mul\.wide\.u32|mul\.hi\.u32", ptx)) <= 25
    if "bf16" in name:
        assert "cvt.rn.bf16" in ptx


def resources(ptx: str, folder: Path) -> dict[str, int]:
    """What the assembler says of registers, and bytes that did not fit into them."""
    from triton.knobs import nvidia

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    command = [nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(source), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    (registers,) = re.findall(r"Used (\d+) registers", said)
    return {"registers": int(registers), "spilled": spilled}


@needs_triton
def test_neither_seeds_nor_temperatures_are_compiled_in() -> None:
    from l0hooks.gates.kernels import cuda as kernels

    varying = {"fill_kernel": 2, "forward_kernel": 2, "backward_kernel": 2, "count_kernel": 0}
    for name, count in varying.items():
        parameters = {p.name: p for p in vars(kernels)[name].params}
        assert {arg for arg, p in parameters.items() if p.is_constexpr} <= {"skip", "counters", "logistic", "summed"}
        assert sum(p.do_not_specialize for arg, p in parameters.items() if arg in ("seed", "first")) == count


# --- on a GPU ---------------------------------------------------------------------------------------------------------

GPU = torch.device("cuda")
CONSTANTS = [(2 / 3, -0.1, 1.1), (0.25, -0.1, 1.1), (1.5, -0.5, 1.3)]


def uniforms(seed: int, count: int) -> Tensor:
    return stream(seed, count, GPU).uniform_(torch.empty(count, device=GPU))


@gpu
def test_on_a_gpu_the_stream_is_philox() -> None:
    assert isinstance(stream(1, 4, GPU), Philox)
    # the first words of Random123's known answer for a counter and a key of zeros
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    expected = ((words >> 9).double() + 0.5) / 2**23
    assert torch.equal(uniforms(0, 4).cpu().double(), expected)
    assert torch.equal(uniforms(2**63 + 5, 10_007)[:100], uniforms(2**63 + 5, 100))


@gpu
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
@pytest.mark.parametrize("count", [1, 1023, 100_003])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
)
def test_on_a_gpu_values_and_gradients_are_those_of_the_plain_product(
    count: int, dtype: torch.dtype, tolerance: float, constants: tuple[float, float, float]
) -> None:
    weight, cotangent = (torch.randn(count, device=GPU).to(dtype) for _ in range(2))
    log_alpha = torch.randn(count, device=GPU)
    weight.requires_grad_(), log_alpha.requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (weight, log_alpha)]
    noise = uniforms(2**62 + 3, count).double()
    expected = wide[0] * hc.sample(wide[1], noise, *constants)
    expected_slopes = torch.autograd.grad(expected, wide, cotangent.double())
    ours = gated_weight(weight, log_alpha, 2**62 + 3, Constants(*constants))
    slopes = torch.autograd.grad(ours, (weight, log_alpha), cotangent)
    assert (ours.dtype, slopes[0].dtype, slopes[1].dtype) == (dtype, dtype, torch.float32)
    with torch.no_grad():  # where rounding decides whether a gate is clamped, slopes differ
        temperature, gamma, zeta = constants
        raw = gamma + (zeta - gamma) * torch.sigmoid((torch.logit(noise) + wide[1]) / temperature)
        clear = (raw.abs() > 1e-5) & ((raw - 1).abs() > 1e-5)
    assert clear.double().mean() > 0.9
    for got, want in zip((ours, *slopes), (expected, *expected_slopes), strict=True):
        torch.testing.assert_close(got.double()[clear], want[clear], rtol=tolerance, atol=tolerance)


@gpu
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_on_a_gpu_both_passes_have_the_same_gates_bit_for_bit(constants: tuple[float, float, float]) -> None:
    weight, log_alpha = torch.ones(1 << 22, device=GPU), torch.randn(1 << 22, device=GPU)
    weight.requires_grad_(), log_alpha.requires_grad_()
    gates = gated_weight(weight, log_alpha, 5, Constants(*constants))
    by_weight, by_location = torch.autograd.grad(gates.sum(), (weight, log_alpha))
    assert torch.equal(by_weight, gates)
    assert torch.equal(by_location != 0, (gates > 0) & (gates < 1))


@gpu
def test_on_a_gpu_halves_are_rounded_as_the_plain_product_rounds() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        log_alpha = torch.randn(100_000, device=GPU)
        gates = gated_weight(torch.ones_like(log_alpha), log_alpha, 5, Constants())
        weight = torch.randn(100_000, device=GPU).to(dtype)
        assert torch.equal(gated_weight(weight, log_alpha, 5, Constants()), weight * gates.to(dtype))


@gpu
@pytest.mark.parametrize("temperature", [0.2, 2 / 3, 1.5])
@pytest.mark.parametrize("location", [-2.0, 0.0, 1.5])
def test_on_a_gpu_gates_have_the_distribution(location: float, temperature: float) -> None:
    count = 1 << 24
    where, constants = torch.tensor(location, dtype=torch.float64), (temperature, -0.1, 1.1)
    log_alpha = torch.full((count,), location, device=GPU)
    gates = gated_weight(torch.ones_like(log_alpha), log_alpha, 9, Constants(*constants)).double()
    for x in torch.linspace(0, 0.99, 12, dtype=torch.float64):
        p = float(hc.cdf(x, where, *constants))
        assert abs(float((gates <= x).double().mean()) - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1e-6
    spread = (float(moments.variance(where, *constants)) / count) ** 0.5
    assert abs(float(gates.mean()) - float(moments.mean(where, *constants))) < 5 * spread + 1e-6


@gpu
def test_on_a_gpu_elements_beyond_two_to_the_31() -> None:
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip("needs 6 GB of the device's memory")
    drawn = stream(3, count, GPU).uniform_(torch.empty(count, dtype=torch.bfloat16, device=GPU))
    kernels = kernels_on(GPU)
    assert kernels is not None
    tail = kernels.fill(torch.empty(4100, dtype=torch.bfloat16, device=GPU), 3, count - 4100)
    assert torch.equal(drawn[-4100:], tail)


def model_of(granularity: str, side: int = 256, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(side, side), nn.Tanh(), nn.Linear(side, side)).to(GPU, dtype)
    x = torch.randn(2, side, device=GPU, dtype=dtype)
    sparsify(layers, GateSpec(granularity=granularity, init_mean=0.5), example_inputs=(x,))
    return layers


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


each_kind = pytest.mark.parametrize("granularity", ["weight", "input", "coupled"])


@gpu
@each_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_on_a_gpu_a_recomputed_forward_has_the_noise_of_its_own(granularity: str, reentrant: bool) -> None:
    model, x = model_of(granularity), torch.randn(8, 256, device=GPU, requires_grad=True)
    found = []
    for again in (False, True):
        torch.manual_seed(5)
        options = {"use_reentrant": reentrant, "preserve_rng_state": False}
        outputs = [checkpoint(model, x, **options) if again else model(x) for _ in range(2)]
        sum(outputs).square().sum().backward()
        found.append(gradients(model))
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@gpu
@each_kind
def test_on_a_gpu_a_compiled_model_sees_the_gates_of_the_eager_one(granularity: str) -> None:
    model, x = model_of(granularity), torch.randn(8, 256, device=GPU)
    found = []
    for run in (model, torch.compile(model, fullgraph=True)):
        torch.manual_seed(5)
        output = run(x)
        output.square().sum().backward()
        found.append([output.detach(), *gradients(model)])
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-2)


@gpu
def test_on_a_gpu_the_gradient_of_a_penalty_comes_in_the_same_pass() -> None:
    model, x = model_of("weight"), torch.randn(8, 256, device=GPU)
    locations = [gate.log_alpha for _, gate in iter_gates(model)]
    torch.manual_seed(1)
    by_loss = torch.autograd.grad(model(x).square().sum(), locations)
    torch.manual_seed(1)
    (model(x).square().sum() + penalty(model, l0=2.0) + penalty(model, l0=1.0)).backward()
    for location, slope in zip(locations, by_loss, strict=True):
        p = torch.sigmoid(location.detach() - hc.closing_point())
        torch.testing.assert_close(location.grad, slope + 3 * p * (1 - p), rtol=1e-4, atol=1e-4)


@gpu
def test_on_a_gpu_the_count_is_the_sum_of_keep_probabilities() -> None:
    log_alpha = torch.randn(1 << 20, device=GPU)
    expected = hc.keep_prob(log_alpha.double()).sum().item()
    assert expected_count(log_alpha, Constants()).item() == pytest.approx(expected, rel=1e-6)


@gpu
def test_on_a_gpu_second_derivatives_are_those_of_the_plain_formulas() -> None:
    weight, log_alpha, cotangent = (torch.randn(3000, device=GPU, requires_grad=True) for _ in range(3))
    product = gated_weight(weight, log_alpha, 3, Constants())
    wide = [t.detach().double().requires_grad_() for t in (weight, log_alpha)]
    plain = wide[0] * hc.sample(wide[1], uniforms(3, 3000).double())
    for found in zip(
        second(product, (weight, log_alpha), cotangent), second(plain, wide, cotangent.double()), strict=True
    ):
        torch.testing.assert_close(found[0].double(), found[1], rtol=1e-3, atol=1e-3)


def second(product: Tensor, of: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
    first = torch.autograd.grad(product, of, cotangent.detach(), create_graph=True)
    return torch.autograd.grad(sum(slope.square().sum() for slope in first), of)


@gpu
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_budget_is_trained_to_its_end_and_pruned(granularity: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(GPU, dtype)
    x = torch.randn(32, 64, device=GPU, dtype=dtype)
    sparsify(model, granularity, example_inputs=(x,), budget=Budget(sparsity=0.5, steps=20))
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-3, gate_lr=0.1))
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    model.eval()
    pruned = prune(model, example_inputs=(x,))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(pruned(x), model(x), rtol=tolerance, atol=tolerance)


@gpu
def test_on_a_gpu_no_gates_are_kept_from_forward_to_backward() -> None:
    weight = torch.randn(1 << 22, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    log_alpha = torch.zeros(1 << 22, device=GPU, requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    product = gated_weight(weight, log_alpha, 5, Constants())
    assert torch.cuda.memory_allocated() - before <= product.nbytes + 4096


@gpu
def test_on_a_gpu_new_seeds_and_temperatures_compile_nothing() -> None:
    from triton import knobs

    compiled: list[object] = []
    log_alpha = torch.zeros(4096, device=GPU, requires_grad=True)
    weight = torch.ones(4096, device=GPU, requires_grad=True)

    def step(seed: int, temperature: float) -> None:
        gated_weight(weight, log_alpha, seed, Constants(temperature)).sum().backward()

    step(2**40, 0.5)
    earlier = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **told: compiled.append(told)
    try:
        for i in range(8):
            step(2**61 + 977 * i, 0.1 + 0.1 * i)
            step(2**64 - 1 - i, 1.0 + i)
    finally:
        knobs.runtime.jit_post_compile_hook = earlier
    assert not compiled
