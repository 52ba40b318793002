"""The arguments of ``python -m l0hooks calibrate``, and their help."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, get_args

from l0hooks.calibration.fit.candidates import Method
from l0hooks.calibration.numerics.dual import Distance
from l0hooks.calibration.numerics.problem import BoundsOn, ClusterDistance, Loss, Precision

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
             lower,upper what it is to lie between, either may be empty
             group       optional: errors are averaged within groups
             importance  optional: what its squared error counts, 1 if empty

             target,value,group
             people/age 0-17,73100000,age
             income/total,1.2e13,income

  MATRIX may be the households themselves, and TARGETS their margins:
             household,region,age,income        margin,category,value
             h1,north,old,20000                 region:age,north:old,4100
             h2,south,young,31000               income by region,north,9e7
                                                share age,old,0.4
                                                count,,10000
  See l0hooks.calibration.margins for all kinds. Categories of a crossing
  are joined by ':'.

  Names are matched, whatever the order. If the matrix has none, rows of
  TARGETS and of --design-weights stand in its order.

  With --margins MATRIX has one row for each household, and columns as they
  were asked; TARGETS says what they must add up to:

      households.csv:  household,region,age,income,weight
                       17,north,young,31000,1041.5
      targets.csv:     margin,category,value
                       region:age,north:young,812000
                       income by region,north,4.1e10
                       mean(income),,38000

exit codes
  0 done; 2 a usage or an input that is wrong, nothing written;
  3 written, but targets are missed or the fit did not converge;
  130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(prog="python -m l0hooks", description="L0 regularisation with Hard Concrete gates.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    calibrate = commands.add_parser(
        "calibrate",
        help="choose households of a survey and weights that meet targets",
        description="Choose households of a survey, and weights for them that meet population targets.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    calibrate.add_argument("matrix", metavar="MATRIX", type=Path, help="what each household adds to each target")
    calibrate.add_argument("targets", metavar="TARGETS", type=Path, help="what is to be met")
    calibrate.add_argument("--transpose", action="store_true", help="MATRIX has one row for each household")
    _add_margins(calibrate.add_argument_group("margins, where MATRIX holds households"))
    _add_choice(calibrate.add_argument_group("choice of households"))
    _add_fit(calibrate.add_argument_group("the fit"))
    _add_output(calibrate.add_argument_group("output"))
    return top


def _add_margins(group: Any) -> None:
    group.add_argument("--unit", metavar="COLUMN", help="rows are persons: which household each is in")
    group.add_argument("--partial", action="store_true", help="categories without a total are left free")
    group.add_argument("--drop-empty", action="store_true", help="leave out cells that no household is in")


def _add_choice(group: Any) -> None:
    count = group.add_mutually_exclusive_group()
    count.add_argument("--keep", metavar="K", type=int, help="number of households; all of them if not given")
    count.add_argument("--l0", metavar="PRICE", type=float, help="instead: what a household costs in the loss")
    group.add_argument(
        "--must-keep", metavar="FILE", type=Path, help="households that must be chosen: column household"
    )
    group.add_argument("--leave-out", metavar="FILE", type=Path, help="households that must not: column household")
    group.add_argument(
        "--clusters", metavar="FILE", type=Path, help="columns household, cluster: each cluster shares one weight"
    )


def _add_fit(group: Any) -> None:
    group.add_argument(
        "--design-weights",
        metavar="FILE",
        type=Path,
        help="columns household, weight; with margins, also the name of a column of MATRIX; 1 if not given",
    )
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
    group.add_argument("--rescale-design", action="store_true", help="to the design weights times one number")
    group.add_argument(
        "--cluster-distance",
        choices=get_args(ClusterDistance),
        default="once",
        help="count a cluster once, or each of its members as R's survey does (once)",
    )
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
