"""Which architectures of transformers, timm and torchvision can be gated and pruned, and which cannot.

pip install "l0hooks[transformers]" timm torchvision            # those that are not installed are left out
python -m benchmarks.coverage --sample 40 --seed 0              # a sample, in minutes
python -m benchmarks.coverage --all --json coverage.json        # every architecture, overnight
python -m benchmarks.coverage --library timm --names levit_128  # single ones

Each is built with a small random configuration in a process of its own. All its coupled groups are gated, a random
third of each group's members is closed, and the model is pruned. The result is compared with the gated model on fresh
inputs, on another batch size, and on another length or image size where the gated model takes one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import l0hooks
from benchmarks.architectures import LIBRARIES, Architecture, NotBuiltError, available, build, names_of

TOLERANCE = 1e-5  # of an output's scale; a larger difference is decided in float64
RESULTS = (
    *("exact, as modules", "exact, single modules as graphs", "exact, as a graph"),
    *("refused before training", "refused by prune"),
    *("inexact", "crashed", "out of time", "not built"),
)
_CLOSED = -9.0  # log-odds
Record = dict[str, Any]


def examine(library: str, name: str, seed: int = 0) -> Record:
    """Gate, prune and compare one architecture: its name, the result, and what there is to say about it."""
    record: Record = {"library": library, "name": name, "result": "crashed", "stage": "build", "why": ""}
    start = time.perf_counter()
    try:
        record |= _gated_and_pruned(build(library, name), seed, record)
    except NotBuiltError as error:
        record |= {"result": "not built", "why": str(error)}
    except Exception as error:  # noqa: BLE001  # what is raised is the finding
        record["why"] = _in_one_line(error)
        if isinstance(error, l0hooks.L0HooksError) and record["stage"] != "compare":
            record["result"] = "refused by prune" if record["stage"] == "prune" else "refused before training"
        else:
            record["trace"] = "".join(traceback.format_exception(error)[-4:])
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def _gated_and_pruned(architecture: Architecture, seed: int, record: Record) -> Record:
    model, inputs = architecture.model, architecture.inputs(2, seed)
    dense = _size(model)
    record["stage"] = "sparsify"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", l0hooks.errors.L0HooksWarning)
        l0hooks.sparsify(model, "coupled", example_inputs=inputs)
    texts = [str(one.message) for one in told]
    record["left out"] = [" ".join(text.split())[:600] for text in texts if "without gates stays" in text]
    generator = torch.Generator().manual_seed(seed)
    groups = 0
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            count, groups = gate.log_alpha.numel(), groups + 1
            gate.log_alpha.uniform_(-0.2, 3.0, generator=generator)
            gate.log_alpha[torch.randperm(count, generator=generator)[: max(1, count // 3)]] = _CLOSED
    record |= {"stage": "prune", "groups": groups}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", l0hooks.errors.L0HooksWarning)  # of graphs, which the result says
        small, report = l0hooks.prune(model.eval(), example_inputs=inputs, return_report=True)
    record |= {"stage": "compare", "removed": round(1 - _size(small) / dense, 3), "note": report.note}
    gap, elsewhere = 0.0, []
    cases = {"fresh": architecture.inputs(2, seed + 1), "batch": architecture.inputs(3, seed + 2)}
    for case, given in (cases | {"size": architecture.other(2, seed + 3)}).items():
        expected = _outputs(model, given)
        if expected is None:
            continue  # the gated model does not take this
        try:
            found = _gap(model, small, given)
        except l0hooks.L0HooksError:
            raise
        except Exception as error:
            if not _graphs(small) or "that the graph was not made for" not in str(error):
                raise
            elsewhere.append(case)
            continue
        gap = max(gap, found)
    exact = "exact, as modules" if not _graphs(small) else "exact, single modules as graphs"
    exact = "exact, as a graph" if isinstance(small, torch.fx.GraphModule) else exact
    result = exact if gap <= TOLERANCE else "inexact"
    return {"result": result, "gap": gap, "other sizes refused": elsewhere}


def _graphs(model: nn.Module) -> int:
    return sum(isinstance(module, torch.fx.GraphModule) for module in model.modules())


def _size(model: nn.Module) -> int:
    gates = {id(p) for _, gate in l0hooks.iter_gates(model) for p in gate.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in gates)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor] | None:
    try:
        return [leaf for leaf in pytree.tree_leaves(model.eval()(*inputs)) if isinstance(leaf, Tensor)]
    except Exception:  # noqa: BLE001  # a model's own code can raise anything for a size that it does not take
        return None


@torch.no_grad()
def _gap(model: nn.Module, small: nn.Module, inputs: tuple[Any, ...]) -> float:
    """The largest difference between outputs, as a share of the scale of each; NaN where one alone has a number."""
    expected = _outputs(model, inputs) or []
    got = [leaf for leaf in pytree.tree_leaves(small.eval()(*inputs)) if isinstance(leaf, Tensor)]
    gap = _difference(expected, got)
    if 0 < gap < 1e-2 and gap > TOLERANCE:  # rounding, or a small fault: float64 shows which
        double = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        try:
            one, two = _outputs(model.double(), double), _outputs(small.double(), double)
            gap = gap if one is None or two is None else _difference(one, two)
        finally:
            model.float(), small.float()
    return gap


def _difference(expected: list[Tensor], got: list[Tensor]) -> float:
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return float("inf")
        if finite.any():
            x, y = a[finite].to(torch.complex128), b[finite].to(torch.complex128)
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-12)))
    return worst


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


# --- processes -------------------------------------------------------------------------------------------------------


def _work(channel: Connection, library: str, name: str, seed: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    channel.send(examine(library, name, seed))


def in_a_process(library: str, name: str, seed: int, limit: float) -> Record:
    """What :func:`examine` finds in a process of its own, which is ended after ``limit`` seconds."""
    context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(["benchmarks.preloaded"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, library, name, seed), daemon=True)
    process.start()
    theirs.close()
    record: Record = {"library": library, "name": name, "stage": "", "seconds": limit}
    try:
        if ours.poll(limit):
            return dict(ours.recv())
        return record | {"result": "out of time", "why": f"more than {limit:g} s"}
    except EOFError:
        process.join()
        return record | {"result": "crashed", "why": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


# --- the command -----------------------------------------------------------------------------------------------------


def table(records: list[Record]) -> str:
    """Counts by library and result, then every architecture that is not exact."""
    libraries = [library for library in LIBRARIES if any(one["library"] == library for one in records)]
    counts = Counter((one["library"], one["result"]) for one in records)
    lines = ["| result | " + " | ".join(libraries) + " |", "| --- |" + " --- |" * len(libraries)]
    lines += [f"| {result} | " + " | ".join(str(counts[one, result]) for one in libraries) + " |" for result in RESULTS]
    partly = Counter(one["library"] for one in records if one.get("left out"))
    lines.append("| of these with groups left out | " + " | ".join(str(partly[one]) for one in libraries) + " |")
    lines += [f"left out: {r['library']} {r['name']}: {text[:300]}" for r in records for text in r.get("left out", ())]
    for result in RESULTS[1:]:
        for one in records:
            if one["result"] == result:
                elsewhere = ", ".join(one.get("other sizes refused", ()))
                why = one.get("why") or one.get("note", "") + (f"; refuses: {elsewhere}" if elsewhere else "")
                lines.append(f"{result}: {one['library']} {one['name']} ({one['stage']}): {why[:300]}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=40, help="how many architectures, of all libraries together")
    parser.add_argument("--all", action="store_true", help="every architecture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", choices=LIBRARIES, nargs="+", default=list(LIBRARIES))
    parser.add_argument("--names", nargs="+", help="these architectures, of one library")
    parser.add_argument("--limit", type=float, default=180, metavar="SECONDS", help="for one architecture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one record for each architecture here")
    options = parser.parse_args(arguments)
    missing = available()
    for library in set(options.library) & set(missing):
        print(f"{library} is left out: {missing[library]}")
    libraries = [library for library in options.library if library not in missing]
    chosen = [(library, name) for library in libraries for name in (options.names or names_of(library))]
    if not options.all and not options.names:
        chosen = sorted(random.Random(options.seed).sample(chosen, min(options.sample, len(chosen))))
    records: list[Record] = []
    for library, name in chosen:
        records.append(in_a_process(library, name, options.seed, options.limit))
        print(f"{library} {name}: {records[-1]['result']} ({records[-1]['seconds']:g} s)", flush=True)
        if options.json:
            options.json.write_text(
                json.dumps({"seed": options.seed, "missing": missing, "records": records}, indent=1)
            )
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
