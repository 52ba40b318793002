"""Running benchmarks in processes of their own, keeping what they found, and writing the documentation from it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks import catalogue, machine, report  # noqa: F401  # the catalogue fills the registry
from benchmarks.registry import REGISTRY, Scale, Table

RESULTS = machine.ROOT / "benchmarks" / "results"
IMAGES = machine.ROOT / "docs" / "images" / "benchmarks"


def measured(name: str, scale: Scale, threads: int) -> list[Table]:
    """Run one, in this process, and print its tables."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    tables = REGISTRY[name].measure(scale)
    for table in tables:
        report.show(table)
    return tables


def measured_alone(name: str, scale: Scale, threads: int) -> list[Table]:
    """``measured`` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, name, scale, threads).result()


def run(name: str, scale: Scale, threads: int) -> dict[str, Any]:
    """One benchmark: what it found, or why there is nothing. Its process is its own, but for a smoke run."""
    told = {"about": REGISTRY[name].about, "seconds": None, "tables": [], "skipped": None, "failed": None}
    reason = REGISTRY[name].missing()
    print(f"\n== {name}: {REGISTRY[name].about}" + (f"\nskipped: {reason}" if reason else ""), flush=True)
    if reason:
        return told | {"skipped": reason}
    start = time.perf_counter()
    try:
        tables = (measured if scale.quick else measured_alone)(name, scale, threads)
    except Exception as error:  # noqa: BLE001  # the others still run; it is told, and in the exit status
        traceback.print_exc()
        return told | {"failed": f"{type(error).__name__}: {error}"}
    return told | {"seconds": round(time.perf_counter() - start, 1), "tables": [table.to_json() for table in tables]}


def tables_of(told: dict[str, Any]) -> list[Table]:
    """A result's tables."""
    return [Table.from_json(table) for table in told["tables"]]


def write_docs() -> None:
    """``tables.md`` and the plots, from all results kept."""
    parts = []
    kept = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    for name in (name for name in REGISTRY if name in kept):
        result, told = kept[name], kept[name]["benchmarks"][name]
        parts.append(f"## {name}\n\n{told['about'][0].upper()}{told['about'][1:]}.\n")
        parts += [report.markdown(table) for table in tables_of(told)]
        if told["skipped"] or told["failed"]:
            parts.append(f"Not measured: {told['skipped'] or told['failed']}.\n")
        if report.plot(tables_of(told), IMAGES / f"{name}.svg"):
            parts.append(f"![{name}: {told['about']}](images/benchmarks/{name}.svg)\n")
        parts.append(f"{result['date']} UTC, revision {result['revision']}. {machine.in_words(result['machine'])}.\n")
    (RESULTS / "tables.md").write_text("\n".join(parts))
