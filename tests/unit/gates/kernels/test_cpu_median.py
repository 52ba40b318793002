"""Numba's sums for a budget, against NumPy in float64; and shares of arrays in several threads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from philox_oracle import problem

from l0hooks.gates.constants import Constants

pytest.importorskip("numba")
from l0hooks.gates.kernels import cpu_median as kernels
from l0hooks.gates.kernels import threads as compiled
from l0hooks.gates.kernels.cpu import BLOCK


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three of them, for arrays that one would do."""
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled, "SHARE", BLOCK)
    monkeypatch.setattr("l0hooks.gates.kernels.cpu.SHARE", BLOCK)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 100_005])
@pytest.mark.parametrize("shift", [0.0, -1.6, 7.0])
def test_sums_and_slopes_are_the_formula_s(count: int, shift: float) -> None:
    _, log_alpha, _ = problem(count)
    around = torch.full((count + 20,), -1.0)
    sums = kernels.measure(log_alpha, shift, around[10:-10])
    p = torch.sigmoid(log_alpha.double() + shift)
    torch.testing.assert_close(
        torch.tensor(sums, dtype=torch.float64), torch.stack([p.sum(), (p * (1 - p)).sum()]), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(around[10:-10].double(), p * (1 - p), rtol=2e-6, atol=2e-7)
    assert (around[:10] == -1).all()
    assert (around[-10:] == -1).all()


def test_a_gate_that_is_no_number_is_seen_in_the_sums() -> None:
    log_alpha = torch.zeros(5000)
    log_alpha[4999] = math.nan
    assert all(map(math.isnan, kernels.measure(log_alpha, 0.0, torch.empty(5000))))


def test_threads_change_nothing(threads: None) -> None:
    weight, log_alpha, cotangent = problem(5 * BLOCK + 9)
    constants, slopes = Constants(), torch.empty(5 * BLOCK + 9)
    many = (
        kernels.gated(weight, log_alpha, constants),
        *kernels.gated_backward(cotangent, weight, log_alpha, constants, (0.7, -1.6)),
        torch.tensor(kernels.measure(log_alpha, 0.3, slopes)),
        slopes.clone(),
    )
    torch.set_num_threads(1)
    one = (
        kernels.gated(weight, log_alpha, constants),
        *kernels.gated_backward(cotangent, weight, log_alpha, constants, (0.7, -1.6)),
        torch.tensor(kernels.measure(log_alpha, 0.3, slopes)),
        slopes,
    )
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_is_wanted_is_computed(wanted: tuple[bool, bool]) -> None:
    weight, log_alpha, cotangent = problem(10_000)
    arguments = (cotangent, weight, log_alpha, Constants(), (1.0, -1.6))
    both, some = kernels.gated_backward(*arguments), kernels.gated_backward(*arguments, wanted=wanted)
    for want, one, other in zip(wanted, both, some, strict=True):
        assert (other is not None) == want
        assert other is None or torch.equal(one, other)
