"""The tracker's figures against counting, histories that survive, and training that does not notice."""

import copy
import csv
import importlib.util
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from l0hooks import Gate, Tracker, iter_gates, param_groups, penalty, prune, set_temperature, sparsify, summary
from l0hooks.errors import InvalidValueError, MissingExtraError, SpecError, StateError
from l0hooks.training.metrics import ScalarWriter

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with a norm between, and two linear layers; one module carries no matrix."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 10, 3, padding=1)
        self.hidden, self.head = nn.Linear(10, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.conv(torch.relu(self.norm(self.stem(x)))))
        return self.head(torch.tanh(self.hidden(x.mean((2, 3)))))


SPECS = {
    "weight": "weight",
    "output": {"stem": "output", "head": "input"},
    "coupled": "coupled",
    "mixed": {"stem": "coupled", "hidden": "weight"},
}
TWICE = {"stem": "weight", "conv": "coupled"}  # the group cuts the stem's weight, which has gates of its own


def gated(spec, close_gates):
    model = Net()
    sparsify(model, SPECS.get(spec, TWICE), example_inputs=(X,))
    close_gates(model)
    return model


def dense_size(model=None):
    return sum(p.numel() for p in (model or Net()).parameters())


class Writer:
    def __init__(self):
        self.seen = []

    def add_scalar(self, tag, value, global_step):
        self.seen.append((tag, value, global_step))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_the_evaluated_size_is_what_prune_exports(spec, close_gates):
    """Parameters less the zeros, of a model whose every parameter is otherwise different from zero."""
    model = gated(spec, close_gates)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3 * (p == 0))
    tracker = Tracker(model)
    tracker.log()
    pruned = prune(model, example_inputs=None if spec == "output" else (X,))  # with inputs, closed channels go
    counted = sum(int((p != 0).sum()) for p in pruned.parameters())
    assert tracker.rows[0]["evaluated"] == counted == summary(model).model_parameters_kept < dense_size()
    assert tracker.exported(pruned) == counted
    assert tracker.rows[1] == {"step": 0, "exported": counted}


@pytest.mark.parametrize("spec", [*SPECS, "twice"])
def test_the_expected_size_is_the_mean_over_samples(spec, close_gates):
    """Every gate is drawn, the model's size counted as if the draw decided: the mean meets the expectation."""
    model = gated(spec, close_gates)
    tracker = Tracker(model)
    tracker.log()
    gates = [gate for _, gate in iter_gates(model)]
    starts = [gate.log_alpha.detach().clone() for gate in gates]
    sizes = []
    for _ in range(300):
        with torch.no_grad():
            for gate, start in zip(gates, starts, strict=True):
                drawn = torch.rand_like(start) < gate.family.keep_prob(start, gate.temperature)
                gate.log_alpha.copy_(torch.where(drawn, 5.0, -5.0))
        sizes.append(summary(model).model_parameters_kept)
    mean, error = np.mean(sizes), np.std(sizes) / len(sizes) ** 0.5
    assert 0 < error
    assert abs(tracker.rows[0]["expected"] - mean) < 4 * error


@pytest.mark.parametrize("spec", ["weight", "output", "coupled"])
def test_the_expected_size_is_the_penalty_and_what_is_not_gated(spec, close_gates):
    model = gated(spec, close_gates)
    tracker = Tracker(model, penalties=("params", "l0"))
    tracker.log()
    row, report = tracker.rows[0], summary(model)
    ungated = report.model_parameters - report.parameters
    assert ungated > 0
    assert row["expected"] == pytest.approx(ungated + row["penalty_params"], rel=1e-6)
    assert row["penalty_params"] == penalty(model, params=1.0).item()
    assert row["penalty_l0"] == penalty(model, l0=1.0).item()


@pytest.mark.parametrize("spec", [*SPECS, "twice"])
def test_with_every_gate_surely_open_or_closed_all_sizes_agree(spec, close_gates):
    model = gated(spec, close_gates)
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha.fill_(60.0)
            gate.log_alpha.view(-1)[::2] = -60.0
    trackers = {unit: Tracker(model, unit=unit) for unit in ("params", "gates", "macs")}
    for tracker in trackers.values():
        tracker.log()
        assert tracker.rows[0]["expected"] == pytest.approx(tracker.rows[0]["evaluated"], rel=1e-6)
    assert trackers["gates"].rows[0]["evaluated"] == sum(int(g.support().sum()) for _, g in iter_gates(model))


@pytest.mark.parametrize("spec", ["weight", "output", "coupled"])
def test_multiply_adds_are_those_of_the_summary_and_of_the_pruned_model(spec, close_gates):
    model = gated(spec, close_gates)
    tracker = Tracker(model, unit="macs", penalties=("macs",))
    tracker.log()
    row = tracker.rows[0]
    assert row["evaluated"] == summary(model).macs_kept
    assert row["expected"] == pytest.approx(row["penalty_macs"], rel=1e-6)
    pruned = prune(model, example_inputs=(X,))
    assert tracker.exported(pruned, example_inputs=(X,)) == row["evaluated"]


def test_a_standalone_gate_by_hand():
    gate = Gate(8, init_keep_prob=0.75)
    with torch.no_grad():
        gate.log_alpha[:3] = -60.0
    tracker = Tracker(gate, unit="gates")
    tracker.log()
    assert tracker.rows == [
        {
            "step": 0,
            "expected": pytest.approx(5 * 0.75),
            "evaluated": 5,
            "temperature": 2 / 3,
            "penalty_l0": pytest.approx(5 * 0.75),
        }
    ]
    beside = nn.ModuleDict({"gate": gate, "layer": nn.Linear(3, 2)})
    sizes = Tracker(beside)
    sizes.log()
    assert (sizes.rows[0]["expected"], sizes.rows[0]["evaluated"]) == (8.0, 8)  # no weights behind the gate


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # importing the compiler
@pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support:UserWarning")  # torch says so once a process
def test_sparse_storage_and_wrappers_do_not_change_the_exported_size(close_gates):
    model = gated("weight", close_gates)
    for wrapped in (model, nn.ModuleDict({"module": model}), torch.compile(model)):
        tracker = Tracker(wrapped)
        sizes = [tracker.exported(prune(model, sparse_format=kind)) for kind in (None, "csr")]
        assert sizes == [summary(model).model_parameters_kept] * 2


def test_the_temperature_is_the_gates_own_or_their_mean():
    gates = nn.ModuleList([Gate(2), Gate(2)])
    tracker = Tracker(gates, unit="gates")
    set_temperature(gates, 0.4)
    tracker.log()
    gates[1].temperature = 0.6
    tracker.log()
    assert [row["temperature"] for row in tracker.rows] == [0.4, pytest.approx(0.5)]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_metrics_become_plain_numbers():
    tracker = Tracker(Gate(2), unit="gates")
    values = {"a": 1, "b": 0.5, "c": torch.tensor(2.0, requires_grad=True), "d": torch.tensor(3), "e": np.float32(0.25)}
    tracker.log(**values, nothing=math.nan)
    row = tracker.rows[0]
    assert [row[name] for name in values] == [1, 0.5, 2.0, 3, 0.25]
    assert {type(row[name]) for name in values} == {int, float}
    assert math.isnan(row["nothing"])


def test_every_nth_call_is_recorded_and_steps_count_on():
    tracker = Tracker(Gate(2), unit="gates", every=3)
    assert [tracker.log() for _ in range(7)] == [True, False, False, True, False, False, True]
    assert [row["step"] for row in tracker.rows] == [0, 3, 6]
    assert [tracker.log(20), tracker.log(), tracker.log(50)] == [False, False, True]
    assert tracker.rows[-1]["step"] == 50


@pytest.mark.parametrize(
    ("error", "step", "metrics"),
    [
        (InvalidValueError, 5, {}),
        (InvalidValueError, 4, {}),
        (InvalidValueError, 6.0, {}),
        (InvalidValueError, True, {}),
        (InvalidValueError, None, {"loss": "0.5"}),
        (InvalidValueError, None, {"loss": None}),
        (InvalidValueError, None, {"loss": torch.ones(1)}),
        (InvalidValueError, None, {"loss": torch.tensor(1j)}),
        (InvalidValueError, None, {"fine": 1, "loss": [0.5]}),
        (SpecError, None, {"expected": 1.0}),
        (SpecError, None, {"penalty_l0": 1.0}),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_what_is_refused_leaves_the_history_as_it_was(error, step, metrics, every):
    writer = Writer()
    tracker = Tracker(Gate(2), unit="gates", writer=writer, every=every)
    tracker.log(5, loss=1.0)
    before, written = copy.deepcopy(tracker.state_dict()), list(writer.seen)
    with pytest.raises(error, match=r"Tracker\.log"):
        tracker.log(step, **metrics)
    assert (tracker.state_dict(), writer.seen) == (before, written)
    assert tracker.log(6, loss=1.0) == (every == 1)


def test_an_exported_size_that_cannot_be_counted_is_refused(close_gates):
    model = gated("weight", close_gates)
    pruned = prune(model)
    for tracker, other, options in [
        (Tracker(model), model, {}),
        (Tracker(model, unit="gates"), pruned, {}),
        (Tracker(model, unit="macs"), pruned, {}),
        (Tracker(model, unit="macs"), nn.Linear(3, 2), {"example_inputs": (torch.zeros(1, 3),)}),
    ]:
        with pytest.raises(StateError, match="exported size"):
            tracker.exported(other, **options)
        assert tracker.rows == []
    with pytest.raises(InvalidValueError, match="accuracy"):
        Tracker(model).exported(pruned, accuracy="high")


def test_what_cannot_be_tracked_is_refused_at_once():
    layer = nn.Linear(3, 2)
    with pytest.raises(StateError, match="hold gates"):
        Tracker(layer)
    sparsify(layer, "weight")
    for error, options in [
        (SpecError, {"unit": "parms"}),
        (SpecError, {"penalties": ("l00",)}),
        (StateError, {"unit": "macs"}),
        (InvalidValueError, {"every": 0}),
        (InvalidValueError, {"every": 1.5}),
    ]:
        with pytest.raises(error):
            Tracker(layer, **options)


def test_penalties_take_strengths():
    layer = nn.Linear(3, 2)
    sparsify(layer, "weight")
    tracker = Tracker(layer, penalties={"l0": 0.5, "l0l2": (1.0, 2.0)})
    tracker.log()
    assert tracker.rows[0]["penalty_l0"] == penalty(layer, l0=0.5).item()
    assert tracker.rows[0]["penalty_l0l2"] == penalty(layer, l0l2=(1.0, 2.0)).item()


def test_the_rows_are_a_copy():
    tracker = Tracker(Gate(2), unit="gates")
    tracker.log()
    tracker.rows[0]["step"] = 7
    tracker.state_dict()["rows"][0]["step"] = 7
    assert tracker.rows[0]["step"] == 0


# --- training does not notice ----------------------------------------------------------------------------------------


def train(model, steps, log, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(param_groups(model, lr=1e-2, gate_lr=0.1))
    for _ in range(steps):
        loss = model(X).square().mean() + penalty(model, l0=1e-3)
        optimizer.zero_grad()
        loss.backward()
        log(loss)
        optimizer.step()
        log(loss)


@pytest.mark.parametrize("spec", SPECS)
def test_training_is_the_same_to_the_bit_with_and_without(spec):
    results = []
    for tracked in (False, True):
        torch.manual_seed(1)
        model = Net()
        sparsify(model, SPECS[spec], example_inputs=(X,))
        tracker = Tracker(model, unit="macs", penalties=("l0", "l2", "expected_l2", "params", "macs"))
        train(model, 5, (lambda loss, t=tracker: t.log(loss=loss)) if tracked else (lambda loss: None))
        results.append((model.state_dict(), torch.get_rng_state()))
    (plain, plain_rng), (tracked, tracked_rng) = results
    assert torch.equal(plain_rng, tracked_rng)
    assert plain.keys() == tracked.keys()
    assert all(torch.equal(plain[key], tracked[key]) for key in plain)


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_is_left_as_it_is(spec):
    model = Net()
    sparsify(model, SPECS[spec], example_inputs=(X,))
    model.train()
    model.norm.eval()
    model(X).sum().backward()
    tracker = Tracker(model, penalties=("l0", "l2", "params", "macs"))
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t, t._version, t.requires_grad, t.grad is None or t.grad.clone()) for t in tensors]
    modes, rng = [module.training for module in model.modules()], torch.get_rng_state()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            tracker.log(loss=1.0)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    for now, (tensor, version, needs_grad, grad) in zip([*model.parameters(), *model.buffers()], before, strict=True):
        assert now is tensor
        assert (now._version, now.requires_grad) == (version, needs_grad)
        assert now.grad is None if grad is True else torch.equal(now.grad, grad)


def test_no_graph_is_kept():
    model = nn.Linear(3, 2)
    sparsify(model, "weight")
    tracker = Tracker(model)
    tracker.log(loss=model(torch.ones(1, 3)).sum())
    assert not any(isinstance(value, Tensor) for row in tracker.rows for value in row.values())


# --- histories that survive ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_resumed_run_has_the_history_of_one_that_was_not_interrupted(every, tmp_path):
    def start():
        torch.manual_seed(2)
        model = Net()
        sparsify(model, "weight", example_inputs=(X,))
        return model, torch.optim.SGD(param_groups(model, lr=1e-2, gate_lr=0.1)), Tracker(model, every=every)

    whole, optimizer, through = start()
    train(whole, 6, lambda loss: through.log(loss=loss), optimizer)
    model, optimizer, tracker = start()
    train(model, 3, lambda loss: tracker.log(loss=loss), optimizer)
    torch.save({"model": model.state_dict(), "tracker": tracker.state_dict()}, tmp_path / "checkpoint.pt")
    rng = torch.get_rng_state()

    resumed = copy.deepcopy(model)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer = torch.optim.SGD(param_groups(resumed, lr=1e-2, gate_lr=0.1))
    again = Tracker(resumed, every=every)
    again.load_state_dict(saved["tracker"])
    torch.set_rng_state(rng)
    train(resumed, 3, lambda loss: again.log(loss=loss), optimizer)
    assert again.rows == through.rows
    assert again.state_dict() == through.state_dict()


def test_a_state_that_does_not_fit_is_refused():
    tracker = Tracker(Gate(2), unit="gates")
    tracker.log()
    before = tracker.state_dict()
    for state in ({}, {**before, "unit": "params"}):
        with pytest.raises(StateError):
            tracker.load_state_dict(state)
    assert tracker.state_dict() == before


def test_the_csv_holds_what_the_frame_holds(tmp_path, close_gates):
    model = gated("weight", close_gates)
    tracker = Tracker(model)
    for value in (1 / 3, math.inf, math.nan):
        tracker.log(loss=value)
    tracker.log(accuracy=1)
    tracker.exported(prune(model), accuracy=0.9)
    tracker.to_csv(tmp_path / "history.csv")
    frame = tracker.to_frame()
    assert list(frame.columns) == [name for name in tracker._columns() if name != "step"]
    assert len(frame) == 5
    read = pd.read_csv(tmp_path / "history.csv", index_col="step")
    pd.testing.assert_frame_equal(read, frame, rtol=1e-14)
    with (tmp_path / "history.csv").open(newline="") as file:  # to the bit, which pandas' reader does not promise
        lines = [{name: float(value) for name, value in line.items() if value} for line in csv.DictReader(file)]
    for line, row in zip(lines, tracker.rows, strict=True):
        assert line.keys() == row.keys()
        assert all(line[name] == row[name] or math.isnan(row[name]) for name in row)


def test_an_empty_history_has_a_frame_and_a_file(tmp_path):
    tracker = Tracker(Gate(2), unit="gates")
    tracker.to_csv(tmp_path / "history.csv")
    assert (tmp_path / "history.csv").read_text().strip() == "step"
    assert len(tracker.to_frame()) == 0


def test_a_csv_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    tracker = Tracker(Gate(2), unit="gates")
    tracker.log()
    path = tmp_path / "history.csv"
    tracker.to_csv(path)
    before = path.read_text()
    tracker.log()
    monkeypatch.setattr("csv.DictWriter.writerows", _full_disk)
    with pytest.raises(OSError, match="full"):
        tracker.to_csv(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["history.csv"]


def _full_disk(*_):
    raise OSError("the disk is full")


def test_without_optional_packages_the_csv_is_written_and_errors_name_the_extra(tmp_path, monkeypatch):
    tracker = Tracker(Gate(2), unit="gates")
    tracker.log()
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    tracker.to_csv(tmp_path / "history.csv")
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 2
    for draw in (tracker.to_frame, tracker.plot):
        with pytest.raises(MissingExtraError, match=r"l0hooks\[examples\]"):
            draw()


# --- writers ---------------------------------------------------------------------------------------------------------


def test_a_writer_gets_every_number_of_the_recorded_rows():
    writer: ScalarWriter = Writer()
    tracker = Tracker(Gate(2, init_keep_prob=0.5), unit="gates", writer=writer, every=2)
    tracker.log(10, loss=0.5)
    tracker.log(11, loss=0.25)
    assert writer.seen == [
        ("l0hooks/expected", 1.0, 10),
        ("l0hooks/evaluated", tracker.rows[0]["evaluated"], 10),
        ("l0hooks/temperature", 2 / 3, 10),
        ("l0hooks/penalty_l0", 1.0, 10),
        ("loss", 0.5, 10),
    ]


def test_a_writer_that_fails_costs_no_row():
    class Broken:
        def add_scalar(self, tag, value, global_step):
            raise OSError("the disk is full")

    tracker = Tracker(Gate(2), unit="gates", writer=Broken())
    with pytest.raises(OSError, match="full"):
        tracker.log(loss=1.0)
    assert tracker.rows[0]["loss"] == 1.0


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_the_writer_of_tensorboard_fits(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        Tracker(Gate(2), unit="gates", writer=writer).log(loss=torch.tensor(1.0))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 100


def test_the_history_of_a_wrapped_model(close_gates):
    inner = gated("coupled", close_gates)
    alone, wrapped = Tracker(inner), Tracker(nn.ModuleDict({"net": inner}))
    alone.log()
    wrapped.log()
    assert alone.rows == wrapped.rows
