"""What the last stage finds, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from l0hooks.calibration.fit.stage import Selection
from l0hooks.calibration.numerics.certificate import PROGRAMME_ENTRIES
from l0hooks.calibration.numerics.columns import Floats

Objective = Literal["auto", "least_squares", "distance"]
Verdict = Literal["met", "impossible", "unknown"]


@dataclass(frozen=True)
class PolishLimits:
    """When the polish ends, and what it counts as converged.

    Attributes
    ----------
    iterations : int, > 0
        Conjugate gradient steps of a least-squares fit, before dense factors are made.
    distance_from : float, > 0
        Above this many units per target, the nearest weights are searched for without a least-squares fit first.
    violation : float
        The largest relative norm of the projected gradient that counts as converged; the tolerance, if that is smaller.
    gap : float
        The largest relative duality gap that counts as converged. At 1e-3 three digits of the distance are right.
    programme_entries : int, >= 0
        Matrix entries up to which a linear programme may decide whether the targets can be met.
    """

    iterations: int = 400
    distance_from: float = 4.0
    violation: float = 1e-6
    gap: float = 1e-3
    programme_entries: int = PROGRAMME_ENTRIES


@dataclass(frozen=True)
class Polished:
    """Weights on a selection, and what is known about them.

    Attributes
    ----------
    selection : Selection
    misses : float64, shape (Q,)
        Scaled, from the matrix as it was given, in float64.
    error : float
        Mean \\|relative error\\| over the targets.
    loss : float
        ½ Σ dist².
    deff : float
        Kish's design effect of the units' weights, k Σw² / (Σw)².
    objective : "least_squares" or "distance"
        What was minimised.
    feasible : bool
        Whether every target is met: by the matrix as it was given, in float64, with a relative error within the
        tolerance.
    conflict : float64, shape (Q,), or None
        Multipliers which prove that these units cannot meet all targets: those that are not zero contradict each other.
    converged : bool
        Whether the optimum is certified, whatever the targets.
    certificate : float
        The relative norm of the projected gradient, or the relative duality gap.
    reason : str
    """

    selection: Selection
    misses: Floats
    error: float
    loss: float
    deff: float
    objective: str
    feasible: bool
    conflict: Floats | None
    converged: bool
    certificate: float
    reason: str

    @property
    def verdict(self) -> Verdict:
        """What is known about whether these units can meet all targets."""
        return "met" if self.feasible else "unknown" if self.conflict is None else "impossible"
