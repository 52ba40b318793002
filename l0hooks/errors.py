"""The exceptions a user can catch; every one is also the built-in exception it resembles."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class L0HooksError(Exception):
    """Base class of every error that l0hooks raises on purpose.

    Examples
    --------
    >>> from l0hooks import Gate
    >>> try:
    ...     Gate(0)
    ... except L0HooksError as error:
    ...     print(error)
    Gate: every axis must be positive.
      expected: >= 1
      got: (0,)
    """


class InvalidValueError(L0HooksError, ValueError):
    """A value is outside the range where the mathematics holds.

    Examples
    --------
    >>> from l0hooks import Gate
    >>> Gate(4, temperature=-1.0)
    Traceback (most recent call last):
    l0hooks.errors.InvalidValueError: temperature: temperature must be positive.
      expected: > 0
      got: -1.0
    """


class SpecError(L0HooksError, ValueError):
    """A gate specification or pattern does not fit the model it is given for.

    Examples
    --------
    >>> import torch, l0hooks
    >>> l0hooks.sparsify(torch.nn.Sequential(torch.nn.Linear(4, 2)), {"1": "weight"})
    Traceback (most recent call last):
    l0hooks.errors.SpecError: sparsify: a pattern must match at least one module.
      got: '1', which matches none
      try: one of '0'
    """


class UnsupportedModuleError(L0HooksError, TypeError):
    """A module or tensor of a kind that cannot carry a gate.

    Examples
    --------
    >>> import torch, l0hooks
    >>> try:
    ...     l0hooks.sparsify(torch.nn.Sequential(torch.nn.LSTM(4, 4)), {"0": "weight"})
    ... except UnsupportedModuleError as error:
    ...     isinstance(error, TypeError)
    True
    """


class StateError(L0HooksError, RuntimeError):
    """The operation does not fit what happened to the model before.

    Examples
    --------
    >>> import torch, l0hooks
    >>> l0hooks.penalty(torch.nn.Linear(4, 2), l0=1.0)
    Traceback (most recent call last):
    l0hooks.errors.StateError: penalty: the model must hold gates.
      got: none
      try: sparsify(model, ...) first
    """


class MissingExtraError(L0HooksError, ImportError):
    """An optional package is needed and not installed.

    Examples
    --------
    >>> issubclass(MissingExtraError, ImportError)
    True
    """


def explain(where: str, must: str, *, expected: object = None, got: object = None, hint: str | None = None) -> str:
    """One message in the house's form: where, what must hold, expected, got, what to try.

    Parameters
    ----------
    where, must : str
        The call or argument, and what must hold of it.
    expected, got : object, optional
        Their ``str`` gets a line each.
    hint : str, optional
        What to try instead.

    Returns
    -------
    str

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

    Parameters
    ----------
    name : str
    known : iterable of str
    limit : int, > 0
        How many to name at the most.

    Returns
    -------
    str

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


def import_extra(package: str, *, extra: str, where: str) -> ModuleType:
    """An optional package, or a module of one, imported when it is needed.

    Parameters
    ----------
    package : str
        Dotted name.
    extra : str
        The extra of l0hooks that installs it.
    where : str
        The call that needs it, for the message.

    Returns
    -------
    module

    Raises
    ------
    MissingExtraError
        If it is not installed.

    Examples
    --------
    >>> import_extra("json.decoder", extra="examples", where="a call").__name__
    'json.decoder'
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
