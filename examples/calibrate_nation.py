"""A synthetic national survey: 3,000 of 20,000 households for 10 states and 100 districts, in one fit.

Households live in districts, districts lie in states; each has people of three ages, an income and, two in five,
housing aid. Targets are the sums of a population that the survey misses: its districts are drawn with unlike chances,
and its answers are a few per cent off. ``hierarchy=`` says which targets add up, and housing aid is known within 5 per
cent only: an interval. The result is compared with as many households at random, weighted in the same way. Written to
``--output``: ``targets.csv``, ``report.html``, ``plot.png`` and ``report.json``. About ten seconds:

    pip install "l0hooks[examples]"
    python examples/calibrate_nation.py
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from l0hooks.calibration import Calibrator, NamedMatrix, write_report

AGES = ("children", "adults", "elderly")


def make_survey(households, states, random):
    """Where each household lives, what it adds to each kind of sum, and its design weight."""
    chance = random.lognormal(0, 0.4, 10 * states)  # ten districts a state
    district = random.choice(10 * states, households, p=chance / chance.sum())
    people = random.poisson([0.6, 1.6, 0.4], (households, 3))
    people[people.sum(1) == 0, 1] = 1
    income = random.lognormal(10.3 + 0.2 * random.standard_normal(10 * states)[district], 0.8, households)
    aid = np.where(random.random(households) < 0.4, random.gamma(4, 700, households), 0.0)
    kinds = {**dict(zip(AGES, people.T.astype(float), strict=True)), "income": income, "housing aid": aid}
    return district, kinds, random.uniform(0.5, 2, households) * 6e6 / households


def make_targets(district, kinds, design, states, random):
    """Sums of the population by district, state and nation: names, matrix, values, groups, and what adds up."""
    people = len(district)
    at = sparse.csr_array((np.ones(people), (district, np.arange(people))), shape=(10 * states, people))
    true = design * random.lognormal(0, 0.3, 10 * states)[district] * random.lognormal(0, 0.2, people)
    names, blocks, values, groups, hierarchy = [], [], [], [], {}
    for kind, amount in kinds.items():
        local = at * amount[None, :]
        sums = {f"{kind}, district {n}": row for n, row in enumerate(local @ true)}
        by_state = {f"{kind}, state {n}": [f"{kind}, district {10 * n + m}" for m in range(10)] for n in range(states)}
        state = sparse.csr_array(np.kron(np.eye(states), np.ones((1, 10)))) @ local
        nation = sparse.csr_array(amount[None, :])
        hierarchy |= by_state | {f"{kind}, nation": list(by_state)}
        names += [*sums, *by_state, f"{kind}, nation"]
        blocks += [local, state, nation]
        values += [*sums.values(), *(state @ true), float(amount @ true)]
        groups += [f"{kind}: districts"] * (10 * states) + [f"{kind}: states"] * states + [f"{kind}: nation"]
    matrix = sparse.vstack(blocks, format="csr")
    reported = matrix.multiply(random.lognormal(0, 0.05, people)[None, :]).tocsr()  # what the survey heard
    return pd.DataFrame({"target": names, "value": values, "group": groups}), reported, hierarchy


def run(options):
    random = np.random.default_rng(options.seed)
    households, keep, states = (4_000, 1_000, 2) if options.quick else (20_000, 3_000, 10)
    district, kinds, design = make_survey(households, states, random)
    targets, matrix, hierarchy = make_targets(district, kinds, design, states, random)
    loose = targets["target"].str.startswith("housing aid")
    targets["lower"] = targets["value"] * np.where(loose, 0.95, 1)
    targets["upper"] = targets["value"] * np.where(loose, 1.05, 1)
    given = NamedMatrix(matrix, targets=targets["target"])

    def fit(chosen=None):
        calibrator = Calibrator(
            keep, hierarchy=hierarchy, bounds=(0.05, 100), max_epochs=60 if options.quick else 200,
            random_state=options.seed, progress=False if options.quiet else None,
        )  # fmt: skip
        left_out = None if chosen is None else ~chosen
        return calibrator.fit(given, targets.drop(columns="value"), design_weights=design, leave_out=left_out)

    result = fit()
    print(result)
    at_random = fit(random.permutation(households) < keep)
    figures = {
        name: {"households": one.active, "error": one.error, "deff": one.deff, "stage": one.stage}
        for name, one in {"chosen": result, "at random": at_random}.items()
    }
    print(f"\nas many at random, weighted alike: error {at_random.error:.2%}, design effect {at_random.deff:.2f}")
    options.output.mkdir(parents=True, exist_ok=True)
    result.to_csv(options.output / "targets.csv", "targets")
    result.plot(options.output / "plot.png")
    write_report(result, options.output / "report.html", title="A synthetic national survey")
    (options.output / "report.json").write_text(json.dumps(figures, indent=1))
    print(f"written to {options.output}/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smaller survey, fewer epochs")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "calibrate_nation")
    run(parser.parse_args())
