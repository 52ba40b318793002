"""Accuracy against size: every method starts from the same dense network and trains for the same epochs.

pip install "l0hooks[dev]" "l0-python==0.6.2" && pip install --no-deps "torch-pruning==1.6.*"
python -m benchmarks.frontier --seeds 5 --json frontier.json --plot frontier.png       # one thread, most of an hour
python -m benchmarks.frontier --tasks digits --kinds weights --targets 0.9 --seeds 1   # a look
python -m benchmarks.frontier --tasks lenet300 lenet5 --targets 0.9 0.95 0.98          # Fashion-MNIST, hours

Weights: l0hooks by `recipe`; l0hooks with a penalty; l0-python's layers; global magnitude with the cubic schedule of
Zhu & Gupta. Channels: l0hooks by `recipe`; Torch-Pruning with magnitude and Taylor importance. The size is reached in
70 % of the steps, then weights alone train. Methods with a penalty have no target: of their strengths the one counts,
seed by seed, that is as sparse and no sparser than it has to be.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import l0hooks
from benchmarks.frontier_tasks import NAMES, Task, step
from l0hooks import schedules
from l0hooks.training import recipe

TARGETS = (0.5, 0.8, 0.9, 0.95, 0.98)
STRENGTHS = (0.5, 2, 8, 24, 64, 200)  # of penalties, over the number of gates


def weights_of(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def groups(model, gate_lr):
    weights, gates = l0hooks.param_groups(model, lr=1e-3, gate_lr=gate_lr)
    return [weights, {**gates, "gates": True}]


# --- single weights: share of the weights that are zero, accuracy -----------------------------------------------------


def with_budget(task, target):
    model, plan = task.start(), recipe(steps=task.steps)
    l0hooks.sparsify(model, plan.spec, budget=plan.budget(sparsity=target))
    by_recipe(model, plan, task)
    small = l0hooks.prune(model)
    return zeros(small), task.accuracy(small)


def by_recipe(model, plan, task):
    optimizer = torch.optim.Adam(plan.param_groups(model, lr=1e-3))
    scheduler = plan.scheduler(optimizer)
    for x, y in task.batches():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()


def with_penalty(task, strength):
    model = task.start()
    gates = l0hooks.sparsify(model, "weight").gates
    optimizer, warm = torch.optim.Adam(groups(model, 0.1)), schedules.linear(0, strength / gates, task.change // 2)
    masks = None
    for t, (x, y) in enumerate(task.batches()):
        if t == task.change:
            model = l0hooks.prune(model).train()
            optimizer, masks = torch.optim.Adam(model.parameters(), 1e-3), hold_zeros(model)
        extra = None if masks else lambda t=t, gated=model: l0hooks.penalty(gated, l0=warm(t))
        step(model, optimizer, x, y, extra, task.rate(t))
    return zeros(model), task.accuracy(model)


def with_l0_python(task, strength):
    from l0.layers import L0Conv2d, L0Linear

    model, pairs = task.start(), []
    for path, old in list(model.named_modules()):
        if isinstance(old, nn.Linear):
            new = L0Linear(old.in_features, old.out_features, old.bias is not None, init_sparsity=0.05)
        elif isinstance(old, nn.Conv2d):
            size = (old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.bias is not None)
            new = L0Conv2d(*size, init_sparsity=0.05)
        else:
            continue
        new.weight.data.copy_(old.weight)
        if old.bias is not None:
            new.bias.data.copy_(old.bias)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
        pairs.append((path, new))
    gates = [p for name, p in model.named_parameters() if "qz" in name or "log" in name]
    known = {id(p) for p in gates}
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizer = torch.optim.Adam([{"params": rest, "lr": 1e-3}, {"params": gates, "lr": 0.1, "gates": True}])
    warm = schedules.linear(0, strength / sum(p.numel() for p in gates), task.change // 2)
    layers = [layer for _, layer in pairs]
    masks = None
    for t, (x, y) in enumerate(task.batches()):
        if t == task.change:
            model = plain_of_l0_python(model, task.dense, pairs)
            optimizer, masks = torch.optim.Adam(model.parameters(), 1e-3), hold_zeros(model)
        extra = None if masks else lambda t=t: warm(t) * sum(layer.get_l0_penalty() for layer in layers)
        step(model, optimizer, x, y, extra, task.rate(t))
    return zeros(model), task.accuracy(model)


@torch.no_grad()
def plain_of_l0_python(model, dense, pairs):
    """What its layers compute in evaluation, as a plain network that can be trained on with its zeros."""
    model.eval()
    plain, state = copy.deepcopy(dense), model.state_dict()
    for path, layer in pairs:
        state[f"{path}.weight"] = layer.weight * layer.weight_gates().view_as(layer.weight)
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain.train()


def with_magnitude(task, target):
    model = task.start()
    weights, optimizer = weights_of(model), torch.optim.Adam(model.parameters(), 1e-3)
    masks, total = [torch.ones_like(w) for w in weights], sum(w.numel() for w in weights)
    wanted = schedules.cubic(0.0, target, task.change)
    for t, (x, y) in enumerate(task.batches()):
        if t <= task.change and (t % 10 == 0 or t == task.change):
            scores = torch.cat([(w.detach().abs() * m).flatten() for w, m in zip(weights, masks, strict=True)])
            chosen = torch.zeros_like(scores)
            chosen[scores.topk(int((1 - wanted(t)) * total + 1e-6)).indices] = 1
            masks = [
                part.view_as(w) for part, w in zip(chosen.split([w.numel() for w in weights]), weights, strict=True)
            ]
        apply(weights, masks)
        step(model, optimizer, x, y, rate=task.rate(t))
    apply(weights, masks)
    return zeros(model), task.accuracy(model)


@torch.no_grad()
def apply(weights, masks):
    for weight, mask in zip(weights, masks, strict=True):
        weight.mul_(mask)


def hold_zeros(model):
    return [w.register_hook((w.detach() != 0).mul) for w in weights_of(model)]


def zeros(model):
    weights = weights_of(model)
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


# --- channels: share of the parameters that are gone, accuracy --------------------------------------------------------


def with_coupled_budget(task, target):
    model, example, plan = task.start(), (task.x[:2],), recipe(steps=task.steps, granularity="coupled")
    l0hooks.sparsify(model, plan.spec, example_inputs=example, budget=plan.budget(sparsity=target))
    by_recipe(model, plan, task)
    small = l0hooks.prune(model, example_inputs=example)
    return gone(small, task.dense), task.accuracy(small)


def with_torch_pruning(importance):
    def run(task, target):
        import torch_pruning as tp

        model, whole = task.start(), parameters(task.dense)
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        pruner = tp.pruner.BasePruner(
            model, task.x[:2], getattr(tp.importance, importance)(), global_pruning=True, pruning_ratio=1.0,
            iterative_steps=400, ignored_layers=[head],
        )  # fmt: skip
        optimizer, wanted = torch.optim.Adam(model.parameters(), 1e-3), schedules.cubic(0.0, target, task.change)
        for t, (x, y) in enumerate(task.batches()):
            if t <= task.change and (t % 10 == 0 or t == task.change):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                for _ in range(400):
                    if parameters(model) <= (1 - wanted(t)) * whole:
                        break
                    pruner.step()
                moments = {id(p): optimizer.state[p] for p in model.parameters() if p in optimizer.state}
                optimizer = torch.optim.Adam(model.parameters(), 1e-3)
                for p in model.parameters():  # those that kept their size keep their moments
                    if id(p) in moments:
                        optimizer.state[p] = moments[id(p)]
            step(model, optimizer, x, y, rate=task.rate(t))
        return gone(model, task.dense), task.accuracy(model)

    return run


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def gone(small, dense):
    return 1 - parameters(small) / parameters(dense)


# --- the table --------------------------------------------------------------------------------------------------------

KINDS = {
    "weights": {
        "l0hooks, budget": (with_budget, True),
        "l0hooks, penalty": (with_penalty, False),
        "l0-python 0.6.2": (with_l0_python, False),
        "magnitude, cubic": (with_magnitude, True),
    },
    "channels": {
        "l0hooks, budget": (with_coupled_budget, True),
        "Torch-Pruning, magnitude": (with_torch_pruning("GroupMagnitudeImportance"), True),
        "Torch-Pruning, Taylor": (with_torch_pruning("GroupTaylorImportance"), True),
    },
}


def run(task, method, has_target, targets):
    """(size asked for, share gone, accuracy, seconds) for each target or strength."""
    found = []
    for value in targets if has_target else STRENGTHS:
        start = time.process_time()
        try:
            share, accuracy = method(task, value)
        except (RuntimeError, ZeroDivisionError, IndexError) as error:  # a peer that cannot go so far
            found.append((value, math.nan, math.nan, math.nan, f"{type(error).__name__}: {error}"[:80]))
            continue
        found.append((value, share, accuracy, time.process_time() - start, ""))
    return found


def at(points, target, has_target):
    """The accuracy at a target: of the run for it, or of the least sparse run that is as sparse; NaN if none is."""
    if has_target:
        return next(a for value, share, a, *_ in points if value == target)
    return min(((share, a) for _, share, a, *_ in points if share >= target - 0.005), default=(0, math.nan))[1]


def show(name, kind, results, targets, dense):
    print(
        f"\n{name}, {kind}; dense {100 * statistics.mean(dense):.2f} %; mean accuracy of {len(dense)} seeds, its error"
    )
    print(f"{'':26}" + "".join(f"{target:>15.0%}" for target in targets) + "   seconds   more removed than asked")
    for method, (_, has_target) in KINDS[kind].items():
        cells, points = [], [p for seed in results[method] for p in seed]
        for target in targets:
            values = 100 * np.array([at(seed, target, has_target) for seed in results[method]])
            error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            cells.append(f"{np.mean(values):8.2f} ± {error:4.2f}")
        off = [share - value for value, share, *_ in points] if has_target else []
        seconds = statistics.median(p[3] for p in points)
        reached = f"   {min(off):+.2%} to {max(off):+.2%}" if off else ""
        print(f"{method:26}" + "".join(cells) + f"{seconds:10.1f}" + reached, flush=True)


def plot(found, targets, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(found), 4.2), layout="constrained")
    for axes, ((name, kind), (results, dense)) in zip(
        np.ravel(figure.subplots(1, len(found))), found.items(), strict=True
    ):
        for method, (_, has_target) in KINDS[kind].items():
            values = [[100 * at(seed, t, has_target) for seed in results[method]] for t in targets]
            axes.errorbar(
                range(len(targets)), np.mean(values, 1), np.std(values, 1) / math.sqrt(len(dense)), fmt="o-", ms=4,
                capsize=2, label=method,
            )  # fmt: skip
        axes.axhline(100 * statistics.mean(dense), color="gray", ls="--", lw=1, label="dense")
        axes.set_xticks(range(len(targets)), [f"{t:.0%}" for t in targets])
        what = "weights" if kind == "weights" else "parameters"
        axes.set(title=f"{name}: {kind}", xlabel=f"{what} removed", ylabel="test accuracy, %")
        axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=["digits", "synthetic"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--methods", nargs="+", help="only methods whose name contains one of these")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few epochs: does it run?")
    parser.add_argument("--json", type=Path, help="write all points here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.methods:
        for kind, methods in KINDS.items():
            KINDS[kind] = {k: v for k, v in methods.items() if any(part in k for part in options.methods)}
    found = {}
    for name in options.tasks:
        tasks = [Task(name, seed, options.quick) for seed in range(options.seeds)]
        dense = [task.accuracy(task.dense) for task in tasks]
        for kind in options.kinds:
            results = {m: [run(task, f, has, options.targets) for task in tasks] for m, (f, has) in KINDS[kind].items()}
            found[name, kind] = results, dense
            show(name, kind, results, options.targets, dense)
    if options.json:
        flat = {f"{name}, {kind}": {"dense": d, "points": r} for (name, kind), (r, d) in found.items()}
        options.json.write_text(json.dumps({"torch": torch.__version__, **flat}, indent=1))
    if options.plot:
        plot(found, options.targets, options.plot)


if __name__ == "__main__":
    main()
