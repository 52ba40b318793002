"""The exceptions a user can catch; every one is also the built-in exception it resembles."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class L0HooksError(Exception):
    """Base class of every error that l0hooks raises on purpose."""


class InvalidValueError(L0HooksError, ValueError):
    """A value is outside the range where the mathematics holds."""


class SpecError(L0HooksError, ValueError):
    """A gate specification or pattern does not fit the model it is given for."""


class UnsupportedModuleError(L0HooksError, TypeError):
    """A module or tensor of a kind that cannot carry a gate."""


class StateError(L0HooksError, RuntimeError):
    """The operation does not fit what happened to the model before."""


class MissingExtraError(L0HooksError, ImportError):
    """An optional package is needed and not installed."""


def explain(where: str, must: str, *, expected: object = None, got: object = None, hint: str | None = None) -> str:
    """One message in the house's form: where, what must hold, expected, got, what to try.

    Examples
    --------
    >>> print(explain("Gate", "shape must be positive.", expected="> 0", got=0))
    Gate: shape must be positive.
      expected: > 0
      got: 0
    """
    lines = [f"{where}: {must}"]
    if expected is not None:
        lines.append(f"  expected: {expected}")
    if got is not None:
        lines.append(f"  got: {got}")
    if hint is not None:
        lines.append(f"  try: {hint}")
    return "\n".join(lines)


def near_names(name: str, known: Iterable[str], *, limit: int = 4) -> str:
    """The known names that look most like ``name``, ready for the ``try:`` line of a message.

    Examples
    --------
    >>> near_names("layr1.conv", ["layer1.conv", "fc"])
    "did you mean 'layer1.conv'?"
    """
    names = list(known)
    if not names:
        return "there is none to choose from"
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    if close:
        return "did you mean " + ", ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(n) for n in names[:8])
    return f"one of {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
