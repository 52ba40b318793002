"""The exceptions that l0hooks raises. Each is also a built-in exception, such as ``ValueError``."""

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
    """A gate specification or pattern does not fit the model.

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
    """The operation does not fit the present state of the model.

    Examples
    --------
    >>> import torch, l0hooks
    >>> l0hooks.penalty(torch.nn.Linear(4, 2), l0=1.0)
    Traceback (most recent call last):
    l0hooks.errors.StateError: penalty: the model must hold gates.
      got: none
      try: sparsify(model, ...) first
    """


class L0HooksWarning(UserWarning):
    """Something ended otherwise than was asked for; the message names both.

    Examples
    --------
    >>> import warnings
    >>> from l0hooks import Budget, prune, sparsify
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> _ = sparsify(model, "weight", budget=Budget(keep=5, steps=100))
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = prune(model)
    >>> str(caught[0].message).splitlines()[:2]  # then the size and the step it has come to, and what to do
    ['prune: the schedule of a budget has not ended.', '  expected: 5 gates after 100 steps']
    """


class MissingExtraError(L0HooksError, ImportError):
    """An optional package is needed and not installed.

    Examples
    --------
    >>> issubclass(MissingExtraError, ImportError)
    True
    """


def explain(where: str, must: str, *, expected: object = None, got: object = None, hint: str | None = None) -> str:
    """The text of an error: where, what must hold, what was expected, what was given, and what to try.

    Parameters
    ----------
    where, must : str
        The call or argument, and what must hold of it.
    expected, got : object, optional
        Each adds a line with its ``str``.
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


def in_one_line(error: BaseException) -> str:
    """The type of an error and the first line of its message.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    str

    Examples
    --------
    >>> in_one_line(ValueError("no such size\\nlook closer"))
    'ValueError: no such size'
    """
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def near_names(name: str, known: Iterable[str], *, limit: int = 4) -> str:
    """The known names most similar to ``name``, as the ``try:`` line of a message.

    Parameters
    ----------
    name : str
    known : iterable of str
    limit : int, > 0
        The largest number of names.

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
    """Import an optional package, or a module of one.

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
        if error.name != name:  # the package is installed, but one of its dependencies is not
            raise
        raise MissingExtraError(
            explain(where, f"the package {name!r} must be installed.", hint=f'pip install "l0hooks[{extra}]"')
        ) from error
