"""Sizes that stand in a config: arrays of gates that keep equally many, in multiples of a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from l0hooks.attach.walk import Gated
from l0hooks.errors import SpecError, explain, near_names
from l0hooks.structure.cost_form import Cubes
from l0hooks.training.budget import Budget
from l0hooks.training.size import Floats, Ints, Size, fitting

Bools = npt.NDArray[np.bool_]
_LAYER = "layer"


def in_blocks(size: Size, gated: Sequence[Gated], budget: Budget) -> Size:
    """``size`` with what ``budget`` says about equal numbers and multiples.

    Parameters
    ----------
    size : Size
        Of the gates of ``gated``.
    gated : sequence of Gated
    budget : Budget

    Returns
    -------
    Size

    Raises
    ------
    SpecError
        If a gate is on no coupled group, or ``round_to`` names a kind that no group has.
    """
    own = np.array([1 if one.coupled is None else one.coupled.group.multiple for one in gated], np.int64)
    if not budget.in_blocks:
        alone = tuple((number,) for number in range(len(gated)))
        return size if (own == 1).all() else replace(size, sets=alone, multiple=own)
    single = next((one.name for one in gated if one.coupled is None and one.layer is None), None)
    if single is not None:
        raise SpecError(
            explain(
                "Budget(uniform=..., round_to=...)",
                "members of coupled groups are counted, for they alone change a model's sizes.",
                expected='granularity "coupled"',
                got=f"other gates on {single!r}",
            )
        )
    kinds = [_LAYER if one.coupled is None else one.coupled.group.kind for one in gated]
    if isinstance(budget.round_to, Mapping):
        unknown = next((kind for kind in budget.round_to if kind not in kinds), None)
        if unknown is not None:
            known = tuple(dict.fromkeys(kinds))
            raise SpecError(
                explain(
                    "Budget(round_to=...)",
                    "each kind must be one that a group has.",
                    expected=" or ".join(map(repr, known)),
                    got=repr(unknown),
                    hint=near_names(str(unknown), known),
                )
            )
        multiple = [budget.round_to.get(kind, 1) for kind in kinds]
    else:
        multiple = [budget.round_to] * len(kinds)
    sets: dict[object, list[int]] = {}
    for number, (kind, count) in enumerate(zip(kinds, size.counts.tolist(), strict=True)):
        key = (kind, count) if budget.uniform and kind != _LAYER else number  # a block stays or goes by itself
        sets.setdefault(key, []).append(number)
    return replace(size, sets=tuple(map(tuple, sets.values())), multiple=np.lcm(np.array(multiple, np.int64), own))


def largest_blocks(
    size: Size, log_odds: Sequence[Floats], closed: Sequence[Bools], allowed: float, min_keep: int
) -> list[Bools]:
    """Which gates stay: the best members of each array, equally many within a set, as many blocks as fit into a size.

    A block is a multiple of members from every array of a set, the next best ones of each. Blocks are taken in the
    order of their mean log-odds.

    Parameters
    ----------
    size : Size
        With sets.
    log_odds : sequence of float64 arrays
    closed : sequence of bool arrays
        Gates that never stay.
    allowed : float
    min_keep : int, >= 0

    Returns
    -------
    list of bool arrays, of the shapes of ``log_odds``
    """
    orders = [np.argsort(np.where(c, np.inf, -a), kind="stable") for a, c in zip(log_odds, closed, strict=True)]
    sets = size.sets or ()
    widths = size.widths.tolist()
    least = size.least(min_keep, log_odds)
    ranks: list[Floats] = []
    for arrays in sets:
        width = widths[arrays[0]]
        there = min(len(log_odds[n]) - int(closed[n].sum()) for n in arrays) // width
        means = [log_odds[n][orders[n][: there * width]].reshape(there, width).mean(1) for n in arrays]
        rank = np.mean(means, axis=0) if there else np.empty(0)
        rank[: int(least[arrays[0]]) // width] = np.inf
        ranks.append(rank)
    set_of: Ints = np.repeat(np.arange(len(sets)), [len(rank) for rank in ranks])
    order = np.argsort(-np.concatenate(ranks), kind="stable") if ranks else np.empty(0, np.int64)
    chosen = order[fitting(_by_blocks(size, widths), set_of[order], allowed)]
    counts = np.bincount(set_of[chosen], minlength=len(sets))
    masks = [np.zeros(len(a), np.bool_) for a in log_odds]
    for arrays, count in zip(sets, counts, strict=True):
        for n in arrays:
            masks[n][orders[n][: int(count) * widths[n]]] = True
    return masks


def _by_blocks(size: Size, widths: Sequence[int]) -> Size:
    """The same size by the number of blocks of each set."""
    sets = size.sets or ()
    blocks = np.zeros((len(widths), len(sets)))
    for column, arrays in enumerate(sets):
        blocks[list(arrays), column] = [widths[n] for n in arrays]
    counts = np.array([size.counts[arrays[0]] // widths[arrays[0]] for arrays in sets], np.int64)
    square = blocks.T @ size.square @ blocks
    gates = {int(np.flatnonzero(blocks[layer])[0]): inner for layer, inner in size.cubes.dense(len(widths)).items()}
    cubes = Cubes.of_blocks({column: blocks.T @ inner @ blocks for column, inner in gates.items()})
    return Size(counts, size.constant, size.linear @ blocks, square, cubes=cubes)
