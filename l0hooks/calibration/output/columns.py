"""The columns of the tables of weights and targets, without pandas."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from l0hooks.calibration.data.inputs import Inputs
from l0hooks.calibration.numerics.columns import Floats


def weight_columns(inputs: Inputs, weights: Floats) -> dict[str, Any]:
    """Weight, design weight and their ratio for every household; NaN for design weights of zero."""
    design = inputs.people.design
    ratio = np.divide(weights, design, out=np.full(len(design), np.nan), where=design > 0)
    return {"weight": weights, "design_weight": design, "ratio": ratio}


def target_columns(inputs: Inputs, weights: Floats, estimates: Floats, relative_errors: Floats) -> dict[str, Any]:
    """What is asked of each target, what ``weights`` give, and how many households add to it."""
    points = bool((inputs.lower == inputs.upper).all())
    asked = {"value": inputs.lower} if points else {"lower": inputs.lower, "upper": inputs.upper}
    matrix = inputs.matrix
    filled = (matrix.data != 0).astype(np.int32)
    pattern = sparse.csr_array((filled, matrix.indices, matrix.indptr), shape=matrix.shape)
    group = {} if inputs.groups is None else {"group": list(inputs.groups)}
    return {
        **asked,
        "design_estimate": np.asarray(matrix.astype(np.float64, copy=False) @ inputs.people.design, np.float64),
        "estimate": estimates,
        "relative_error": relative_errors,
        **group,
        "support": np.asarray(pattern.sum(axis=1)).ravel(),
        "chosen": np.asarray(pattern @ (weights > 0).astype(np.int32)).ravel(),
        "reachable": inputs.reachable,
    }
