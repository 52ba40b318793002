"""Weights for the households of a survey of persons, from margins of persons and of households.

Made-up persons live in households. Totals of persons are known by age and region, and of their income. ``margins`` adds
persons up to households, and ``Calibrator`` gives each household one weight, which all its persons share. Written to
``--output``: ``weights.csv`` and ``report.json``. A few seconds:

    pip install "l0hooks[calibration]"
    python examples/calibrate_margins.py
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from l0hooks.calibration import Calibrator, margins


def make_persons(rng, households):
    size = rng.integers(1, 6, households)
    home = np.repeat(np.arange(households), size)
    region = rng.choice(["north", "south", "east"], households)[home]
    age = rng.choice(["0-17", "18-64", "65+"], len(home), p=[0.2, 0.6, 0.2])
    income = np.where(age == "0-17", 0.0, rng.lognormal(10, 0.5, len(home)).round())
    return pd.DataFrame({"home": home, "region": region, "age": age, "income": income})


def run(options):
    rng = np.random.default_rng(options.seed)
    persons = make_persons(rng, options.households)
    response = rng.uniform(60, 140, options.households)[persons["home"]]  # persons that each one stands for
    counted = persons.assign(persons=response)
    totals = {
        "age:region": counted.groupby(["age", "region"])["persons"].sum(),
        "income by region": (response * persons["income"]).groupby(persons["region"]).sum(),
        "mean income by age": {
            age: np.average(persons["income"], weights=response * (persons["age"] == age)) for age in ["18-64", "65+"]
        },
    }
    found = margins(persons, totals, unit="home", partial=True)
    result = Calibrator(groups=found.groups, progress=False if options.quiet else None).fit(
        found.matrix, found.targets, design_weights=np.full(options.households, 100.0)
    )
    print(result)
    options.output.mkdir(parents=True, exist_ok=True)
    result.to_csv(options.output / "weights.csv")
    figures = {"targets": len(found.targets), "error": result.error, "deff": result.deff}
    (options.output / "report.json").write_text(json.dumps(figures, indent=1))
    print(f"\nwritten to {options.output}/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "calibrate_margins")
    parser.add_argument("--households", type=int, default=500)
    run(parser.parse_args())
