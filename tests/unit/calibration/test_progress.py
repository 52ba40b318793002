"""Progress in a terminal and in a log, and checkpoints that are whole or not there."""

import io
import logging
import math
import os

import numpy as np
import pytest

from l0hooks.calibration.fit.checkpoint import Checkpoint
from l0hooks.calibration.fit.progress import Display, Update, Watch, percent
from l0hooks.calibration.fit.stage import Progress
from l0hooks.errors import InvalidValueError, StateError


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def updates(clock, display, steps=50, stage="gates", seconds=1.0):
    for step in range(1, steps + 1):
        clock.now += seconds
        display.show(Update(stage, step, steps, 1 / step, 9, step, steps - step))


def test_time_left_is_that_of_the_stage_as_its_steps_went():
    clock = Clock()
    watch = Watch(clock, before=5.0)
    clock.now += 2
    first = watch.update(Progress("gates", 1, 4, 0.1, 9))
    assert (first.seconds, first.left) == (7.0, None)
    clock.now += 4
    assert watch.update(Progress("gates", 2, 4, 0.1, 9)).left == 8.0
    clock.now += 1
    assert watch.update(Progress("gates", 3, 4, 0.1, 9)).left == 2.5
    clock.now += 1
    resumed = watch.update(Progress("swaps", 10, 20, 0.1, 9))
    assert (resumed.seconds, resumed.left) == (13.0, None)
    clock.now += 1
    assert watch.update(Progress("swaps", 11, 20, 0.1, 9)).left == 9.0
    clock.now += 1
    assert watch.update(Progress("swaps", 1, 20, 0.1, 9)).left is None  # the same stage for another candidate


def test_a_terminal_has_one_line_that_changes_and_goes():
    clock, out = Clock(), Terminal()
    display = Display(stream=out, clock=clock)
    updates(clock, display, seconds=0.04)
    assert "\n" not in out.getvalue()
    assert 12 < out.getvalue().count("\r") < 30  # ten a second
    assert "gates 50/50  error 2.00 %  active 9" in out.getvalue()
    display.close()
    assert out.getvalue().endswith(" \r")


def test_elsewhere_lines_are_sparse(caplog):
    clock, out = Clock(), io.StringIO()
    updates(clock, Display(True, stream=out, clock=clock))
    assert 5 <= len(out.getvalue().splitlines()) <= 7
    with caplog.at_level(logging.INFO, logger="l0hooks.calibration"):
        updates(clock, Display(stream=out, clock=clock))
    assert 5 <= len(caplog.records) <= 7
    assert caplog.messages[-1] == "gates 50/50  error 2.00 %  active 9  50 s"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_it_can_be_switched_off(stream, caplog):
    clock, out = Clock(), stream()
    with caplog.at_level(logging.INFO):
        display = Display(False, stream=out, clock=clock)
        updates(clock, display)
        display.close()
    assert out.getvalue() == ""
    assert not caplog.records


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "1 min 40 s"), (7300, "2 h 01 min")])
def test_durations(seconds, text):
    assert str(Update("s", 1, 1, 0.5, 1, seconds, 0.0)).endswith(text)


def test_percent_keeps_digits_that_say_something():
    assert [percent(x) for x in (0.00042, 0.5, 20.0)] == ["0.04 %", "50.0 %", "2,000 %"]


STATE = {
    "stage": "swaps",
    "none": None,
    "float": 0.1 + 0.2,
    "many": [math.inf, -math.inf, 1, True],
    "deep": {"a": {"b": np.arange(3), "c": np.float32(0.1)}, "empty": {}, "f": np.ones((2, 2), np.float32)},
}


def same(one, other):
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "fit.ckpt"
    assert Checkpoint(path, "data").read() is None
    Checkpoint(path, "data").write(STATE)
    assert same(STATE, Checkpoint(path, "data").read())
    assert [file.name for file in tmp_path.iterdir()] == ["fit.ckpt"]  # no temporary file stays
    Checkpoint(path, "data").remove()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    Checkpoint(tmp_path / "c", "data").write(STATE)
    with pytest.raises(
        StateError, match=r"(?s)same data and settings.*expected: other.*got: data in .*delete the file"
    ):
        Checkpoint(tmp_path / "c", "other").read()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"not one", None])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "c"
    if content is None:
        np.savez(tmp_path / "other.npz", a=np.ones(2))
        (tmp_path / "other.npz").rename(path)
    else:
        path.write_bytes(content)
    with pytest.raises(StateError, match="must be a checkpoint"):
        Checkpoint(path, "data").read()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c"
    Checkpoint(path, "data").write({"step": 1})

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        Checkpoint(path, "data").write({"step": 2})
    monkeypatch.undo()
    assert Checkpoint(path, "data").read() == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_what_cannot_be_saved_is_refused_before_writing(tmp_path):
    with pytest.raises(StateError, match="got: object"):
        Checkpoint(tmp_path / "c", "data").write({"a": object()})
    assert not list(tmp_path.iterdir())


def test_checkpoints_come_at_the_interval(tmp_path):
    clock = Clock()
    checkpoint = Checkpoint(tmp_path / "c", "data", interval=60, clock=clock)
    assert not checkpoint.due
    clock.now += 60
    assert checkpoint.due
    checkpoint.write({})
    assert not checkpoint.due


def test_where_it_cannot_be_written_is_said_at_once(tmp_path):
    with pytest.raises(InvalidValueError, match="its folder must exist"):
        Checkpoint(tmp_path / "missing" / "c", "data")
    with pytest.raises(InvalidValueError, match="interval must not be negative"):
        Checkpoint(tmp_path / "c", "data", interval=-1)
