"""``Calibrator``: what it promises for every combination, its result, and runs that are stopped, killed and resumed."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.optimize import lsq_linear, minimize

from l0hooks.calibration import CalibrationWarning, Calibrator, NamedMatrix
from l0hooks.calibration.fit.polished import PolishLimits
from l0hooks.calibration.output.plots import history_plot
from l0hooks.errors import InvalidValueError, MissingExtraError, StateError

T, N = 12, 150


def survey(seed=0, targets=T, households=N):
    """Counts and sums over random categories, with the weights that give the targets."""
    rng = np.random.default_rng(seed)
    matrix = (rng.random((targets, households)) < 0.3) * rng.lognormal(0, 0.5, (targets, households)).round(3)
    design = rng.lognormal(2, 0.4, households)
    return matrix, matrix @ (design * rng.lognormal(0, 0.2, households)), design


def named(matrix):
    return pd.DataFrame(matrix, [f"t{i}" for i in range(len(matrix))], [f"h{i}" for i in range(matrix.shape[1])])


def quick(k=None, **options):
    return Calibrator(k, max_epochs=20, progress=False, **options)


@pytest.mark.parametrize("method", ["auto", "gates", "greedy", "dense"])
@pytest.mark.parametrize("k", [5, 40])
def test_exactly_k_households_have_a_positive_weight(method, k):
    matrix, y, design = survey()
    result = quick(k, method=method).fit(matrix, y, design_weights=design)
    assert result.active == (result.weights > 0).sum() == k
    assert (result.weights >= 0).all()
    np.testing.assert_allclose(result.estimates, matrix @ result.weights)
    if k == 40:
        assert result.error < 1e-6
        assert result.converged


@pytest.mark.parametrize("on", ["ratio", "weight"])
@pytest.mark.parametrize("k", [None, 60])
def test_bounds_of_each_household_hold(on, k):
    matrix, y, design = survey()
    rng = np.random.default_rng(1)
    low, high = rng.uniform(0.2, 0.6, N), rng.uniform(1.5, 6, N)
    scale = design if on == "weight" else np.ones(N)
    result = quick(k, bounds=(low * scale, high * scale), bounds_on=on, dtype="float64").fit(
        matrix, y, design_weights=design
    )
    ratios = (result.weights / design)[result.chosen]
    assert (ratios >= low[result.chosen] * (1 - 1e-9)).all()
    assert (ratios <= high[result.chosen] * (1 + 1e-9)).all()
    assert result.active == (k or N)


def test_plain_calibration_is_the_nearest_by_an_independent_solver():
    matrix, y, design = survey()
    result = quick(dtype="float64", tolerance=1e-9).fit(matrix, y, design_weights=design)
    gap = np.linalg.solve((matrix * design) @ matrix.T, y - matrix @ design)
    linear = design * (1 + matrix.T @ gap)  # Deville & Särndal's linear weights, of which none is negative here
    assert (linear > 0).all()
    assert result.error < 1e-8
    np.testing.assert_allclose(result.estimates, y, rtol=1e-6)
    scales = np.linspace(0.8, 1.2, 401)
    own, other = (min(np.sum((w - c * design) ** 2 / design) for c in scales) for w in (result.weights, linear))
    assert own <= 1.01 * other  # both are near; the factor of the design weights is free here


@pytest.mark.parametrize("ends", ["both", "lower", "upper"])
def test_within_intervals_the_weights_are_the_nearest_by_an_independent_solver(ends):
    rng = np.random.default_rng(0)
    matrix, design = rng.random((4, 15)), rng.uniform(1, 2, 15)
    middle = matrix @ design * np.array([1.2, 0.9, 1.0, 1.0])
    lower = middle * 0.95 if ends != "upper" else np.full(4, -np.inf)
    upper = middle * 1.05 if ends != "lower" else np.full(4, np.inf)
    result = quick(dtype="float64", tolerance=1e-8).fit(matrix, lower=lower, upper=upper, design_weights=design)
    assert result.converged
    rows = [
        {"type": "ineq", "fun": lambda w, row=row, end=end, sign=sign: sign * (row @ w - end)}
        for ends, sign in ((lower, 1.0), (upper, -1.0))
        for row, end in zip(matrix, ends, strict=True)
        if np.isfinite(end)
    ]

    def distance(w):  # in the median the design weights meet the targets as they are
        return np.sum((w - design) ** 2 / design)

    best = minimize(
        distance, design, method="SLSQP", bounds=[(0, None)] * 15, constraints=rows, options={"ftol": 1e-12}
    )
    np.testing.assert_allclose(result.weights, best.x, atol=1e-4)
    assert (matrix @ result.weights >= lower - 1e-6).all()
    assert (matrix @ result.weights <= upper + 1e-6).all()


def test_least_squares_is_that_of_scipy():
    matrix, y, _ = survey(targets=30, households=20)
    matrix, y = np.delete(matrix, 24, axis=0), np.delete(y, 24)  # a row of zeros
    result = quick(objective="least_squares", dtype="float64").fit(matrix, y)
    scale = 1 / (np.abs(y) + 1)
    expected = lsq_linear(matrix * scale[:, None], y * scale, (0, np.inf), tol=1e-12)
    loss = np.sum(((matrix @ result.weights - y) * scale) ** 2) / 2
    assert loss == pytest.approx(expected.cost, rel=1e-6)


def test_who_must_be_in_is_in_and_who_is_out_is_out():
    matrix, y, design = survey()
    keep, out = [f"h{i}" for i in range(10)], [f"h{i}" for i in range(20, 90)]
    result = quick(30).fit(named(matrix), y, design_weights=design, keep=keep, leave_out=out)
    assert (result.weights[:10] > 0).all()
    assert (result.weights[20:90] == 0).all()
    assert result.active == 30


@pytest.mark.parametrize("options", [{}, {"k": 20, "method": "greedy"}, {"bounds": (0.2, 9)}])
def test_zero_design_weights_stay_zero_and_the_rest_is_as_without_them(options):
    matrix, y, design = survey(targets=8)
    zero = np.arange(0, len(design), 7)
    replicate = design.copy()
    replicate[zero] = 0.0
    result = quick(**options).fit(matrix, y, design_weights=replicate)
    rest = np.setdiff1d(np.arange(len(design)), zero)
    alone = quick(**options).fit(matrix[:, rest], y, design_weights=design[rest])
    assert not result.weights[zero].any()
    np.testing.assert_allclose(result.weights[rest], alone.weights, rtol=1e-6)
    assert np.isnan(result.columns("weights")["ratio"][zero]).all()
    assert np.isfinite(result.ratios).all()
    assert str(result).startswith("8 targets")


def test_the_cpu_of_torch_is_a_cpu():
    assert quick(device=torch.device("cpu")).device == torch.device("cpu")
    with pytest.raises(InvalidValueError, match="runs on the CPU"):
        quick(device=torch.device("meta"))


def test_a_cluster_shares_one_weight_and_counts_once():
    matrix, y, _ = survey()
    clusters = np.arange(N) // 3
    result = quick(15, bounds=(0.1, 50)).fit(matrix, y, clusters=clusters)
    weights = result.weights.reshape(-1, 3)
    np.testing.assert_array_equal(weights, weights[:, :1] * np.ones(3))
    assert (weights[:, 0] > 0).sum() == 15
    assert result.active == 45


@pytest.mark.parametrize("cluster_distance", ["once", "members"])
def test_clusters_are_nearest_as_asked_by_an_independent_solver(cluster_distance):
    matrix, y, design = survey(targets=5, households=40)
    clusters = np.sort(np.random.default_rng(3).integers(0, 15, 40))
    _, number, size = np.unique(clusters, return_inverse=True, return_counts=True)
    mean = np.bincount(number, design) / size
    columns = np.zeros((5, len(size)))
    np.add.at(columns.T, number, matrix.T)
    y = columns @ mean * [0.94, 1.0, 1.03, 0.98, 1.05]  # the design weights are right in the median
    # stationary points of sum q (w - d)^2 / 2d subject to A w = y: w = d + (d / q) A' u
    strength = size if cluster_distance == "members" else np.ones(len(size))
    scaled = columns * (mean / strength)
    expected = mean + scaled.T @ np.linalg.solve(scaled @ columns.T, y - columns @ mean)
    assert (expected > 0).all()
    fitted = quick(cluster_distance=cluster_distance, tolerance=1e-9, dtype="float64")
    found = fitted.fit(matrix, y, design_weights=design, clusters=clusters)
    np.testing.assert_allclose(found.weights, expected[number], rtol=1e-5)


def test_left_out_households_and_bounds_by_household_go_together():
    matrix, y, design = survey()
    high = np.linspace(2, 9, N)
    result = quick(60, bounds=(0, high)).fit(matrix, y, design_weights=design, leave_out=[0, 1, 77])
    assert (result.weights <= high * design * (1 + 1e-6)).all()
    assert (result.weights[[0, 1, 77]] == 0).all()


def test_everything_is_aligned_by_name():
    matrix, y, design = survey()
    frame = named(matrix)
    rng = np.random.default_rng(3)
    shuffle = {axis: rng.permutation(len(names)) for axis, names in (("t", frame.index), ("h", frame.columns))}
    straight = quick(30, groups=dict.fromkeys(frame.index, "g")).fit(frame, y, design_weights=design)
    mixed = quick(30, groups=pd.Series("g", frame.index[shuffle["t"]])).fit(
        frame,
        pd.Series(y, frame.index).iloc[shuffle["t"]],
        design_weights=dict(zip(frame.columns[shuffle["h"]], design[shuffle["h"]], strict=True)),
    )
    np.testing.assert_array_equal(mixed.weights, straight.weights)
    sparse_named = NamedMatrix(sparse.coo_matrix(matrix), list(frame.index), list(frame.columns))
    again = quick(30, groups=dict.fromkeys(frame.index, "g")).fit(sparse_named, y, design_weights=design)
    np.testing.assert_array_equal(again.weights, straight.weights)
    assert straight.weights_frame.loc["h7", "design_weight"] == design[7]


def test_intervals_zero_and_negative_targets():
    matrix, y, _ = survey()
    matrix[2] *= -1
    matrix[3] -= matrix[3].mean()
    y[2], y[3] = -y[2], 0.0
    lower, upper = y - 0.01 * np.abs(y), y + 0.01 * np.abs(y)
    lower[5], upper[5] = -np.inf, y[5]
    result = quick(40).fit(matrix, lower=lower, upper=upper)
    assert result.error < 1e-6
    assert (result.estimates >= lower - 1e-4 * np.abs(y) - 1e-4).all()
    assert (result.estimates <= upper + 1e-4 * np.abs(y) + 1e-4).all()
    assert list(result.target_report.columns[:3]) == ["lower", "upper", "design_estimate"]


def test_a_hierarchy_pulls_sums_together():
    rng = np.random.default_rng(0)
    matrix = np.zeros((3, 60))
    matrix[1, :30], matrix[2, 30:] = rng.random(30), rng.random(30)
    matrix[0] = rng.random(60)  # measured otherwise than its parts
    y = np.array([60.0, 20.0, 25.0])
    options = {"hierarchy": {1: 0, 2: 0}, "bounds": (0.5, 2.0), "dtype": "float64", "objective": "least_squares"}
    apart = {}
    for consistency in (0.0, 1e4):
        calibrator = quick(**options, consistency=consistency)
        with pytest.warns(CalibrationWarning, match="sum of its children"):
            estimates = calibrator.fit(matrix, y).estimates
        apart[consistency] = abs(estimates[0] - estimates[1:].sum())
    assert apart[1e4] < 1e-2 * apart[0.0]


def test_targets_that_count_nothing_are_reported_and_not_met():
    matrix, y, design = survey()
    y[:3] *= [9, -9, 0]
    options = {"design_weights": design}
    with pytest.warns(CalibrationWarning, match="lie within"):
        result = quick(30, importance=[0, 0, 0] + [1] * (T - 3)).fit(matrix, y, **options)
    alone = quick(30).fit(matrix[3:], y[3:], **options)
    np.testing.assert_array_equal(result.weights, alone.weights)
    assert len(result.target_report) == T
    with pytest.warns(CalibrationWarning):
        related = quick(30, importance=[0, 0, 0] + [1] * (T - 3), hierarchy={3: [0, 4]}).fit(matrix, y, **options)
    assert np.isfinite(related.history["error"]).any()
    assert related.active == 30


def test_a_result_is_one_line_in_a_list(fitted):
    assert repr(fitted).startswith("<CalibrationResult: 30 households, error ")


def test_a_path_gives_each_number_exactly():
    matrix, y, design = survey()
    results = quick().fit_path(matrix, y, ks=[20, 60, 5], design_weights=design)
    assert {k: result.active for k, result in results.items()} == {5: 5, 20: 20, 60: 60}
    assert list(results) == [5, 20, 60]
    assert results[60].error <= results[5].error
    for bad in ([], [0], [5, N + 1], [2.5]):
        with pytest.raises(InvalidValueError):
            quick().fit_path(matrix, y, ks=bad)


def test_a_price_chooses_fewer_the_higher_it_is():
    matrix, y, design = survey()
    active = [quick(l0=price).fit(matrix, y, design_weights=design).active for price in (1e-6, 1e-1)]
    assert active[1] < active[0] <= N


def test_equal_random_states_give_equal_weights_and_torch_is_left_alone():
    matrix, y, _ = survey()
    state = torch.random.get_rng_state()
    runs = [quick(20, method="gates", random_state=seed).fit(matrix, y).weights for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 3, "l0": 1.0}, "either k or l0"),
        ({"l0": 0.0}, "l0: it must be positive"),
        ({"l0": 1.0, "method": "greedy"}, "a price l0 needs gates"),
        ({"loss": "mse"}, "loss: it must be known"),
        ({"method": "best"}, "method: it must be known"),
        ({"distance": "kl"}, "distance: it must be known"),
        ({"max_epochs": 0}, "max_epochs: it must be an integer >= 1"),
        ({"error_offset": 0.0}, "error_offset: it must be positive and finite"),
        ({"error_offset": None}, "error_offset: it must be positive and finite"),
        ({"patience": 0}, "patience: it must be an integer >= 1"),
        ({"patience": 2.5}, "patience: it must be an integer >= 1"),
        ({"random_state": -1}, "random_state: it must be an integer >= 0"),
        ({"random_state": 1.5}, "random_state"),
        ({"tolerance": float("nan")}, "tolerance: it must be positive"),
        ({"consistency": -1}, "consistency: it must be finite"),
        ({"device": "cuda"}, "the fit runs on the CPU"),
        ({"callbacks": [3]}, "callbacks: they must be callable"),
        ({"dtype": "float16"}, "dtype: it must be known"),
        ({"tolerance": "small"}, "tolerance: it must be positive"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(InvalidValueError, match=message):
        Calibrator(**options)


def test_options_are_read_and_changed_by_name():
    calibrator = Calibrator(5, loss="squared")
    assert repr(calibrator) == "Calibrator(k=5, loss='squared')"
    assert Calibrator(**calibrator.get_params()).get_params() == calibrator.get_params()
    assert calibrator.set_params(k=7).k == 7
    with pytest.raises(InvalidValueError, match="options must be known"):
        calibrator.set_params(kk=7)
    with pytest.raises(InvalidValueError, match="max_epochs"):
        calibrator.set_params(k=9, max_epochs=0)
    assert calibrator.k == 7


def test_predictions_are_those_of_the_matrix_at_hand():
    matrix, y, _ = survey()
    frame = named(matrix)
    calibrator = quick(20)
    with pytest.raises(StateError, match=r"fit\(\) must come first"):
        calibrator.predict(matrix)
    weights = calibrator.fit(frame, y).weights
    np.testing.assert_allclose(calibrator.predict(sparse.csr_array(matrix * 2)), 2 * matrix @ weights)
    np.testing.assert_allclose(calibrator.predict(frame.iloc[:3, ::-1]), matrix[:3] @ weights)
    with pytest.raises(InvalidValueError, match="fitted households"):
        calibrator.predict(matrix[:, 1:])
    with pytest.raises(InvalidValueError, match="fitted households"):
        calibrator.predict(frame.rename(columns={"h3": "x"}))


class Unreachable(Calibrator):
    """A calibrator whose last fit never counts as converged."""

    def solver_options(self):
        return replace(super().solver_options(), polish=PolishLimits(iterations=1, violation=-1.0))


def test_not_converged_is_told():
    matrix, y, _ = survey(targets=40, households=30)
    y = y * np.random.default_rng(0).uniform(0.5, 1.5, len(y))  # more than 30 weights can meet
    with pytest.warns(CalibrationWarning, match=r"(?s)every target should be met.*not converged"):
        result = Unreachable(max_epochs=20, progress=False, objective="least_squares").fit(matrix, y)
    assert not result.converged
    assert "within the bounds: not converged" in str(result)


# the result


@pytest.fixture(scope="module")
def fitted():
    matrix, y, design = survey()
    matrix[4] = 0
    with pytest.warns(CalibrationWarning, match="empty row"):
        return quick(30, groups=["a", "b", "b"] * 4).fit(named(matrix), y, design_weights=design)


def test_the_tables_say_what_the_weights_do(fitted):
    matrix, report = fitted.inputs.matrix.toarray(), fitted.target_report
    assert list(report.index) == [f"t{i}" for i in range(T)]
    assert list(report.columns) == [
        *("value", "design_estimate", "estimate", "relative_error", "group", "support", "chosen", "reachable"),
    ]
    np.testing.assert_allclose(report["estimate"], matrix @ fitted.weights)
    np.testing.assert_allclose(report["relative_error"], (report["estimate"] - report["value"]) / (report["value"] + 1))
    np.testing.assert_array_equal(report["support"], (matrix != 0).sum(axis=1))
    np.testing.assert_array_equal(report["chosen"], (matrix[:, fitted.weights > 0] != 0).sum(axis=1))
    assert report["reachable"].tolist() == [i != 4 for i in range(T)]
    assert fitted.unreachable == ("t4",)
    assert fitted.history["seconds"].is_monotonic_increasing
    frame = fitted.weights_frame
    np.testing.assert_allclose(frame["ratio"] * frame["design_weight"], frame["weight"])


def test_kish(fitted):
    weights = fitted.weights[fitted.weights > 0]
    assert fitted.deff == pytest.approx(1 + weights.var() / weights.mean() ** 2)
    assert fitted.effective_sample_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    quantiles = fitted.ratio_quantiles()
    assert quantiles[0.5] == pytest.approx(np.median(fitted.ratios))
    assert (quantiles[0.0], quantiles[1.0]) == (fitted.ratios.min(), fitted.ratios.max())


def test_the_summary_says_it_all(fitted):
    text = str(fitted)
    for part in ("12 targets, 30 of 150 households", "'t4'", "out of reach    1", "design effect", fitted.stage, "'a'"):
        assert part in text


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("table", ["weights", "targets", "history"])
def test_files_hold_the_tables(fitted, kind, table, tmp_path):
    path = tmp_path / f"table.{kind}"
    {"csv": fitted.to_csv, "parquet": fitted.to_parquet}[kind](path, table)
    read = pd.read_csv(path) if kind == "csv" else pd.read_parquet(path)
    for name, values in fitted.columns(table).items():
        assert read[name].tolist() == list(values)  # all digits
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(InvalidValueError, match="table: it must be known"):
        fitted.to_csv(path, "weight")


def test_only_those_chosen_can_be_written(fitted, tmp_path):
    fitted.to_csv(tmp_path / "w.csv", chosen_only=True)
    read = pd.read_csv(tmp_path / "w.csv")
    assert len(read) == 30
    assert (read["weight"] > 0).all()


def test_what_is_missing_is_named(fitted, tmp_path, monkeypatch):
    for name in ("pyarrow", "pandas", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: fitted.to_parquet(tmp_path / "w.parquet"), lambda: fitted.target_report, fitted.plot):
        with pytest.raises(MissingExtraError, match=r"l0hooks\[calibration\]"):
            call()
    fitted.to_csv(tmp_path / "w.csv")
    assert str(fitted)


def test_pictures_show_the_groups_and_every_chosen_household(fitted, tmp_path):
    figure = fitted.plot(tmp_path / "plot.png")
    left, right = figure.axes
    assert sorted(tick.get_text() for tick in left.get_yticklabels()) == ["a (4)", "b (8)"]
    assert sum(right.patches[0].get_data().values) == 30
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert history_plot(fitted.rows).axes[0].lines


# callbacks, checkpoints


def test_callbacks_see_every_step_and_can_stop():
    matrix, y, _ = survey(targets=60)
    seen = []

    def stop_soon(update):
        seen.append(update)
        return update.stage == "gates" and update.step == 3

    result = quick(20, method="gates", callbacks=[stop_soon]).fit(matrix, y)
    assert [update.step for update in seen if update.stage == "gates"] == [1, 2, 3]
    assert result.active == 20
    assert "stopped by a callback after gates 3/20" in result.reason
    assert len(result.rows) == len(seen)


def test_a_stop_in_swaps_or_greedy_still_gives_k():
    matrix, y, _ = survey(targets=60)
    for method in ("auto", "gates", "greedy", "dense"):
        result = quick(20, method=method, callbacks=[lambda update: True]).fit(matrix, y)
        assert result.active == 20


SCRIPT = """
import json, os, signal, sys
import numpy as np
import torch
from l0hooks.calibration import Calibrator

torch.set_num_threads(1)  # a fork has none of the threads that its parent waits for

def fit(path=None, die=0):
    rng = np.random.default_rng(0)
    matrix = rng.random((20, 120)) * (rng.random((20, 120)) < 0.3)
    y = matrix @ rng.lognormal(0, 1, 120)
    steps = []
    def count(update):
        steps.append(update.stage + str(update.step))
        if len(steps) == die:
            os.kill(os.getpid(), signal.SIGKILL)
    calibrator = Calibrator(max_epochs=40, callbacks=[count], progress=False, checkpoint=path, checkpoint_interval=0)
    results = calibrator.fit_path(matrix, y, ks=[30, 12])
    weights = [result.weights.tolist() for result in results.values()]
    return weights, [[row["stage"] + str(row["step"]) for row in result.rows] for result in results.values()], steps
"""
KILLED = """
fit()  # imports all that a fit needs, once for all forks
for die in sys.argv[2:]:
    child = os.fork()
    if not child:
        fit(sys.argv[1], int(die))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.slow
def test_a_killed_fit_goes_on_where_it_was(tmp_path):
    kills = [7, 35, 30, 20, 3, 15]  # steps after which the process of the moment is killed
    scope = {}
    exec(SCRIPT, scope)
    weights, rows, steps = scope["fit"]()
    path = tmp_path / "fit.ckpt"
    command = [sys.executable, "-c", SCRIPT + KILLED, str(path), *map(str, kills)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert ended.stdout.split() == [f"{-signal.SIGKILL}"] * len(kills), ended.stderr
    again = scope["fit"](path)
    assert again[0] == weights  # to the bit
    assert again[1] == rows
    assert 0 < len(again[2]) <= len(steps) - 20  # what was done is not done again
    assert not list(tmp_path.iterdir())  # a finished fit leaves nothing


class InterruptError(Exception):
    pass


def interrupted(path, matrix, y, **options):
    def stop(update):
        if update.step == 15:
            raise InterruptError

    with pytest.raises(InterruptError):
        quick(20, method="gates", checkpoint=path, checkpoint_interval=0, callbacks=[stop], **options).fit(matrix, y)
    assert path.exists()


@pytest.mark.parametrize("change", ["value", "target", "k", "epochs", "loss"])
def test_a_checkpoint_of_other_data_or_settings_is_refused_before_work(tmp_path, change):
    matrix, y, _ = survey(targets=60)
    path = tmp_path / "c"
    interrupted(path, matrix, y)
    options = {"k": 20, "method": "gates", "max_epochs": 20}
    if change == "value":
        matrix[matrix > 0] += 1e-12  # the same pattern
    elif change == "target":
        y[3] *= 1.000001
    else:
        options.update({"k": {"k": 21}, "epochs": {"max_epochs": 30}, "loss": {"loss": "squared"}}[change])
    called = []
    with pytest.raises(StateError, match="same data and settings"):
        Calibrator(**options, checkpoint=path, callbacks=[called.append], progress=False).fit(matrix, y)
    assert not called
    assert path.exists()  # it is someone's work


def test_a_full_disk_under_a_checkpoint_is_told_and_the_fit_goes_on(tmp_path, monkeypatch):
    matrix, y, _ = survey(targets=20)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    expected = quick(20, method="gates").fit(matrix, y)
    with monkeypatch.context() as patch:
        patch.setattr("l0hooks.calibration.fit.checkpoint.replacing", full)
        with pytest.warns(CalibrationWarning, match=r"(?s)checkpoint: it could not be written.*No space left"):
            result = quick(20, method="gates", checkpoint=tmp_path / "c", checkpoint_interval=0).fit(matrix, y)
    np.testing.assert_array_equal(result.weights, expected.weights)


def test_a_finished_fit_can_be_kept(tmp_path):
    matrix, y, _ = survey(targets=20)
    options = {"method": "gates", "checkpoint": tmp_path / "c", "keep_checkpoint": True}
    first, steps = quick(20, **options).fit(matrix, y), []
    again = quick(20, **options, callbacks=[steps.append]).fit(matrix, y)
    np.testing.assert_array_equal(again.weights, first.weights)
    assert (steps, again.stage, again.columns("history")) == ([], first.stage, first.columns("history"))


def test_bad_data_is_refused_before_the_checkpoint_is_touched(tmp_path):
    matrix, y, _ = survey()
    with pytest.raises(InvalidValueError, match="looks transposed"):
        quick(20, checkpoint=tmp_path / "c", checkpoint_interval=0).fit(matrix.T, y)
    with pytest.raises(InvalidValueError, match="folder must exist"):
        quick(20, checkpoint=tmp_path / "no" / "c").fit(matrix, y)
    assert not list(tmp_path.iterdir())


def test_the_offset_says_what_errors_of_small_targets_are_divided_by():
    rng = np.random.default_rng(0)
    matrix = np.vstack([rng.random(60) * 1e-4, rng.random(60), rng.random(60)])
    y = np.array([1e-3, 30.0, 31.0])
    usual, small = (quick(3, error_offset=one).fit(matrix, y) for one in (1.0, 1e-6))
    for fitted, offset in ((usual, 1.0), (small, 1e-6)):
        wanted = (matrix @ fitted.weights - y) / (np.abs(y) + offset)
        np.testing.assert_allclose(fitted.relative_errors, wanted, atol=1e-15)
    assert abs(small.relative_errors[0]) < 1e-3  # of the target itself
    assert abs(matrix[0] @ usual.weights / y[0] - 1) > abs(small.relative_errors[0])
