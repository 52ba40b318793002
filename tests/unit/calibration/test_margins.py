"""Matrix and targets from microdata: sums by hand, and what people get wrong."""

import numpy as np
import pandas as pd
import pytest

from l0hooks.calibration import CalibrationWarning, Calibrator, margins
from l0hooks.calibration.cli import main
from l0hooks.errors import InvalidValueError

N = 400


@pytest.fixture
def people():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "region": rng.choice(["north", "south", "west"], N),
            "age": rng.choice(["young", "old"], N),
            "tenure": rng.choice([1.0, 2.0], N),
            "income": rng.lognormal(10, 0.5, N).round(),
            "employed": rng.random(N) < 0.6,
            "weight": rng.uniform(5, 20, N).round(2),
        },
        index=[f"h{n}" for n in range(N)],
    )


def totals_of(people, weights):
    """By pandas, for weights that are not the design weights."""
    frame = people.assign(w=weights, wx=weights * people["income"])
    employed = frame[frame["employed"]]
    means = frame.groupby("age")[["wx", "w"]].sum()
    return {
        "region:age": frame.groupby(["region", "age"])["w"].sum(),
        "tenure": {"1": frame.loc[frame["tenure"] == 1, "w"].sum(), "2": frame.loc[frame["tenure"] == 2, "w"].sum()},
        "income by region where employed": employed.groupby("region")["wx"].sum(),
        "mean(income) by age": (means["wx"] / means["w"]).to_dict(),
        "share(region) where employed": employed.groupby("region")["w"].sum() / employed["w"].sum(),
        "sum(income)": frame["wx"].sum(),
        "count": frame["w"].sum(),
    }


def test_rows_and_targets_hold_for_the_weights_that_the_totals_come_from(people):
    weights = people["weight"].to_numpy() * np.random.default_rng(1).uniform(0.8, 1.25, N)
    found = margins(people, totals_of(people, weights))
    targets = np.array(list(found.targets.values()))
    assert len(targets) == 6 + 2 + 3 + 2 + 3 + 1 + 1
    np.testing.assert_allclose(found.matrix.matrix @ weights, targets, atol=1e-8 * float(weights.sum()), rtol=1e-12)
    assert found.targets["region:age[north, old]"] > 0
    assert found.groups["mean(income) by age[old]"] == "mean(income) by age"
    assert found.matrix.households == list(people.index)


def test_a_calibrator_meets_them(people):
    weights = people["weight"].to_numpy() * np.random.default_rng(1).uniform(0.8, 1.25, N)
    found = margins(people, totals_of(people, weights))
    calibrator = Calibrator(groups=found.groups, progress=False)
    result = calibrator.fit(found.matrix, found.targets, design_weights=people["weight"])
    assert result.converged
    w = result.weights
    old = (people["age"] == "old").to_numpy()
    mean = totals_of(people, weights)["mean(income) by age"]["old"]
    assert float(w[old] @ people["income"][old] / w[old].sum()) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("kind", ["polars", "pyarrow", "mapping"])
def test_every_kind_of_frame_gives_the_same(people, kind):
    totals = {"region:age": {"north:old": 3, ("south", "young"): 4}, "mean(income)": 20_000, "tenure": {1: 8, "2": 9}}
    given = people.reset_index(names="household")
    if kind == "mapping":
        other = {name: given[name].to_numpy() for name in given}
    else:
        module = pytest.importorskip(kind)
        other = module.from_pandas(given) if kind == "polars" else module.Table.from_pandas(given)
    with pytest.warns(CalibrationWarning, match="every category should have a total"):
        expected = margins(people, totals)
    with pytest.warns(CalibrationWarning, match="every category should have a total"):
        found = margins(other, totals)
    assert found.targets == expected.targets
    assert list(found.matrix.households) == list(expected.matrix.households)
    assert (found.matrix.matrix != expected.matrix.matrix).nnz == 0


def test_a_frame_of_totals_is_read_by_its_columns(people):
    counts = people.groupby(["region", "age"]).size()
    frame = counts.rename("people").reset_index()
    assert margins(people, {"region:age": frame}).targets == margins(people, {"region:age": counts}).targets


WRONG = {
    "a column": ({"regoin": {"north": 1}}, r"'regoin' must be a column.*did you mean 'region'"),
    "a number": ({"incme by region": {"north": 1}}, r"'incme' must be a column.*'income'"),
    "a domain": ({"count where emplyed": 5}, r"'emplyed' must be a column.*'employed'"),
    "no truth": ({"count where income": 5}, r"'income' must hold truth values"),
    "a category": ({"region": {"nroth": 1}}, r"some household must be in category 'nroth'.*'north'"),
    "no names": ({"region": [1, 2, 3]}, r"must be named by their categories"),
    "several totals": ({"count": [1, 2]}, r"it has one total"),
    "a word": ({"region": {"north": "many"}}, r"totals must be numbers.*'many'"),
    "not finite": ({"count": float("nan")}, r"totals must be finite"),
    "text": ({"sum(region)": 5}, r"'region' must hold numbers"),
    "one category": ({"region:age": {"north": 4}}, r"one category of region and age"),
    "nothing": ({}, r"there must be targets"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told(people, name):
    totals, message = WRONG[name]
    with pytest.raises(InvalidValueError, match=r"(?s)" + message):
        margins(people, totals)


def test_empty_cells_are_told(people):
    people.loc["h3", "region"] = None
    people.loc["h5", "income"] = np.nan
    with pytest.raises(InvalidValueError, match=r"(?s)'region' must have a value.*1 empty cells, the first in row 4"):
        margins(people, {"region": {"north": 1}})
    with pytest.raises(InvalidValueError, match=r"(?s)'income' must have a value.*row 6"):
        margins(people, {"sum(income)": 1})


def test_totals_that_disagree_are_told(people):
    ages = {"young": 30, "old": 40}
    with pytest.warns(CalibrationWarning, match=r"(?s)add up to one number.*'age' 70.*'count' 71"):
        margins(people, {"age": ages, "count": 71})


def test_a_total_of_zero_needs_nobody(people):
    found = margins(people, {"age": {"young": 30, "old": 40, "ancient": 0}})
    assert list(found.targets) == ["age[young]", "age[old]"]


def test_from_files(people, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    people.rename_axis("household").to_csv("people.csv")
    lines = ["margin,category,value", "age,young,2500", "age,old,2400", "mean(income),,26000"]
    (tmp_path / "totals.csv").write_text("\n".join(lines) + "\n")
    command = ["calibrate", "people.csv", "totals.csv", "--margins", "--weight-column", "weight", "--out", "w.csv"]
    assert main([*command, "--quiet"]) == 0
    w = pd.read_csv("w.csv", index_col="household")["weight"]
    assert list(w.index) == list(people.index)
    assert float(w[people["age"] == "old"].sum()) == pytest.approx(2400, rel=1e-5)
    assert float(w @ people["income"] / w.sum()) == pytest.approx(26_000, rel=1e-5)
    (tmp_path / "twice.csv").write_text("\n".join([*lines, "age,old,2401"]) + "\n")
    assert main(["calibrate", "people.csv", "twice.csv", "--margins"]) == 2
    assert "a category of a margin has one total" in capsys.readouterr().err
    assert main(["calibrate", "people.csv", "totals.csv", "--margins", "--weight-column", "wieght"]) == 2
    assert "did you mean 'weight'" in capsys.readouterr().err
    assert main(["calibrate", "people.csv", "totals.csv", "--weight-column", "weight"]) == 2
    assert "with --margins" in capsys.readouterr().err
