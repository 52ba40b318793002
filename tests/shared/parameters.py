"""Parameters of tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

OLDEST = (pytest.mark.slow, pytest.mark.oldest)  # of laws and zoo: slow, and run on the oldest torch, too


def slow(values: Iterable[Any]) -> list[Any]:
    """Values of one parameter that are left to the slow tests; the same test is fast for others of their kind."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
