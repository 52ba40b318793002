"""Optional packages, imported only where they serve."""

from __future__ import annotations

import importlib
from types import ModuleType

from l0hooks.errors import MissingExtraError, explain


def import_extra(package: str, *, extra: str, where: str) -> ModuleType:
    """``package``, or a module of one, or an error that names the package and the extra to install.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    name = package.partition(".")[0]
    try:
        importlib.import_module(name)
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != name:  # installed, but something it needs is not
            raise
        raise MissingExtraError(
            explain(where, f"the package {name!r} must be installed.", hint=f'pip install "l0hooks[{extra}]"')
        ) from error
