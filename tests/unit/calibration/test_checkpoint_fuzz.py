"""Checkpoints that were changed in every field: refused by our error, or a fit that goes on."""

import json

import numpy as np
import pytest
from mutations import mutations
from parameters import slow

from l0hooks.calibration import Calibrator
from l0hooks.calibration.fit.checkpoint import Checkpoint
from l0hooks.errors import StateError

RNG = np.random.default_rng(0)
MATRIX = (RNG.random((6, 40)) < 0.4) * RNG.lognormal(0, 0.5, (6, 40)).round(3)
Y = MATRIX @ RNG.lognormal(2, 0.4, 40)


class StopError(Exception):
    pass


def fit(path, stop, *, k=None, ks=None, **options):
    """A fit that writes a checkpoint after each step and ends when ``stop`` says so."""

    def end(update):
        if stop(update):
            raise StopError

    calibrator = Calibrator(
        k, max_epochs=20, checkpoint=path, checkpoint_interval=0, callbacks=[end], progress=False, **options
    )
    return calibrator.fit_path(MATRIX, Y, ks=ks) if ks else calibrator.fit(MATRIX, Y)


def after(count):
    """Stops after so many steps, or at the second of a stage."""
    seen = []

    def stop(update):
        seen.append(update.stage)
        return seen.count(count) == 2 if isinstance(count, str) else len(seen) > count

    return stop


CASES = {  # options, and how many steps are taken before the checkpoint that is changed
    "gates": ({"k": 8, "method": "gates", "patience": 4}, 11),
    "greedy": ({"k": 8, "method": "greedy"}, 1),
    "swaps": ({"k": 8, "method": "dense"}, 2),
    "priced": ({"l0": 0.1}, 22),
    "polished": ({"k": 8}, "polish"),
    "second size": ({"ks": [12, 6], "method": "gates"}, 40),
}


@pytest.mark.filterwarnings("ignore::l0hooks.calibration.CalibrationWarning")
@pytest.mark.parametrize("name", ["greedy", *slow(name for name in CASES if name != "greedy")])
def test_a_changed_state_is_refused_by_our_error(name, tmp_path):
    options, count = CASES[name]
    path = tmp_path / "c"

    def run(stop):
        return fit(path, stop, **options)

    with pytest.raises(StopError):
        run(after(count))
    with np.load(path) as file:
        fingerprint = json.loads(file["header"].tobytes())["fingerprint"]
    checkpoint = Checkpoint(path, fingerprint)
    state = checkpoint.read()
    raw, refused, went_on = [], 0, 0
    for what, changed in mutations(state, 1):
        checkpoint.write(changed)
        try:
            run(lambda _: True)
        except StateError as error:
            assert str(error).startswith("checkpoint")  # noqa: PT017
            refused += 1
        except StopError:
            went_on += 1
        except Exception as error:  # noqa: BLE001
            raw.append(f"{what}: {type(error).__name__}: {error}"[:200])
    assert not raw
    assert refused > 4 * went_on


@pytest.mark.parametrize("at", ["state", "format", "fingerprint", "whole"])
def test_a_header_that_was_changed_is_refused(at, tmp_path):
    path = tmp_path / "c"
    checkpoint = Checkpoint(path, "data")
    checkpoint.write({"stage": "gates", "gates": {"epoch": 7, "theta": np.ones(2), "best": [0.5, None]}})
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays.pop("header").tobytes())
    for what, changed in mutations(header if at == "whole" else header[at]):
        whole = changed if at == "whole" else {**header, at: changed}
        with path.open("wb") as file:
            np.savez(file, header=np.frombuffer(json.dumps(whole).encode(), np.uint8), **arrays)
        try:
            checkpoint.read()
        except StateError:
            continue
        except Exception as error:  # noqa: BLE001
            pytest.fail(f"{what}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("step", [7, 31])
def test_a_damaged_checkpoint_is_refused_or_the_same(step, tmp_path):
    path = tmp_path / "c"
    checkpoint = Checkpoint(path, "data")
    checkpoint.write({"epoch": 7, "theta": np.arange(9.0)})
    data = path.read_bytes()
    for place in range(0, len(data), step):
        for new in (data[:place], data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]):
            path.write_bytes(new)
            try:
                state = checkpoint.read()
            except StateError:
                continue
            assert state["epoch"] == 7
            assert np.array_equal(state["theta"], np.arange(9.0))
