"""The benchmarks' runner: its tables, its arithmetic on times, and a smoke run of everything that is fast."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, machine, memory, report
from benchmarks.contenders import Contender
from benchmarks.docstrings import pairs
from benchmarks.pruned import wins_from
from benchmarks.registry import REGISTRY, Aim, Panel, Scale, Table, register
from benchmarks.running import RESULTS, run, tables_of, write_docs
from benchmarks.scripts import means
from benchmarks.timing import extra, medians, ratio, rounds

ROOT = Path(__file__).parents[2]
TABLE = Table(
    "Two layers",
    [{"layer": "dense", "ms": 2.0, "over dense": 1.0}, {"layer": "gated", "ms": 12_345.0, "note": "slow"}],
    Panel("bars", ("ms", "over dense"), "ms"),
    [Aim("gated over dense", 1.5, 1.25), Aim("bytes", 2.0, 2.0)],
    ["a remark"],
)


def test_functions_take_turns_and_warm_up_is_left_out() -> None:
    calls: list[str] = []
    ticks = itertools.count()
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = rounds(functions, repeats=3, warmup=2, clock=lambda: float(next(ticks)))
    assert calls == ["a", "b"] * 5
    assert found == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert medians(functions, repeats=3, clock=lambda: float(next(ticks))) == {"a": 1.0, "b": 1.0}


def test_ratios_and_differences_are_taken_within_a_round() -> None:
    seconds = {"dense": [1.0, 10.0, 2.0], "gated": [2.0, 20.0, 5.0]}
    assert ratio(seconds, "gated", "dense") == 2.0
    assert extra(seconds, "gated", "dense") == 3.0


def test_an_aim_says_whether_it_was_met() -> None:
    assert [aim.met for aim in TABLE.aims] == [False, True]
    assert str(TABLE.aims[0]) == "gated over dense: 1.5, asked at most 1.25: MISSED"


def test_a_table_survives_json() -> None:
    for table in (TABLE, Table("bare", [{"x": 1.0}])):
        assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "–"), ("never", "never"), (3.0, "3"), (12_345.6, "12,346"), (0.01234, "0.0123"), (1.2345, "1.234")],
)
def test_cells_are_written_for_people(cell: float | str | None, text: str) -> None:
    assert report.written(cell) == text


def test_markdown_and_text_hold_all_cells(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report.markdown(TABLE).splitlines()
    assert lines[2:4] == ["| layer | ms | over dense | note |", "| --- | ---: | ---: | ---: |"]
    assert lines[5] == "| gated | 12,345 | – | slow |"
    assert lines[-1] == "- a remark"
    report.show(TABLE)
    shown = capsys.readouterr().out
    assert "MISSED" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("gated ")] == [
        ["gated", "12,345", "–", "slow"]
    ]


def test_plots_of_bars_and_lines_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    panel = Panel("lines", ("ms",), "ms", x="size", by="who", log="xy", reference=1.0)
    lines = Table("Growth", [{"size": n, "who": w, "ms": 2 * n} for n in (1.0, 9.0) for w in "ab"], panel)
    assert report.plot([TABLE, lines, Table("no panel", [{"x": 1.0}])], tmp_path / "new" / "plot.svg")
    assert "<svg" in (tmp_path / "new" / "plot.svg").read_text()
    assert not report.plot([Table("no panel", [{"x": 1.0}])], tmp_path / "none.svg")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="two benchmarks are called 'memory'"):
        register("memory", "again")(lambda scale: [])
    assert REGISTRY["memory"].measure is memory.measure


def test_the_scale_chooses_sizes() -> None:
    assert Scale(quick=True).of([1], [2, 3], [4]) == [1]
    assert Scale().of([1], [2, 3], [4]) == [2, 3]
    assert Scale(large=True).of([1], [2, 3], [4]) == [2, 3, 4]
    assert (Scale(quick=True).repeats(9), Scale().repeats(9)) == (3, 9)


def test_sparse_weights_win_only_where_all_sparser_ones_do() -> None:
    assert wins_from({0.99: 0.5, 0.9: 0.9, 0.8: 1.2, 0.5: 0.9}) == "90 %"
    assert wins_from({0.99: 1.5, 0.9: 0.9}) == "never"


def test_means_of_records() -> None:
    records = [{"m": "a", "s": 1.0}, {"m": "b", "s": 5.0}, {"m": "a", "s": 3.0}]
    assert means(records, "m", ["s"]) == [{"m": "a", "s": 2.0, "runs": 2.0}, {"m": "b", "s": 5.0, "runs": 1.0}]


def test_bytes_of_a_dense_layer_are_counted() -> None:
    layer, x = torch.nn.Linear(64, 64, bias=False), torch.randn(4, 64)
    dense = Contender(layer)
    assert memory.held_bytes(dense) == 4 * 64**2
    assert memory.saved_bytes(dense, x) == 4 * 4 * 64  # the output, for the square; weight and input are no extra
    assert 4 * 64**2 <= memory.peak_bytes(dense, x) <= 4 * 64**2 + 4 * 4 * 4 * 64 + 64  # the gradient, few activations


def test_memory_that_the_library_reuses_is_counted() -> None:
    side, x = 600, torch.randn(4, 600)  # more than a megabyte for each array of gates
    dense, gated = (memory.peak_bytes(one, x) for one in (Contender(torch.nn.Linear(side, side)), ours(side)))
    assert gated >= dense + 4 * side**2  # the product of weight and gates


def ours(side: int) -> Contender:
    contender = contenders.ours(torch.nn.Linear(side, side))
    memory.loss_of(contender, torch.randn(4, side)).backward()  # the first step sets things up
    return contender


def test_gating_alone_is_compared_with_the_bytes_it_must_move() -> None:
    gpu = importlib.import_module("benchmarks.gpu")  # not above: the order of first imports is that of the tables
    assert gpu.ideal_bytes(torch.bfloat16) == 8 + 14
    assert gpu.ideal_bytes(torch.float32) == 12 + 20
    table = gpu.traffic(Scale(quick=True), torch.device("cpu"), side=64)
    assert [row["ideal"] for row in table.rows] == [22, 22, 32, 32]
    for row in table.rows:
        assert row["bytes/weight"] > 0
        assert row["over ideal"] == pytest.approx(row["bytes/weight"] / row["ideal"])
    assert table.notes[-1] == "Triton kernels: not used"


def test_the_page_is_made_of_the_results_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    told = {"about": "bytes", "seconds": 1.0, "tables": [TABLE.to_json()], "skipped": None, "failed": None}
    result = {"date": "2026-01-01 00:00", "revision": "abc", "machine": machine.description(1), "quick": False}
    (tmp_path / "memory.json").write_text(json.dumps(result | {"benchmarks": {"memory": told}}))
    skipped = told | {"tables": [], "skipped": "no CUDA device"}
    (tmp_path / "gpu.json").write_text(json.dumps(result | {"benchmarks": {"gpu": skipped}}))
    monkeypatch.setattr("benchmarks.running.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.running.IMAGES", tmp_path / "images")
    write_docs()
    page = (tmp_path / "tables.md").read_text()
    assert page.index("## memory") < page.index("## gpu")
    assert "Not measured: no CUDA device." in page
    assert "2026-01-01 00:00 UTC, revision abc." in page
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["memory.svg"]


def test_the_results_kept_can_be_read() -> None:
    kept = sorted(RESULTS.glob("*.json"))
    assert kept
    for path in kept:
        result = json.loads(path.read_text())
        assert list(result["benchmarks"]) == [path.stem]
        assert path.stem in REGISTRY
        assert not result["quick"]
        told = result["benchmarks"][path.stem]
        assert told["skipped"] or all(table.rows for table in tables_of(told))


@pytest.mark.slow
def test_a_benchmark_has_a_process_of_its_own() -> None:
    filters = list(warnings.filters)
    told = run("memory", Scale(), 1)
    assert (told["skipped"], told["failed"]) == (None, None)
    assert told["seconds"] > 0
    assert [row["layer"] for row in tables_of(told)[0].rows][:2] == ["dense", "l0hooks"]
    assert warnings.filters == filters  # it changes them, there


@pytest.mark.slow
def test_a_smoke_run_of_the_fast_ones(tmp_path: Path) -> None:
    for needed in ("matplotlib", "transformers"):
        pytest.importorskip(needed)
    command = [sys.executable, "-m", "benchmarks", "--quick", "--json", str(tmp_path / "all.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--plot", str(tmp_path / "plots")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text())
    fast = [name for name, benchmark in REGISTRY.items() if not benchmark.long]
    assert list(found) == ["date", "revision", "machine", "quick", "benchmarks"]
    assert found["quick"] is True
    assert set(machine.description(1)) == set(found["machine"])
    assert sorted(found["benchmarks"]) == sorted(fast)
    for name, told in found["benchmarks"].items():
        assert set(told) == {"about", "seconds", "tables", "skipped", "failed"}
        if told["skipped"]:
            assert name == "gpu"
            continue
        assert all(table.title in done.stdout and table.rows for table in tables_of(told))
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_of_docstrings_are_summaries_and_paragraphs() -> None:
    found = dict(pairs(("json", "a_package_that_is_not_installed")))
    head = "Implement this method in a subclass such that it returns a serializable object for ``o``, or calls"
    (body,) = [body for summary, body in found.items() if summary.startswith(head)]
    assert body.startswith("For example, to support arbitrary iterators")
    assert all(20 <= len(head) <= 200 and 60 <= len(body) <= 400 for head, body in found.items())
    assert not any(body.startswith("Parameters") for body in found.values())
