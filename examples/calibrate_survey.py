"""Reduce a real survey to a quarter of its respondents, with new weights that keep its margins.

The survey is statsmodels' bundled extract of the American National Election Study of 1996: 944 respondents. Its margins
are the expected vote by age, party, leaning and education, education by age, income, television news and size of place,
and the sums of age and income. ``Calibrator`` chooses 236 respondents and gives them weights between 1 and 16 that
reproduce all of them. Tables that were not targets are compared with those of random quarters. Written to ``--output``:
``weights.csv``, ``targets.csv``, ``report.html``, ``plot.png`` and ``report.json``. A few seconds:

    pip install "l0hooks[examples]"
    python examples/calibrate_survey.py
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.datasets import anes96

from l0hooks.calibration import Calibrator, write_report


def load_survey():
    """Answers in bands, crossed where margins are crossed, and as they are."""
    data = anes96.load_pandas().data
    data.index = pd.Index([f"respondent {number}" for number in data.index], name="household")
    vote = " " + data["vote"].map({0: "Clinton", 1: "Dole"})
    age = pd.cut(data["age"], [0, 29, 44, 59, 120], labels=["19-29", "30-44", "45-59", "60+"]).astype(str)
    education = data["educ"].astype(int).astype(str)
    bands = {
        "age x vote": age + vote,
        "party x vote": data["PID"].astype(int).astype(str) + vote,
        "leaning x vote": data["selfLR"].astype(int).astype(str) + vote,
        "education x vote": education + vote,
        "education x age": education + " " + age,
        "income": data["income"].astype(int).astype(str),
        "news": data["TVnews"].astype(int).astype(str),
        "place": pd.cut(data["popul"], [-1, 1, 25, 100, 1e5], labels=["rural", "small", "medium", "large"]).astype(str),
    }
    return pd.DataFrame(bands), data


def make_targets(bands, data):
    """One row for each target, one column for each respondent, and the group of each target."""
    rows, groups = {}, {}
    for question in bands:
        for answer in bands[question].unique():
            name = f"{question}: {answer}"
            rows[name], groups[name] = (bands[question] == answer).astype(float), question
    for question in ("age", "income"):
        rows[f"sum of {question}"], groups[f"sum of {question}"] = data[question], "sums"
    matrix = pd.DataFrame(rows).T
    return matrix, matrix.sum(axis=1), groups


def other_tables(data, weights):
    """Shares that no target mentions: party by leaning, leaning by income."""
    cells = [data["PID"] * 10 + data["selfLR"], 100 + data["selfLR"] * 100 + data["income"]]
    return pd.concat([pd.Series(weights, data.index).groupby(cell).sum() / np.sum(weights) for cell in cells])


def mean_error(data, weights):
    return (other_tables(data, weights) - other_tables(data, np.ones(len(data)))).abs().mean()


def run(options):
    bands, data = load_survey()
    matrix, targets, groups = make_targets(bands, data)
    calibrator = Calibrator(
        len(bands) // 4,
        bounds=(1, 16),
        groups=groups,
        max_epochs=30 if options.quick else 200,
        random_state=options.seed,
        progress=False if options.quiet else None,
    )
    result = calibrator.fit(matrix, targets)
    print(result)

    random = np.random.default_rng(options.seed)
    quarters = [random.permutation(len(data)) < result.active for _ in range(20)]
    away = {
        "chosen and weighted": mean_error(data, result.weights),
        "a random quarter": np.mean([mean_error(data, quarter.astype(float)) for quarter in quarters]),
    }
    print("\nTables that were not targets, mean error in points of percent:")
    for name, error in away.items():
        print(f"  {name:<20} {100 * error:.2f}")

    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    result.to_csv(output / "weights.csv", chosen_only=True)
    result.to_csv(output / "targets.csv", "targets")
    result.plot(output / "plot.png")
    write_report(result, output / "report.html", title="ANES 1996, a quarter of its respondents")
    figures = {"respondents": result.active, "error": result.error, "deff": result.deff, "stage": result.stage, **away}
    (output / "report.json").write_text(json.dumps(figures, indent=1))
    print(f"\nwritten to {output}/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "calibrate_survey")
    run(parser.parse_args())
