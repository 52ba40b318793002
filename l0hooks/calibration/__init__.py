"""Survey calibration: few households, non-negative bounded weights, thousands of targets."""

from l0hooks.calibration.calibrator import Calibrator
from l0hooks.calibration.data.margins import Margins, margins
from l0hooks.calibration.data.matrix import NamedMatrix
from l0hooks.calibration.data.targets import CalibrationWarning
from l0hooks.calibration.fit.progress import Update
from l0hooks.calibration.output.html_report import write_report
from l0hooks.calibration.output.integers import integer_weights
from l0hooks.calibration.output.result import CalibrationResult

__all__ = [
    "CalibrationResult",
    "CalibrationWarning",
    "Calibrator",
    "Margins",
    "NamedMatrix",
    "Update",
    "integer_weights",
    "margins",
    "write_report",
]
