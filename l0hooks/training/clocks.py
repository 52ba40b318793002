"""Clocks: what a call takes on the device at hand, and how two calls compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from l0hooks.errors import SpecError, explain

Run = Callable[[], object]
_FEWEST, _MOST = 3, 10  # readings of one layer
_ENOUGH = 0.02  # seconds in all of them
_FEWEST_ROUNDS, _MOST_ROUNDS = 7, 40  # of models, one after the other
_CERTAIN = 0.004  # of a ratio of times: its standard error that is small enough


class Clock(Protocol):
    """Times one call of a function.

    Examples
    --------
    >>> import time
    >>> def cpu_time(run):
    ...     start = time.process_time()
    ...     run()
    ...     return time.process_time() - start
    >>> from l0hooks import Budget
    >>> Budget(speedup=2.0, clock=cpu_time).unit
    'latency'
    """

    def __call__(self, run: Run) -> float:
        """Call ``run`` once; the seconds that it took."""
        ...


def clock_for(device: torch.device) -> Clock:
    """The clock of a device: the wall's on the CPU, CUDA's own events on a GPU.

    Raises
    ------
    SpecError
        For other devices, whose work may go on after a call has returned.
    """
    if device.type == "cpu":
        return _wall
    if device.type == "cuda":
        return _Cuda(device)
    raise SpecError(
        explain(
            'unit="latency"',
            "this library can time calls on CPU and CUDA only.",
            got=f"device {device.type}",
            hint="Budget(..., clock=...), which waits until the device has finished",
        )
    )


def _wall(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class _Cuda:
    """Seconds between two events on the stream that the work goes to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, run: Run) -> float:
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3


def shared(clock: Clock) -> Clock:
    """``clock``, or with several processes what the first of them reads, so that all of them decide alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return clock

    def first(run: Run) -> float:
        reading = [clock(run)]
        torch.distributed.broadcast_object_list(reading, src=0)
        return reading[0]

    return first


def least_seconds(clock: Clock, run: Run) -> float:
    """The least of a few readings, after one call that is not counted: other programs can only add to it."""
    clock(run)
    readings: list[float] = []
    while len(readings) < _FEWEST or (len(readings) < _MOST and sum(readings) < _ENOUGH):
        readings.append(clock(run))
    return min(readings)


def interleaved(clock: Clock, runs: Sequence[Run]) -> list[list[float]]:
    """Readings of several functions, each called once in every round, so that drift meets all alike.

    Rounds go on until the ratio of the last function to the first is known to 0.4 %, at most 40.

    Returns
    -------
    list of lists of float, > 0
        For each function its seconds, one for each round.
    """
    for run in runs:
        clock(run)
    rounds: list[list[float]] = []
    while len(rounds) < _FEWEST_ROUNDS or (len(rounds) < _MOST_ROUNDS and not _certain(rounds)):
        rounds.append([clock(run) for run in runs])
    return [list(readings) for readings in zip(*rounds, strict=True)]


def _certain(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether the median ratio is known well: its standard error by the median deviation, for a normal distribution."""
    ratios = [one[-1] / (one[0] if len(one) > 1 else rounds[0][0]) for one in rounds]
    middle = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in ratios)
    return bool(1.2533 * deviation / len(ratios) ** 0.5 <= _CERTAIN * middle)


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median over the rounds of one function's time over another's.

    Examples
    --------
    >>> ratio([1.0, 5.0, 1.0], [2.0, 2.0, 2.0])
    0.5
    """
    return statistics.median(a / b for a, b in zip(first, second, strict=True))
