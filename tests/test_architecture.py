"""The house stands: imports go strictly downward, and the contributing guide draws it as it is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {
    0: ["errors"],
    1: ["hard_concrete", "layers", "noise", "schedules", "extras"],
    2: ["distribution", "families", "fused", "tracing"],
    3: ["gate"],
    4: ["spec", "weights", "optim"],
    5: ["penalties"],
    6: ["summary"],
    7: ["attach", "export"],
    8: ["__init__"],
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def imported_rooms(source: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "l0hooks":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("l0hooks.")}
    return rooms


def test_every_room_has_a_floor() -> None:
    assert {path.stem for path in (ROOT / "l0hooks").rglob("*.py")} == set(FLOOR_OF)


def test_imports_go_strictly_downward() -> None:
    for room, floor in FLOOR_OF.items():
        for other in imported_rooms(ROOT / "l0hooks" / f"{room}.py"):
            assert FLOOR_OF[other] < floor, f"{room} imports {other}"


def test_the_contributing_guide_draws_the_same_house() -> None:
    table = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs" / "contributing.md").read_text(), re.MULTILINE)
    drawn = {room: int(floor) for floor, rooms in table for room in re.findall(r"`(\w+)`", rooms)}
    assert drawn == {room: floor for room, floor in FLOOR_OF.items() if room != "__init__"}


def test_importing_the_library_imports_no_optional_package() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import l0hooks;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(added) & {"sklearn", "pandas", "matplotlib", "tqdm", "onnx", "safetensors", "transformers", "scipy"}


def test_the_front_door_is_small_and_sorted() -> None:
    import l0hooks

    assert len(l0hooks.__all__) <= 22
    assert l0hooks.__all__ == sorted(l0hooks.__all__)
    assert all(name in vars(l0hooks) for name in l0hooks.__all__)


def test_names_to_avoid_are_avoided() -> None:
    avoided = re.compile(r"\b(qz_logits|loga|active_prob|droprate|get_penalty|lambda_reg|lambda_|limit_a)\b")
    for path in (ROOT / "l0hooks").rglob("*.py"):
        assert not avoided.search(path.read_text()), path
