"""Which groups can be cut together, found in few tries."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence

from l0hooks.structure import ChannelGroup

Fault = Callable[[Sequence[int]], str]


class GroupSearch:
    """The groups that can be cut together, found by adding some at a time to those that can.

    Parameters
    ----------
    kinds : sequence
        The kind of each group: where the same code runs in many layers, often none of its groups can be cut.

    Attributes
    ----------
    good : list of int
    refused : dict from int to str
        The others, and why each cannot be added.
    """

    def __init__(self, kinds: Sequence[Hashable]) -> None:
        self._kinds = kinds
        self._looked_at: set[Hashable] = set()
        self.good: list[int] = []
        self.refused: dict[int, str] = {}

    def forgotten(self) -> list[int]:
        """The groups that were refused, which can be tried again."""
        numbers = list(self.refused)
        self.refused, self._looked_at = {}, set()
        return numbers

    def add(self, numbers: Sequence[int], fault: Fault, known: str = "") -> bool:
        """Add those that can be cut together with all that are good; whether these are all.

        Parameters
        ----------
        numbers : sequence of int
        fault : callable from numbers of groups to str
            Why they cannot be cut together; empty if they can.
        known : str
            Why these cannot be all, if that is known.
        """
        why = known or fault([*self.good, *numbers])
        kinds = {self._kinds[number] for number in numbers}
        if not why:
            self.good += numbers
        elif len(numbers) == 1:
            self.refused[numbers[0]] = why
        elif len(kinds) == 1 and not kinds <= self._looked_at:
            self._looked_at |= kinds
            self._add_of_one_kind(numbers, fault, why)
        else:
            numbers = sorted(numbers, key=lambda number: self._kinds.index(self._kinds[number]))
            half = len(numbers) // 2
            whole = self.add(numbers[:half], fault)
            self.add(numbers[half:], fault, why if whole else "")
        return not why

    def _add_of_one_kind(self, numbers: Sequence[int], fault: Fault, why: str) -> None:
        """Take the first and the last for the others, if both cannot be cut, and these not together."""
        first, *between, last = numbers
        ends = self.add([first], fault), self.add([last], fault)
        if between and not any(ends):
            why = fault([*self.good, *between])
            self.good += [] if why else between
            self.refused |= dict.fromkeys(between, why) if why else {}
        elif between:
            self.add(between, fault, why if all(ends) else "")


def kind_of(group: ChannelGroup) -> Hashable:
    """Equal for groups at the same place of layers with the same code."""
    return (
        group.kind,
        group.size,
        tuple((re.sub(r"\d+", "#", s.names[0]), s.shape, s.axis, s.reads) for s in group.sites),
    )
