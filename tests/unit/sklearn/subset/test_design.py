"""Checks of a design matrix and its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from l0hooks.errors import InvalidValueError
from l0hooks.sklearn.subset.design import Design


@pytest.mark.parametrize(
    ("weight", "message"),
    [(np.ones(3), "one weight for each row"), (-np.ones(4), "not negative"), (np.zeros(4), "not all zero")],
)
def test_invalid_weights_are_refused(weight: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        Design(np.eye(4), weight)


def test_a_design_is_a_matrix() -> None:
    with pytest.raises(InvalidValueError, match="must be a matrix"):
        Design(np.ones(3))
