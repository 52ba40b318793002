"""Every public name stands on a reference page, and says what it takes, gives, refuses, and how it is used."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
INNER = ("attach", "calibration", "export", "gates", "select", "sklearn", "structure", "training")
PACKAGES = ("l0hooks", *(f"l0hooks.{name}" for name in INNER))
MODULES = ("l0hooks.plots", "l0hooks.schedules", "l0hooks.errors", "l0hooks.gates.hard_concrete")
SHAPED = re.compile(r"shape|broadcast|as `|of this|scalar|sequence|dtype of")


def identifiers() -> list[str]:
    """What the pages ask mkdocstrings for."""
    pages = [*(DOCS / "reference").glob("*.md"), *DOCS.glob("*.md")]
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def resolve(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(resolve(module), attribute)


def members(module: str) -> Iterator[str]:
    for name, value in vars(importlib.import_module(module)).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module and callable(value):
            yield f"{module}.{name}"


def is_documented_object(value: object) -> bool:
    return inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)) if callable(value) else False


def public() -> dict[str, Any]:
    """Names at the doors, those of modules that are documented whole, and what the pages add."""
    names = [f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__]
    names += [name for module in MODULES for name in members(module)] + identifiers()
    found = {name: resolve(name) for name in names}
    return {name: value for name, value in found.items() if is_documented_object(value)}


PUBLIC = public()


def sections(value: object) -> dict[str, str]:
    """The sections of a numpydoc docstring; the first part is ""."""
    parts = re.split(r"^(\w+)\n-+\n", inspect.getdoc(value) or "", flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(section: str) -> dict[str, str]:
    """Of a section of parameters: the type of each, by its name."""
    found = {}
    for names, kind in re.findall(r"^(\S[^:\n]*?)(?: ?: (.*))?$", section, re.MULTILINE):
        found |= {name.strip(" *"): kind for name in names.split(",")}
    return found


def arguments(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: one for name, one in parameters.items() if name not in ("self", "cls") and not name.startswith("_")}


def raises(function: Callable[..., Any]) -> bool:
    """Whether it raises errors itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return False
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def said_of_all(value: Any) -> str:
    """What a module that is documented whole says of all of its functions."""
    said = inspect.getdoc(inspect.getmodule(value)) or ""
    return said if "Every function takes" in said and value.__module__ in MODULES else ""


PROTOCOLS = tuple(value for value in PUBLIC.values() if getattr(value, "_is_protocol", False))


def lacks(name: str, value: Any) -> Iterator[str]:
    """What a docstring should say and does not."""
    said = sections(value)
    if not said[""].strip():
        yield "a first line"
    if ">>>" not in said.get("Examples", ""):
        yield "an example that runs"
    if "+SKIP" in said.get("Examples", ""):
        yield "an example that is not skipped"
    if inspect.isclass(value):
        made = [function for n in ("__init__", "__post_init__") if (function := vars(value).get(n))]
        plain = issubclass(value, Exception) or value in PROTOCOLS or not made
        made, taken = ([], {}) if plain else (made, arguments(value))
        listed = entries(said.get("Parameters", "") + said.get("Attributes", ""))
    else:
        made, taken, listed = [value], arguments(value), entries(said.get("Parameters", ""))
        if said_of_all(value):
            taken = {name: one for name, one in taken.items() if f"``{name}``" not in said_of_all(value)}
            said["Returns"] = said_of_all(value)
        returned = inspect.signature(value).return_annotation
        if returned not in (None, "None") and not {"Returns", "Yields"} & said.keys():
            yield "what it returns"
        if "Tensor" in str(returned) and not SHAPED.search(said.get("Returns", "")):
            yield "the shape of what it returns"
    for parameter, one in taken.items():
        if parameter not in listed:
            yield f"the parameter {parameter}"
        elif "Tensor" in str(one.annotation) and not SHAPED.search(listed[parameter]):
            yield f"the shape of {parameter}"
    if any(map(raises, made)) and "Raises" not in said:
        yield "what it raises"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented_whole(name: str) -> None:
    missing = list(lacks(name, PUBLIC[name]))
    assert not missing, f"{name} lacks {', '.join(missing)}"


def test_every_public_name_stands_on_a_reference_page() -> None:
    pages = identifiers()
    shown = [PUBLIC.get(page) for page in pages]
    for name, value in PUBLIC.items():
        on_page = {name.rpartition(".")[0], value.__module__} & set(pages) or any(value is one for one in shown)
        assert on_page, f"::: {name} is missing from docs/reference"


def test_every_public_method_says_what_it_does() -> None:
    for name, value in PUBLIC.items():
        for method, member in vars(value).items() if inspect.isclass(value) else ():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not method.startswith("_") and inspect.isfunction(function):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"
