"""Times that can be compared: interleaved repeats, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def rounds(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 25,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call of each function; in every round each is called once, so that drift hits all alike.

    With one thread ``clock=time.process_time`` leaves out the time that other programs take on a busy machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        for name, function in functions.items():
            start = clock()
            function()
            if round_ >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def medians(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 25,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of one call of each function, from ``rounds``."""
    seconds = rounds(functions, repeats=repeats, warmup=warmup, clock=clock)
    return {name: statistics.median(times) for name, times in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """Median over the rounds of one function's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def extra(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """Median over the rounds of one function's seconds beyond another's in the same round."""
    return statistics.median(a - b for a, b in zip(seconds[name], seconds[to], strict=True))
