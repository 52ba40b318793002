"""Functions that Numba compiles for the CPU, called with addresses of memory, in as many threads as torch uses.

Why not ``numba.prange``: its OpenMP ends a process that was forked. In two threads it takes 1.7 times as long for
64 × 64 weights, 0.6 times as long for 512 × 512, and as long for 2048 × 2048.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from typing import Any

import numba
import torch
from numba import config, types

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set", name=__name__)

SHARE = 2**16  # elements; a thread is not worth starting for fewer

# what is NaN stays NaN, sums keep their order; a product may be fused with what is added to it
EXACT: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
SUMS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "reassoc"}}
FLOATS, LEVELS, WIDE = types.CPointer(types.float32), types.CPointer(types.uint16), types.CPointer(types.float64)
INT, FLOAT = types.int64, types.float32
_CTYPES = {INT: ctypes.c_int64, FLOAT: ctypes.c_float}
_compiled: list[Any] = []  # code lives as long as these


def kernel(*arguments: Any) -> Callable[[Any], Callable[..., None]]:
    """Compile a function of pointers and numbers that runs without Python's lock; keep the code for later processes."""

    def compile_(function: Any) -> Callable[..., None]:
        try:
            code = numba.cfunc(types.void(*arguments), cache=True, **EXACT)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):  # there is no folder that Numba may write to
                raise
            code = numba.cfunc(types.void(*arguments), **EXACT)(function)
        _compiled.append(code)
        kinds: list[Any] = [_CTYPES.get(argument, ctypes.c_void_p) for argument in arguments]
        call: Callable[..., None] = ctypes.CFUNCTYPE(None, *kinds)(code.address)
        return call

    return compile_


def share_out(total: int, least: int, run: Callable[[int, int], None], memory: Sequence[object] = ()) -> None:
    """Call ``run(first, how many)`` for shares of ``total`` elements: multiples of ``least``, but for the last.

    Parameters
    ----------
    total, least : int
    run : callable
    memory : sequence
        The arrays at the addresses that ``run`` uses: kept until all threads have ended, even after an interrupt.
    """
    threads = min(torch.get_num_threads(), -(-total // SHARE))
    if threads <= 1:
        run(0, total)
        return
    each = -(-total // (threads * least)) * least
    shares = [(at, min(each, total - at)) for at in range(0, total, each)]
    count, ended, done = len(shares), Semaphore(0), []

    def take() -> list[tuple[int, int]]:
        try:
            return [shares.pop()]  # without a look first: another thread may take the last one
        except IndexError:
            return []

    def work(_: object) -> None:
        while share := take():
            try:
                run(*share[0])
                done.extend(share)
            finally:
                ended.release()

    others = _threads.start(work, memory, count - 1)
    try:
        work(memory)
    finally:
        while take():  # what is left after an interruption
            ended.release()
        for _ in range(count):
            ended.acquire()
    if len(done) < count:
        for other in others:
            other.result()


class _Threads:
    """Threads that start when they are first needed; a forked process has none of its parent's."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    def start(self, work: Callable[[object], None], argument: object, count: int) -> list[Future[None]]:
        """Call ``work`` in up to ``count`` threads: none when the interpreter ends or the system has no more."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(os.cpu_count(), "l0hooks")
        started: list[Future[None]] = []
        try:
            for _ in range(count):
                started.append(self._executor.submit(work, argument))
        except RuntimeError:
            pass
        return started

    def forget(self) -> None:
        self._executor = None


_threads = _Threads()
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_threads.forget)
