"""The command line: from files to files, its errors one message, its exit codes as it says."""

import base64
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from l0hooks.calibration import Calibrator, cli
from l0hooks.calibration.cli import main
from l0hooks.calibration.fit.polished import PolishLimits
from l0hooks.calibration.output.html_report import report_html

T, N = 6, 40


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """One survey in every kind of file."""
    rng = np.random.default_rng(0)
    matrix = (rng.random((T, N)) < 0.5) * rng.integers(1, 9, (T, N))
    targets, people = [f"t{i}" for i in range(T)], [f"h{i}" for i in range(N)]
    frame = pd.DataFrame(matrix, pd.Index(targets, name="target"), people)
    y = matrix @ rng.uniform(1, 3, N)
    monkeypatch.chdir(tmp_path)
    sparse.save_npz("M.npz", sparse.csr_array(matrix))
    mmwrite("M.mtx", sparse.coo_matrix(matrix))
    frame.to_csv("M.csv")
    frame.to_parquet("M.parquet")
    frame.T.rename_axis("household").to_csv("MT.csv")
    frame.T.rename_axis("household").to_parquet("MT.parquet")
    frame.reset_index().to_parquet("plain.parquet")
    table = pd.DataFrame({"target": targets, "value": y, "group": ["a", "b"] * 3, "source": "census"})
    table.to_csv("targets.csv", index=False)
    table.iloc[::-1].to_csv("reversed.csv", index=False)
    table.to_parquet("targets.parquet")
    pd.DataFrame({"household": people, "weight": rng.uniform(1, 3, N)}).to_csv("w.csv", index=False)
    tmp_path.joinpath("some.csv").write_text("household\nh3\nh5\n")
    return tmp_path


def call(*arguments):
    return main(["calibrate", *arguments, "--max-epochs", "10"])


def test_from_files_to_files(folder, capsys):
    code = call(
        *("M.parquet", "reversed.csv", "--keep", "12", "--design-weights", "w.csv", "--must-keep", "some.csv"),
        *("--out", "weights.csv", "--target-report", "t.parquet", "--report", "report.html"),
    )
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "6 targets, 12 of 40 households" in out
    weights = pd.read_csv("weights.csv", index_col="household")
    assert (weights["weight"] > 0).sum() == 12
    assert (weights.loc[["h3", "h5"], "weight"] > 0).all()
    matrix, y = pd.read_parquet("M.parquet"), pd.read_csv("targets.csv", index_col="target")["value"]
    np.testing.assert_allclose(matrix @ weights["weight"], y, rtol=1e-5)
    assert pd.read_parquet("t.parquet")["target"].tolist() == list(y.index)
    assert "Calibration of M.parquet" in (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def weights_from_arrays():
    """Weights that the files of one survey should give, once they are known."""
    return []


@pytest.mark.parametrize("matrix", ["M.npz", "M.mtx", "M.csv", "M.parquet", "plain.parquet", "MT.csv", "MT.parquet"])
@pytest.mark.parametrize("targets", ["targets.csv", "targets.parquet"])
def test_every_kind_of_file_gives_the_same(folder, matrix, targets, weights_from_arrays, capsys):
    options = ["--keep", "9", "--method", "greedy"]
    assert call(matrix, targets, *options, "--out", "w.parquet", "--chosen-only", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    found = pd.read_parquet("w.parquet")["weight"].to_numpy()
    if not weights_from_arrays:
        given = pd.read_csv("targets.csv")
        calibrator = Calibrator(9, method="greedy", groups=given["group"].to_numpy(), progress=False)
        weights_from_arrays.append(calibrator.fit(sparse.load_npz("M.npz"), given["value"].to_numpy()).weights)
    (expected,) = weights_from_arrays
    np.testing.assert_allclose(found, expected[expected > 0])


def test_intervals_points_and_importance_in_one_file(folder):
    rows = "".join(f"t{i};;{190 + i};{200 + i};\n" for i in range(1, T))
    text = f"target;value;lower;upper;importance\n{rows}t0;150;;;2\n"
    (folder / "both.csv").write_text("\ufeff" + text)  # as some spreadsheets write it
    assert call("M.csv", "both.csv", "--target-report", "t.csv", "--quiet") == 0
    report = pd.read_csv("t.csv", index_col="target")
    assert report.loc["t0", ["lower", "upper"]].tolist() == [150, 150]
    assert report.loc["t3", ["lower", "upper"]].tolist() == [193, 203]
    assert (report["relative_error"].abs() < 1e-5).all()


def test_hierarchy_clusters_bounds_and_multipliers(folder):
    (folder / "tree.csv").write_text("parent,child\nt0,t1\nt0,t2\n")
    (folder / "clusters.csv").write_text("household,cluster\nh0,x\nh1,x\nh2,\n")
    code = call(
        *("M.csv", "targets.csv", "--hierarchy", "tree.csv", "--clusters", "clusters.csv", "--bounds", "0.5", "4"),
        *("--group-multiplier", "a=3", "--group-multiplier", "b=0.5", "--out", "out.csv"),
    )
    weights = pd.read_csv("out.csv", index_col="household")["weight"]
    assert code == 3  # t0 is not t1 + t2
    assert weights["h0"] == weights["h1"] != weights["h2"]
    assert weights.between(0.5 - 1e-9, 4 + 1e-9).all()


BAD = {
    "no matrix": (["N.npz", "targets.csv"], r"N\.npz: the file must exist"),
    "near names": (["M2.npz", "targets.csv"], r"did you mean 'M\.npz'"),
    "no kind": (["w.txt", "targets.csv"], r"its kind must be known.*\.mtx"),
    "no matrix in it": (["broken.npz", "targets.csv"], r"must be a file of scipy\.sparse\.save_npz"),
    "an array's npz": (["array.npz", "targets.csv"], r"must be a file of scipy\.sparse\.save_npz"),
    "no Matrix Market": (["broken.mtx", "targets.csv"], r"must be Matrix Market"),
    "no Parquet": (["broken.parquet", "targets.csv"], r"must be Parquet"),
    "transposed": (["turned.csv", "targets.csv"], r"looks transposed.*--transpose"),
    "transposed twice": (["M.csv", "targets.csv", "--transpose"], r"one row for each target.*leave --transpose out"),
    "k": (["M.npz", "targets.csv", "--keep", "41"], r"k: it must lie between 1.*1 to 40"),
    "word": (["M.npz", "word.csv"], r"word\.csv, row 2 of column 'value': it must be a number.*'many'"),
    "hole": (["M.npz", "hole.csv"], r"hole\.csv, line 3: every line must have all columns"),
    "no column": (["M.npz", "w.txt.csv"], r"needs a column 'value'"),
    "empty": (["M.npz", "empty.csv"], r"empty\.csv: it must have a header"),
    "twice": (["M.csv", "twice.csv"], r"names must be distinct.*'t0'"),
    "unknown": (["M.csv", "targets.csv", "--leave-out", "strangers.csv"], r"leave_out: names must be those.*'x'"),
    "bounds": (["M.csv", "targets.csv", "--bounds", "3", "1"], r"lo must not be above hi"),
    "out": (["M.csv", "targets.csv", "--out", "w.xlsx"], r"--out: its kind must be known"),
    "folder": (["M.csv", "targets.csv", "--report", "no/r.html"], r"--report: its folder must exist"),
    "multiplier": (["M.csv", "targets.csv", "--group-multiplier", "a"], r"must be GROUP=NUMBER"),
    "unknown group": (["M.csv", "targets.csv", "--group-multiplier", "z=2"], r"keys must be groups"),
    "binary": (["M.csv", "binary.csv"], r"must be CSV in UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_is_one_message_and_writes_nothing(folder, name, capsys):
    arguments, message = BAD[name]
    for broken in ("broken.npz", "broken.mtx", "broken.parquet", "w.txt"):
        (folder / broken).write_text("something else")
    np.savez(folder / "array.npz", a=np.ones(3))
    (folder / "word.csv").write_text("value\n3\nmany\n")
    (folder / "hole.csv").write_text("target,value\na,3\nb\n")
    (folder / "w.txt.csv").write_text("target,amount\na,3\n")
    pd.read_csv(folder / "MT.csv").drop(columns="household").to_csv(folder / "turned.csv", index=False)
    (folder / "empty.csv").write_text("")
    (folder / "twice.csv").write_text("target,value\n" + "t0,3\n" * T)
    (folder / "strangers.csv").write_text("household\nx\n")
    (folder / "binary.csv").write_bytes(b"value\n\xff\xfe\n")
    before = sorted(folder.iterdir())
    extra = [] if "--out" in arguments else ["--out", "weights.csv"]
    assert call(*arguments, *extra) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err, re.DOTALL), err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert sorted(folder.iterdir()) == before


def test_not_converged_has_its_own_code_and_still_writes(folder, monkeypatch, capsys):
    class Unreachable(Calibrator):
        def solver_options(self):
            return replace(super().solver_options(), polish=PolishLimits(gap=-1.0, violation=-1.0))

    monkeypatch.setattr(cli, "Calibrator", Unreachable)
    (folder / "far.csv").write_text("target,value\n" + "".join(f"t{i},{-5 if i == 2 else 100}\n" for i in range(T)))
    assert call("M.csv", "far.csv", "--keep", "9", "--out", "out.csv", "--report", "r.html") == 3
    assert "warning: Calibrator.fit: every target should be met" in capsys.readouterr().err
    assert (folder / "out.csv").exists()
    assert "Targets are missed" in (folder / "r.html").read_text()


def test_interrupted(folder, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_matrix_file", interrupt)
    assert call("M.csv", "targets.csv", "--checkpoint", "c") == 130
    assert "goes on from c" in capsys.readouterr().err


def test_warnings_are_shown_and_kept(folder, capsys):
    (folder / "far.csv").write_text("target,value\n" + "".join(f"t{i},{-5 if i == 2 else 100}\n" for i in range(T)))
    assert call("M.csv", "far.csv", "--keep", "9", "--report", "r.html") == 3
    assert "warning: y: targets should lie within" in capsys.readouterr().err
    assert "targets should lie within" in (folder / "r.html").read_text()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as done:
        main(["calibrate", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "python -m l0hooks calibrate M.npz targets.csv --keep 5000",
        "exit codes",
        "--transpose",
        "importance",
    ):
        assert part in text
    with pytest.raises(SystemExit) as wrong:
        main(["calibrate", "--keep", "3"])
    assert wrong.value.code == 2


@pytest.mark.slow
def test_it_runs_as_a_module_without_any_optional_package(folder):
    code = """if True:
        import runpy, sys
        sys.modules.update(dict.fromkeys(["pandas", "matplotlib", "pyarrow", "sklearn", "tqdm"]))
        runpy.run_module("l0hooks", run_name="__main__", alter_sys=True)
    """
    arguments = ["calibrate", "M.npz", "targets.csv", "--keep", "9", "--max-epochs", "5"]
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "9 of 40 households" in done.stdout
    assert re.search(
        r"^\d\d:\d\d:\d\d \w+ \d+/\d+  error .* active", done.stderr, re.MULTILINE
    )  # sparse lines of a log


class Page(HTMLParser):
    """Tags, and what attributes point at."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.points = [], set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.points += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escaped():
    evil = "<script>alert('x')</script>&\"'"
    rng = np.random.default_rng(0)
    matrix = rng.random((3, 20))
    calibrator = Calibrator(8, groups=[evil, r"b $\bad{$", r"b $\bad{$"], max_epochs=10, progress=False)
    result = calibrator.fit(matrix, {evil: 4.0, "ü\n$": 5.0, "": 5.0})
    text = report_html(result, title=evil, notes=[evil], settings={evil: evil})
    page = Page()
    page.feed(text)
    assert not page.open
    known = "html head meta title style body h1 h2 p div table thead tbody tr th td img"
    assert page.tags <= set(known.split())
    assert len(page.points) == 2
    for image in page.points:
        kind, data = image.split(",")
        assert kind == "data:image/svg+xml;base64"
        svg = ElementTree.fromstring(base64.b64decode(data))
        links = [value for node in svg.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert links
        assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in text
    assert "url(" not in text
    assert "ü" in text


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no files, whoever asks")
@pytest.mark.parametrize("option", ["--out", "--target-report", "--report", "--checkpoint"])
def test_paths_that_cannot_be_written_are_refused_before_the_matrix_is_read(folder, monkeypatch, capsys, option):
    monkeypatch.setattr(cli, "read_matrix_file", lambda *args, **options: pytest.fail("the work has begun"))
    ending = ".html" if option == "--report" else ".csv"
    assert call("M.csv", "targets.csv", option, f"/proc/x{ending}") == 2
    assert re.search(f"{option}: its folder must take new files", capsys.readouterr().err)
    (folder / f"a{ending}").mkdir()
    assert call("M.csv", "targets.csv", option, f"a{ending}") == 2
    assert f"{option}: it must be a file" in capsys.readouterr().err
    if option != "--checkpoint":
        needed = "matplotlib" if option == "--report" else "pyarrow"
        monkeypatch.setitem(sys.modules, needed, None)
        assert call("M.csv", "targets.csv", option, "w.html" if option == "--report" else "w.parquet") == 2
        assert f"the package '{needed}' must be installed" in capsys.readouterr().err


def test_a_finished_fit_keeps_its_checkpoint_until_its_results_are_written(folder, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    arguments = ("M.csv", "targets.csv", "--keep", "9", "--checkpoint", "c", "--out", "w.csv")
    with monkeypatch.context() as patch:
        patch.setattr(cli.CalibrationResult, "to_csv", full)
        assert call(*arguments) == 2
    assert re.search("No space left.*goes on from c", capsys.readouterr().err, re.DOTALL)
    steps = []
    monkeypatch.setattr("l0hooks.calibration.fit.solver.Solver.advance", lambda self: steps.append(1))
    assert call(*arguments) == 0
    assert (steps, (folder / "c").exists()) == ([], False)  # nothing is done again
    assert (pd.read_csv("w.csv")["weight"] > 0).sum() == 9
