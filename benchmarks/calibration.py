"""Calibration: ``python -m benchmarks.calibration [--problems stress survey areas] [--quick] [--plain] [--scaling]``.

For each problem: l0-python's SparseCalibrationWeights with settings tuned in its favour, then, at the K at which it
ended, ours and three baselines: a random selection polished, random with swaps, greedy with swaps. Every fit runs in a
process of its own, on one thread; memory is the peak over what the process held when it had the problem.
``--plain``: plain calibration against scipy's lsq_linear, the textbook Newton iteration for raking, and iterative
proportional fitting of four and of six margins.
``--scaling``: time and memory of a whole fit against N, 3,000 targets.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from benchmarks.calibration_problems import PROBLEMS, Given

# (strength, learning rate, epochs), found by trial: the strength leads to the K, the rate to the smallest error there
PEER = {
    "stress": [(1e-2, 0.1, 300), (1.5e-2, 0.1, 300)],
    "survey": [(2.3e-2, 0.2, 300), (6e-4, 0.2, 600)],
    "areas": [(1e-2, 0.1, 1500)],
}
PEER_KEEP = 0.5  # its init_keep_prob


def scaled_design(given):
    estimates = given.matrix @ given.design
    usable = estimates != 0
    return given.design * np.median(given.targets[usable] / estimates[usable])


def measures(given, weights):
    errors = np.abs(given.matrix @ weights - given.targets) / (np.abs(given.targets) + 1)
    positive = weights[weights > 0]
    deff = len(positive) * float(positive @ positive) / float(positive.sum()) ** 2
    return {"K": len(positive), "error %": 100 * float(errors.mean()), "deff": deff}


def peer_fit(given, strength, rate, epochs):
    from l0.calibration import SparseCalibrationWeights

    torch.manual_seed(0)
    start = scaled_design(given)
    model = SparseCalibrationWeights(given.matrix.shape[1], init_keep_prob=PEER_KEEP, init_weights=start, seed=0)
    begin = time.process_time()
    model.fit(given.matrix, given.targets, lambda_l0=strength, lr=rate, epochs=epochs, loss_type="relative")
    seconds = time.process_time() - begin
    weights = model.get_weights(deterministic=True).detach().double().numpy()
    return weights, {"seconds": seconds, "epoch ms": 1e3 * seconds / epochs}


def our_fit(given, keep, method="auto"):
    from l0hooks.calibration import Calibrator

    epochs, last = [], [time.process_time()]

    def clock(told):
        now = time.process_time()
        if told.stage == "gates" and told.step > 1:
            epochs.append(now - last[0])
        last[0] = now

    begin = time.process_time()
    calibrator = Calibrator(keep, method=method, callbacks=[clock], progress=False)
    fitted = calibrator.fit(given.matrix, given.targets, design_weights=given.design)
    seconds = time.process_time() - begin
    told = {"seconds": seconds, "winner": fitted.stage, "converged": fitted.converged, "reason": fitted.reason}
    return fitted.weights, told | ({"epoch ms": 1e3 * statistics.median(epochs)} if epochs else {})


def baseline(given, keep, kind):
    from l0hooks.calibration.fit.candidates import Options, random_selection
    from l0hooks.calibration.fit.polish import polish
    from l0hooks.calibration.fit.solver import Solver
    from l0hooks.calibration.numerics.preparation import UnitOptions, prepare

    if kind != "random":
        return our_fit(given, keep, {"random+swaps": "dense", "greedy+swaps": "greedy"}[kind])
    begin = time.process_time()
    solver = Solver(prepare(given.matrix, given.targets, units=UnitOptions(given.design)), Options(keep=keep))
    done = polish(solver.problem, random_selection(solver.problem, keep, 0))
    weights = solver.problem.weights(done.selection.g, done.selection.units)
    return weights, {"seconds": time.process_time() - begin, "converged": done.converged}


def worker(request):
    """One fit in this process: what it reached, its time, its peak memory."""
    torch.set_num_threads(1)
    given, kind = PROBLEMS[request["problem"]](**request.get("size", {})), request["kind"]
    import_everything(kind)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what making the problem has left over would hide what the fit takes
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted from here
    before = resident("VmRSS")
    if kind == "l0-python":
        weights, told = peer_fit(given, request["strength"], request["rate"], request["epochs"])
    elif kind in ("ours", "gates"):
        weights, told = our_fit(given, request["keep"], "auto" if kind == "ours" else "gates")
    else:
        weights, told = baseline(given, request["keep"], kind)
    told |= {"peak MB": resident("VmHWM") - before, "held MB": before}
    return {"kind": kind, **measures(given, weights), **told}


def import_everything(kind):
    """What a library takes when it is loaded is not what a fit takes: a fit of a toy."""
    toy = Given(sparse.csr_array(np.ones((2, 9))), np.ones(2), np.ones(9))
    if kind == "l0-python":
        peer_fit(toy, 1e-3, 0.1, 2)
    else:
        our_fit(toy, 1, "gates")
        our_fit(toy, 9)


def resident(which):
    """MB of this process, now (VmRSS) or at the most (VmHWM)."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(which))
    return int(line.split()[1]) / 1024


def run(**request):
    command = [sys.executable, "-m", "benchmarks.calibration", "--worker", json.dumps(request)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def show(row):
    numbers = ("K", "error %", "deff", "seconds", "epoch ms", "peak MB")
    cells = "".join(f"{row[n]:12.4g}" if n in row else f"{'':12}" for n in numbers)
    print(f"{row['kind']:14}{cells}  {row.get('winner', '')} {row.get('reason', '')}", flush=True)


def compare(problem, quick):
    rows = []
    for strength, rate, epochs in PEER[problem]:
        epochs = 20 if quick else epochs
        print(f"\n{problem}, l0-python at strength {strength}, rate {rate}, for {epochs} epochs")
        print(f"{'':14}" + "".join(f"{n:>12}" for n in ("K", "error %", "deff", "seconds", "epoch ms", "peak MB")))
        peer = run(problem=problem, kind="l0-python", strength=strength, rate=rate, epochs=epochs)
        show(peer)
        lines = [run(problem=problem, kind=kind, keep=peer["K"]) for kind in ("ours", "gates")]
        lines += [
            run(problem=problem, kind=kind, keep=peer["K"]) for kind in ("random", "random+swaps", "greedy+swaps")
        ]
        for line in lines:
            show(line)
        ours, gates = lines[0], lines[1]
        ratios = {
            "error": ours["error %"] / peer["error %"],
            "time": ours["seconds"] / peer["seconds"],
            "memory": ours["peak MB"] / peer["peak MB"],
            "epoch, times faster": peer["epoch ms"] / gates["epoch ms"],
            "never worse": ours["error %"] <= 1.01 * min(line["error %"] for line in lines),
        }
        print("ours / l0-python:", {k: round(v, 4) for k, v in ratios.items()}, flush=True)
        rows.append({"problem": problem, "lines": [peer, *lines], "ratios": ratios})
    return rows


def plain():
    """Plain calibration: seconds, and how far the optima are apart."""
    from scipy.optimize import lsq_linear

    from l0hooks.calibration.numerics.distance import nearest_weights
    from l0hooks.calibration.numerics.dual import NearestOptions
    from l0hooks.calibration.numerics.least_squares import bounded_fit

    rng = np.random.default_rng(0)
    n, rows = 3_000, 200
    block = sparse.random_array((n, rows), density=0.1, rng=rng, format="csr")
    true = rng.lognormal(0, 0.3, n)
    target, ones = block.T @ true, np.ones(n)
    noisy = target * (1 + 0.3 * rng.normal(size=rows))
    few, bounds = sparse.csr_array(block[:180]), (np.zeros(180), np.full(180, 40.0))

    def timed(function):
        begin = time.process_time()
        return function(), time.process_time() - begin

    ours, seconds = timed(lambda: bounded_fit(few, noisy, *bounds, np.ones(180), iterations=20_000, tolerance=1e-10))
    theirs, peer = timed(lambda: lsq_linear(few.T.toarray(), noisy, bounds, tol=1e-12))
    cost = float(ours.residual @ ours.residual) / 2
    found = {"lsq_linear": {"ours s": seconds, "peer s": peer, "cost ours / peer": cost / theirs.cost}}
    near, seconds = timed(
        lambda: nearest_weights(
            block,
            target,
            target,
            0 * ones,
            np.inf * ones,
            ones,
            options=NearestOptions(distance="raking", tolerance=1e-9),
        )
    )
    raked, peer = timed(lambda: newton_raking(block, target))
    found["raking"] = {"ours s": seconds, "peer s": peer, "largest difference": float(np.abs(near.g - raked).max())}

    found["margins"] = raking_to_margins(rng, 50_000, (400, 50, 12, 8))
    found["six margins"] = raking_to_margins(rng, 100_000, (5, 10, 15, 20, 35, 50))
    return found


def raking_to_margins(rng, n, sizes, repeats=5):
    """Medians: ours on the matrix, a whole fit with its checks, and proportional fitting, which is given labels."""
    from l0hooks.calibration import Calibrator
    from l0hooks.calibration.numerics.distance import nearest_weights
    from l0hooks.calibration.numerics.dual import NearestOptions

    labels = [rng.integers(0, size, n) for size in sizes]
    starts, many = np.cumsum([0, *sizes[:-1]]), len(sizes)
    where = np.stack([start + label for start, label in zip(starts, labels, strict=True)], axis=1)
    block = sparse.csr_array((np.ones(where.size), where.ravel(), many * np.arange(n + 1)), shape=(n, sum(sizes)))
    target, ones = block.T @ rng.lognormal(0, 0.3, n), np.ones(n)
    relative, met, matrix = block.copy(), np.ones(len(target)), sparse.csr_array(block.T)
    relative.data /= target[relative.indices]  # misses are relative, as those of the other
    kinds = {
        "ours": lambda: (
            nearest_weights(
                relative,
                met,
                met,
                0 * ones,
                np.inf * ones,
                ones,
                options=NearestOptions(distance="raking", tolerance=1e-11),
            ).g
        ),
        "fit": lambda: Calibrator(distance="raking", dtype="float64", progress=False).fit(matrix, target).weights,
        "peer": lambda: proportional_fitting(labels, np.split(target, starts[1:])),
    }
    seconds, weights = {kind: [] for kind in kinds}, {}
    for _ in range(repeats):
        for kind, function in kinds.items():
            begin = time.process_time()
            weights[kind] = function()
            seconds[kind].append(time.process_time() - begin)
    apart = float(np.abs(weights["ours"] - weights["peer"]).max())
    return {f"{kind} s": statistics.median(one) for kind, one in seconds.items()} | {"largest difference": apart}


def proportional_fitting(labels, margins):
    """Deming & Stephan's iteration: every margin in turn, until all are met within 1e-11 of their size."""
    g = np.ones(len(labels[0]))
    for _ in range(1000):
        worst = 0.0
        for label, wanted in zip(labels, margins, strict=True):
            ratio = wanted / np.bincount(label, g, minlength=len(wanted))
            worst = max(worst, float(np.abs(ratio - 1).max()))
            g *= ratio[label]
        if worst < 1e-11:
            break
    return g


def newton_raking(block, target):
    """Deville & Särndal's iteration with dense normal equations, as R's survey and sampling packages take it."""
    x = block.toarray()
    u = np.zeros(x.shape[1])
    for _ in range(100):
        g = np.exp(x @ u)
        missing = target - x.T @ g
        if np.abs(missing).max() < 1e-9:
            break
        u += np.linalg.solve(x.T @ (g[:, None] * x), missing)
    return g


def scaling(quick):
    """A whole fit of the survey at growing N, K = 2 % of N."""
    rows = []
    for households in (10_000, 30_000) if quick else (10_000, 100_000, 1_000_000):
        row = run(problem="survey", kind="ours", keep=households // 50, size={"households": households})
        print(
            f"N {households:>9,}  {row['seconds']:8.1f} s  peak {row['peak MB'] + row['held MB']:8.0f} MB", flush=True
        )
        rows.append({"households": households, **row})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="*", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--quick", action="store_true", help="l0-python for 20 epochs only")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    results = {"comparison": [row for problem in options.problems for row in compare(problem, options.quick)]}
    if options.plain:
        results["plain"] = plain()
        print(json.dumps(results["plain"], indent=1))
    if options.scaling:
        results["scaling"] = scaling(options.quick)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
