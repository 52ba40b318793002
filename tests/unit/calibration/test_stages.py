"""Gates, greedy, pruning, swaps, the solver and the fitter on small problems."""

import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize, sparse

from l0hooks.calibration import Calibrator
from l0hooks.calibration.fit.candidates import Options, SearchLimits, random_selection
from l0hooks.calibration.fit.gates import GateStage
from l0hooks.calibration.fit.greedy import GreedyStage
from l0hooks.calibration.fit.polish import polish
from l0hooks.calibration.fit.priced import PricedSwapStage
from l0hooks.calibration.fit.solver import Solver, path
from l0hooks.calibration.fit.stage import Selection, largest, refit
from l0hooks.calibration.fit.swaps import SwapStage
from l0hooks.calibration.numerics.distance import nearest_weights
from l0hooks.calibration.numerics.preparation import ErrorOptions, UnitOptions, prepare
from l0hooks.gates import hard_concrete


def small(seed=0, rows=30, households=200, feasible=True, dtype="float32", **units):
    rng = np.random.default_rng(seed)
    matrix = sparse.random_array((rows, households), density=0.3, rng=rng, format="csr")
    targets = matrix @ rng.lognormal(0, 0.5, households)
    if not feasible:
        targets = targets * rng.lognormal(0, 0.5, rows)
    return prepare(matrix, targets, units=UnitOptions(**units), dtype=dtype)


def tiny(**options):
    return small(rows=15, households=100, **options)


def finish(stage):
    while not stage.done:
        stage.advance()
    return stage.selection()


def rows_of(solver):
    reports = []
    while not solver.done:
        reports.append(solver.advance())
    return reports


@pytest.fixture(scope="module")
def whole_run():
    """The number of steps of a solver, and its best candidate."""
    solver = Solver(tiny(feasible=False), Options(keep=10, epochs=30))
    return len(rows_of(solver)), solver.best()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_the_solver_resumes_bit_by_bit(share, whole_run) -> None:
    problem = tiny(feasible=False)
    steps, best = whole_run
    first, second = (Solver(problem, Options(keep=10, epochs=30)) for _ in range(2))
    for _ in range(int(share * steps)):
        first.advance()
    while not first.resumable:
        first.advance()
    second.resume(first.state())
    found = second.run()
    assert found.name == best.name
    np.testing.assert_array_equal(found.polished.selection.g, best.polished.selection.g)


def test_gates_depend_on_the_seed() -> None:
    problem = small()
    one, other = (finish(GateStage(problem, 20, epochs=5, random_state=seed)) for seed in (3, 4))
    assert not np.array_equal(one.g, other.g)


def test_the_expected_size_follows_the_schedule() -> None:
    stage = GateStage(small(), 20, epochs=50)
    assert stage.gate.expected_l0().item() == pytest.approx(80, rel=1e-4)
    for _ in range(15):
        stage.advance()
    assert stage.gate.expected_l0().item() == pytest.approx(40, rel=1e-4)  # half way of 0.6 · 50 epochs: 80 · ½
    for _ in range(15):
        stage.advance()
    assert stage.gate.expected_l0().item() == pytest.approx(20, rel=1e-4)


@pytest.mark.parametrize("copied_share", [0.0, 2.0])
def test_the_gradient_over_open_units_is_autograds(copied_share) -> None:
    problem = small(dtype="float64")
    stage = GateStage(problem, 20, epochs=20, copied_share=copied_share)
    x = np.where(np.arange(problem.size) % 3 == 0, 0.5, 0.0).astype(np.float32)
    open_units = np.flatnonzero(x)
    slope, misses, factor = stage._slope(open_units, x[open_units])
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    product = torch.from_numpy(problem.columns.toarray()).T @ leaf
    (0.5 * (factor * product - torch.from_numpy(problem.lower)).square().sum()).backward()
    np.testing.assert_allclose(slope, leaf.grad.numpy()[open_units], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(misses, factor * product.detach().numpy() - problem.lower, atol=1e-9)


def test_a_higher_price_keeps_fewer_units() -> None:
    problem = tiny()
    counts = [len(finish(GateStage(problem, l0=price, epochs=60)).units) for price in (1e-4, 1e-1)]
    assert counts[0] > counts[1]


def test_greedy_finds_the_units_that_made_the_targets() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(40, 100))
    weights = np.zeros(100)
    weights[[5, 17, 60]] = [3.0, 1.0, 2.0]
    problem = prepare(sparse.csr_array(matrix), matrix @ weights, errors=ErrorOptions("squared"))
    assert finish(GreedyStage(problem, 3)).units.tolist() == [5, 17, 60]


def test_swaps_never_worsen() -> None:
    problem = small(feasible=False)
    start = random_selection(problem, 15, 0)
    stage = SwapStage(problem, start)
    losses = [refit(problem, start.units, start.g, iterations=5000).loss]
    while not stage.done:
        stage.advance()
        now = stage.selection()
        losses.append(refit(problem, now.units, now.g, iterations=5000).loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_auto_comes_close_to_the_best_of_all_selections() -> None:
    rng = np.random.default_rng(4)
    matrix = rng.random((6, 12))
    targets = matrix @ rng.lognormal(0, 1, 12)
    best = min(
        optimize.nnls((matrix / (targets + 1)[:, None])[:, list(chosen)], targets / (targets + 1))[1]
        for chosen in itertools.combinations(range(12), 3)
    )
    problem = prepare(sparse.csr_array(matrix), targets, dtype="float64")
    found = Solver(problem, Options(keep=3, epochs=60)).run().polished
    assert np.linalg.norm(found.misses) <= 1.3 * best


@pytest.mark.parametrize("keep", [3, 10, 14, 25, 40])  # of 15 targets
@pytest.mark.parametrize("feasible", [True, False])
def test_auto_is_never_worse_than_the_simple_methods_and_k_is_exact(keep, feasible) -> None:
    problem = tiny(feasible=feasible)
    solver = Solver(problem, Options(keep=keep, epochs=40))
    best = solver.run().polished
    assert len(best.selection.units) == keep
    assert (best.selection.g > 0).all()
    assert (best.selection.g >= solver.problem.low[best.selection.units] * (1 - 1e-12)).all()
    others = [
        polish(solver.problem, random_selection(problem, keep, 0)),
        polish(solver.problem, finish(SwapStage(solver.problem, random_selection(problem, keep, 0)))),
        polish(solver.problem, finish(SwapStage(solver.problem, finish(GreedyStage(solver.problem, keep))))),
    ]
    assert best.feasible or best.error <= 1.02 * min(one.error for one in others)


@pytest.mark.parametrize("kept", [(), (3, 5)])
def test_the_slopes_of_an_epoch_are_those_of_autograd(kept) -> None:
    problem = small(dtype="float64", keep=kept)
    stage = GateStage(problem, 60, epochs=50)
    for _ in range(5):
        stage.advance()
    theta, odds = (one.detach().double().requires_grad_() for one in (stage.theta, stage.gate.log_alpha))
    stage._noise.epoch = stage.epoch
    z = torch.ones(problem.size, dtype=torch.float64)
    z[torch.from_numpy(stage._free)] = hard_concrete.sample(odds, stage.gate.noise().double())
    p = torch.from_numpy(problem.columns.T.toarray()) @ (z * theta.exp())
    target = torch.from_numpy(problem.lower)
    factor = ((p @ target) / (p @ p)).detach()
    (((factor * p - target) ** 2).sum() / 2).backward()  # at its optimum the factor has no share in the gradient
    wanted = [theta.grad.numpy(), odds.grad.numpy()]
    found = []
    stage._step = lambda factor: found.extend([stage.theta.grad.numpy(), stage.gate.log_alpha.grad.numpy()])
    stage.advance()
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4 * np.abs(other).max())


def priced_cost(problem, selection, price):
    misses = problem.misses(problem.estimates(selection.g, selection.units))
    return float(misses @ misses) / 2 + price / 2 * len(selection.units)


def test_priced_swaps_never_cost_more() -> None:
    problem = small(feasible=False, keep=(3, 5))
    stage = PricedSwapStage(problem, random_selection(problem, 60, 0), 1e-2)
    costs = [stage.cost]
    while not stage.done:
        progress = stage.advance()
        costs.append(stage.cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.5 * costs[0]
    found = stage.selection()
    assert progress.active == len(found.units) < 60
    assert stage.cost == pytest.approx(priced_cost(problem, found, 1e-2), rel=1e-4)


@pytest.mark.parametrize("price", [1e-3, 1e-2, 1e-1])
def test_with_a_price_the_choice_costs_no_more_than_the_best_of_all_choices_nearly(price) -> None:
    rng = np.random.default_rng(3)
    matrix = rng.random((5, 10))
    problem = prepare(sparse.csr_array(matrix), matrix @ rng.lognormal(0, 1, 10), dtype="float64")
    found = Solver(problem, Options(l0=price, epochs=60)).run().polished.selection
    block = problem.columns.toarray()
    best = min(
        optimize.nnls(block[list(chosen)].T, problem.lower)[1] ** 2 / 2 + price / 2 * len(chosen)
        for count in range(1, 6)
        for chosen in itertools.combinations(range(10), count)
    )
    assert priced_cost(problem, found, price) <= 1.25 * best


@pytest.mark.parametrize(("method", "stage", "patience"), [("gates", "gates", 3), ("dense", "swaps", 1)])
def test_patience_ends_a_search_that_gets_no_better(method, stage, patience) -> None:
    problem = small(feasible=False)
    options = Options(keep=20, epochs=100, method=method)
    whole, short = (Solver(problem, replace(options, patience=one)) for one in (None, patience))
    long_run, short_run = ([told.error for told in rows_of(one) if told.stage == stage] for one in (whole, short))
    assert len(short_run) < len(long_run)
    assert short_run == long_run[: len(short_run)]
    watched = short_run[59:] if stage == "gates" else short_run  # gates: once they are down to K
    assert min(watched[-patience:]) >= 0.99 * min(watched[:-patience])
    assert len(short.best().polished.selection.units) == 20


def test_patience_that_is_never_tried_changes_nothing() -> None:
    problem = tiny(feasible=False)
    found = [Solver(problem, Options(keep=10, epochs=20, patience=one)).run().polished for one in (None, 10_000)]
    np.testing.assert_array_equal(found[0].selection.g, found[1].selection.g)


def test_a_patient_solver_resumes_bit_by_bit() -> None:
    problem, options = tiny(feasible=False), Options(keep=10, epochs=30, patience=4)
    whole, first = Solver(problem, options), Solver(problem, options)
    wanted = whole.run().polished
    while not first.done:
        first.advance()
        if first.resumable:
            second = Solver(problem, options)
            second.resume(first.state())
            first = second
    np.testing.assert_array_equal(first.best().polished.selection.g, wanted.selection.g)


@pytest.mark.parametrize("keep", [4, 10])
def test_a_frugal_solver_finds_the_same_with_less(keep) -> None:
    problem = tiny()
    usual, frugal = (Solver(problem, Options(keep=keep, epochs=30), frugal=one) for one in (False, True))
    first, second = usual.run(), frugal.run()
    np.testing.assert_array_equal(first.polished.selection.units, second.polished.selection.units)
    np.testing.assert_array_equal(first.polished.selection.g, second.polished.selection.g)
    assert usual.problem.columns.nnz == problem.columns.nnz
    assert frugal.problem.columns.nnz < problem.columns.nnz


def test_targets_that_can_be_met_are_met_nearest_to_the_design_weights() -> None:
    problem = small(households=400, dtype="float64")
    done = polish(problem, Selection(np.arange(400), np.ones(400)))
    assert done.feasible
    assert done.converged
    assert done.objective == "distance"
    assert np.abs(done.misses).max() <= 1e-6


@pytest.mark.parametrize("households", [60, 400])  # twice, and thirteen times as many as targets
def test_within_intervals_the_nearest_weights_are_sought_at_the_estimates_of_least_squares(households, monkeypatch):
    module = sys.modules[polish.__module__]
    calls = []

    def gives_up_on_intervals(block, lower, upper, *arguments, **options):
        calls.append(bool((lower < upper).any()))
        found = nearest_weights(block, lower, upper, *arguments, **options)
        return replace(found, gap=1.0, feasible=False) if calls[-1] else found

    monkeypatch.setattr(module, "nearest_weights", gives_up_on_intervals)
    problem = small(households=households, dtype="float64")
    problem = replace(problem, upper=problem.upper + 0.05 * np.abs(problem.upper))
    done = polish(problem, Selection(np.arange(households), np.ones(households)))
    assert calls == [True, False]
    assert done.converged
    assert done.feasible
    assert np.abs(done.misses).max() <= 1e-6
    assert "the same estimates" in done.reason
    plain = polish(problem, Selection(np.arange(households), np.ones(households)), objective="least_squares")
    assert done.deff <= plain.deff * (1 + 1e-9)


def test_of_selections_that_meet_all_targets_the_smallest_design_effect_wins() -> None:
    solver = Solver(small(households=400), Options(keep=200, epochs=20))
    best = solver.run()
    assert best.polished.feasible
    assert "random" in {one.name for one in solver.candidates}
    assert best.polished.deff == min(one.polished.deff for one in solver.candidates if one.polished.feasible)


def test_many_units_take_one_start_and_the_polish_is_certified() -> None:
    limits = SearchLimits(every_start=0, greedy=1.6)  # 50 are 1.67 times as many as targets
    solver = Solver(small(feasible=False), Options(keep=50, search=limits))
    best = solver.run()
    assert [one.name for one in solver.candidates] == ["random+swaps"]
    assert best.polished.converged
    assert best.polished.certificate <= 1e-6


def test_greedy_search_is_polished_too_where_its_error_is_near_though_its_loss_is_not() -> None:
    solver = Solver(small(feasible=False), Options(keep=50, search=SearchLimits(every_start=0)))
    while not solver._selected:
        solver.advance()
    first, other = solver._pending[0], solver._pending[1]
    solver._pending = [replace(first, norm=1.0, error=0.1), replace(other, norm=9.0, error=0.05)]
    solver.run()
    assert {one.name for one in solver.candidates} == {"random+swaps", "greedy+swaps"}


def test_a_path_goes_through_all_sizes() -> None:
    found = path(tiny(), [5, 20, 10], Options(epochs=20))
    assert list(found) == [20, 10, 5]
    assert all(len(best.polished.selection.units) == keep for keep, best in found.items())
    errors = [best.polished.error for best in found.values()]
    assert errors[0] <= errors[2]


def test_intervals_are_met_where_points_are_not() -> None:
    rng = np.random.default_rng(0)
    matrix = sparse.csr_array(rng.random((20, 100)))
    targets = matrix @ np.ones(100) * rng.lognormal(0, 0.02, 20)
    wide = Calibrator(15, max_epochs=30).fit(matrix, lower=0.9 * targets, upper=1.1 * targets)
    estimates = wide.estimates
    assert np.all((estimates >= 0.9 * targets - 1e-3) & (estimates <= 1.1 * targets + 1e-3))
    assert wide.converged


def test_ties_are_broken_by_order() -> None:
    assert largest(np.array([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [1, 2]


def test_callbacks_see_every_step_and_may_stop() -> None:
    rng = np.random.default_rng(0)
    matrix = sparse.csr_array(rng.random((20, 100)))
    seen = []

    def watch(told):
        seen.append(told.stage)
        return told.stage == "polish"

    targets = matrix @ rng.lognormal(0, 1, 100)
    fitted = Calibrator(8, max_epochs=20, callbacks=[watch]).fit(matrix, targets)
    assert seen[-1] == "polish"
    assert len(fitted.candidates) == 1


def test_kept_left_out_and_clustered_households() -> None:
    rng = np.random.default_rng(0)
    matrix = sparse.csr_array(rng.random((10, 60)))
    clusters = np.arange(60) // 2
    choice = {"keep": [3], "leave_out": [10], "clusters": clusters}
    fitted = Calibrator(6, max_epochs=20).fit(matrix, matrix @ np.ones(60), **choice)
    weights = fitted.weights
    assert weights[2] == weights[3] > 0
    assert weights[10] == weights[11] == 0
    np.testing.assert_array_equal(weights[0::2], weights[1::2])
    assert (weights[0::2] > 0).sum() == 6


# --- laws: what units things are measured in, and how they are ordered, does not matter -----------------------------


def fit(matrix, targets, design=None, **options):
    options = {"method": "greedy", "dtype": "float64"} | options
    return Calibrator(5, **options).fit(sparse.csr_array(matrix), targets, design_weights=design).weights


def test_the_unit_of_a_household_and_of_the_design_weights_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.random((20, 60)) * 100
    targets = matrix @ rng.lognormal(0, 0.5, 60)
    base = fit(matrix, targets, np.ones(60))
    np.testing.assert_allclose(fit(matrix, targets, np.full(60, 7.0)), base, rtol=1e-6)
    permutation = rng.permutation(60)
    np.testing.assert_allclose(fit(matrix[:, permutation], targets, np.ones(60)), base[permutation], rtol=1e-5)


def test_the_unit_of_the_targets_does_not_matter_for_the_squared_loss() -> None:
    rng = np.random.default_rng(2)
    matrix = rng.random((20, 60))
    targets = matrix @ rng.lognormal(0, 0.5, 60) * 1e3
    base = fit(matrix, targets, loss="squared")
    np.testing.assert_allclose(fit(1e3 * matrix, 1e3 * targets, loss="squared"), base, rtol=1e-4)


def test_a_duplicated_household_gets_the_same_weight_in_plain_calibration() -> None:
    rng = np.random.default_rng(3)
    matrix = rng.random((8, 60))
    matrix[:, 1] = matrix[:, 0]
    weights = Calibrator(dtype="float64").fit(matrix, matrix @ rng.lognormal(0, 0.2, 60)).weights
    assert weights[0] == pytest.approx(weights[1])


def test_bounds_hold() -> None:
    rng = np.random.default_rng(4)
    matrix, design = rng.random((8, 60)), rng.uniform(1, 2, 60)
    targets = matrix @ (design * rng.lognormal(0, 0.2, 60))
    fitted = Calibrator(bounds=(0.8, 1.25), dtype="float64").fit(matrix, targets, design_weights=design)
    ratios = fitted.weights / design
    assert 0.8 - 1e-9 <= ratios.min() <= ratios.max() <= 1.25 + 1e-9


def test_the_same_problem_with_other_values_is_another_problem() -> None:
    one, two = small(seed=1), replace(small(seed=1))
    two.columns.data *= 2
    first, second = (Solver(p, Options(keep=10, method="greedy")).run().polished for p in (one, two))
    assert not np.array_equal(first.selection.g, second.selection.g)
