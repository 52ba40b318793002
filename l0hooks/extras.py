"""Optional packages, imported only where they serve."""

from __future__ import annotations

import importlib
from types import ModuleType

from l0hooks.errors import MissingExtraError, explain


def import_extra(package: str, *, extra: str, where: str) -> ModuleType:
    """``package``, or an error that names the extra to install.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:  # installed, but something it needs is not
            raise
        raise MissingExtraError(
            explain(where, f"the package {package!r} must be installed.", hint=f'pip install "l0hooks[{extra}]"')
        ) from error
