"""Margins from microdata: rows and targets are those of pandas' own sums, and what does not fit is told."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest

from l0hooks.calibration import CalibrationWarning, Calibrator, margins
from l0hooks.calibration.cli import main
from l0hooks.errors import InvalidValueError


def people(count=400, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "region": rng.choice(["north", "south", "east"], count),
            "age": rng.choice([1, 2], count),
            "tenure": rng.choice(["own", "rent"], count),
            "income": rng.lognormal(3, 0.5, count).round(2),
            "employed": rng.random(count) < 0.6,
            "design weight": rng.uniform(5, 15, count).round(2),
        }
    )
    return frame.set_index(pd.Index([f"h{i}" for i in range(count)], name="household"))


def truth(frame, weights):
    """Totals, means and shares of weighted microdata, by pandas."""
    data = frame.assign(w=weights, wx=weights * frame["income"])
    by = data.groupby("region")
    return {
        "region:age": data.groupby(["region", "age"])["w"].sum(),
        "count by tenure": data.groupby("tenure")["w"].sum().to_dict(),
        "count": float(data["w"].sum()),
        "income": float(data["wx"].sum()),
        "income by tenure": data.groupby("tenure")["wx"].sum().rename("value").reset_index(),
        "employed": float(data["w"][frame["employed"]].sum()),
        "mean income by region": by["wx"].sum() / by["w"].sum(),
        "mean income": float(data["wx"].sum() / data["w"].sum()),
        "share tenure by region": data.groupby(["tenure", "region"])["w"].sum() / by["w"].sum(),
        "share age": data.groupby("age")["w"].sum() / data["w"].sum(),
    }


def polars(frame):
    return pytest.importorskip("polars", reason="polars is not installed").from_pandas(frame.reset_index())


def arrow(frame):
    return pytest.importorskip("pyarrow", reason="pyarrow is not installed").Table.from_pandas(frame.reset_index())


@pytest.mark.parametrize("kind", [lambda frame: frame, polars, arrow])
def test_weights_that_have_the_totals_meet_every_target(kind):
    frame = people()
    weights = np.random.default_rng(1).uniform(5, 15, len(frame))
    found = margins(kind(frame), truth(frame, weights), design_weights="design weight")
    estimates, targets = found.matrix.matrix @ weights, np.array(list(found.targets.values()))
    np.testing.assert_allclose(estimates, targets, rtol=1e-10, atol=1e-12)
    assert found.matrix.households == list(frame.index)
    assert found.targets["region:age=south:2"] == pytest.approx(truth(frame, weights)["region:age"]["south", 2])
    assert (found.groups["count"], found.groups["share age=1"]) == ("count", "share age")
    np.testing.assert_array_equal(found.design_weights, frame["design weight"])


def test_what_is_fitted_has_the_means_shares_and_totals_that_were_asked():
    frame = people()
    asked = truth(frame, np.random.default_rng(1).uniform(5, 15, len(frame)))
    found = margins(frame, asked, design_weights="design weight")
    fitted = Calibrator(progress=False, groups=found.groups, dtype="float64").fit(
        found.matrix, found.targets, design_weights=found.design_weights
    )
    again = truth(frame, fitted.weights)
    for name in ("mean income by region", "share tenure by region", "region:age"):
        np.testing.assert_allclose(again[name], asked[name].reindex(again[name].index), rtol=1e-4)


def test_an_error_of_a_mean_is_its_relative_error_and_of_a_share_its_own():
    frame = people()
    found = margins(frame, {"count": 4000, "mean income": 30.0, "share tenure": {"own": 0.3, "rent": 0.7}})
    rows = found.matrix.matrix @ np.full(len(frame), 10.0)  # 4,000 in all
    assert rows[1] == pytest.approx(frame["income"].mean() / 30 - 1)
    assert rows[2] == pytest.approx((frame["tenure"] == "own").mean() - 0.3)


def test_persons_are_added_up_to_households():
    frame = people(60)
    frame["home"] = [f"home {i // 3}" for i in range(60)]
    frame["design weight"] = np.repeat(np.arange(1.0, 21), 3)
    found = margins(frame, {"age": {1: 300, 2: 300}, "income": 5e3}, unit="home", design_weights="design weight")
    counts = pd.crosstab(frame["age"], frame["home"])[list(found.matrix.households)]
    np.testing.assert_array_equal(found.matrix.matrix[:2].toarray(), counts)
    np.testing.assert_allclose(found.matrix.matrix[[2]].toarray()[0], frame.groupby("home", sort=False)["income"].sum())
    np.testing.assert_array_equal(found.design_weights, np.arange(1, 21))
    frame.loc["h4", "design weight"] = 9.0
    with pytest.raises(InvalidValueError, match=r"(?s)all rows of a household.*home 'home 1'"):
        margins(frame, {"income": 5e3}, unit="home", design_weights="design weight")


ALL = {"north": 1, "south": 1, "east": 1}
BAD = {
    "column": ({"regoin": ALL}, {}, r"must have this column.*'regoin'.*did you mean 'region'"),
    "domain": ({"income by regin": ALL}, {}, r"must have this column.*'regin'.*did you mean 'region'"),
    "category": ({"region": {**ALL, "nroth": 1}}, {}, r"categories must be those of 'region'.*'nroth'.*'north'"),
    "missing category": ({"region": {"north": 1, "south": 1}}, {}, r"every category needs a total.*'east'.*partial"),
    "missing cell": ({"region:age": {("north", 1): 1}}, {}, r"every category needs a total.*'(south|east):\d'"),
    "empty cell": (
        {"age:nest": {(1, "a"): 1, (1, "b"): 1, (2, "b"): 1, (2, "a"): 1}},
        {},
        r"needs a household.*'age:nest=\d:\w'.*drop",
    ),
    "no value": (
        {"holes": {"a": 1}},
        {},
        r"every row needs a value of 'holes'.*none in 3 rows, the first is row 1.*partial",
    ),
    "no number": ({"numbers": 5}, {}, r"'numbers' must hold numbers.*nan in row 2, and 1 more"),
    "words": ({"tenure": 5}, {}, r"column 'tenure': it must hold numbers"),
    "percentages": ({"share tenure": {"own": 40, "rent": 60}}, {}, r"add up to one.*got: 100.*divide percentages"),
    "shares": ({"share age by tenure": {(1, "own"): 1, (2, "own"): 0.1}}, {"partial": True}, r"add up.*1.1 within"),
    "scalar": ({"region:age": 7}, {}, r"must be a mapping"),
    "list": ({"region": [1, 2, 3]}, {}, r"must be a mapping, a Series with an index, or a frame"),
    "mapping": ({"mean income": {"north": 3}}, {}, r"needs one number"),
    "two numbers": ({"income:age by region": ALL}, {}, r"of one column"),
    "cell of one part": ({"region:age": {"north": 1}}, {}, r"one category of each column.*2"),
    "twice": ({"region:age": {"north:1": 1, ("north", "1"): 2}}, {}, r"given once"),
    "NaN": ({"region": {**ALL, "east": np.nan}}, {}, r"total must be a finite number"),
    "no totals": ({}, {}, r"totals must be a mapping"),
    "design": ({"region": ALL}, {"design_weights": "desing weight"}, r"did you mean 'design weight'"),
    "frame": ({"region": pd.DataFrame({"area": ["north"], "value": [1]})}, {}, r"needs the columns of the margin"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_told(name):
    totals, options, message = BAD[name]
    frame = people(40)
    frame["nest"] = np.where(frame["age"] == 1, "a", "b")
    frame["holes"] = [None, np.nan, None] + ["a"] * 37
    frame["numbers"] = [1.0, np.nan, np.nan] + [2.0] * 37
    with pytest.raises(InvalidValueError, match=f"(?s){message}"):
        margins(frame, totals, **options)


def test_cells_are_dropped_and_categories_left_free_if_that_is_asked():
    frame = people(40)
    found = margins(frame, {"region": {**ALL, "west": 9.0}}, empty="drop")
    assert (list(found.targets), found.dropped) == ([f"region={one}" for one in ALL], ("region=west",))
    assert margins(frame, {"region": {**ALL, "west": 0.0}}).dropped == ("region=west",)
    frame.iloc[0, 0] = None
    found = margins(frame, {"region": {"north": 4.0}}, partial=True)
    np.testing.assert_array_equal(found.matrix.matrix.toarray()[0], frame["region"] == "north")


def test_margins_of_two_populations_are_told():
    with pytest.warns(CalibrationWarning, match=r"(?s)one population.*'region' to 3, 'count' to 4"):
        margins(people(40), {"region": ALL, "count": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        margins(people(40), {"region": ALL, "count": 3})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_of_households_and_margins(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frame = people()
    frame.to_csv("households.csv")
    frame.to_parquet("households.parquet")
    asked = truth(frame, np.random.default_rng(1).uniform(5, 15, len(frame)))
    lines = ["margin,category,value", f"income,,{asked['income']}"]
    lines += [f"region:age,{':'.join(map(str, cell))},{value}" for cell, value in asked["region:age"].items()]
    lines += [f"share age,{cell},{value}" for cell, value in asked["share age"].items()]
    (tmp_path / "targets.csv").write_text("\n".join(lines) + "\n")
    command = ["calibrate", f"households.{kind}", "targets.csv", "--design-weights", "design weight"]
    assert main([*command, "--out", "w.csv", "--quiet"]) == 0
    written = pd.read_csv("w.csv", index_col="household")
    assert written.index.tolist() == frame.index.tolist()
    np.testing.assert_allclose(written["design_weight"], frame["design weight"])
    np.testing.assert_allclose(written["weight"] @ frame["income"], asked["income"], rtol=1e-5)
    found = written["weight"].groupby([frame["region"], frame["age"]]).sum()
    np.testing.assert_allclose(found, asked["region:age"], rtol=1e-5)
    (tmp_path / "wrong.csv").write_text("margin,category,value\nregion,nroth,3\n")
    assert main(["calibrate", f"households.{kind}", "wrong.csv"]) == 2
    assert re.search(r"'nroth'.*did you mean 'north'", capsys.readouterr().err, re.DOTALL)
