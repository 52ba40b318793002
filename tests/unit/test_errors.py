"""The exceptions and the form of their messages."""

from __future__ import annotations

import pytest

from l0hooks import errors
from l0hooks.errors import L0HooksError, explain, near_names


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.InvalidValueError, ValueError),
        (errors.SpecError, ValueError),
        (errors.UnsupportedModuleError, TypeError),
        (errors.StateError, RuntimeError),
        (errors.MissingExtraError, ImportError),
    ],
)
def test_every_error_is_caught_as_ours_and_as_the_builtin_it_resembles(
    error: type[Exception], builtin: type[Exception]
) -> None:
    for caught in (L0HooksError, builtin):
        with pytest.raises(caught, match="why"):
            raise error("why")


def test_every_error_of_the_module_derives_from_the_base() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    warnings = [value for value in classes if issubclass(value, Warning)]
    assert (len(classes), len(warnings)) == (7, 1)
    assert all(issubclass(value, L0HooksError) for value in classes if value not in warnings)


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        ({}, []),
        ({"expected": "> 0"}, ["  expected: > 0"]),
        ({"got": 0}, ["  got: 0"]),
        ({"got": False, "hint": "True"}, ["  got: False", "  try: True"]),
        ({"hint": "c", "got": "b", "expected": "a"}, ["  expected: a", "  got: b", "  try: c"]),
    ],
    ids=str,
)
def test_a_message_has_a_line_for_each_part_that_is_given(parts: dict[str, object], lines: list[str]) -> None:
    assert explain("Gate", "it must hold.", **parts) == "\n".join(["Gate: it must hold.", *lines])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("layr1", ["layer1", "fc"], "did you mean 'layer1'?"),
        ("layer", ["layer12", "layer1", "head"], "did you mean 'layer1', 'layer12'?"),  # closest first
        ("xyz", ["layer1", "fc"], "one of 'layer1', 'fc'"),
        ("xyz", [f"n{i}" for i in range(8)], "one of 'n0', 'n1', 'n2', 'n3', 'n4', 'n5', 'n6', 'n7'"),
        ("xyz", (f"n{i}" for i in range(11)), "one of 'n0', 'n1', 'n2', 'n3', 'n4', 'n5', 'n6', 'n7' and 3 more"),
    ],
    ids=["one", "two", "none near", "eight", "generator of eleven"],
)
def test_near_names(name: str, known: list[str], expected: str) -> None:
    assert near_names(name, known) == expected


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (2, 2)])
def test_near_names_are_limited(limit: int | None, count: int) -> None:
    known = [f"layer{i}" for i in range(9)]
    hint = near_names("layer", known) if limit is None else near_names("layer", known, limit=limit)
    assert hint.count("'layer") == count
