"""Gates of a budget that are closed for good: no draw opens them again, so that what they gate can be cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l0hooks.gates.gate import Gate
from l0hooks.training.size import Size

_SELDOM = 1e-3  # a gate that fewer draws than these open is closed for good
CLOSED = -30.0  # log-odds at which no draw opens a gate: P(z ≠ 0) < 1e-12


class ClosedGates:
    """Which gates are closed for good; their log-odds stay at -30.

    Parameters
    ----------
    gates : sequence of Gate
    size : Size
        By the numbers of gates that stay in each array.
    min_keep : int, >= 0
        How many of each array stay at the least.

    Attributes
    ----------
    masks : list of Tensor, boolean, the shapes of the gates

    Examples
    --------
    >>> import numpy as np
    >>> gate = Gate(3)
    >>> _ = gate.log_alpha.data.copy_(torch.tensor([2.0, -20.0, -9.0]))
    >>> closed = ClosedGates([gate], Size(np.array([3]), 0.0, np.ones(1), np.zeros((1, 1))), min_keep=2)
    >>> closed.close_seldom_open()
    >>> closed.masks[0].tolist(), gate.log_alpha.tolist()
    ([False, True, False], [2.0, -30.0, -9.0])
    """

    def __init__(self, gates: Sequence[Gate], size: Size, min_keep: int) -> None:
        self._gates = gates
        self._least = size.least(max(min_keep, 1)).astype(int).tolist()
        self._masks: list[Tensor] = []

    @property
    def masks(self) -> list[Tensor]:
        """Which gates are closed; read from the gates if these were cut since."""
        if [mask.shape for mask in self._masks] != [gate.log_alpha.shape for gate in self._gates]:
            self.restart()
        return self._masks

    def restart(self) -> None:
        """Read from the gates which are closed, as after a checkpoint was loaded."""
        self._masks = [gate.log_alpha.detach() <= CLOSED for gate in self._gates]

    @torch.no_grad()
    def close_seldom_open(self) -> None:
        """Close those that fewer than one draw in 1,000 opens."""
        masks = []
        for gate, least in zip(self._gates, self._least, strict=True):
            seldom = gate.keep_prob() < _SELDOM
            seldom[gate.log_alpha.topk(min(least, len(seldom))).indices] = False
            masks.append(seldom)
        self.close(masks)

    @torch.no_grad()
    def close(self, masks: Sequence[Tensor]) -> None:
        """Close these gates, too."""
        self._masks = [mine | more for mine, more in zip(self.masks, masks, strict=True)]
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Bring the log-odds of all that are closed back to -30, from where shifts and momentum moved them."""
        for gate, mask in zip(self._gates, self.masks, strict=True):
            gate.log_alpha.masked_fill_(mask, CLOSED)
