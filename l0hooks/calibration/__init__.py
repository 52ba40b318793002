"""Survey calibration: few households, non-negative bounded weights, thousands of targets."""

from l0hooks.calibration.calibrator import Calibrator
from l0hooks.calibration.matrix import NamedMatrix
from l0hooks.calibration.progress import Update
from l0hooks.calibration.report import write_report
from l0hooks.calibration.result import CalibrationResult
from l0hooks.calibration.targets import CalibrationWarning

__all__ = ["CalibrationResult", "CalibrationWarning", "Calibrator", "NamedMatrix", "Update", "write_report"]
