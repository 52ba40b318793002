"""Files that are written as a whole or not at all, and plain data from files, checked by type."""

from __future__ import annotations

import dataclasses
import os
import shutil
import types
import typing
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from l0hooks.errors import InvalidValueError, explain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_T = TypeVar("_T")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if all goes well; else the old file stays as it was.

    The temporary name has the suffix of ``path``, because some writers choose a format by it. A link is followed. What
    exists and is no regular file, such as ``/dev/stdout``, is written to directly.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "w.txt") as temporary:
    ...         _ = temporary.write_text("new")
    ...     [(one.name, one.read_text()) for one in Path(folder).iterdir()]
    [('w.txt', 'new')]
    """
    final = Path(path).resolve()
    if final.exists() and not final.is_file():
        yield Path(path)
        return
    temporary = final.with_name(f".{uuid.uuid4().hex[:12]}.part{final.suffix}")
    try:
        yield temporary
        _sync(temporary)
        if final.exists():
            shutil.copymode(final, temporary)
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        _sync(final.parent)  # the new name, too, survives a loss of power


def check_writable(path: str | os.PathLike[str], where: str) -> None:
    """Refuse a path that :func:`replacing` could not write to; it is tried beside it, and nothing is left.

    Raises
    ------
    InvalidValueError
        If its folder does not exist or takes no files, or it is a folder.

    Examples
    --------
    >>> check_writable("no such folder/w.csv", "--out")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    l0hooks.errors.InvalidValueError: --out: its folder must exist.
      got: ...no such folder
    """
    final = Path(path).resolve()
    if not final.parent.is_dir():
        raise InvalidValueError(explain(where, "its folder must exist.", got=str(final.parent)))
    if final.is_dir():
        raise InvalidValueError(explain(where, "it must be a file.", got=f"the folder {final}"))
    if final.exists() and not final.is_file():  # a device or a pipe is not touched
        return
    probe = final.with_name(f".{uuid.uuid4().hex[:12]}.part")
    try:
        probe.touch()
    except OSError as error:
        got = f"{final}: {error.strerror or error}"
        raise InvalidValueError(explain(where, "its folder must take new files.", got=got)) from error
    finally:
        probe.unlink(missing_ok=True)


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int) -> None:
    """Write a figure; the suffix of ``path`` says in which format, and without one it gets matplotlib's usual one.

    Examples
    --------
    >>> import tempfile
    >>> from matplotlib.figure import Figure
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_figure(Figure(), Path(folder) / "empty", dpi=50)
    ...     [one.name for one in Path(folder).iterdir()]
    ['empty.png']
    """
    target = Path(path)
    if not target.suffix:
        target = target.with_name(f"{target.name}.{figure.canvas.get_default_filetype()}")
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=dpi)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def typed(kind: type[_T] | Any, value: Any, where: str, name: str = "") -> _T:
    """``value``, read from JSON, as ``kind``: dataclasses, tuples, dicts with names as keys, unions, literals, plain.

    Lists become tuples, and mappings dataclasses. A boolean is no integer, and an integer no number with a fraction.
    ``Any`` takes everything.

    Parameters
    ----------
    kind : type or annotation
    value : plain data
    where : str
        What is read, for the message.
    name : str
        Where in it ``value`` stands.

    Raises
    ------
    InvalidValueError
        If a value is of another type, or names are missing or unknown.

    Examples
    --------
    >>> typed(dict[str, tuple[int, ...]], {"a": [1, 2]}, "a plan")
    {'a': (1, 2)}
    >>> typed(tuple[int, str], [True, "b"], "a plan", "first")
    Traceback (most recent call last):
    l0hooks.errors.InvalidValueError: a plan: what it holds must be of the right type.
      expected: int for first[0]
      got: True
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)

    def refuse(expected: str, got: str | None = None) -> InvalidValueError:
        return InvalidValueError(
            explain(
                where,
                "what it holds must be of the right type.",
                expected=f"{expected} for {name or 'the whole'}",
                got=repr(value)[:80] if got is None else got,
            )
        )

    if kind is Any:
        return value  # type: ignore[no-any-return]
    if origin is typing.Literal:
        if value not in inner:
            raise refuse(" or ".join(map(repr, inner)))
        return value  # type: ignore[no-any-return]
    if origin in (types.UnionType, typing.Union):
        return _one_of(inner, value, where, name)  # type: ignore[no-any-return]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            keys = None if not isinstance(value, dict) else f"the keys {', '.join(map(repr, sorted(value)))}"[:200]
            raise refuse(f"the keys {', '.join(map(repr, sorted(hints)))}", keys)
        return kind(**{key: typed(hints[key], one, where, f"{name}.{key}".lstrip(".")) for key, one in value.items()})  # type: ignore[return-value]
    if origin is dict:
        if not isinstance(value, dict):
            raise refuse("names and values")
        return {key: typed(inner[1], one, where, f"{name}[{key!r}]") for key, one in value.items()}  # type: ignore[return-value]
    if origin is tuple:
        endless = len(inner) == 2 and inner[1] is Ellipsis
        if not isinstance(value, (list, tuple)) or (not endless and len(value) != len(inner)):
            raise refuse("a list" if endless else f"a list of {len(inner)}")
        kinds = [inner[0]] * len(value) if endless else list(inner)
        return tuple(  # type: ignore[return-value]
            typed(one, part, where, f"{name}[{place}]")
            for place, (one, part) in enumerate(zip(kinds, value, strict=True))
        )
    if type(value) is not kind:
        raise refuse("nothing" if kind is types.NoneType else kind.__name__)
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, where: str, name: str) -> Any:
    """``value`` as the first of ``kinds`` that it is; nothing stands for itself."""
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    for kind in others[:-1]:
        if type(value) is kind:
            return value
    return typed(others[-1], value, where, name)
