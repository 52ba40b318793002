"""Checkpoints of a fit: written as a whole or not at all, and read back only for the data they were made from."""

from __future__ import annotations

import io
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from l0hooks._files import check_writable, replacing
from l0hooks.calibration.data.targets import CalibrationWarning
from l0hooks.calibration.fit.stage import State
from l0hooks.errors import InvalidValueError, StateError, explain

_FORMAT = 3  # of the file
_HEADER = "header"


class Checkpoint:
    """One file that holds the latest state of a fit.

    Parameters
    ----------
    path : path-like
        Of a file in a folder that exists; created when first written.
    fingerprint : str
        Of the data and the settings. A file with another one is refused.
    interval : float, >= 0
        Seconds between two checkpoints: a killed fit loses no more than this.
    clock : callable
        Returns seconds since any fixed moment.

    Raises
    ------
    InvalidValueError
        If the file could not be written, or the interval is negative.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> checkpoint = Checkpoint(Path(folder.name) / "fit.npz", "data 1")
    >>> checkpoint.write({"stage": "gates", "gates": {"epoch": 7, "theta": np.ones(2)}})
    >>> checkpoint.read()
    {'stage': 'gates', 'gates': {'epoch': 7, 'theta': array([1., 1.])}}
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fingerprint: str,
        *,
        interval: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path)
        check_writable(self.path, "checkpoint")
        if not interval >= 0:
            raise InvalidValueError(explain("checkpoint", "the interval must not be negative.", got=repr(interval)))
        self.fingerprint, self.interval = fingerprint, interval
        self._clock = clock
        self._next = clock() + interval
        self._failed = False

    @property
    def due(self) -> bool:
        """Whether the interval is over."""
        return self._clock() >= self._next

    def write(self, state: State) -> None:
        """Replace the file; at every moment it is complete, with the old state or the new one."""
        self.path = self.path.absolute()
        arrays: dict[str, Any] = {}
        tree = _take_apart(state, arrays)
        header = {"format": _FORMAT, "fingerprint": self.fingerprint, "state": tree}
        buffer = io.BytesIO()
        arrays[_HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        np.savez(buffer, **arrays)
        with replacing(self.path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
        self._next = self._clock() + self.interval

    def try_to_write(self, state: State) -> None:
        """As :meth:`write`; if the file cannot be written, a warning, and the next try after the interval.

        Warns
        -----
        CalibrationWarning
        """
        try:
            self.write(state)
        except OSError as error:
            self._next = self._clock() + self.interval
            must = "it could not be written; the fit goes on without it."
            got = f"{self.path}: {error.strerror or error}"
            hint = "make room: it is tried again after each interval"
            warnings.warn(explain("checkpoint", must, got=got, hint=hint), CalibrationWarning, stacklevel=2)

    def read(self) -> State | None:
        """The state of the file; None if there is no file.

        Raises
        ------
        StateError
            If the file is of other data or settings, or not a checkpoint.
        """
        if not self.path.exists():
            return None
        try:
            with self.path.open("rb") as content, np.load(content, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(arrays.pop(_HEADER).tobytes())
            kind, fingerprint = header["format"], header["fingerprint"]
        except Exception as error:  # zip, zlib, NumPy and JSON raise some ten kinds for damaged files
            raise self._no_checkpoint(error) from error
        if kind != _FORMAT:
            raise StateError(explain("checkpoint", "its format must be known.", expected=_FORMAT, got=repr(kind)))
        if fingerprint != self.fingerprint:
            raise StateError(
                explain(
                    "checkpoint",
                    "it must be of the same data and settings.",
                    expected=self.fingerprint,
                    got=f"{fingerprint} in {self.path}",
                    hint="another path, or delete the file to begin anew",
                )
            )
        try:
            state: State = _put_together(header["state"], arrays)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise self._no_checkpoint(error) from error
        return state

    def _no_checkpoint(self, error: Exception) -> StateError:
        got = f"{self.path}: {type(error).__name__}: {error}"
        return StateError(explain("checkpoint", "the file must be a checkpoint.", got=got, hint="another path"))

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)


def _take_apart(value: Any, arrays: dict[str, Any]) -> Any:
    """``value`` as JSON; its arrays are put into ``arrays`` under numbered names."""
    if isinstance(value, dict):
        return {"of": {str(key): _take_apart(one, arrays) for key, one in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [_take_apart(one, arrays) for one in value]}
    if isinstance(value, np.ndarray):
        name = f"array{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return {"float": value.hex()}  # exact, also for infinity and NaN
    if value is None or isinstance(value, (bool, int, str)):
        return {"plain": value}
    raise StateError(explain("checkpoint", "a state holds numbers, strings and arrays.", got=type(value).__name__))


def _put_together(tree: Any, arrays: dict[str, Any]) -> Any:
    ((kind, value),) = tree.items()
    if kind == "of":
        return {key: _put_together(one, arrays) for key, one in value.items()}
    if kind == "list":
        return [_put_together(one, arrays) for one in value]
    if kind == "array":
        return arrays[value]
    return float.fromhex(value) if kind == "float" else value
