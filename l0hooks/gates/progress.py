"""``Progress``: how far the schedule of a budget has come."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from l0hooks.errors import L0HooksWarning, explain


@dataclass(frozen=True)
class Progress:
    """How far the schedule of a budget has come.

    Attributes
    ----------
    step, steps : int or float
        Steps taken, and steps until the schedule ends.
    unit : str
        What sizes count; memory in bytes.
    kept, target, whole : float
        The size that evaluation keeps now, the size to reach, and the size with all gates open.
    cut : int
        Parameters that were cut out of the model while it trained.

    Examples
    --------
    >>> print(Progress(step=20, steps=1000, unit="params", kept=3000.0, target=500.0, whole=5000.0))
    step 20 of 1,000, 3,000 of 5,000 params kept, the target is 500
    """

    step: int
    steps: float
    unit: str
    kept: float
    target: float
    whole: float
    cut: int = 0

    @property
    def missed(self) -> bool:
        """Whether the schedule has not ended and the target is not reached."""
        return self.step < self.steps and self.kept > self.target

    def __str__(self) -> str:
        sizes = f"{self.kept:,.0f} of {self.whole:,.0f} {_noun(self.unit)} kept, the target is {self.target:,.0f}"
        return f"step {self.step:,} of {self.steps:,}, {sizes}"


def warn_if_tied(where: str, ties: tuple[int, int]) -> None:
    """Warn if so many gates that stay, and so many of the others, have equal log-odds: their order has decided."""
    kept, lost = ties
    if kept:
        text = explain(
            where,
            "gates with equal log_alpha cannot be ranked: of these the first stay.",
            expected="different log_alpha where the largest are chosen",
            got=f"{kept + lost:,} gates that are equal, of which {kept:,} stay",
            hint="train the gates first",
        )
        warnings.warn(text, L0HooksWarning, stacklevel=4)


def unfinished(where: str, found: Sequence[Progress]) -> str | None:
    """The text of a warning that schedules have not ended and targets are missed; None if there are none."""
    early = [one for one in found if one.missed]
    if not early:
        return None
    return explain(
        where,
        "the schedule of a budget has not ended.",
        expected="; ".join(f"{one.target:,.0f} {_noun(one.unit)} after {one.steps:,} steps" for one in early),
        got="; ".join(f"{one.kept:,.0f} {_noun(one.unit)} at step {one.step:,}" for one in early),
        hint="train on, or l0hooks.finish_budget(model), which fixes the target's size now",
    )


def _noun(unit: str) -> str:
    return "bytes" if unit == "memory" else unit
