"""What a tracker records besides sizes: numbers that were measured elsewhere, and where they are written."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Protocol

from torch import Tensor

Number = int | float
Row = dict[str, Number]


class ScalarWriter(Protocol):
    """What a writer must do; ``torch.utils.tensorboard.SummaryWriter`` does.

    Examples
    --------
    >>> class Lines:
    ...     def add_scalar(self, tag, value, global_step):
    ...         if "l0hooks" not in tag:
    ...             print(global_step, tag, value)
    >>> from l0hooks import Gate, Tracker
    >>> _ = Tracker(Gate(4), unit="gates", writer=Lines()).log(loss=2.0)
    0 loss 2.0
    """

    def add_scalar(self, tag: str, value: float, global_step: int, /) -> object:
        """Write one number."""


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer, of Python or NumPy, and no boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is one real number."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())


def plain_numbers(metrics: Mapping[str, Any]) -> Row:
    """The metrics as Python's numbers."""
    plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
    return {name: int(value) if isinstance(value, Integral) else float(value) for name, value in plain.items()}
