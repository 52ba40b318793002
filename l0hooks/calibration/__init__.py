"""Survey calibration: exactly K households, non-negative bounded weights, thousands of targets."""

from l0hooks.calibration.calibrator import Calibrator

__all__ = ["Calibrator"]
