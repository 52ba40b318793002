"""``python -m l0hooks calibrate``: a calibration from files to files."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from l0hooks.calibration.calibrator import Calibrator
from l0hooks.calibration.data.files import TextTable, as_names, read_matrix_file, read_table
from l0hooks.calibration.data.targets import CalibrationWarning
from l0hooks.calibration.fit.solver import Method
from l0hooks.calibration.numerics.dual import Distance
from l0hooks.calibration.numerics.problem import BoundsOn, Loss, Precision
from l0hooks.calibration.output.html_report import write_report
from l0hooks.calibration.output.result import CalibrationResult, Table
from l0hooks.errors import InvalidValueError, L0HooksError, explain

OK, BAD, NOT_CONVERGED, INTERRUPTED = 0, 2, 3, 130
_EPILOG = """\
example: 5,000 of the households of a survey, and a report
  python -m l0hooks calibrate M.npz targets.csv --keep 5000 \\
      --design-weights w.csv --out weights.csv --report report.html

files
  MATRIX   one row for each target, one column for each household:
           .npz (scipy.sparse.save_npz), .mtx (Matrix Market), or .parquet and
           .csv, whose column 'target' names the rows and whose header names
           the households. One row for each household instead: --transpose.
  TARGETS  .csv or .parquet with columns
             target      its name (without it: in the order of the rows)
             value       what is to be met; or
             lower,upper what it shall lie between, either may be empty
             group       optional: errors are averaged within groups
             importance  optional: what its squared error counts, 1 if empty

             target,value,group
             people/age 0-17,73100000,age
             income/total,1.2e13,income

  Names are matched, whatever the order. If the matrix has none, rows of
  TARGETS and of --design-weights stand in its order.

exit codes
  0 done; 2 a usage or an input that is wrong, nothing written;
  3 written, but the fit did not converge; 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process if not given.

    Returns
    -------
    int
        The exit code.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", CalibrationWarning)
            return _calibrate(options, told)
    except (L0HooksError, OSError, MemoryError) as error:
        _say(f"error: {error}" if str(error) else f"error: {type(error).__name__}")
        return BAD
    except KeyboardInterrupt:
        saved = f"; the same command goes on from {options.checkpoint}" if options.checkpoint else ""
        _say(f"interrupted{saved}")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m l0hooks", description="L0 regularisation with Hard Concrete gates.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser = commands.add_parser(
        "calibrate",
        help="choose households of a survey and weights that meet targets",
        description="Choose households of a survey, and weights for them that meet population targets.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("matrix", metavar="MATRIX", type=Path, help="what each household adds to each target")
    parser.add_argument("targets", metavar="TARGETS", type=Path, help="what is to be met")
    parser.add_argument("--transpose", action="store_true", help="MATRIX has one row for each household")
    _add_choice(parser.add_argument_group("who is chosen"))
    _add_fit(parser.add_argument_group("the fit"))
    _add_output(parser.add_argument_group("output"))
    return top


def _add_choice(group: Any) -> None:
    count = group.add_mutually_exclusive_group()
    count.add_argument("--keep", metavar="K", type=int, help="so many households; all of them if not given")
    count.add_argument("--l0", metavar="PRICE", type=float, help="instead: what a household costs in the loss")
    group.add_argument(
        "--must-keep", metavar="FILE", type=Path, help="households that must be chosen: column household"
    )
    group.add_argument("--leave-out", metavar="FILE", type=Path, help="households that must not: column household")
    group.add_argument(
        "--clusters", metavar="FILE", type=Path, help="columns household, cluster: each cluster shares one weight"
    )


def _add_fit(group: Any) -> None:
    group.add_argument("--design-weights", metavar="FILE", type=Path, help="columns household, weight; 1 if not given")
    group.add_argument(
        "--bounds",
        metavar=("LO", "HI"),
        nargs=2,
        type=float,
        default=(0.0, math.inf),
        help="of a chosen household (0 inf)",
    )
    group.add_argument(
        "--bounds-on", choices=get_args(BoundsOn), default="ratio", help="weight / design weight, or weight"
    )
    group.add_argument("--distance", choices=get_args(Distance), default="chi_square", help="from the design weights")
    group.add_argument("--loss", choices=get_args(Loss), default="relative")
    group.add_argument("--method", choices=get_args(Method), default="auto", help="how households are chosen (auto)")
    group.add_argument("--hierarchy", metavar="FILE", type=Path, help="columns parent, child of targets that add up")
    group.add_argument(
        "--group-multiplier",
        metavar="GROUP=X",
        action="append",
        default=[],
        help="what a group counts; may be repeated",
    )
    group.add_argument(
        "--no-normalize-groups", action="store_true", help="targets count whatever the size of their group"
    )
    group.add_argument(
        "--tolerance", metavar="X", type=float, default=1e-6, help="relative error of a target met (1e-6)"
    )
    group.add_argument("--error-offset", metavar="X", type=float, default=1.0, help="errors are divided by |y| + X (1)")
    group.add_argument("--max-epochs", metavar="N", type=int, default=200, help="of the gates (200)")
    group.add_argument("--patience", metavar="N", type=int, help="end a search after N steps without a better error")
    group.add_argument("--dtype", choices=get_args(Precision), default="float32", help="of the matrix in the fit")
    group.add_argument("--random-state", metavar="N", type=int, default=0)
    group.add_argument("--checkpoint", metavar="FILE", type=Path, help="state of a long fit: the same command goes on")
    group.add_argument("--checkpoint-interval", metavar="S", type=float, default=60.0, help="seconds (60)")


def _add_output(group: Any) -> None:
    group.add_argument("--out", metavar="FILE", type=Path, help="weights as .csv or .parquet")
    group.add_argument("--chosen-only", action="store_true", help="leave households without weight out of --out")
    group.add_argument("--target-report", metavar="FILE", type=Path, help="every target as .csv or .parquet")
    group.add_argument("--report", metavar="FILE", type=Path, help="a page with pictures, .html")
    group.add_argument("--quiet", action="store_true", help="no progress and no summary; warnings and errors only")


def _calibrate(options: argparse.Namespace, told: Sequence[warnings.WarningMessage]) -> int:
    _check_outputs(options)
    matrix = read_matrix_file(options.matrix, transpose=options.transpose)
    targets = _targets(read_table(options.targets))
    calibrator = Calibrator(
        options.keep,
        l0=options.l0,
        bounds=tuple(options.bounds),
        bounds_on=options.bounds_on,
        distance=options.distance,
        loss=options.loss,
        method=options.method,
        groups=targets.pop("groups"),
        importance=targets.pop("importance"),
        group_multipliers=_multipliers(options.group_multiplier),
        normalize_groups=not options.no_normalize_groups,
        hierarchy=None if options.hierarchy is None else _hierarchy(read_table(options.hierarchy)),
        tolerance=options.tolerance,
        error_offset=options.error_offset,
        max_epochs=options.max_epochs,
        patience=options.patience,
        dtype=options.dtype,
        random_state=options.random_state,
        checkpoint=options.checkpoint,
        checkpoint_interval=options.checkpoint_interval,
        progress=False if options.quiet else None,
    )
    result = calibrator.fit(
        matrix,
        **targets,
        design_weights=_households(options.design_weights, "weight"),
        keep=_listed(options.must_keep),
        leave_out=_listed(options.leave_out),
        clusters=_households(options.clusters, "cluster"),
    )
    notes = [str(one.message) for one in told if issubclass(one.category, CalibrationWarning)]
    _write(result, options, notes)
    for note in notes:
        _say(f"warning: {note}")
    if not options.quiet:
        sys.stdout.write(f"{result}\n")
    return OK if result.converged else NOT_CONVERGED


def _targets(table: TextTable) -> dict[str, Any]:
    """``y`` or ``lower`` and ``upper``, ``groups`` and ``importance``, by name if there are names."""
    found: dict[str, Any] = dict.fromkeys(("y", "lower", "upper", "groups", "importance"))
    table.need("value", "lower", "upper")
    if {"lower", "upper"} & set(table.columns):
        ends = [(-math.inf, "lower"), (math.inf, "upper")]
        points = [math.nan] * len(next(iter(table.columns.values())))
        if "value" in table.columns:
            points = table.numbers("value", empty=math.nan)
        for infinite, name in ends:
            given = table.numbers(name, empty=infinite) if name in table.columns else [infinite] * len(points)
            values = [end if math.isnan(point) else point for point, end in zip(points, given, strict=True)]
            found[name] = table.by_name("target", values)
    else:
        found["y"] = table.by_name("target", table.numbers("value"))
    if "group" in table.columns:
        found["groups"] = table.by_name("target", as_names(table.columns["group"]))
        if "" in table.columns["group"]:
            raise InvalidValueError(explain(str(table.path), "every target needs a group.", got="an empty cell"))
    if "importance" in table.columns:
        found["importance"] = table.by_name("target", table.numbers("importance", empty=1.0))
    return found


def _households(path: Path | None, column: str) -> Any:
    if path is None:
        return None
    table = read_table(path)
    if column == "weight":
        if len(table.columns) > 1:
            column = table.need(column)
        else:
            (column,) = table.columns
        return table.by_name("household", table.numbers(column))
    labels = [label if label not in ("", None) else None for label in table.columns[table.need(column)]]
    return table.by_name("household", labels)


def _listed(path: Path | None) -> Any:
    if path is None:
        return None
    table = read_table(path)
    return table.names(table.need("household"))


def _hierarchy(table: TextTable) -> dict[Any, list[Any]]:
    parents, children = (table.names(table.need(name)) for name in ("parent", "child"))
    found: dict[Any, list[Any]] = {}
    for parent, child in zip(parents, children, strict=True):
        found.setdefault(parent, []).append(child)
    return found


def _multipliers(given: Sequence[str]) -> dict[Any, float] | None:
    found = {}
    for text in given:
        name, equals, factor = text.rpartition("=")
        try:
            found[name] = float(factor)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise InvalidValueError(explain("--group-multiplier", "it must be GROUP=NUMBER.", got=repr(text)))
    return dict(zip(as_names(list(found)), found.values(), strict=True)) or None


def _check_outputs(options: argparse.Namespace) -> None:
    """What cannot be written is said before the work, not after it."""
    kinds = {"out": (".csv", ".parquet"), "target_report": (".csv", ".parquet"), "report": (".html", ".htm")}
    for name, known in kinds.items():
        path: Path | None = vars(options)[name]
        option = "--" + name.replace("_", "-")
        if path is not None and path.suffix not in known:
            raise InvalidValueError(
                explain(option, "its kind must be known.", expected=" or ".join(known), got=path.name)
            )
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidValueError(explain(option, "its folder must exist.", got=str(path.absolute().parent)))
    written = [*kinds, "checkpoint"]
    paths = {name: path.resolve() for name, path in vars(options).items() if isinstance(path, Path)}
    for name in written:
        same = [other for other, path in paths.items() if other != name and path == paths.get(name)]
        if same:  # writing the second would destroy the first
            names = " and ".join("--" + one.replace("_", "-") for one in (name, same[0]))
            raise InvalidValueError(explain(names, "files must be distinct.", got=paths[name].name))


def _write(result: CalibrationResult, options: argparse.Namespace, notes: Sequence[str]) -> None:
    tables: list[tuple[Path | None, Table]] = [(options.out, "weights"), (options.target_report, "targets")]
    for path, table in tables:
        if path is not None:
            write = result.to_parquet if path.suffix == ".parquet" else result.to_csv
            write(path, table, chosen_only=options.chosen_only)
    if options.report is not None:
        settings = {
            name: value for name, value in vars(options).items() if name != "command" and value not in (None, [])
        }
        write_report(
            result, options.report, title=f"Calibration of {options.matrix.name}", notes=notes, settings=settings
        )


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
