"""Parameters that share an entry get one each, for Griffe gives all of them the first one's default."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHARED = re.compile(r"^(\w+(?:, \w+)+)( : .+\n|\n(?=    ))((?:    .*(?:\n|\Z))*)", re.MULTILINE)


def split(text: str) -> str:
    """A docstring with one entry for each name."""
    return _SHARED.sub(lambda m: "".join(f"{n}{m[2]}{m[3]}" for n in m[1].split(", ")), text)


class OneEntryEach(griffe.Extension):
    """Reads docstrings as if no parameters shared an entry."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = split(obj.docstring.value)
