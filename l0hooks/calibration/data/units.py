"""Targets that are probably in another unit than their rows of the matrix."""

from __future__ import annotations

import warnings

import numpy as np

from l0hooks.calibration.data.frames import few
from l0hooks.calibration.data.inputs import Inputs
from l0hooks.calibration.data.targets import CalibrationWarning
from l0hooks.errors import explain

_FAR = 10.0  # times what the other targets say of the design weights
_CLOSE = 3.0  # times the same: how far the others may be spread
_LEAST_OTHERS = 0.8  # share of the targets that must agree, before one that does not is named
_LEAST_TARGETS = 5


def warn_of_units(inputs: Inputs) -> None:
    """Warn of targets that differ by an order of magnitude from their design-weighted estimates, where others agree.

    One number for all, which the design weights may be wrong by, is no difference.

    Parameters
    ----------
    inputs : Inputs
    """
    estimates = np.asarray(inputs.matrix.astype(np.float64, copy=False) @ inputs.people.design, np.float64)
    middle = (inputs.lower + inputs.upper) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = middle / estimates
    usable = np.isfinite(ratios) & (ratios > 0) & (inputs.importance > 0)
    if usable.sum() < _LEAST_TARGETS:
        return
    usual = float(np.median(ratios[usable]))
    off = np.abs(np.log(np.where(usable, ratios, usual) / usual))
    far = off > np.log(_FAR)
    if not far.any() or (off[usable] <= np.log(_CLOSE)).mean() < _LEAST_OTHERS:
        return
    names = [inputs.targets.labels[int(place)] for place in np.flatnonzero(far)]
    place = int(off.argmax())
    message = explain(
        "y",
        "targets should have the units of their rows of M.",
        expected=f"about {usual * estimates[place]:,.6g} for {inputs.targets.labels[place]!r}, by the design weights",
        got=f"{middle[place]:,.6g}; an order of magnitude off: {few(names)}",
        hint="thousands instead of units? importance 0 leaves a target out",
    )
    warnings.warn(message, CalibrationWarning, stacklevel=4)
