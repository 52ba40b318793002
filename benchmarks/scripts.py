"""The long benchmarks: each stays a command of its own, which is run here, and its JSON made into tables."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.registry import Panel, Row, Scale, Table, register

Reader = Callable[[Any], list[Table]]


def script(name: str, about: str, *, needs: Sequence[str], quick: str, usual: str) -> Callable[[Reader], Reader]:
    """Register ``python -m benchmarks.NAME`` with these options; the function decorated reads its JSON."""

    def missing() -> str | None:
        lacking = [module for module in needs if importlib.util.find_spec(module) is None]
        return f"not installed: {', '.join(lacking)}" if lacking else None

    def enter(read: Reader) -> Reader:
        @register(name, about, missing=missing, long=True)
        def measure(scale: Scale) -> list[Table]:
            with tempfile.TemporaryDirectory() as folder:
                found = Path(folder) / "found.json"
                options = (quick if scale.quick else usual).split()
                command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json", str(found)]
                subprocess.run(command, check=True, cwd=ROOT)
                tables = read(json.loads(found.read_text()))
            told = f"python -m benchmarks.{name} {' '.join(options)}".strip()
            return [*tables[:-1], Table(**{**vars(tables[-1]), "notes": [*tables[-1].notes, told]})]

        return read

    return enter


def means(records: Sequence[dict[str, Any]], by: str, of: Sequence[str]) -> list[Row]:
    """For each value of ``by``, in order of appearance, the means of the columns ``of`` and how many there were."""
    rows: list[Row] = []
    for value in dict.fromkeys(record[by] for record in records):
        own = [record for record in records if record[by] == value]
        rows.append({by: value} | {column: statistics.mean(one[column] for one in own) for column in of})
        rows[-1]["runs"] = float(len(own))
    return rows


@script(
    "shrink", "coupled groups of a zoo of models: exactness beside Torch-Pruning; tracing",
    needs=("transformers", "torch_pruning"), quick="--parts tracing", usual="",
)  # fmt: skip
def shrink(found: dict[str, Any]) -> list[Table]:
    """Counts of results, and seconds."""
    tables = []
    if "zoo" in found:
        rows: list[Row] = [{"tool": tool, **counts} for tool, counts in found["zoo"]["counts"].items()]
        kinds = tuple(dict.fromkeys(kind for row in rows for kind in row if kind != "tool"))
        tables.append(Table("Models of the zoo, cut by a third", rows, Panel("bars", kinds, "models")))
    rows = [{"model": f"{name}, channel_groups()", "best s": row["best"]} for name, row in found["tracing"].items()]
    return [*tables, Table("Tracing, the export included", rows, Panel("bars", ("best s",), "seconds"))]


@script(
    "frontier", "accuracy against size, beside l0-python, Torch-Pruning and magnitude",
    needs=("sklearn", "l0", "torch_pruning"), quick="--quick --seeds 1 --tasks digits --targets 0.9", usual="--seeds 3",
)  # fmt: skip
def frontier(found: dict[str, Any]) -> list[Table]:
    """Mean accuracy of every method at each size or strength asked for."""
    tables = []
    for title, part in found.items():
        if title == "torch":
            continue
        records = [
            {"method": f"{method}, asked {asked:g}", "removed %": 100 * gone, "accuracy %": 100 * accuracy}
            for method, seeds in part["points"].items()
            for seed in seeds
            for asked, gone, accuracy, *_ in seed
            if not math.isnan(gone)
        ]
        rows = means(records, "method", ("removed %", "accuracy %"))
        for row in rows:
            row["who"] = str(row["method"]).split(", asked")[0]
        panel = Panel("lines", ("accuracy %",), "test accuracy, %", x="removed %", by="who")
        note = f"dense {100 * statistics.mean(part['dense']):.2f} %"
        tables.append(Table(title, rows, panel, notes=[note]))
    return tables


@script(
    "samples", "subsets that stand for all: distance, accuracy, seconds",
    needs=("sklearn",), quick="--sizes 50 --seeds 1", usual="--seeds 5",
)  # fmt: skip
def samples(found: dict[str, Any]) -> list[Table]:
    """For each k, the means over the seeds."""
    columns = ("ratio", "svc", "logistic", "seconds")
    return [
        Table(
            f"digits, k = {k}",
            means([row for row in found["rows"] if row["k"] == k], "method", columns),
            Panel("bars", ("ratio",), "distance over that of random subsets", reference=1.0),
        )
        for k in dict.fromkeys(row["k"] for row in found["rows"])
    ]


@script(
    "selection", "best subsets for linear models, beside abess: support, loss, seconds",
    needs=("sklearn", "abess"), quick="--seeds 1 --settings 200,100,5,0.5,5 --methods l0hooks abess",
    usual="--seeds 5 --settings 500,1000,10,0.5,1 500,1000,10,0.9,2 500,1000,25,0.5,2 500,1000,25,0.9,5",
)  # fmt: skip
def selection(found: list[dict[str, Any]]) -> list[Table]:
    """For each setting, the means over the seeds."""
    return [
        Table(
            "n, p, k, ρ, SNR = " + ", ".join(f"{v:g}" for v in setting),
            means([r for r in found if tuple(r["setting"]) == setting], "method", ("f1", "r2", "loss", "k", "seconds")),
            Panel("bars", ("f1",), "F1 of the support"),
        )
        for setting in dict.fromkeys(tuple(row["setting"]) for row in found)
    ]


@script(
    "features", "features for any model, beside LassoNet, STG and a forest",
    needs=("sklearn", "lassonet", "stg"), quick="--problems xor20 --methods l0hooks forest --seeds 1",
    usual="--seeds 3 --slow-seeds 1",
)  # fmt: skip
def features(found: dict[str, Any]) -> list[Table]:
    """For each problem, the means over the seeds."""
    records = [dict(zip(("problem", "method"), key.split("/")[:2], strict=True)) | row for key, row in found.items()]
    return [
        Table(
            problem,
            means(
                [row for row in records if row["problem"] == problem], "method", ("score", "svm", "forest", "seconds")
            ),
            Panel("bars", ("score",), "mean accuracy on the other half"),
        )
        for problem in dict.fromkeys(row["problem"] for row in records)
    ]


@script(
    "calibration", "survey calibration, beside l0-python's SparseCalibrationWeights and baselines",
    needs=("l0", "pandas"), quick="--problems areas --quick", usual="",
)  # fmt: skip
def calibration(found: dict[str, Any]) -> list[Table]:
    """For each problem, one line a method."""
    columns = ("kind", "K", "error %", "deff", "seconds", "epoch ms", "peak MB")
    tables = []
    for part in found["comparison"]:
        rows = [{column: line.get(column) for column in columns} for line in part["lines"]]
        notes = ["ours / l0-python: " + ", ".join(f"{name} {value:.3g}" for name, value in part["ratios"].items())]
        panel = Panel("bars", ("error %",), "mean |relative error|, %", log="x")
        tables.append(Table(part["problem"], rows, panel, notes=notes))
    return tables
