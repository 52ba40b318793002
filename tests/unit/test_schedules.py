"""Schedules: their formulas, their ends and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from l0hooks.errors import InvalidValueError
from l0hooks.schedules import Schedule, cosine, cubic, exponential, linear

Maker = Callable[[float, float, int], Schedule]

all_schedules = pytest.mark.parametrize("make", [linear, exponential, cosine, cubic])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (linear, [8.0, 6.5, 5.0, 3.5, 2.0]),
        (exponential, [8.0, 8 / math.sqrt(2), 4.0, 2 * math.sqrt(2), 2.0]),
        (cubic, [8.0, 2 + 6 * 27 / 64, 2.75, 2 + 6 / 64, 2.0]),
        (cosine, [8.0, 5 + 3 / math.sqrt(2), 5.0, 5 - 3 / math.sqrt(2), 2.0]),
    ],
)
def test_quarter_by_quarter(make: Maker, expected: list[float]) -> None:
    value = make(8.0, 2.0, 20)
    assert [value(step) for step in (0, 5, 10, 15, 20)] == pytest.approx(expected, rel=1e-12)


@all_schedules
@pytest.mark.parametrize(("start", "stop"), [(1.0, 0.1), (0.1, 0.7), (3.0, 0.1), (1e17, 1.0)])
def test_the_ends_are_exact_and_held(make: Maker, start: float, stop: float) -> None:
    value = make(start, stop, 7)
    assert [value(step) for step in (-3, 0)] == [start, start]
    assert [value(step) for step in (7, 8, 10_000)] == [stop, stop, stop]


@all_schedules
@pytest.mark.parametrize(("start", "stop"), [(2.0, 0.5), (0.5, 2.0)])
def test_every_step_moves_towards_the_end(make: Maker, start: float, stop: float) -> None:
    value = make(start, stop, 50)
    direction = math.copysign(1, stop - start)
    assert all(direction * (value(step + 1) - value(step)) > 0 for step in range(50))


@all_schedules
def test_equal_ends_give_a_constant(make: Maker) -> None:
    value = make(0.3, 0.3, 10)
    assert [value(step) for step in (0, 3, 10)] == pytest.approx([0.3] * 3)


@all_schedules
def test_a_single_step_jumps(make: Maker) -> None:
    value = make(1.0, 0.5, 1)
    assert (value(0), value(1)) == (1.0, 0.5)


@all_schedules
@pytest.mark.parametrize("steps", [0, -5])
def test_fewer_than_one_step_is_refused(make: Maker, steps: int) -> None:
    message = rf"^{make.__name__}: steps must be at least 1\.\n  expected: >= 1\n  got: {steps}$"
    with pytest.raises(InvalidValueError, match=message):
        make(1.0, 0.5, steps)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (1.0, 0.0), (-1.0, -2.0), (math.nan, 1.0)])
def test_exponential_refuses_ends_that_are_not_positive(start: float, stop: float) -> None:
    message = rf"^exponential: both ends must be positive\.\n  expected: > 0\n  got: start={start}, stop={stop}$"
    with pytest.raises(InvalidValueError, match=message):
        exponential(start, stop, 10)


@pytest.mark.parametrize("make", [linear, cosine])
def test_zero_and_negative_ends_are_fine_elsewhere(make: Maker) -> None:
    assert make(0.0, -2.0, 10)(5) == pytest.approx(-1.0)
