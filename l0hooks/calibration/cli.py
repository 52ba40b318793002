"""``python -m l0hooks calibrate``: a calibration from files to files."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l0hooks._files import check_writable
from l0hooks.calibration.calibrator import Calibrator
from l0hooks.calibration.cli_options import parser
from l0hooks.calibration.data.files import TextTable, as_names, read_matrix_file, read_table
from l0hooks.calibration.data.frames import few
from l0hooks.calibration.data.margin_files import read_margins, read_microdata
from l0hooks.calibration.data.matrix import NamedMatrix
from l0hooks.calibration.data.targets import CalibrationWarning
from l0hooks.calibration.output.html_report import write_report
from l0hooks.calibration.output.result import CalibrationResult, Table
from l0hooks.calibration.output.tables import EXTRA
from l0hooks.errors import InvalidValueError, L0HooksError, explain, import_extra

OK, BAD, NOT_CONVERGED, INTERRUPTED = 0, 2, 3, 130


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
    options = parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CalibrationWarning)
            return _calibrate(options, caught)
    except (L0HooksError, OSError, MemoryError) as error:
        _say(f"error: {error}" if str(error) else f"error: {type(error).__name__}")
        if options.checkpoint is not None and options.checkpoint.is_file() and isinstance(error, OSError):
            _say(f"the fit is kept: the same command goes on from {options.checkpoint}")
        return BAD
    except KeyboardInterrupt:
        saved = f"; the same command goes on from {options.checkpoint}" if options.checkpoint else ""
        _say(f"interrupted{saved}")
        return INTERRUPTED


def _calibrate(options: argparse.Namespace, caught: Sequence[warnings.WarningMessage]) -> int:
    _check_outputs(options)
    matrix, targets, weights = _data(options)
    calibrator = Calibrator(
        options.keep,
        l0=options.l0,
        bounds=tuple(options.bounds),
        bounds_on=options.bounds_on,
        distance=options.distance,
        rescale_design=options.rescale_design,
        cluster_distance=options.cluster_distance,
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
        keep_checkpoint=True,  # until the results are written
        progress=False if options.quiet else None,
    )
    result = calibrator.fit(
        matrix,
        **targets,
        design_weights=weights,
        keep=_listed(options.must_keep),
        leave_out=_listed(options.leave_out),
        clusters=_households(options.clusters, "cluster"),
    )
    notes = [str(one.message) for one in caught if issubclass(one.category, CalibrationWarning)]
    _write(result, options, notes)
    for note in notes:
        _say(f"warning: {note}")
    if options.checkpoint is not None:
        options.checkpoint.unlink(missing_ok=True)
    if not options.quiet:
        sys.stdout.write(f"{result}\n")
    return OK if result.converged else NOT_CONVERGED


def _data(options: argparse.Namespace) -> tuple[NamedMatrix, dict[str, Any], Any]:
    """Matrix, targets and design weights; the targets say whether the first file holds a matrix or microdata."""
    table = read_table(options.targets)
    given: Path | None = options.design_weights
    if "margin" not in table.columns:
        for option in ("unit", "partial", "drop_empty"):
            if vars(options)[option]:
                must = "it needs a column 'margin' in TARGETS."
                raise InvalidValueError(explain("--" + option.replace("_", "-"), must, got=few(list(table.columns))))
        matrix = read_matrix_file(options.matrix, transpose=options.transpose)
        return matrix, _targets(table), _households(given, "weight")
    data = read_microdata(options.matrix)
    column = None if given is None or str(given) not in data.columns else str(given)
    found = read_margins(
        data,
        table,
        design_weights=column,
        unit=options.unit,
        partial=options.partial,
        drop_empty=options.drop_empty,
    )
    weights = found.design_weights if column is not None or given is None else _households(given, "weight")
    if found.dropped:
        _say(f"dropped, as no household is in them: {few(found.dropped)}")
    return found.matrix, {"y": found.targets, "groups": found.groups, "importance": None}, weights


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
    """Refuse files that cannot be written before the work begins."""
    kinds = {"out": (".csv", ".parquet"), "target_report": (".csv", ".parquet"), "report": (".html", ".htm")}
    for name, known in kinds.items():
        path: Path | None = vars(options)[name]
        option = "--" + name.replace("_", "-")
        if path is not None and path.suffix not in known:
            raise InvalidValueError(
                explain(option, "its kind must be known.", expected=" or ".join(known), got=path.name)
            )
        if path is not None:
            check_writable(path, option)
            if path.suffix == ".parquet":
                import_extra("pyarrow.parquet", extra=EXTRA, where=option)
    if options.report is not None:
        import_extra("matplotlib", extra=EXTRA, where="--report")
    if options.checkpoint is not None:
        check_writable(options.checkpoint, "--checkpoint")
    written = [*kinds, "checkpoint"]
    paths = {name: path.resolve() for name, path in vars(options).items() if isinstance(path, Path)}
    for name in written:
        same = [other for other, path in paths.items() if other != name and path == paths.get(name)]
        if same:  # writing the second would destroy the first
            names = " and ".join("--" + one.replace("_", "-") for one in (name, same[0]))
            raise InvalidValueError(explain(names, "files must be distinct.", got=paths[name].name))


def _try(path: Path, option: str) -> None:
    """Refuse a path where no file can be written."""
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise InvalidValueError(explain(option, "it must be possible to write this file.", got=str(path)))
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent) as file:
            file.write(b"\0")
    except OSError as error:
        got = str(error)
        raise InvalidValueError(explain(option, "it must be possible to write into its folder.", got=got)) from error


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
