"""A folder called l0hooks, as a clone is, must not hide the installed package from a script beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PRINT_ORIGIN = "import importlib.util; print(importlib.util.find_spec('l0hooks').origin)"


def test_the_package_is_found_from_the_folder_above_a_clone(tmp_path: Path) -> None:
    (tmp_path / "l0hooks").mkdir()
    command = [sys.executable, "-c", PRINT_ORIGIN]
    origin = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(origin).name == "__init__.py"
