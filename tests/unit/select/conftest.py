"""Failed assertions of the laws are explained like those of tests."""

import pytest

pytest.register_assert_rewrite("item_gate_laws")
