"""``LatencyTable``: what the layers of a model take at several widths on one device."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l0hooks._files import replacing, typed
from l0hooks.errors import InvalidValueError, explain

Times = tuple[tuple[int, int, float], ...]  # inputs, outputs, microseconds
WIDTHS = (1.0, 0.7, 0.4, 0.15)  # shares of the members at which a layer is timed, along each axis
_LONGEST_NAME = 48


@dataclass(frozen=True)
class LayerTimes:
    """The times of one layer, or of several that are alike: a + b·inputs + c·outputs + d·inputs·outputs.

    Attributes
    ----------
    names : tuple of str
        The layers; one name for each call.
    kind : str
        Their type.
    inputs, outputs : int
        The lengths of the axes that gates shorten; 0 where they shorten none.
    times : tuple of (int, int, float)
        Lengths of the two axes, and microseconds, the whole layer first.
    terms : (float, float, float, float), >= 0, microseconds
        a, b, c and d, fitted to ``times`` by least squares of relative errors.
    written : int
        Numbers that the layer writes for each of its outputs.
    measured : bool
        Whether smaller widths were timed; else the time is taken to be proportional to them.

    Examples
    --------
    >>> times = ((0, 8, 10.0), (0, 4, 6.0))
    >>> layer = LayerTimes(("0",), "Linear", 0, 8, times, (2.0, 0.0, 1.0, 0.0), written=3, measured=True)
    >>> layer.at(0, 6), layer.error
    (8.0, 0.0)
    """

    names: tuple[str, ...]
    kind: str
    inputs: int
    outputs: int
    times: Times
    terms: tuple[float, float, float, float]
    written: int
    measured: bool

    def at(self, inputs: float, outputs: float) -> float:
        """The fitted microseconds at these lengths."""
        a, b, c, d = self.terms
        return a + b * inputs + c * outputs + d * inputs * outputs

    @property
    def error(self) -> float:
        """The largest relative difference between fit and readings."""
        return max(abs(self.at(i, o) / seconds - 1) for i, o, seconds in self.times)


@dataclass(frozen=True)
class LatencyTable:
    """What the layers of a model take at several widths on one device; ``print`` shows it.

    :func:`latency_table` measures it, and so does a budget in time, whose rule keeps it as ``rule.table``.

    Attributes
    ----------
    device : str
    threads : int
        Of torch, on the CPU.
    whole : float, > 0, microseconds
        The whole model.
    layers : tuple of LayerTimes
    each_written : float, >= 0, microseconds
        What every number that a layer writes costs outside of the layers, in activations and sums: the model cut to
        half its members told.

    Examples
    --------
    >>> import tempfile
    >>> times = ((0, 8, 10.0), (0, 4, 6.0))
    >>> layer = LayerTimes(("0",), "Linear", 0, 8, times, (2.0, 0.0, 1.0, 0.0), written=3, measured=True)
    >>> table = LatencyTable("cpu", 1, 25.0, (layer,))
    >>> table.rest
    15.0
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table.save(f"{folder}/times.json")
    ...     LatencyTable.load(f"{folder}/times.json") == table
    True
    """

    device: str
    threads: int
    whole: float
    layers: tuple[LayerTimes, ...]
    each_written: float = 0.0

    @property
    def rest(self) -> float:
        """Microseconds of the whole that none of the layers takes, negative if they take more alone than in it."""
        return self.whole - sum(len(layer.names) * layer.at(layer.inputs, layer.outputs) for layer in self.layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table that :meth:`save` has written.

        Raises
        ------
        InvalidValueError
            If the file holds anything else.
        """
        where = f"LatencyTable.load({str(path)!r})"
        try:
            plain = json.loads(Path(path).read_text())
        except ValueError as error:
            text = explain(where, "the file must be one that LatencyTable.save has written.", got=f"no JSON: {error}")
            raise InvalidValueError(text) from error
        return typed(cls, plain, where)

    def __str__(self) -> str:
        on = self.device + (f", {self.threads} thread{'s' * (self.threads != 1)}" if self.device == "cpu" else "")
        head = f"microseconds on {on}: the model {self.whole:,.0f}, of which {self.rest:,.0f} outside the layers below"
        columns = ("layer", "in", "out", *(f"{share:.0%}" for share in WIDTHS), "fit within")
        rows = [columns, *(_row(layer) for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([head, *(line.rstrip() for line in lines)])


def _row(layer: LayerTimes) -> tuple[str, ...]:
    """Times where both axes have the same share."""
    more = len(layer.names) - 1
    name = layer.names[0] if len(layer.names[0]) <= _LONGEST_NAME else f"…{layer.names[0][-_LONGEST_NAME:]}"
    name += f" ({layer.kind})" + (f" and {more} more" if more else "")
    step = len(WIDTHS) + 1 if len(layer.times) > len(WIDTHS) else 1
    times = [f"{microseconds:,.0f}" for _, _, microseconds in layer.times[::step]]
    times += ["–"] * (len(WIDTHS) - len(times))
    fit = f"{layer.error:.0%}" if layer.measured else "not timed"
    return name, *(f"{n:,}" if n else "–" for n in (layer.inputs, layer.outputs)), *times, fit


def fitted(times: Times) -> tuple[float, float, float, float]:
    """Non-negative a, b, c and d of a + b·inputs + c·outputs + d·inputs·outputs with the least relative errors.

    Examples
    --------
    >>> [round(term, 3) for term in fitted(tuple((i, o, 5.0 + 2 * i * o) for i in (4, 2) for o in (6, 3)))]
    [5.0, 0.0, 0.0, 2.0]
    """
    from scipy.optimize import nnls  # slow to import

    table = np.array(times, np.float64)
    inputs, outputs, readings = table.T
    columns = np.stack([np.ones_like(inputs), inputs, outputs, inputs * outputs], axis=1)
    scale = np.maximum(columns.max(0), 1.0)
    found, _ = nnls(columns / scale / readings[:, None], np.ones_like(readings))
    a, b, c, d = (found / scale).tolist()
    return a, b, c, d


def proportional(times: Times) -> tuple[float, float, float, float]:
    """Terms of a time in proportion to both lengths, from the whole layer's.

    Examples
    --------
    >>> proportional(((0, 8, 16.0),))
    (0.0, 0.0, 2.0, 0.0)
    """
    inputs, outputs, whole = times[0]
    places: Sequence[float] = (whole / (max(inputs, 1) * max(outputs, 1)), 0.0)
    place = bool(inputs) + 2 * bool(outputs)
    a, b, c, d = (places[place != number] for number in range(4))
    return a, b, c, d
