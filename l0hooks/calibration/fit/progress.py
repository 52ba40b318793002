"""Progress of a fit: a line in a terminal, occasional lines in a log, and updates for the user's callbacks."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO

from l0hooks.calibration.fit.stage import Progress

logger = logging.getLogger("l0hooks.calibration")
_TERMINAL_SECONDS, _LOG_SECONDS = 0.1, 10.0  # seconds between two lines, in a terminal and in a log


@dataclass(frozen=True)
class Update:
    """What callbacks are given after each step.

    Attributes
    ----------
    stage : str
    step, steps : int
        Of this stage: steps taken, and how many there will be at the most.
    error : float
        Mean \\|relative error\\| over the targets as of this step; infinite where it is not known.
    active : int
        Households with a positive weight (clusters, where there are any).
    seconds : float
        Since the fit began.
    left : float, optional
        Seconds that this stage will take at most, if it goes on at its present speed; None at its first step.

    Examples
    --------
    >>> print(Update("gates", 50, 200, 0.0123, 6000, 4.0, 12.0))
    gates 50/200  error 1.23 %  active 6,000  4 s, at most 12 s left
    """

    stage: str
    step: int
    steps: int
    error: float
    active: int
    seconds: float
    left: float | None

    def __str__(self) -> str:
        """One line."""
        left = f", at most {_duration(self.left)} left" if self.left else ""
        error = f"error {percent(self.error)}  " if math.isfinite(self.error) else ""
        return f"{self.stage} {self.step}/{self.steps}  {error}active {self.active:,}  {_duration(self.seconds)}{left}"


class Callback(Protocol):
    """A function that is called after each step.

    If it returns True, the stage ends with its current selection, the fit goes on to the polish, and its reason says
    that a callback stopped the search.
    """

    def __call__(self, update: Update, /) -> bool | None:
        """Whether to stop after ``update``."""
        ...


class Watch:
    """Adds times to the progress of stages.

    Parameters
    ----------
    clock : callable
        Returns seconds since any fixed moment.
    before : float
        Seconds that earlier runs of the same fit took.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, before: float = 0.0) -> None:
        self._clock = clock
        self._start = clock() - before
        self._stage = ""
        self._began, self._first, self._step = self._start, 0, 0

    def seconds(self) -> float:
        """Since the fit began."""
        return self._clock() - self._start

    def update(self, progress: Progress) -> Update:
        """``progress`` with times."""
        now = self._clock()
        if progress.stage != self._stage or progress.step <= self._step:
            self._stage, self._first, self._began = progress.stage, progress.step, now  # the first step also prepares
        self._step = progress.step
        done = progress.step - self._first
        left = (now - self._began) / done * max(0, progress.steps - progress.step) if done else None
        return Update(
            progress.stage, progress.step, progress.steps, progress.error, progress.active, now - self._start, left
        )


class Display:
    """Shows updates: one line that is overwritten in a terminal, and occasional lines elsewhere.

    Parameters
    ----------
    show : bool, optional
        False: nothing. True: in a terminal, or as lines on the standard error. If not given: in a terminal, or
        else through ``logging`` (``l0hooks.calibration``, level INFO).
    stream : text file, optional
        Instead of the standard error.
    clock : callable
        Returns seconds since any fixed moment.

    Examples
    --------
    >>> import io
    >>> out = io.StringIO()
    >>> display = Display(True, stream=out)
    >>> display.show(Update("swaps", 3, 3, 0.001, 50, 1.0, 0.0))
    >>> out.getvalue()
    'swaps 3/3  error 0.10 %  active 50  1 s\\n'
    """

    def __init__(
        self, show: bool | None = None, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = show is not False and self._stream.isatty()
        self._off = show is False
        self._log = show is None and not self._terminal
        self._clock = clock
        self._next = -float("inf")
        self._stage = ""
        self._width = 0

    def show(self, update: Update) -> None:
        """Show it, unless the last one was shown just before."""
        now = self._clock()
        due = now >= self._next or update.stage != self._stage or update.step >= update.steps
        if self._off or not due:
            return
        self._next, self._stage = now + (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS), update.stage
        if self._log:
            logger.info("%s", update)
        elif self._terminal:
            text = str(update)
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)
        else:
            self._stream.write(f"{update}\n")
            self._stream.flush()

    def close(self) -> None:
        """Clear the line in the terminal."""
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


def percent(share: float) -> str:
    """A share in per cent, with about three significant digits.

    Examples
    --------
    >>> percent(0.0123), percent(1.5), percent(3.2e-7), percent(0.0)
    ('1.23 %', '150 %', '3.2e-05 %', '0 %')
    """
    value = 100 * share
    if value == 0:
        return "0 %"
    if abs(value) < 0.01:
        return f"{value:.1e} %"
    return f"{value:.2f} %" if abs(value) < 10 else f"{value:.1f} %" if abs(value) < 100 else f"{value:,.0f} %"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
