"""The runner: ``python -m benchmarks [NAME ...] [--quick] [--large] [--json FILE] [--plot DIR] [--docs] [--list]``.

Without names all benchmarks run that take minutes at the most; ``all`` adds the long ones. Each has a process of its
own, but for a smoke run, which measures nothing. ``--docs`` keeps the results in ``benchmarks/results`` and writes the
documentation's tables and plots anew from all that is kept there; ``--docs --list`` only writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import machine, report
from benchmarks.registry import REGISTRY, Scale
from benchmarks.running import RESULTS, run, tables_of, write_docs


def list_all() -> None:
    """Names, what they measure, and whether they can run."""
    for name, benchmark in REGISTRY.items():
        reason = benchmark.missing()
        remark = f"  [skipped: {reason}]" if reason else "  [long: runs when named]" if benchmark.long else ""
        print(f"{name:12}{benchmark.about}{remark}")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*REGISTRY, "all", []])
    parser.add_argument("--quick", action="store_true", help="a smoke run: small sizes, few repeats")
    parser.add_argument("--large", action="store_true", help="the sizes that take gigabytes and minutes, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw one plot a benchmark here")
    parser.add_argument("--docs", action="store_true", help="keep the results, and write the documentation's tables")
    parser.add_argument("--list", action="store_true", help="what there is; run nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.docs and options.quick:
        print("--docs wants whole runs, without --quick", file=sys.stderr)
        return 2
    if options.list:
        list_all()
        if options.docs:
            write_docs()
        return 0
    names = list(REGISTRY) if "all" in options.names else options.names
    names = names or [name for name, benchmark in REGISTRY.items() if not benchmark.long]
    found = {"date": machine.now(), "revision": machine.revision(), "machine": machine.description(options.threads)}
    found |= {"quick": options.quick, "benchmarks": {}}
    print(f"{machine.in_words(found['machine'])}; revision {found['revision']}")
    if options.quick:
        print("a smoke run: that it runs is what it shows, its figures mean nothing")
    for name in names:
        told = run(name, Scale(options.quick, options.large), options.threads)
        found["benchmarks"][name] = told
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1))
        if options.plot:
            report.plot(tables_of(told), options.plot / f"{name}.png")
        if options.docs and not told["failed"]:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(found | {"benchmarks": {name: told}}, indent=1) + "\n")
    if options.docs:
        write_docs()
    return 1 if any(told["failed"] for told in found["benchmarks"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
