"""Bounded least squares and the weights nearest to the design weights, against dense solvers of other kinds."""

import numpy as np
import pytest
from scipy import optimize, sparse

from l0hooks.calibration.numerics.distance import nearest_weights
from l0hooks.calibration.numerics.dual import NearestOptions
from l0hooks.calibration.numerics.factor import factorised
from l0hooks.calibration.numerics.least_squares import bounded_fit
from l0hooks.calibration.numerics.proximal import proximal_fit


def random_block(rng, n, rows, density=0.4):
    return rng.random((n, rows)) * (rng.random((n, rows)) < density)


@pytest.mark.parametrize(("n", "rows"), [(20, 50), (60, 40), (150, 120)])
@pytest.mark.parametrize("bounds", [(0.0, np.inf), (0.0, 0.3), (0.1, 0.4), (-np.inf, np.inf)])
def test_bounded_fit_reaches_the_optimum_of_lsq_linear(n, rows, bounds) -> None:
    rng = np.random.default_rng(n)
    block, target = random_block(rng, n, rows), 3 * rng.random(rows)
    low, high = np.full(n, bounds[0]), np.full(n, bounds[1])
    fit = bounded_fit(sparse.csr_array(block), target, low, high, np.ones(n), iterations=20_000, tolerance=1e-10)
    cost = optimize.lsq_linear(block.T, target, bounds, tol=1e-14).cost
    assert fit.converged
    assert fit.residual @ fit.residual / 2 == pytest.approx(cost, rel=1e-9, abs=1e-12)
    assert np.all((fit.g >= low) & (fit.g <= high))
    np.testing.assert_allclose(fit.residual, block.T @ fit.g - target, atol=1e-12)


def test_a_fit_that_stops_early_says_so() -> None:
    rng = np.random.default_rng(0)
    block, target = sparse.csr_array(random_block(rng, 60, 40)), rng.random(40)
    fit = bounded_fit(block, target, np.zeros(60), np.full(60, np.inf), np.ones(60), iterations=3)
    assert not fit.converged
    assert fit.violation > 1e-6


def test_columns_of_zeros_and_fixed_units_do_no_harm() -> None:
    block = sparse.csr_array(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
    low, high = np.array([0.0, 2.0, 0.0]), np.array([1.0, 2.0, np.inf])
    fit = bounded_fit(block, np.array([5.0, 1.0]), low, high, np.ones(3), iterations=50)
    np.testing.assert_allclose(fit.g, [1.0, 2.0, 2.0], atol=1e-8)


def slsqp(block, lower, upper, low, high, strength, factor, raking):
    """The same problem for a dense solver that knows nothing of duals."""

    def cost(g):
        r = g / factor
        return float(strength @ (r * np.log(r) - r + 1 if raking else (r - 1) ** 2 / 2))

    def slope(g):
        r = g / factor
        return strength * (np.log(r) if raking else r - 1) / factor

    constraints = [
        {"type": "ineq", "fun": lambda g: block.T @ g - lower, "jac": lambda g: block.T},
        {"type": "ineq", "fun": lambda g: upper - block.T @ g, "jac": lambda g: -block.T},
    ]
    if np.all(lower == upper):
        constraints = [{"type": "eq", "fun": lambda g: block.T @ g - lower, "jac": lambda g: block.T}]
    start = np.clip(np.full(len(block), factor), low, high)
    bounds = list(zip(low, high, strict=True))
    options = {"ftol": 1e-14, "maxiter": 1000}
    how = {"jac": slope, "constraints": constraints, "bounds": bounds, "method": "SLSQP", "options": options}
    return optimize.minimize(cost, start, **how).x


@pytest.mark.parametrize("distance", ["chi_square", "raking"])
@pytest.mark.parametrize("width", [0.0, 0.1])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_nearest_weights_are_those_of_a_dense_solver(distance, width, factor) -> None:
    rng = np.random.default_rng(1)
    block, strength = rng.random((30, 5)), rng.uniform(0.5, 2, 30)
    target = block.T @ rng.uniform(0.5, 1.5, 30) * factor
    lower, upper = target - width, target + width
    low, high = np.full(30, 0.6 * factor), np.full(30, 1.4 * factor)
    found = nearest_weights(
        sparse.csr_array(block),
        lower,
        upper,
        low,
        high,
        strength,
        factor,
        options=NearestOptions(distance=distance, tolerance=1e-9),
    )
    wanted = slsqp(block, lower, upper, low, high, strength, factor, distance == "raking")
    np.testing.assert_allclose(found.g, wanted, atol=2e-6)
    assert found.feasible
    assert abs(found.gap) < 1e-8
    assert np.all((found.g >= low) & (found.g <= high))


def interval_problem(seed):
    """Intervals and a few points that weights within the bounds meet; some intervals have one end."""
    rng = np.random.default_rng(seed)
    n, rows = int(rng.integers(10, 60)), int(rng.integers(2, 10))
    block = random_block(rng, n, rows, density=0.6)
    if seed % 2:  # columns with much in common
        block = block + 3 * rng.random((n, 1))
    weights = np.clip(rng.lognormal(0, 0.8, n), 0.3, 5.0)
    y = block.T @ weights
    block, y = block / (np.abs(y) + 1), y / (np.abs(y) + 1)
    width = rng.choice([1e-4, 1e-2, 0.1]) * rng.random(rows) * (rng.random(rows) < 0.7)
    lower, upper = y - width * rng.random(rows), y + width * rng.random(rows)
    open_end, side = (rng.random(rows) < 0.2) & (width > 0), rng.random(rows) < 0.5
    lower, upper = np.where(open_end & side, -np.inf, lower), np.where(open_end & ~side, np.inf, upper)
    return block, lower, upper, np.full(n, 0.3), np.full(n, 5.0), rng.lognormal(0, 0.5, n)


def unexplained(gradient, block, g, u_signs, low, high):
    """How far the gradient is from multipliers of the right signs, by non-negative least squares."""
    edges = np.eye(len(g))
    columns = [np.where(u_signs > 0, block, 0.0), np.where(u_signs < 0, -block, 0.0)]
    columns += [edges[:, g <= low + 1e-9], -edges[:, g >= high - 1e-9]]
    points = u_signs == 2
    columns += [block[:, points], -block[:, points]]
    return optimize.nnls(np.concatenate(columns, axis=1), gradient)[1] / np.linalg.norm(gradient)


@pytest.mark.parametrize("distance", ["chi_square", "raking"])
@pytest.mark.parametrize("seed", [*range(30), 105, 191, 217, 251, 255, 259, 289, 298])  # eight that once stalled
def test_nearest_weights_within_intervals_are_certified_and_have_multipliers(distance, seed) -> None:
    block, lower, upper, low, high, strength = interval_problem(seed)
    found = nearest_weights(
        sparse.csr_array(block),
        lower,
        upper,
        low,
        high,
        strength,
        options=NearestOptions(distance=distance, tolerance=1e-9),
    )
    assert found.feasible
    assert abs(found.gap) < 1e-4
    assert np.all((found.g >= low) & (found.g <= high))
    estimates = block.T @ found.g
    assert np.all((estimates >= lower - 2e-9) & (estimates <= upper + 2e-9))
    at_lower, at_upper = np.abs(estimates - lower) < 1e-7, np.abs(estimates - upper) < 1e-7
    signs = np.where(at_lower & at_upper, 2, np.where(at_lower, 1, np.where(at_upper, -1, 0)))
    gradient = strength * (np.log(found.g) if distance == "raking" else found.g - 1)
    assert unexplained(gradient, block, found.g, signs, low, high) < 1e-4


@pytest.mark.parametrize("distance", ["chi_square", "raking"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_nearest_weights_within_intervals_are_those_of_a_dense_solver(distance, seed) -> None:
    block, lower, upper, low, high, strength = interval_problem(seed)
    found = nearest_weights(
        sparse.csr_array(block),
        lower,
        upper,
        low,
        high,
        strength,
        options=NearestOptions(distance=distance, tolerance=1e-9),
    )
    raking = distance == "raking"
    ends = [(block, lower), (-block, -upper)]

    def cost(g):
        return float(strength @ (g * np.log(g) - g + 1 if raking else (g - 1) ** 2 / 2))

    best = optimize.minimize(
        cost,
        np.ones(len(block)),
        jac=lambda g: strength * (np.log(g) if raking else g - 1),
        bounds=list(zip(low, high, strict=True)),
        constraints=[
            {
                "type": "ineq",
                "fun": lambda g, side=side, end=end: (side.T @ g - end)[np.isfinite(end)],
                "jac": lambda g, side=side, end=end: side.T[np.isfinite(end)],
            }
            for side, end in ends
        ],
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert best.success
    assert cost(found.g) == pytest.approx(best.fun, rel=1e-5, abs=1e-9)
    np.testing.assert_allclose(found.g, best.x, atol=2e-3)


def test_raking_is_that_of_iterative_proportional_fitting() -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 3, 200), rng.integers(0, 4, 200)
    margins = np.concatenate([np.eye(3)[rows], np.eye(4)[columns]], axis=1)
    target = margins.T @ rng.lognormal(0, 0.3, 200)
    g = np.ones(200)
    for _ in range(500):
        for part in (slice(0, 3), slice(3, 7)):
            g *= margins[:, part] @ (target[part] / (margins[:, part].T @ g))
    found = nearest_weights(
        sparse.csr_array(margins),
        target,
        target,
        0 * g,
        np.inf * g,
        0 * g + 1,
        options=NearestOptions(distance="raking", tolerance=1e-9),
    )
    np.testing.assert_allclose(found.g, g, rtol=1e-6)


def test_targets_that_cannot_be_met_are_told_and_the_soft_optimum_is_certified() -> None:
    rng = np.random.default_rng(2)
    block = rng.random((40, 6))
    target = block.T @ np.ones(40)
    target[0] *= 10
    low, high, strength = np.full(40, 0.5), np.full(40, 2.0), np.ones(40)
    found = nearest_weights(sparse.csr_array(block), target, target, low, high, strength)
    assert not found.feasible
    assert abs(found.gap) < 1e-3
    best = optimize.lsq_linear(block.T, target, (0.5, 2.0), tol=1e-14).cost
    assert found.misses @ found.misses / 2 == pytest.approx(best, rel=0.05)
    r = found.g
    soft = optimize.minimize(
        lambda g: np.sum((g - 1) ** 2) / 2 + found.tau / 2 * np.sum((block.T @ g - target) ** 2),
        r,
        jac=lambda g: g - 1 + found.tau * block @ (block.T @ g - target),
        bounds=[(0.5, 2.0)] * 40,
        method="L-BFGS-B",
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10},
    )
    mine = np.sum((r - 1) ** 2) / 2 + found.tau / 2 * np.sum((block.T @ r - target) ** 2)
    assert mine == pytest.approx(soft.fun, rel=1e-3)


def test_the_dense_preconditioner_changes_nothing_but_the_work() -> None:
    rng = np.random.default_rng(3)
    block = random_block(rng, 300, 80) * np.geomspace(1e-3, 1e3, 80)
    target, ones = block.T @ rng.uniform(0.5, 1.5, 300), np.ones(300)

    def solve(**limits):
        options = NearestOptions(plain_steps=2, **limits)
        return nearest_weights(sparse.csr_array(block), target, target, 0 * ones, 9 * ones, ones, options=options)

    dense = solve()
    plain = solve(preconditioned_targets=0)
    assert dense.feasible
    assert dense.products < plain.products
    if plain.feasible:
        np.testing.assert_allclose(dense.g, plain.g, atol=1e-5)


def ill_conditioned(rng, n, rows):
    """Columns with much in common, and rows that contradict each other a little."""
    block = random_block(rng, n, rows) + 3 * rng.random((n, 1))
    block[:, rows // 2] = block[:, : rows // 2].sum(axis=1)
    return block


@pytest.mark.parametrize(("n", "rows"), [(40, 80), (80, 80), (200, 60)])
@pytest.mark.parametrize("bounds", [(0.0, np.inf), (0.05, 0.4), (-np.inf, np.inf)])
def test_proximal_points_reach_the_optimum_of_lsq_linear(n, rows, bounds) -> None:
    rng = np.random.default_rng(rows)
    block = ill_conditioned(rng, n, rows)
    target = block.T @ rng.lognormal(-2, 1, n) * (1 + 0.05 * rng.normal(size=rows))
    low, high = np.full(n, bounds[0]), np.full(n, bounds[1])
    fit = proximal_fit(sparse.csr_array(block), target, low, high, np.full(n, 0.1), tolerance=1e-8)
    if np.isinf(bounds).all():  # where lsq_linear keeps singular values that are but rounding
        cost = float(np.square(block.T @ np.linalg.lstsq(block.T, target)[0] - target).sum()) / 2
    else:
        cost = optimize.lsq_linear(block.T, target, bounds, tol=1e-14, max_iter=1000).cost
    assert fit.converged
    assert np.all((fit.g >= low) & (fit.g <= high))
    assert fit.residual @ fit.residual / 2 == pytest.approx(cost, rel=1e-5, abs=1e-7 * float(target @ target))
    np.testing.assert_allclose(fit.residual, block.T @ fit.g - target, atol=1e-12 * np.abs(target).max())


def test_proximal_points_go_on_where_conjugate_gradients_stall() -> None:
    rng = np.random.default_rng(7)
    block = sparse.csr_array(ill_conditioned(rng, 150, 120))
    target = block.T @ rng.lognormal(-2, 1, 150) * (1 + 0.05 * rng.normal(size=120))
    low, high = np.zeros(150), np.full(150, np.inf)
    stalled = bounded_fit(block, target, low, high, np.full(150, 0.1), iterations=50, tolerance=1e-8)
    finished = proximal_fit(block, target, low, high, stalled.g, tolerance=1e-8)
    assert not stalled.converged
    assert finished.converged
    assert finished.residual @ finished.residual < stalled.residual @ stalled.residual


def test_proximal_points_say_when_they_do_not_arrive() -> None:
    rng = np.random.default_rng(8)
    block = sparse.csr_array(ill_conditioned(rng, 150, 120))
    target = rng.random(120)
    fit = proximal_fit(block, target, np.zeros(150), np.full(150, np.inf), np.ones(150), tolerance=1e-10, points=1)
    assert not fit.converged
    assert fit.violation > 1e-10


def nested(rng, n, places=60):
    """Five targets a place and four for all: the normal matrix is an arrow, and mostly zeros."""
    where, block = rng.integers(0, places, n), np.zeros((n, 5 * places + 4))
    for column in range(5):
        block[np.arange(n), 5 * where + column] = rng.random(n)
    block[:, -4:] = rng.random((n, 4))
    return block


@pytest.mark.parametrize("kind", ["nested", "full", "wide"])
def test_factors_of_all_kinds_are_inverses_of_the_normal_matrix_nearly(kind) -> None:
    rng = np.random.default_rng(5)
    block = {
        "nested": lambda: nested(rng, 2000),
        "full": lambda: random_block(rng, 400, 120, density=0.05),  # a sparse product that is dense
        "wide": lambda: random_block(rng, 400, 120, density=0.9),
    }[kind]()
    curvature, ridge = rng.random(len(block)) * (rng.random(len(block)) < 0.9), rng.random(block.shape[1]) + 0.1
    matrix = block.T @ (curvature[:, None] * block) + np.diag(ridge)
    solve = factorised(sparse.csr_array(block), curvature, ridge, np.diag(matrix))
    v = rng.normal(size=block.shape[1])
    np.testing.assert_allclose(solve(v), np.linalg.solve(matrix, v), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("width", [60, 300])  # one slab of targets, and several
def test_factors_leave_the_block_as_it_is(width) -> None:
    rng = np.random.default_rng(width)
    block = sparse.random_array((200, width), density=0.03, rng=rng, format="csr")
    before, curvature = block.copy(), rng.random(200) * (rng.random(200) < 0.8)
    diagonal = 1 + (block.power(2).T @ curvature)
    solve = factorised(block, curvature, np.ones(width), diagonal)
    for kept, now in zip(
        (before.data, before.indices, before.indptr), (block.data, block.indices, block.indptr), strict=True
    ):
        np.testing.assert_array_equal(kept, now)
    matrix = (block.T @ sparse.diags_array(curvature) @ block).toarray() + np.eye(width)
    v = rng.normal(size=width)
    np.testing.assert_allclose(solve(v), np.linalg.solve(matrix, v), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_proximal_points_come_nearer_again_after_a_step_that_was_too_long(seed) -> None:
    rng = np.random.default_rng(seed)
    block = nested(rng, 120, places=14)
    target = block.T @ rng.lognormal(-2, 1, 120) * (1 + 0.05 * rng.normal(size=block.shape[1]))
    fit = proximal_fit(sparse.csr_array(block), target, np.zeros(120), np.full(120, 0.4), np.full(120, 0.1))
    assert fit.converged


def test_proximal_points_with_sparse_factors_reach_the_optimum_of_lsq_linear() -> None:
    rng = np.random.default_rng(6)
    block = nested(rng, 250, places=30)
    target = block.T @ rng.lognormal(-2, 1, 250) * (1 + 0.05 * rng.normal(size=block.shape[1]))
    low, high = np.zeros(250), np.full(250, 0.4)
    fit = proximal_fit(sparse.csr_array(block), target, low, high, np.full(250, 0.1), tolerance=1e-8)
    cost = optimize.lsq_linear(block.T, target, (0.0, 0.4), tol=1e-14).cost
    assert fit.converged
    assert fit.residual @ fit.residual / 2 == pytest.approx(cost, rel=1e-6)


def margins_problem(seed: int, sizes: tuple[int, ...], n: int = 3000):
    """Labels of every unit in some margins, the block, and targets that positive weights give."""
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, size, n) for size in sizes]
    strength = rng.uniform(0.5, 2.0, n)
    scales = [rng.uniform(0.1, 5.0, size) for size in sizes]  # a target's own unit
    parts = [sparse.csr_array((s[one] * strength, (np.arange(n), one))) for s, one in zip(scales, labels, strict=True)]
    block = sparse.hstack(parts, format="csr")
    return labels, scales, strength, block, block.T @ rng.lognormal(0, 0.4, n)


def deming_stephan(labels, scales, strength, target):
    """Proportional fitting as in the paper, one margin after the other."""
    x, margins = strength.copy(), np.split(target, np.cumsum([len(s) for s in scales])[:-1])
    for _ in range(500):
        for label, scale, wanted in zip(labels, scales, margins, strict=True):
            x *= (wanted / scale / np.bincount(label, x, minlength=len(wanted)))[label]
    return x / strength


@pytest.mark.parametrize("sizes", [(7,), (4, 9), (40, 5, 3), (2, 3, 4, 5, 6), (300, 7)])
def test_raking_to_margins_is_proportional_fitting(sizes) -> None:
    labels, scales, strength, block, target = margins_problem(len(sizes), sizes)
    ones = np.ones(len(strength))
    found = nearest_weights(
        block,
        target,
        target,
        0 * ones,
        np.inf * ones,
        strength,
        options=NearestOptions(distance="raking", tolerance=1e-9),
    )
    assert found.feasible
    assert found.steps == 0  # no Newton step
    assert abs(found.gap) < 1e-9
    np.testing.assert_allclose(found.g, deming_stephan(labels, scales, strength, target), rtol=1e-8)


@pytest.mark.parametrize("how", ["bounds", "contradiction", "no margin", "uneven", "intervals", "gap in the pattern"])
def test_raking_to_what_is_no_margin_is_newtons(how) -> None:
    *_, strength, block, target = margins_problem(11, (30, 4), n=400)
    low, high, upper = np.zeros(400), np.full(400, np.inf), target.copy()
    if how == "bounds":
        low, high = np.full(400, 0.5), np.full(400, 1.15)
    elif how == "contradiction":
        target = upper = target * np.where(np.arange(len(target)) < 30, 1.2, 1.0)
    elif how == "no margin":
        block = sparse.csr_array(block + sparse.random_array(block.shape, density=0.1, rng=np.random.default_rng(1)))
        target = upper = block.T @ np.random.default_rng(2).lognormal(0, 0.1, 400)
    elif how == "uneven":
        block = block.copy()
        block.data[::7] *= 1.5
        target = upper = block.T @ np.random.default_rng(2).lognormal(0, 0.1, 400)
    elif how == "intervals":
        upper = target * 1.1
    else:
        block = block.tolil()
        block[3] = 0
        block = sparse.csr_array(block)
        target = upper = block.T @ np.random.default_rng(2).lognormal(0, 0.1, 400)
    found = nearest_weights(
        block, target, upper, low, high, strength, options=NearestOptions(distance="raking", tolerance=1e-8)
    )
    assert found.steps > 0
    assert found.feasible == (how != "contradiction") or how == "bounds"
    assert np.all((found.g >= low) & (found.g <= high))
    assert abs(found.gap) < 1e-4
