"""Functions that Numba compiles for the CPU, called with addresses of memory, in as many threads as torch uses."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from numba import types

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

SHARE = 2**16  # elements that are worth a thread

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


def share_out(total: int, least: int, run: Callable[[int, int], None], *, size: int = 1) -> None:
    """Call ``run(first, how many)`` for shares of ``total`` items: multiples of ``least``, but for the last.

    Parameters
    ----------
    total, least : int
    run : callable
    size : int
        Elements of an item.
    """
    threads = min(torch.get_num_threads(), -(-total * size // SHARE))
    if threads <= 1:
        run(0, total)
        return
    each = -(-total // (threads * least)) * least
    shares = [(at, min(each, total - at)) for at in range(0, total, each)]
    others = [_threads.get().submit(run, *share) for share in shares[1:]]
    run(*shares[0])
    for other in others:
        other.result()


class _Threads:
    """Threads that start when they are first needed; a forked process has none of its parent's."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    def get(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(os.cpu_count(), "l0hooks")
        return self._executor

    def forget(self) -> None:
        self._executor = None


_threads = _Threads()
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_threads.forget)
