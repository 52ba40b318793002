"""English text that every machine has: the docstrings of installed packages, as pairs of a summary and what follows."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator
from types import ModuleType

TRAINING = ("numpy", "pandas", "torch", "matplotlib", "sympy", "networkx", "transformers", "lightning")
JUDGING = ("scipy", "sklearn", "statsmodels")
Pair = tuple[str, str]
_MOST_MODULES, _MOST_PAIRS = 400, 4000  # of a package
_SKIPPED = re.compile(r"\.(tests|testing|_\w*|test_\w*|conftest)(\.|$)")
_NO_PROSE = ("Parameters", ".. ", ">>>", "See ")


def pairs(packages: tuple[str, ...]) -> list[Pair]:
    """(summary line, paragraph that follows) of the public classes, methods and functions of these packages.

    Packages that are not installed are left out.
    """
    found: dict[str, str] = {}
    for package in packages:
        own: dict[str, str] = {}
        for text in _docstrings(package):
            pair = _split(text)
            if pair is not None:
                own.setdefault(*pair)
            if len(own) == _MOST_PAIRS:
                break
        found = own | found
    return list(found.items())


def _modules(package: str) -> Iterator[ModuleType]:
    try:
        root = importlib.import_module(package)
    except ImportError:
        return
    yield root
    count = 1
    for info in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda _: None):
        if _SKIPPED.search(info.name):
            continue
        try:
            yield importlib.import_module(info.name)
        except (Exception, SystemExit):  # noqa: BLE001  # what a module needs, or does on import, is its own affair
            continue
        count += 1
        if count > _MOST_MODULES:
            return


def _docstrings(package: str) -> Iterator[str]:
    seen: set[int] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in _modules(package):
            for name, value in list(vars(module).items()):
                if name.startswith("_") or id(value) in seen:
                    continue
                seen.add(id(value))
                members = vars(value).items() if inspect.isclass(value) else ()
                for one in (value, *(member for key, member in members if not key.startswith("_"))):
                    text = inspect.getdoc(one) if callable(one) else None
                    if isinstance(text, str):
                        yield text


def _split(text: str) -> Pair | None:
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text, maxsplit=2)]
    if len(parts) > 2 and "(" in parts[0].split(" ")[0]:  # a signature stands first
        parts = parts[1:]
    if len(parts) < 2 or not 20 <= len(parts[0]) <= 200 or len(parts[1]) < 60 or parts[1].startswith(_NO_PROSE):
        return None
    return parts[0], parts[1][:400]
