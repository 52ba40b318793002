"""Estimators with exactly k features, for scikit-learn's pipelines (extra ``sklearn``)."""

from l0hooks.errors import import_extra

import_extra("sklearn", extra="sklearn", where="l0hooks.sklearn")

from l0hooks.sklearn.classifier import L0Classifier  # noqa: E402  only once scikit-learn is there
from l0hooks.sklearn.regressor import L0Regressor  # noqa: E402
from l0hooks.sklearn.selector import L0FeatureSelector  # noqa: E402
from l0hooks.sklearn.subset.results import Subset, SubsetPath  # noqa: E402

__all__ = ["L0Classifier", "L0FeatureSelector", "L0Regressor", "Subset", "SubsetPath"]
