"""The house stands: imports go strictly downward, and the contributing guide draws it as it is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {
    -1: ["memory", "compiled"],
    0: ["errors", "kernels", "cpu_kernels", "recording", "slopes"],
    1: [
        *("hard_concrete", "layers", "streams", "recomputed", "levelled", "placement", "schedules", "extras"),
        *("rows", "quadratics", "subset"),
    ],
    2: [
        *("distribution", "families", "fused", "counting", "noise", "stepping", "stored", "tracing", "report"),
        "storage",
    ],
    3: ["structure", "gate", "kept"],
    4: ["spec", "weights", "optim", "team"],
    5: ["coupled", "copies"],
    6: ["gated", "coupling", "comparison", "constants"],
    7: ["penalties", "summary", "shrink", "sizes", "planning", "control"],
    8: ["folding", "serial", "shift", "support", "measures", "plots"],
    9: ["export", "budget", "track"],
    10: ["lagrangian", "integrations"],
    11: ["budgeting"],
    12: ["attach", "items", "calibration"],
    13: ["selection"],
    14: ["hybrid", "matching", "sklearn"],
    15: ["__init__", "__main__"],
}
STRUCTURE = {
    **{"groups": 0, "labels": 0, "nodes": 0, "ties": 0, "roles": 0, "failure": 0, "declare": 1, "surgery": 1},
    **{"tracer": 1, "table": 2, "movement": 3, "rules": 4, "trace": 5, "finding": 6, "rewrite": 6, "__init__": 7},
}
SUBSET = {
    **{"__init__": 0, "design": 0, "likelihood": 1, "tableau": 1, "path": 1, "grouped": 2, "problem": 3},
    **{"squares": 4, "refit": 5, "glm": 6, "choice": 7},
}
CALIBRATION = {
    **{"columns": -1, "problem": 0, "factor": 1, "margins": 1, "certificate": 1, "least_squares": 1, "dual": 2},
    **{"distance": 3, "proximal": 2, "stage": 3},
    **{"gates": 4, "greedy": 4, "swaps": 4, "priced": 4, "polish": 4, "solver": 5},
    **{"names": 1, "matrix": 2, "households": 2, "targets": 2, "reach": 3, "inputs": 4, "files": 3},
    **{"progress": 4, "checkpoint": 4, "plots": 1, "export": 2, "result": 6, "report": 7, "driver": 6},
    **{"settings": 6, "calibrator": 7, "cli": 8, "__init__": 8},
}
SKLEARN = {
    **{"base": 0, "rows": 0, "linear": 1, "screening": 1, "gated": 1, "targets": 1, "selector": 2, "__init__": 3},
}
PACKAGES = {
    "structure": STRUCTURE,
    "integrations": {"steps": 0, "transformers": 1, "lightning": 1, "__init__": 0},
    "subset": SUBSET,
    "sklearn": SKLEARN,
    "calibration": CALIBRATION,
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def imports(source: Path) -> set[tuple[str, ...]]:
    """The modules of the house that a file imports when it runs, as parts of their names."""
    tree = ast.parse(source.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "l0hooks":
            parts = tuple(node.module.split(".")[1:])
            found |= {parts} if parts else {(alias.name,) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("l0hooks.")}
    return found


def test_every_room_has_a_floor() -> None:
    house = ROOT / "l0hooks"
    assert {path.stem for path in house.glob("*.py")} | set(PACKAGES) == set(FLOOR_OF)
    for package, floors in PACKAGES.items():
        assert {path.stem for path in (house / package).glob("*.py")} == set(floors)


def test_imports_go_strictly_downward() -> None:
    for room, floor in FLOOR_OF.items():
        for path in (ROOT / "l0hooks" / room).glob("*.py") if room in PACKAGES else [ROOT / "l0hooks" / f"{room}.py"]:
            for first, *rest in imports(path):
                if first == room and room in PACKAGES:
                    assert PACKAGES[room][rest[0]] < PACKAGES[room][path.stem], f"{path.stem} imports {rest[0]}"
                else:
                    assert FLOOR_OF[first] < floor, f"{room} imports {first}"


def test_the_contributing_guide_draws_the_same_house() -> None:
    table = re.findall(r"^\| (-?\d+) \| (.*?) \|", (ROOT / "docs" / "contributing.md").read_text(), re.MULTILINE)
    drawn = {room: int(floor) for floor, rooms in table for room in re.findall(r"`(\w+)`", rooms)}
    assert drawn == {room: floor for room, floor in FLOOR_OF.items() if room != "__init__"}


def test_importing_the_library_imports_no_optional_package() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import l0hooks;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    optional = {"sklearn", "pandas", "matplotlib", "tqdm", "onnx", "safetensors", "scipy", "triton"}
    assert not set(added) & (optional | {"transformers", "accelerate", "lightning", "pytorch_lightning"})


def test_the_front_door_is_small_and_sorted() -> None:
    import l0hooks

    assert len(l0hooks.__all__) <= 24
    assert l0hooks.__all__ == sorted(l0hooks.__all__)
    assert all(name in vars(l0hooks) for name in l0hooks.__all__)


def test_names_to_avoid_are_avoided() -> None:
    avoided = re.compile(r"\b(qz_logits|loga|active_prob|droprate|get_penalty|lambda_reg|lambda_|limit_a)\b")
    for path in (ROOT / "l0hooks").rglob("*.py"):
        assert not avoided.search(path.read_text()), path
