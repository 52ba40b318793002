"""Which gates stay under a budget: the largest log-odds that fit into its size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from l0hooks._torch.tensors import is_sharded, version, whole
from l0hooks.gates.gate import Gate
from l0hooks.gates.optimizer_hooks import steps_taken
from l0hooks.training.blocks import largest_blocks
from l0hooks.training.closing import ClosedGates
from l0hooks.training.size import Size, fitting


class FittingSupport:
    """The support of several arrays of gates, kept with each as ``mask``, and once it is fixed as ``held``.

    Parameters
    ----------
    gates : sequence of Gate
    size : Size
        By the numbers of gates that stay in each array.
    min_keep : int, >= 0
        How many of each array stay at the least.
    closed : ClosedGates, optional
        Gates that never stay.

    Attributes
    ----------
    counts : sequence of int or None
        Once this is known, how many gates of each array stay, whatever size is allowed.
    """

    counts: Sequence[int] | None = None

    def __init__(self, gates: Sequence[Gate], size: Size, min_keep: int, closed: ClosedGates | None = None) -> None:
        self._gates = gates
        self._size = size
        self._min_keep = min_keep
        self._closed = closed
        self._key: tuple[object, ...] = ()
        self._sharded = False

    def state(self, step: int, *, fixed: bool) -> tuple[object, ...]:
        """What the masks and, once they are fixed, the values depend on."""
        steps = None if fixed else steps_taken()  # fused optimisers leave no version
        sharded = self.is_sharded()  # gathering and freeing change versions and addresses, not values
        return (step, steps, *(() if sharded else map(_state_of, self._gates)))

    def is_of(self, state: tuple[object, ...]) -> bool:
        """Whether the gates hold the masks of ``state``."""
        return state == self._key and self._gates[0].mask is not None

    def update(self, state: tuple[object, ...], allowed: float, *, fixed: bool) -> None:
        """Give every gate its mask for the size ``allowed``, and its final values if the support is fixed."""
        with torch.inference_mode(False), torch.no_grad():  # training will use them, too
            for gate, mask in zip(self._gates, self.masks(allowed), strict=True):
                gate.mask = mask
            self._key = state  # before the values, which ask for the support
            for gate in self._gates:
                gate.held = gate.value() if fixed else None

    def is_sharded(self) -> bool:
        """Whether ``fully_shard`` has spread the gates; it stays so while they are gathered."""
        self._sharded = self._sharded or any(is_sharded(gate.log_alpha) for gate in self._gates)
        return self._sharded

    @torch.no_grad()
    def masks(self, allowed: float) -> list[Tensor]:
        """The largest log-odds that fit into a size, ``min_keep`` of every array first; of equal ones the first.

        Returns
        -------
        list of Tensor, boolean, each of the shape and on the device of its array
        """
        device = self._gates[0].log_alpha.device
        arrays = [whole(gate.log_alpha.detach()).flatten() for gate in self._gates]
        if self.counts is not None:
            chosen = [_first_largest(a, n) for a, n in zip(arrays, self.counts, strict=True)]
            return [m.view(g.log_alpha.shape) for m, g in zip(chosen, self._gates, strict=True)]
        if self._size.sets is not None:
            return self._in_blocks(arrays, allowed)
        rank = torch.cat([a.to(device) for a in arrays])
        known = [a.double().cpu().numpy() for a in arrays] if self._size.lists else None
        least = self._size.least(self._min_keep, known).tolist()
        for part, n in zip(torch.split(rank, [len(a) for a in arrays]), least, strict=True):
            part[_first_largest(part, int(n))] = torch.inf
        order = rank.argsort(descending=True, stable=True).cpu().numpy()
        stays = np.zeros(len(order), np.bool_)
        if self._closed is not None:
            order = order[~torch.cat([mask.flatten().cpu() for mask in self._closed.masks]).numpy()[order]]
        array_of = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])[order]
        stays[order[fitting(self._size, array_of, allowed)]] = True
        masks = torch.split(torch.from_numpy(stays), [len(a) for a in arrays])
        return [m.view(g.log_alpha.shape).to(g.log_alpha.device) for m, g in zip(masks, self._gates, strict=True)]

    def _in_blocks(self, arrays: Sequence[Tensor], allowed: float) -> list[Tensor]:
        closed = [torch.zeros(len(a), dtype=torch.bool) for a in arrays] if self._closed is None else self._closed.masks
        masks = largest_blocks(
            self._size,
            [a.double().cpu().numpy() for a in arrays],
            [mask.flatten().cpu().numpy() for mask in closed],
            allowed,
            self._min_keep,
        )
        return [
            torch.from_numpy(m).view_as(g.log_alpha).to(g.log_alpha.device)
            for m, g in zip(masks, self._gates, strict=True)
        ]

    @torch.no_grad()
    def ties(self, masks: Sequence[Tensor]) -> tuple[int, int]:
        """How many gates have the log-odds of one that is decided otherwise, of those that stay and of the others."""
        device = self._gates[0].log_alpha.device
        rank = torch.cat([whole(gate.log_alpha.detach()).flatten().to(device) for gate in self._gates])
        stays = torch.cat([mask.flatten().to(device) for mask in masks])
        kept, lost = rank[stays], rank[~stays]
        return int(torch.isin(kept, lost).sum()), int(torch.isin(lost, kept).sum())


def _first_largest(values: Tensor, count: int) -> Tensor:
    """Which are the ``count`` largest, of equal ones the first; ``topk`` takes any of these."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    if count:
        found = values.topk(count)
        chosen[found.indices] = True
        equal = values == found.values[-1]
        taken = int((chosen & equal).sum())
        chosen[equal] = False
        chosen[equal.nonzero().flatten()[:taken]] = True
    return chosen


def _state_of(gate: Gate) -> tuple[object, ...]:
    """What the support and the final values depend on."""
    found = gate.log_alpha
    changes = None if found.is_inference() else version(found)
    return changes, found.data_ptr(), found.device, gate.temperature, gate.estimator


@torch.no_grad()
def choose_at_once(gates: Sequence[Gate], masks: Sequence[Tensor]) -> None:
    """Open the gates of ``masks`` to exactly 1 and close all others, **in place**; the order of both is kept."""
    for gate, stays in zip(gates, masks, strict=True):
        location = gate.log_alpha.nan_to_num(posinf=3e38, neginf=-3e38)
        order = torch.sigmoid((location - location.median()) / location.std(correction=0).clamp(min=1e-6))
        family, temperature = gate.family, gate.temperature
        shut, wide = (family.start_keep_prob(p, temperature) for p in (1e-6, 1 - 1e-6))
        while float(family.median(torch.tensor(wide), temperature)) < 1:
            wide += abs(wide) / 2 + 1
        gate.log_alpha.copy_(torch.where(stays, wide + order, shut - 1 + order))
