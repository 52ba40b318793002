"""Packages import only what the table allows, the contributing guide prints the same table, and files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "l0hooks"
BASE = {"errors", "_torch"}
MODELS = {*BASE, "structure", "gates"}
ATTACHED = {*MODELS, "attach"}
TRAINED = {*ATTACHED, "plots", "schedules", "training"}
# package or public module -> the packages that it may import, beside itself
IMPORTS: dict[str, set[str]] = {
    "_torch": set(),
    "errors": set(),
    "_files": {"errors"},
    "schedules": {"errors"},
    "structure": BASE,
    "gates": BASE,
    "attach": MODELS,
    "plots": ATTACHED,
    "export": {*ATTACHED, "_files"},
    "training": {*TRAINED, "export", "_files"} - {"training"},
    "select": TRAINED,
    "calibration": {*TRAINED, "_files"},
    "integrations": {*TRAINED, "export"},
    "sklearn": {"errors", "schedules", "select"},
    "_sparsify": TRAINED,
    "_preview": {*TRAINED, "_sparsify"},
}
ENTRANCES = {"__init__", "__main__"}  # these may import everything


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name without the leading ``l0hooks.``."""
    names = {}
    for path in LIBRARY.rglob("*.py"):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        names[name] = path
    return names


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules of the library that a file imports, those under TYPE_CHECKING and within functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "l0hooks":
            base = node.module.removeprefix("l0hooks").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                found.add(inner if inner in known else base or "__init__")
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("l0hooks.") for a in node.names if a.name.startswith("l0hooks.")}
    return found


def package(module: str) -> str:
    return module.split(".")[0]


def test_the_table_names_every_package() -> None:
    assert {package(name) for name in modules()} - ENTRANCES == set(IMPORTS)


def test_packages_import_only_what_the_table_allows() -> None:
    known = modules()
    for name, path in known.items():
        if name in ENTRANCES:
            continue
        above = {package(target) for target in imported(path, set(known))} - IMPORTS[package(name)] - {package(name)}
        assert not above, f"{name} imports {sorted(above)}"


def test_no_imports_run_in_a_circle() -> None:
    known = modules()
    graph = {name: imported(path, set(known)) - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_function_hides_a_module() -> None:
    for name, path in modules().items():
        if path.stem != "__init__":
            continue
        own = {child.stem for child in path.parent.glob("*.py")} | {child.name for child in path.parent.iterdir()}
        public = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert not own & public, name


PRIVATE_ATTRIBUTES = {
    *("_version", "_modules", "_parameters", "_buffers", "_cdata", "_schema", "_sequence_nr", "_is_zerotensor"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_cache_enabled"),
    *("_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_current_level", "_execution_engine"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_is_fx_tracing_flag", "_tracer_cls"),
    *("full_tensor", "check_guards"),
}


def private_names(path: Path) -> Iterator[str]:
    """Private names of torch that a file reads: below ``torch`` itself, from its modules, or of tensors and modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if re.match(r"(torch|nn|fx)(\.\w+)*\._[a-z]", dotted) or node.attr in PRIVATE_ATTRIBUTES:
                yield dotted
        elif isinstance(node, ast.ImportFrom) and re.match(r"torch\b", node.module or ""):
            yield from (f"{node.module}.{a.name}" for a in node.names if re.search(r"\._", f".{node.module}.{a.name}"))
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if re.match(r"torch\..*\b_", a.name))
        elif isinstance(node, ast.keyword) and node.arg in PRIVATE_ATTRIBUTES:
            yield node.arg


def test_private_names_of_torch_stand_in_one_package() -> None:
    for name, path in modules().items():
        if package(name) != "_torch":
            assert not set(private_names(path)), name


LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 300, 50, 8
MANY_PARAMETERS = {  # public: every setting is a keyword of its own, as scikit-learn asks for
    "Calibrator.fit_path",
    "Gate.__init__",
    "ItemGate.__init__",
    "L0Classifier.__init__",
    "L0FeatureSelector.__init__",
    "L0LinearModel.__init__",
    "L0Regressor.__init__",
    "Settings.__init__",
    "match_samples",
}


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        inner = f"{prefix}{node.name}." if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else prefix
        yield from functions(node, inner)


def lines_of(function: ast.FunctionDef) -> int:
    """Lines without the docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    end = function.end_lineno or 0
    return end - function.lineno + 1 - (0 if docstring is None else (docstring.end_lineno or 0) - docstring.lineno + 1)


def parameters_of(function: ast.FunctionDef) -> int:
    """Parameters without ``self``."""
    names = function.args
    positional = [*names.posonlyargs, *names.args]
    own = bool(positional) and positional[0].arg in ("self", "cls")
    return len(positional) + len(names.kwonlyargs) + sum(a is not None for a in (names.vararg, names.kwarg)) - own


def test_files_and_functions_stay_small() -> None:
    kernels = LIBRARY / "gates" / "kernels"  # compiled functions take every array and number by itself
    large = []
    for path in modules().values():
        if path.is_relative_to(kernels):
            continue
        text = path.read_text()
        if text.count("\n") > LONGEST_FILE:
            large.append(f"{path.name}: {text.count(chr(10))} lines")
        for name, function in functions(ast.parse(text)):
            if lines_of(function) > LONGEST_FUNCTION:
                large.append(f"{path.name}: {name} has {lines_of(function)} lines")
            if parameters_of(function) > MOST_PARAMETERS and name not in MANY_PARAMETERS:
                large.append(f"{path.name}: {name} has {parameters_of(function)} parameters")
    assert not large


def test_the_contributing_guide_prints_the_same_table() -> None:
    guide = (ROOT / "docs" / "contributing.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \|$", guide, re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows} == IMPORTS


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

    assert len(l0hooks.__all__) <= 28
    assert l0hooks.__all__ == sorted(l0hooks.__all__)
    assert all(name in vars(l0hooks) for name in l0hooks.__all__)


def test_names_to_avoid_are_avoided() -> None:
    avoided = re.compile(r"\b(qz_logits|loga|active_prob|droprate|get_penalty|lambda_reg|lambda_|limit_a)\b")
    for path in LIBRARY.rglob("*.py"):
        assert not avoided.search(path.read_text()), path
