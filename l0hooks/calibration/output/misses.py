"""The warning of a fit that ends otherwise than asked."""

from __future__ import annotations

import warnings

from l0hooks.calibration.data.frames import few
from l0hooks.calibration.data.targets import CalibrationWarning
from l0hooks.calibration.output.result import CalibrationResult
from l0hooks.errors import explain

_WHERE = "Calibrator.fit"


def warn_of_misses(result: CalibrationResult, tolerance: float, *, priced: bool) -> None:
    """Warn of targets that are missed, unless households had a price, which is paid in misses; or of no optimum.

    Parameters
    ----------
    result : CalibrationResult
    tolerance : float, > 0
        A target is met if its relative error is not larger.
    priced : bool
    """
    if result.converged:
        return
    if result.verdict == "met" or priced:
        message = explain(_WHERE, "the last fit should reach its optimum.", got=result.reason)
    else:
        named = f"; in conflict: {few(result.conflict)}" if result.conflict else ""
        message = explain(
            _WHERE,
            f"every target should be met within a relative error of {tolerance:g}.",
            got=f"{result.missed(tolerance)}; {result.reason}{named}",
            hint="target_report shows each target; more households, wider bounds, or intervals",
        )
    warnings.warn(message, CalibrationWarning, stacklevel=4)
