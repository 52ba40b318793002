"""Estimators for scikit-learn; needs the extra ``sklearn``."""

from __future__ import annotations

from l0hooks.sklearn.selector import L0FeatureSelector

__all__ = ["L0FeatureSelector"]
