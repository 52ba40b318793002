"""Which compiled kernels run on a device: loaded when the first gates need them, and compared before they are used."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from types import ModuleType

import torch

from l0hooks.errors import L0HooksWarning, explain
from l0hooks.gates.kernels.agreement import TOLERANCE, disagreement, median_disagreement

LEAST_FOR_NUMBA = 2**8  # numbers; loading the kernels is not worth the time for fewer
_COMPILERS = {"cuda": ("triton", "cuda"), "cpu": ("numba", "cpu")}
_log = logging.getLogger("l0hooks")


@functools.lru_cache(maxsize=1024)  # asked in every forward
def kernels_for(count: int, device: torch.device) -> ModuleType | None:
    """The kernels that draw ``count`` numbers on ``device``, if any do.

    Parameters
    ----------
    count : int
    device : torch.device

    Returns
    -------
    module or None

    Examples
    --------
    >>> kernels_for(2, torch.device("cpu")) is None
    True
    """
    return None if device.type == "cpu" and count < LEAST_FOR_NUMBA else kernels_on(device)


@functools.cache
def kernels_on(device: torch.device) -> ModuleType | None:
    """The module ``kernels.cuda`` or ``kernels.cpu``, if it can run on ``device``; the log says once why not.

    Before their first use on a device the kernels are compared with the plain formula.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    module or None

    Warns
    -----
    L0HooksWarning
        If the kernels compute something else.

    Examples
    --------
    >>> kernels_on(torch.device("meta")) is None
    True
    """
    if device.type not in _COMPILERS:
        return None
    compiler, module = _COMPILERS[device.type]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        _log.info("gates on %s run without Triton kernels: it needs compute capability 7.0", device)
        return None
    try:
        kernels = importlib.import_module(f"{__package__}.{module}")
    except ImportError as error:
        without = f"gates on {device} run without {compiler.capitalize()} kernels"
        if isinstance(error, ModuleNotFoundError) and error.name == compiler:
            _log.info("%s: the package %s is not installed", without, compiler)
        elif device.type == "cpu":  # Numba is optional here: one that is broken must not stop the training
            _log.warning("%s: the package %s cannot be imported: %s", without, compiler, error)
        else:
            raise
        return None
    return kernels if _agree(disagreement(kernels, device), device) else None


@functools.lru_cache(maxsize=1024)
def median_kernels_for(count: int, device: torch.device) -> ModuleType | None:
    """The kernels of gates without noise for ``count`` gates on ``device``, if any run there: on CPUs with Numba.

    Parameters
    ----------
    count : int
    device : torch.device

    Returns
    -------
    module or None

    Examples
    --------
    >>> median_kernels_for(2, torch.device("cpu")) is None
    True
    """
    return _median_kernels() if device.type == "cpu" and kernels_for(count, device) is not None else None


@functools.cache
def _median_kernels() -> ModuleType | None:
    kernels = importlib.import_module(f"{__package__}.cpu_median")
    return kernels if _agree(median_disagreement(kernels), torch.device("cpu")) else None


def _agree(wrong: str, device: torch.device) -> bool:
    """Whether nothing is wrong; else a warning says what."""
    if not wrong:
        return True
    compiler = _COMPILERS[device.type][0]
    text = explain(
        f"gates on {device}",
        f"{compiler.capitalize()} kernels must compute what the plain formula does; they are not used here.",
        expected=f"a difference of at most {TOLERANCE:.0e}",
        got=wrong,
        hint=f"another version of {compiler}; until then gates are drawn by torch, more slowly",
    )
    warnings.warn(text, L0HooksWarning, stacklevel=3)
    return False
