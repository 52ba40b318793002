"""The noise of gates of which some are gone: what is left draws what it would have drawn among all."""

from __future__ import annotations

import torch
from torch import Tensor

from l0hooks._torch.memory import fresh
from l0hooks.gates.random import Stream


class SelectedStream:
    """The numbers of a stream at some positions along the last axis.

    Parameters
    ----------
    stream : Stream
        For all ``count`` positions.
    count : int
    positions : Tensor, int64, shape (left,)

    Examples
    --------
    >>> from l0hooks.gates.random import stream
    >>> every = stream(0, 4, torch.device("cpu")).uniform_(torch.empty(4))
    >>> some = SelectedStream(stream(0, 4, torch.device("cpu")), 4, torch.tensor([1, 3]))
    >>> torch.equal(some.uniform_(torch.empty(2)), every[[1, 3]])
    True
    """

    def __init__(self, stream: Stream, count: int, positions: Tensor) -> None:
        self._stream = stream
        self._count = count
        self._positions = positions

    def uniform_(self, out: Tensor) -> Tensor:
        """Fill ``out``, of which the last axis is that of the positions."""
        return out.copy_(self._stream.uniform_(self._whole(out)).index_select(-1, self._positions))

    def logistic_(self, out: Tensor, scale: float) -> Tensor:
        """Fill ``out`` with ``scale · logit u``."""
        return out.copy_(self._stream.logistic_(self._whole(out), scale).index_select(-1, self._positions))

    def _whole(self, out: Tensor) -> Tensor:
        return fresh(torch.Size((*out.shape[:-1], self._count)), out.dtype, out.device)
