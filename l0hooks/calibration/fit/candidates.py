"""What the solver is asked to do, and the chains of stages that it may try."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from l0hooks.calibration.fit.polished import Objective, Polished, PolishLimits
from l0hooks.calibration.fit.stage import Selection
from l0hooks.calibration.numerics.columns import shared
from l0hooks.calibration.numerics.dual import Distance
from l0hooks.calibration.numerics.problem import Problem

Method = Literal["auto", "gates", "greedy", "dense"]
Chain = tuple[str, ...]  # the stages of a candidate, one after the other
RANDOM_ONLY: Chain = ("random",)
RANDOM_WITH_SWAPS: Chain = ("random", "swaps")
GREEDY_WITH_SWAPS: Chain = ("greedy", "swaps")
GATES_WITH_SWAPS: Chain = ("gates", "prune", "swaps")
FROM_LARGER: Chain = ("path", "prune", "swaps")
PRICED: Chain = ("gates", "swaps")
ALL_UNITS: Chain = ("all",)
_SMALLEST_G = 1e-3  # of a chosen unit, as a share of n/K


@dataclass(frozen=True)
class SearchLimits:
    """Which starts of the search are tried, by the number of units; the defaults come from measurements.

    Attributes
    ----------
    gates : float, > 0
        Gates are tried up to this many units per target.
    greedy : float, > 0
        Greedy search is tried up to this many units per target.
    random : float, > 0
        Above this many units per target, a random selection is also tried without any search.
    every_start : int, >= 0
        Up to this many units, gates and greedy search are tried however many targets there are.
    """

    gates: float = 1.5
    greedy: float = 5.0
    random: float = 2.0
    every_start: int = 2000


@dataclass(frozen=True)
class Options:
    """What :class:`Solver` is to do.

    Attributes
    ----------
    keep : int, optional
        K, the number of units with a positive weight.
    l0 : float, > 0, optional
        The price of a unit, instead of ``keep``. With neither, all units are kept: plain calibration.
    method : "auto", "gates", "greedy" or "dense"
        "auto" runs all candidates that could be best; "dense" starts from a random selection and swaps, without gates.
    epochs : int, > 0
        Of the gates.
    objective, distance, tolerance, rescale_design
        As in :func:`polish`.
    random_state : int, >= 0
    patience : int, > 0, optional
        Gates (once their number is the final one) and swaps end after this many steps without a better error.
    search : SearchLimits
        Which starts are tried.
    polish : PolishLimits
        Limits of the last fit.
    """

    keep: int | None = None
    l0: float | None = None
    method: Method = "auto"
    epochs: int = 200
    objective: Objective = "auto"
    distance: Distance = "chi_square"
    tolerance: float = 1e-6
    rescale_design: bool = False
    random_state: int = 0
    patience: int | None = None
    search: SearchLimits = field(default_factory=SearchLimits)
    polish: PolishLimits = field(default_factory=PolishLimits)


@dataclass(frozen=True)
class Pending:
    """A candidate's selection before the polish.

    Attributes
    ----------
    name : str
    selection : Selection
    norm : float
        √Σ dist² after a short refit.
    error : float
        The mean relative error after that refit.
    """

    name: str
    selection: Selection
    norm: float
    error: float


@dataclass(frozen=True)
class Candidate:
    """One candidate's result.

    Attributes
    ----------
    name : str
        Its stages, joined by ``+``.
    polished : Polished
    """

    name: str
    polished: Polished


def random_selection(problem: Problem, keep: int, random_state: int) -> Selection:
    """``keep`` units at random, those that must stay among them, with one g for all."""
    rng = np.random.default_rng([random_state, 1])
    free = np.flatnonzero(~problem.kept)
    drawn = rng.choice(free, keep - (problem.size - len(free)), replace=False)
    units = np.sort(np.concatenate([np.flatnonzero(problem.kept), drawn]))
    return Selection(units, np.full(keep, problem.size / keep))


def with_floor(problem: Problem, keep: int | None) -> Problem:
    """``problem`` with a positive lower bound for all units if their number is fixed, else for those that must stay."""
    floor = np.minimum(_SMALLEST_G * problem.size / (problem.size if keep is None else keep), problem.high)
    needed = (problem.low <= 0) & (problem.kept | (keep is not None))
    return replace(problem, low=shared(np.where(needed, floor, problem.low)))


def planned(problem: Problem, options: Options, prunable: bool) -> list[tuple[str, ...]]:
    """The candidates, the likeliest to be best first."""
    if options.l0 is not None and not problem.kept.all():
        return [PRICED]
    if options.keep is None or options.keep == problem.size:
        return [ALL_UNITS]
    if options.keep == int(problem.kept.sum()):
        return [RANDOM_ONLY]
    single: dict[str, list[tuple[str, ...]]] = {
        "gates": [GATES_WITH_SWAPS],
        "greedy": [GREEDY_WITH_SWAPS],
        "dense": [RANDOM_WITH_SWAPS],
    }
    if options.method != "auto":
        return single[options.method]
    first = [FROM_LARGER] if prunable else []
    last = [RANDOM_ONLY] if options.keep > options.search.random * problem.rows else []
    if options.keep <= max(options.search.gates * problem.rows, options.search.every_start):
        return [*first, GREEDY_WITH_SWAPS, RANDOM_WITH_SWAPS, *last, GATES_WITH_SWAPS]
    also = [GREEDY_WITH_SWAPS] if options.keep <= options.search.greedy * problem.rows else []
    return [*first, RANDOM_WITH_SWAPS, *also, *last]
