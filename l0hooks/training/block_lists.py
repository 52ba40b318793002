"""Which arrays of gates are those of blocks in one list, and how many of them stay at the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l0hooks.attach.walk import Gated


@dataclass(frozen=True)
class BlockList:
    """The gates of the blocks of one list.

    Attributes
    ----------
    arrays : tuple of int
        The numbers of their arrays, which have one gate each.
    others : int
        How many entries of the list have no gates, and stay.
    floor : int
        How many entries stay at the least.

    Examples
    --------
    >>> BlockList((0, 1, 2), others=1, floor=1).least(2)
    1
    """

    arrays: tuple[int, ...]
    others: int
    floor: int

    def least(self, min_keep: int) -> int:
        """How many blocks with gates stay at the least, if ``min_keep`` entries of the list are to."""
        return min(max(max(min_keep, self.floor) - self.others, 0), len(self.arrays))


def block_lists(gated: Sequence[Gated]) -> tuple[BlockList, ...]:
    """The lists of blocks among the gates of a budget.

    Parameters
    ----------
    gated : sequence of Gated
    """
    found: dict[str, list[int]] = {}
    for number, one in enumerate(gated):
        if one.layer is not None:
            found.setdefault(one.layer.prefix + one.layer.block.owner, []).append(number)
    lists = []
    for arrays in found.values():
        layer = gated[arrays[0]].layer
        if layer is not None:
            mates = sum(block.owner == layer.block.owner for block in layer.plan.blocks)
            lists.append(BlockList(tuple(arrays), layer.block.among - mates, int(layer.block.list_stays)))
    return tuple(lists)
