"""Every file is written beside its target and renamed: a full disk or an interrupt leaves the old one whole."""

import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from parameters import slow
from torch import nn

from l0hooks import Tracker, save_pruned, sparsify
from l0hooks._files import replacing, save_figure, typed
from l0hooks.calibration import Calibrator
from l0hooks.calibration.fit.checkpoint import Checkpoint
from l0hooks.calibration.output.html_report import write_report
from l0hooks.errors import InvalidValueError


def tracker():
    model = nn.Linear(40, 40)
    sparsify(model)
    found = Tracker(model)
    for _ in range(400):
        found.log()
    return found


def result():
    return Calibrator(300, progress=False, max_epochs=5).fit(np.ones((1, 900)), [900.0])


WRITERS = {
    "save_pruned": (lambda path: save_pruned(nn.Linear(99, 99), path), ".safetensors"),
    "Tracker.to_csv": (lambda path: tracker().to_csv(path), ".csv"),
    "Tracker.plot": (lambda path: tracker().plot(path), ".png"),
    "result.to_csv": (lambda path: result().to_csv(path), ".csv"),
    "result.to_parquet": (lambda path: result().to_parquet(path), ".parquet"),
    "result.plot": (lambda path: result().plot(path), ".png"),
    "write_report": (lambda path: write_report(result(), path), ".html"),
    "Checkpoint": (lambda path: Checkpoint(path, "data").write({"a": np.ones(9999)}), ".npz"),
}

FULL = """
import resource, signal, sys
from pathlib import Path
from test_files import WRITERS
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails as on a full disk
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for path in map(Path, sys.argv[1:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, most))
    try:
        WRITERS[path.parent.name][0](path)
        said = "it was written"
    except Exception as error:
        said = "refused" if "too large" in str(error) else f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    print(path.parent.name, said, sep=": ")
"""
FAST = ["save_pruned", "Tracker.plot"]


@pytest.mark.skipif(os.name != "posix", reason="sets a limit of the process")
@pytest.mark.parametrize("names", [FAST, *slow([[name for name in WRITERS if name not in FAST]])])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(names, tmp_path):
    paths = [tmp_path / name / f"file{WRITERS[name][1]}" for name in names]
    for path in paths:
        path.parent.mkdir()
        path.write_text("old")
    ended = subprocess.run(
        [sys.executable, "-c", FULL, *map(str, paths)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.stdout.splitlines() == [f"{name}: refused" for name in names]
    for path in paths:
        assert path.read_text() == "old"
        assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_an_interrupt_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes and links of files")
def test_links_modes_and_devices_stay_what_they_are(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with replacing("/dev/null") as temporary:
        temporary.write_text("new")
    assert not Path("/dev/null").is_file()


def test_a_figure_without_a_suffix_gets_the_usual_one(tmp_path):
    from matplotlib.figure import Figure

    save_figure(Figure(), tmp_path / "picture", 50)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@dataclass(frozen=True)
class Pair:
    name: str
    sizes: tuple[int, ...] | None


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        (Pair, {"name": "a", "sizes": [1, 2]}, Pair("a", (1, 2))),
        (Pair, {"name": "a", "sizes": None}, Pair("a", None)),
        (dict[str, tuple[str, int]], {"b": ["c", 3]}, {"b": ("c", 3)}),
        (int | str, "a", "a"),
        (int | str, 1, 1),
    ],
)
def test_plain_data_is_read_by_type(kind, value, found):
    assert typed(kind, value, "a file") == found


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Pair, {"name": "a"}, "(?s)the keys 'name', 'sizes'.*got: the keys 'name'"),
        (Pair, {"name": "a", "sizes": None, "more": 1}, "'more'"),
        (Pair, [], r"got: \[\]"),
        (Pair, {"name": 1, "sizes": None}, "str for name"),
        (Pair, {"name": "a", "sizes": [1, True]}, r"int for sizes\[1\]"),
        (tuple[int, str], [1], "a list of 2"),
        (tuple[int, ...], {"a": 1}, "a list for the whole"),
        (dict[str, int], [1], "names and values"),
        (dict[str, int], {"a": 1.0}, r"int for \['a'\]"),
        (int | str, 1.5, "str for the whole"),
        (float, 1, "float"),
    ],
)
def test_plain_data_of_another_type_is_refused(kind, value, message):
    with pytest.raises(InvalidValueError, match=message):
        typed(kind, value, "a file")
