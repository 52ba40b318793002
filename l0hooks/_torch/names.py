"""Look up private names of torch, with a fallback for missing ones."""

from __future__ import annotations

from typing import NoReturn, TypeVar

import torch

T = TypeVar("T")


class MissingTorchNameError(RuntimeError):
    """This version of torch lacks a private name that a feature needs."""


def lookup(path: str, fallback: T) -> T:
    """``torch.<path>``, or ``fallback`` if this version of torch has no such name.

    Parameters
    ----------
    path : str
        Dotted, below ``torch``.
    fallback : object
        Used in its place; slower, or for fewer cases.

    Examples
    --------
    >>> lookup("_C._no_such_name", 3)
    3
    """
    found: object = torch
    for name in path.split("."):
        if name not in vars(found):
            return fallback
        found = vars(found)[name]
    return found  # type: ignore[return-value]  # the caller gives the type by the fallback


def refuse(path: str, feature: str) -> NoReturn:
    """Raise the error that ``feature`` needs ``torch.<path>``.

    Raises
    ------
    MissingTorchNameError
        Always.
    """
    raise MissingTorchNameError(
        f"{feature} needs torch.{path}.\n"
        f"  got: torch {torch.__version__}, which has no such name\n"
        "  try: a version of torch that l0hooks was tested with"
    )
