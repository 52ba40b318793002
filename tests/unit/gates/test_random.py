"""Random numbers handed out in pieces: what they are, and that pieces do not matter."""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from scipy import stats
from torch import Tensor

from l0hooks.gates import kernels
from l0hooks.gates.kernels.loading import LEAST_FOR_NUMBA, kernels_for, kernels_on
from l0hooks.gates.random import LEAST_FOR_PACKED, Native, Packed, Philox, Stream, stream

CPU = torch.device("cpu")
FEW, SOME, MANY = 200, 1000, 4 * LEAST_FOR_PACKED


@pytest.fixture(params=["few", "many", "some by kernels", "many by kernels"])
def count(request: pytest.FixtureRequest) -> int:
    """Each of the ways to draw numbers."""
    if request.param == "many":
        request.getfixturevalue("no_kernels")
    elif "kernels" in request.param:
        pytest.importorskip("numba")
    return {"few": FEW, "some": SOME, "many": MANY}[request.param.split()[0]]


def uniforms(seed: int, count: int) -> Tensor:
    return stream(seed, count, CPU).uniform_(torch.empty(count))


def test_without_kernels_few_and_many_are_drawn_in_two_ways(no_kernels: None) -> None:
    kinds: list[Stream] = [stream(1, count, CPU) for count in (FEW, LEAST_FOR_PACKED - 1, LEAST_FOR_PACKED)]
    assert [type(kind) for kind in kinds] == [Native, Native, Packed]


def test_all_but_a_few_are_drawn_by_numba_s_kernels() -> None:
    pytest.importorskip("numba")
    kinds: list[Stream] = [
        stream(1, count, CPU) for count in (FEW, LEAST_FOR_NUMBA - 1, LEAST_FOR_NUMBA, LEAST_FOR_PACKED)
    ]
    assert [type(kind) for kind in kinds] == [Native, Native, Philox, Philox]


def test_a_stream_is_a_function_of_its_seed(count: int) -> None:
    seed = 0x123456789ABCDEF0
    assert torch.equal(uniforms(seed, count), uniforms(seed, count))
    for bit in (32, 47, 63):
        assert not torch.equal(uniforms(seed, count), uniforms(seed ^ (1 << bit), count))


@pytest.mark.parametrize("kernels", [False, True])
def test_every_bit_of_the_seed_counts_where_many_are_drawn(kernels: bool, request: pytest.FixtureRequest) -> None:
    if not kernels:
        request.getfixturevalue("no_kernels")
    first = uniforms(0, MANY)
    assert all((uniforms(1 << bit, MANY) != first).any() for bit in range(64))


@pytest.mark.parametrize("piece", [1, 4, 10])
def test_pieces_of_fours_make_the_whole(count: int, piece: int) -> None:
    """Odd pieces are right too, but other numbers: a word is never split."""
    whole, source = uniforms(5, count), stream(5, count, CPU)
    parts = torch.cat([source.uniform_(torch.empty(n)) for n in (4 * piece, 8 * piece, count - 12 * piece)])
    assert torch.equal(parts, whole)


def test_logistic_numbers_are_the_logits_of_the_uniform_ones(count: int) -> None:
    logistic = stream(5, count, CPU).logistic_(torch.empty(count), 1.5)
    torch.testing.assert_close(logistic, 1.5 * torch.logit(uniforms(5, count)), rtol=1e-5, atol=1e-4)


def test_the_numbers_are_uniform(no_kernels: None) -> None:
    drawn = uniforms(11, 1_000_000).double()
    assert stats.kstest(drawn[:200_000].numpy(), "uniform").pvalue > 1e-3
    counts = torch.bincount((drawn * 65536).long(), minlength=65536)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert drawn.min() >= 0.5 / 65536
    assert drawn.max() <= 1 - 0.5 / 65536


def test_neighbours_words_and_seeds_are_uncorrelated(no_kernels: None) -> None:
    count = 1 << 20
    drawn = uniforms(3, count)
    others = [drawn.roll(lag) for lag in (1, 2, 3, 4, 5, 64)] + [uniforms(seed, count) for seed in (4, 1 << 63)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 5 / math.sqrt(count)


def test_the_four_parts_of_a_word_are_independent_in_pairs(no_kernels: None) -> None:
    drawn = (uniforms(9, 1 << 20).view(-1, 4) * 16).long()
    for one, other in itertools.combinations(range(4), 2):
        table = torch.bincount(drawn[:, one] * 16 + drawn[:, other], minlength=256)
        assert stats.chisquare(table.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.998])
def test_gates_drawn_with_sixteen_bits_close_as_often_as_they_should(keep: float, no_kernels: None) -> None:
    """Each level has the same weight, so the share of levels that close a gate is the probability, to half a level."""
    levels = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    closed = (torch.logit(levels) + math.log(keep / (1 - keep)) <= 0).double().mean()
    assert abs(float(closed) - (1 - keep)) <= 0.5 / 65536
    drawn = stream(21, 1 << 20, CPU).logistic_(torch.empty(1 << 20), 1.0)
    share = float((drawn + math.log(keep / (1 - keep)) <= 0).double().mean())
    assert abs(share - (1 - keep)) < 5 * math.sqrt(keep * (1 - keep) / (1 << 20)) + 1 / 65536


# --- whether a GPU has kernels ----------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[tuple[int, int], ModuleType | None], None]]:
    """A function that feigns a GPU of some compute capability, and what ``import triton`` finds."""

    def feign(capability: tuple[int, int], triton: ModuleType | None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setitem(sys.modules, "triton", triton)
        monkeypatch.delitem(sys.modules, "triton.language", raising=False)
        monkeypatch.delitem(sys.modules, "l0hooks.gates.kernels.cuda", raising=False)
        monkeypatch.delattr(kernels, "cuda", raising=False)

    kernels_on.cache_clear()
    kernels_for.cache_clear()
    yield feign
    kernels_on.cache_clear()
    kernels_for.cache_clear()


@pytest.mark.parametrize(
    ("capability", "why"),
    [((9, 0), "the package triton is not installed"), ((6, 1), "it needs compute capability 7.0")],
    ids=["no triton", "an old GPU"],
)
def test_a_gpu_without_kernels_is_told_of_once(
    gpu_of: Callable[..., None], caplog: pytest.LogCaptureFixture, capability: tuple[int, int], why: str
) -> None:
    gpu_of(capability, None)
    with caplog.at_level(logging.INFO, logger="l0hooks"):
        assert [kernels_on(GPU) for _ in range(3)] == [None] * 3
    assert [(record.name, record.levelname) for record in caplog.records] == [("l0hooks", "INFO")]
    assert caplog.messages == [f"gates on cuda:0 run without Triton kernels: {why}"]


def test_a_triton_that_is_broken_is_an_error(gpu_of: Callable[..., None]) -> None:
    gpu_of((9, 0), ModuleType("triton"))
    with pytest.raises(ModuleNotFoundError, match=r"triton\.language"):
        kernels_on(GPU)


def test_a_cpu_without_numba_is_told_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "l0hooks.gates.kernels.cpu", raising=False)
    kernels_on.cache_clear()
    kernels_for.cache_clear()
    with caplog.at_level(logging.INFO, logger="l0hooks"):
        assert [type(stream(1, count, CPU)) for count in (FEW, MANY, MANY)] == [Native, Packed, Packed]
    assert caplog.messages == ["gates on cpu run without Numba kernels: the package numba is not installed"]
    kernels_on.cache_clear()
    kernels_for.cache_clear()


def test_other_devices_have_none_and_are_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="l0hooks"):
        assert kernels_on(torch.device("meta")) is None
    assert not caplog.records
