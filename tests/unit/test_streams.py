"""Random numbers handed out in pieces: what they are, and that pieces do not matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from l0hooks.streams import _MANY, Native, Packed, Stream, stream

CPU = torch.device("cpu")
COUNTS = (1000, 4 * _MANY)
either = pytest.mark.parametrize("count", COUNTS, ids=["few", "many"])


def uniforms(seed: int, count: int) -> Tensor:
    return stream(seed, count, CPU).uniform_(torch.empty(count))


def test_few_and_many_are_drawn_in_two_ways() -> None:
    kinds: list[Stream] = [stream(1, count, CPU) for count in COUNTS]
    assert [type(kind) for kind in kinds] == [Native, Packed]


@either
def test_a_stream_is_a_function_of_its_seed(count: int) -> None:
    seed = 0x123456789ABCDEF0
    assert torch.equal(uniforms(seed, count), uniforms(seed, count))
    for bit in (32, 47, 63):
        assert not torch.equal(uniforms(seed, count), uniforms(seed ^ (1 << bit), count))


def test_every_bit_of_the_seed_counts_where_many_are_drawn() -> None:
    first = uniforms(0, COUNTS[1])
    assert all((uniforms(1 << bit, COUNTS[1]) != first).any() for bit in range(64))


@either
@pytest.mark.parametrize("piece", [1, 4, 60])
def test_pieces_of_fours_make_the_whole(count: int, piece: int) -> None:
    """Odd pieces are right too, but other numbers: a word is never split."""
    whole, source = uniforms(5, count), stream(5, count, CPU)
    parts = torch.cat([source.uniform_(torch.empty(n)) for n in (4 * piece, 8 * piece, count - 12 * piece)])
    assert torch.equal(parts, whole)


@either
def test_logistic_numbers_are_the_logits_of_the_uniform_ones(count: int) -> None:
    logistic = stream(5, count, CPU).logistic_(torch.empty(count), 1.5)
    torch.testing.assert_close(logistic, 1.5 * torch.logit(uniforms(5, count)), rtol=1e-5, atol=1e-4)


def test_the_numbers_are_uniform() -> None:
    drawn = uniforms(11, 1_000_000).double()
    assert stats.kstest(drawn[:200_000].numpy(), "uniform").pvalue > 1e-3
    counts = torch.bincount((drawn * 65536).long(), minlength=65536)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert drawn.min() >= 0.5 / 65536
    assert drawn.max() <= 1 - 0.5 / 65536


def test_neighbours_words_and_seeds_are_uncorrelated() -> None:
    count = 1 << 20
    drawn = uniforms(3, count)
    others = [drawn.roll(lag) for lag in (1, 2, 3, 4, 5, 64)] + [uniforms(seed, count) for seed in (4, 1 << 63)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 5 / math.sqrt(count)


def test_the_four_parts_of_a_word_are_independent_in_pairs() -> None:
    drawn = (uniforms(9, 1 << 20).view(-1, 4) * 16).long()
    for one, other in itertools.combinations(range(4), 2):
        table = torch.bincount(drawn[:, one] * 16 + drawn[:, other], minlength=256)
        assert stats.chisquare(table.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.998])
def test_gates_drawn_with_sixteen_bits_close_as_often_as_they_should(keep: float) -> None:
    """Each level has the same weight, so the share of levels that close a gate is the probability, to half a level."""
    levels = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    closed = (torch.logit(levels) + math.log(keep / (1 - keep)) <= 0).double().mean()
    assert abs(float(closed) - (1 - keep)) <= 0.5 / 65536
    drawn = stream(21, 1 << 20, CPU).logistic_(torch.empty(1 << 20), 1.0)
    share = float((drawn + math.log(keep / (1 - keep)) <= 0).double().mean())
    assert abs(share - (1 - keep)) < 5 * math.sqrt(keep * (1 - keep) / (1 << 20)) + 1 / 65536
