"""The functions that docs/migration.md and docs/migration_amlab.md give for checkpoints, as the pages have them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from public_names import DOCS


def from_page(page: str, name: str) -> Callable[..., Any]:
    """The function called ``name``, defined by the block of ``page`` that defines it."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (source,) = (block for block in blocks if f"def {name}(" in block)
    imports = [line for line in "\n".join(blocks).splitlines() if re.match(r"(import|from) (?!l0 )", line)]
    function = re.search(rf"^def {name}\(.*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)
    assert function is not None
    namespace: dict[str, Any] = {}
    exec("\n".join([*imports, function[0]]), namespace)
    found: Callable[..., Any] = namespace[name]
    return found
