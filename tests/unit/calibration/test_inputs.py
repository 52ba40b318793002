"""What users pass to a calibration: aligned by name, refused with a message that helps, never changed."""

import re
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from l0hooks.calibration.data import inputs as reading
from l0hooks.calibration.data.households import GivenHouseholds, check_count, read_households
from l0hooks.calibration.data.names import Axis
from l0hooks.calibration.data.reach import reachable_range, weight_limits
from l0hooks.calibration.data.targets import CalibrationWarning, GivenTargets
from l0hooks.errors import InvalidValueError

NAMES = ["people", "income", "owners"]
WHO = ["h1", "h2", "h3", "h4"]
M = np.array([[1.0, 1.0, 1.0, 1.0], [10.0, 20.0, 0.0, 5.0], [1.0, 0.0, 0.0, 1.0]])
Y = np.array([8.0, 70.0, 3.0])
FRAME = pd.DataFrame(M, NAMES, WHO)


def read_inputs(matrix, y=None, **options):
    """All options by name, sorted into those of targets, of households, and others."""
    targets, households = (
        kind(**{field.name: options.pop(field.name) for field in fields(kind) if field.name in options})
        for kind in (GivenTargets, GivenHouseholds)
    )
    return reading.read_inputs(matrix, replace(targets, y=y), households, **options)


def refused(message, *args, **options):
    with pytest.raises(InvalidValueError, match=f"(?s){message}"):
        read_inputs(*args, **options)


FORMATS = ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csr_matrix])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_every_format_array_or_matrix_gives_the_same_and_is_not_changed(form, kind, dtype):
    given = kind(M.astype(dtype)).asformat(form)
    before = given.copy()
    inputs = read_inputs(given, Y)
    np.testing.assert_array_equal(inputs.matrix.toarray(), M)
    assert isinstance(inputs.matrix, sparse.csr_array)
    assert (before != given).nnz == 0


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: M,
        M.tolist,
        lambda: np.asmatrix(M),
        lambda: FRAME,
        lambda: FRAME.astype(pd.SparseDtype(float, 0.0)),
        lambda: M != 0,
    ],
    ids=["array", "list", "matrix", "frame", "sparse frame", "bool"],
)
def test_dense_matrices_and_frames(make):
    given = make()
    inputs = read_inputs(given, Y)
    expected = M != 0 if np.asarray(given).dtype == bool else M
    np.testing.assert_array_equal(inputs.matrix.toarray(), expected)


def test_duplicate_entries_add_up_as_scipy_says():
    given = sparse.csr_array((np.ones(3), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2))
    inputs = read_inputs(given, [3.0])
    np.testing.assert_array_equal(inputs.matrix.toarray(), [[2.0, 1.0]])
    assert given.nnz == 3


@pytest.mark.parametrize(
    "y",
    [
        pd.Series(Y, NAMES)[["owners", "people", "income"]],
        dict(zip(reversed(NAMES), reversed(Y.tolist()), strict=True)),
        pd.DataFrame({"anything": Y}, NAMES).iloc[::-1],
        pd.DataFrame({"value": Y, "source": "x"}, NAMES).iloc[::-1],
        pd.DataFrame({"target": NAMES, "value": Y}).iloc[::-1],
        Y,
        Y.tolist(),
        Y[:, None],
    ],
    ids=lambda y: type(y).__name__,
)
def test_targets_are_aligned_by_name(y):
    inputs = read_inputs(FRAME, y)
    np.testing.assert_array_equal(inputs.lower, Y)
    np.testing.assert_array_equal(inputs.upper, Y)
    assert inputs.targets.names == tuple(NAMES)


@pytest.mark.parametrize("as_frame", [False, True, "columns"])
def test_design_weights_and_bounds_are_aligned_by_name(as_frame):
    design = pd.Series([1.0, 2.0, 3.0, 4.0], WHO).iloc[[2, 0, 3, 1]]
    if as_frame:
        design = design.to_frame("weight")
    if as_frame == "columns":
        design = design.rename_axis("household").reset_index()
    bounds = (pd.Series([0.1, 0.2, 0.3, 0.4], WHO)[::-1], {"h4": 9.0, "h3": 8.0, "h2": 7.0, "h1": 6.0})
    people = read_inputs(FRAME, Y, design_weights=design, bounds=bounds).people
    np.testing.assert_array_equal(people.design, [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(people.low, [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_array_equal(people.high, [6.0, 7.0, 8.0, 9.0])


def test_an_unnamed_matrix_takes_the_names_of_its_targets():
    inputs = read_inputs(
        sparse.csr_array(M), pd.Series([8, 5, 8], NAMES), hierarchy={"people": ["owners"]}, groups=[1, 2, 2]
    )
    assert inputs.targets.names == tuple(NAMES)
    assert inputs.hierarchy == ((0, (2,)),)


def test_numbers_in_another_order_say_which_entry_of_an_unnamed_matrix_is_meant():
    shuffled = pd.Series([3.0, 8.0, 70.0], [2, 0, 1])
    np.testing.assert_array_equal(read_inputs(M, shuffled).lower, Y)
    np.testing.assert_array_equal(read_inputs(M, {2: 3.0, 1: 70.0, 0: 8.0}).lower, Y)


def test_names_can_be_numbers_and_tuples():
    frame = pd.DataFrame(M, pd.MultiIndex.from_tuples([("us", 1), ("us", 2), ("ca", 1)]), [7, 3, 5, 9])
    inputs = read_inputs(frame, {("ca", 1): 3.0, ("us", 2): 70.0, ("us", 1): 8.0}, keep=[9], leave_out=[7])
    np.testing.assert_array_equal(inputs.lower, Y)
    assert inputs.people.keep.tolist() == [3]
    assert inputs.people.leave_out.tolist() == [0]


def test_intervals_from_arguments_or_a_frame():
    lower, upper = {"people": 7.0, "owners": 3.0, "income": -np.inf}, [9.0, 80.0, 3.0]
    for inputs in (
        read_inputs(FRAME, lower=lower, upper=upper),
        read_inputs(FRAME, pd.DataFrame({"lower": lower, "upper": dict(zip(NAMES, upper, strict=True))})),
        read_inputs(
            FRAME,
            pd.DataFrame(
                {"value": [np.nan, np.nan, 3.0], "lower": [7.0, -np.inf, np.nan], "upper": [9.0, 80, 1]}, NAMES
            ),
        ),
    ):
        np.testing.assert_array_equal(inputs.lower, [7.0, -np.inf, 3.0])
        np.testing.assert_array_equal(inputs.upper, upper)
    np.testing.assert_array_equal(read_inputs(FRAME, upper=Y).lower, np.full(3, -np.inf))


def test_groups_are_averaged_and_multiplied():
    inputs = read_inputs(FRAME, Y, groups=["a", "b", "b"], group_multipliers={"b": 3}, importance={"owners": 10})
    np.testing.assert_allclose(inputs.importance, [1.0, 1.5, 15.0])
    plain = read_inputs(FRAME, Y, groups=["a", "b", "b"], group_multipliers={"b": 3}, normalize_groups=False)
    np.testing.assert_allclose(plain.importance, [1.0, 3.0, 3.0])
    frame = pd.DataFrame({"value": Y, "group": ["a", "b", "b"], "importance": [1.0, 1.0, 10.0]}, NAMES)
    again = read_inputs(FRAME, frame, group_multipliers={"b": 3})
    np.testing.assert_allclose(again.importance, inputs.importance)
    assert again.groups == ("a", "b", "b")


@pytest.mark.parametrize(
    "given", [{"nation": ["east", "west"]}, {"east": "nation", "west": "nation"}, {"nation": ("west", "east")}]
)
def test_hierarchies_are_said_from_above_or_from_below(given):
    matrix = pd.DataFrame([[1, 1], [1, 0], [0, 1]], ["nation", "east", "west"])
    assert read_inputs(matrix, [5, 2, 3], hierarchy=given).hierarchy == ((0, (1, 2)),)


@pytest.mark.parametrize("flags", [["h2", "h4"], [False, True, False, True], np.array([False, True, False, True])])
def test_households_are_named_or_flagged(flags):
    assert read_inputs(FRAME, Y, keep=flags).people.keep.tolist() == [1, 3]
    assert read_inputs(FRAME, Y, keep=pd.Series([True, True], ["h2", "h4"])).people.keep.tolist() == [1, 3]


def test_clusters_have_bounds_in_common_and_unnamed_households_are_on_their_own():
    people = read_inputs(FRAME, Y, clusters={"h1": "a", "h3": "a"}, bounds=([1, 0, 2, 0], [5, 5, 4, 5])).people
    assert people.units == 3
    assert people.clusters.tolist() == [0, 1, 0, 2]
    np.testing.assert_array_equal(people.low, [2, 0, 2, 0])
    np.testing.assert_array_equal(people.high, [4, 5, 4, 5])


# what is wrong, each with its message

BAD = {
    "NaN in M": (r"M: values must be finite.*nan at target 1, household 2", (np.where(M == 0, np.nan, M), Y), {}),
    "inf in a frame": (
        r"M: values must be finite.*inf at target 'income', household 'h2'",
        (FRAME.replace(20, np.inf), Y),
        {},
    ),
    "NaN in y": (r"y: targets must be finite.*nan for 'income'", (FRAME, [8, np.nan, 3]), {}),
    "inf in y": (r"y: targets must be finite.*inf for 0", (M, [np.inf, 70, 3]), {}),
    "too few targets": (r"y: there must be one for each target.*expected: 3.*got: 2", (M, Y[:2]), {}),
    "targets of two axes": (r"y: there must be one for each target.*shape \(3, 2\)", (M, np.ones((3, 2))), {}),
    "words as targets": (r"y: values must be real numbers", (M, ["8", "x", "3"]), {}),
    "complex": (r"M: values must be real numbers", (M + 1j, Y), {}),
    "words in M": (r"every column must hold numbers.*'h1'", (FRAME.astype({"h1": str}), Y), {}),
    "one axis": (r"M: it must have two axes", (Y, Y), {}),
    "empty": (r"M: it must have two axes.*\(0, 4\)", (M[:0], []), {}),
    "ragged": (r"M: it must be a matrix", ([[1, 2], [3]], Y), {}),
    "no targets": (r"y: targets must be given", (M,), {}),
    "points and ends": (r"points or intervals", (M, Y), {"lower": Y}),
    "reversed interval": (
        r"lower: it must not be above upper.*9 for 0",
        (M,),
        {"lower": [9, 1, 1], "upper": [8, 2, 2]},
    ),
    "no end": (r"at least one finite end.*for 1", (M,), {"lower": [1, -np.inf, 1], "upper": [8, np.inf, 2]}),
    "NaN end": (r"lower: it must be a number or -inf", (M,), {"lower": [np.nan, 1, 1]}),
    "missing name": (r"every target must be named.*1 missing: 'owners'", (FRAME, {"people": 8, "income": 7}), {}),
    "unknown name": (
        r"names must be those.*'incme'.*did you mean 'income'",
        (FRAME, {"people": 8, "incme": 7, "owners": 3}),
        {},
    ),
    "numbers for names": (r"names must be those.*\.to_numpy\(\)", (FRAME, pd.Series(Y)), {}),
    "double targets": (r"M's rows \(targets\): names must be distinct.*'a'", (FRAME.set_axis(["a", "b", "a"]), Y), {}),
    "double households": (r"M's columns.*distinct.*'a'", (FRAME.set_axis(["a", "b", "a", "c"], axis=1), Y), {}),
    "double names of y": (
        r"y: names must be distinct.*'people'",
        (FRAME, pd.Series(Y, ["people", "people", "owners"])),
        {},
    ),
    "nameless row": (r"every name must be given", (FRAME.set_axis(["a", None, "b"]), Y), {}),
    "transposed": (r"looks transposed.*shape \(4, 3\).*try: M\.T", (M.T, Y), {}),
    "transposed by name": (
        r"looks transposed.*'people'",
        (pd.DataFrame(np.eye(3), list("abc"), NAMES), dict.fromkeys(NAMES, 1)),
        {},
    ),
    "transposed by design": (r"looks transposed.*4 design weights", (M.T, [1, 2, 3, 4]), {"design_weights": [1] * 4}),
    "k too large": (r"k: it must lie between 1 and the number of households.*1 to 4.*got: 5", (M, Y), {"k": 5}),
    "k zero": (r"between 1 and.*got: 0", (M, Y), {"k": 0}),
    "k negative": (r"between 1 and.*got: -1", (M, Y), {"k": -1}),
    "k half": (r"k: it must be an integer.*2\.5", (M, Y), {"k": 2.5}),
    "k flag": (r"k: it must be an integer", (M, Y), {"k": True}),
    "k above the rest": (r"expected: 1 to 3", (M, Y), {"k": 4, "leave_out": [1]}),
    "k below kept": (r"must be kept count too.*>= 3", (M, Y), {"k": 2, "keep": [0, 1, 2]}),
    "k above clusters": (r"number of clusters.*1 to 2", (M, Y), {"k": 3, "clusters": [0, 0, 1, 1]}),
    "reversed bounds": (r"bounds: lo must not be above hi.*\(3, 2\)", (M, Y), {"bounds": (3, 2)}),
    "negative bounds": (r"finite and not negative.*-1", (M, Y), {"bounds": (-1, 2)}),
    "NaN bounds": (r"lower bound must be finite", (M, Y), {"bounds": (np.nan, 2)}),
    "infinite lower bound": (r"lower bound must be finite", (M, Y), {"bounds": (np.inf, np.inf)}),
    "no room": (r"upper bound must be positive", (M, Y), {"bounds": (0, 0)}),
    "masked M": (r"values must be finite.*nan", (np.ma.masked_greater(M, 15), Y), {}),
    "masked y": (r"targets must be finite.*nan for 1", (M, np.ma.masked_greater(Y, 50)), {}),
    "bounds in words": (r"must be a pair", (M, Y), {"bounds": "ab"}),
    "one bound": (r"must be a pair", (M, Y), {"bounds": (1,)}),
    "bounds of one household": (r"lo must not be above hi", (M, Y), {"bounds": ([0, 0, 4, 0], 3)}),
    "bounds for three": (r"bounds \(hi\): there must be one for each household", (M, Y), {"bounds": (0, [1, 2, 3])}),
    "bounds_on": (r"bounds_on: it must be known", (M, Y), {"bounds_on": "ratios"}),
    "cluster without bounds": (
        r"bounds in common.*cluster of 0",
        (M, Y),
        {"bounds": ([0, 4, 0, 0], [3, 9, 3, 3]), "clusters": [1, 1, 2, 2]},
    ),
    "negative design": (
        r"design_weights: they must be finite and not negative.*-1 for 'h3'",
        (FRAME, Y),
        {"design_weights": [1, 1, -1, 1]},
    ),
    "zero design for all": (r"some must be positive", (M, Y), {"design_weights": [0, 0, 0, 0]}),
    "zero design of one to keep": (r"stays at zero.*kept: 2", (M, Y), {"design_weights": [1, 1, 0, 1], "keep": [2]}),
    "zero design within a cluster": (
        r"all zero, or none.*unlike others: 2",
        (M, Y),
        {"design_weights": [1, 1, 0, 1], "clusters": [0, 0, 1, 1]},
    ),
    "k above those with design": (r"expected: 1 to 3", (M, Y), {"k": 4, "design_weights": [1, 1, 0, 1]}),
    "NaN design": (r"finite and not negative.*nan", (M, Y), {"design_weights": [1, np.nan, 1, 1]}),
    "design of others": (
        r"those of the matrix's households.*'h9'",
        (FRAME, Y),
        {"design_weights": dict.fromkeys(["h1", "h2", "h3", "h9"], 1)},
    ),
    "unknown group": (
        r"group_multipliers: keys must be groups.*'c'",
        (M, Y),
        {"groups": list("abb"), "group_multipliers": {"c": 2}},
    ),
    "multipliers alone": (r"targets must have groups", (M, Y), {"group_multipliers": {"c": 2}}),
    "negative multiplier": (
        r"finite and not negative.*'a': -1",
        (M, Y),
        {"groups": list("abb"), "group_multipliers": {"a": -1}},
    ),
    "missing group": (r"every target needs a group.*1", (M, Y), {"groups": ["a", None, "b"]}),
    "too many groups": (r"groups: there must be one for each target", (M, Y), {"groups": list("abcd")}),
    "negative importance": (
        r"importance: it must be finite and not negative.*-2 for 1",
        (M, Y),
        {"importance": [1, -2, 1]},
    ),
    "nothing counts": (r"some target must count", (M, Y), {"importance": [0, 0, 0]}),
    "unknown importance": (r"those of the matrix's targets.*'rent'", (FRAME, Y), {"importance": {"rent": 2}}),
    "unknown parent": (r"hierarchy \(parents\).*'nation'", (FRAME, Y), {"hierarchy": {"nation": ["people"]}}),
    "unknown child": (r"children of 'people'.*'renters'", (FRAME, Y), {"hierarchy": {"people": ["owners", "renters"]}}),
    "double child": (r"children of 'people'.*distinct", (FRAME, Y), {"hierarchy": {"people": ["owners", "owners"]}}),
    "own child": (
        r"no target may be its own ancestor.*'people' → 'people'",
        (FRAME, Y),
        {"hierarchy": {"people": ["people"]}},
    ),
    "cycle": (
        r"no target may be its own ancestor.*→.*→.*→",
        (FRAME, Y),
        {"hierarchy": {"people": ["owners"], "owners": ["income"], "income": ["people"]}},
    ),
    "no children": (r"a parent needs children", (FRAME, Y), {"hierarchy": {"people": []}}),
    "both ways": (r"not both", (FRAME, Y), {"hierarchy": {"people": ["owners"], "income": "people"}}),
    "no mapping": (r"hierarchy: it must be a mapping", (FRAME, Y), {"hierarchy": [("people", "owners")]}),
    "in and out": (r"either in or out.*'h2'", (FRAME, Y), {"keep": ["h1", "h2"], "leave_out": ["h2"]}),
    "unknown household": (r"keep: names must be those.*'h7'", (FRAME, Y), {"keep": ["h7"]}),
    "number out of range": (r"leave_out: names must be those.*numbered 0 to 3", (M, Y), {"leave_out": [4]}),
    "too few flags": (r"flags must be one for each household", (M, Y), {"keep": [True, False]}),
    "all out": (r"some household must be left", (M, Y), {"leave_out": [0, 1, 2, 3]}),
    "torn cluster": (r"in or out as a whole", (M, Y), {"clusters": [0, 0, 1, 2], "keep": [0], "leave_out": [1]}),
    "dtype": (r"dtype: it must be known", (M, Y), {"dtype": "float16"}),
    "float32 overflow of M": (r"float32 holds numbers up to 3.4e38.*float64", (M * 1e38, Y * 1e37), {}),
    "float32 overflow of y": (r"float32 holds.*a target of 1e\+39", (M, [1e39, 1, 1]), {}),
    "float32 overflow by design": (
        r"float32 holds.*design weights up to 1e\+10",
        (M * 1e28, Y),
        {"design_weights": [1e10] * 4},
    ),
}


@pytest.mark.filterwarnings("ignore::l0hooks.calibration.data.targets.CalibrationWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    message, args, options = BAD[name]
    refused(message, *args, **options)


def test_float64_holds_what_float32_cannot():
    inputs = read_inputs(M * 1e38, Y * 1e38, dtype="float64")
    assert inputs.reachable.all()


def test_an_empty_row_is_told():
    empty = M.copy()
    empty[1] = 0
    with pytest.warns(CalibrationWarning, match=r"(?s)M: every target should have.*1 with an empty row: 1"):
        inputs = read_inputs(sparse.csr_array(empty), Y)
    assert inputs.reachable.tolist() == [True, False, True]
    stored = sparse.csr_array(M)
    stored.data[stored.indptr[1] : stored.indptr[2]] = 0  # zeros that are stored are zeros
    with pytest.warns(CalibrationWarning, match="empty row"):
        read_inputs(stored, Y)
    with pytest.warns(CalibrationWarning, match="empty row"):
        assert read_inputs(empty, [8.0, 0.0, 3.0]).reachable.all()  # zero is what it gives


@pytest.mark.parametrize(
    ("y", "options", "expected"),
    [
        ([8.0, -70.0, 3.0], {}, "0 to inf for 'income'"),
        ([8.0, 70.0, 30.0], {"bounds": (0, 10)}, "0 to 20 for 'owners'"),
        ([8.0, 20.0, 3.0], {"bounds": (1, 10)}, "35 to 350 for 'income'"),
        ([25.0, 70.0, 3.0], {"bounds": (0, 10), "k": 2}, "0 to 20 for 'people'"),
        ([9.0, 70.0, 3.0], {"bounds": (0, 2), "bounds_on": "weight", "design_weights": [9] * 4}, "0 to 8 for 'people'"),
        ([8.0, 70.0, 3.0], {"leave_out": ["h1", "h4"], "bounds": (0, 9)}, "0 to 0 for 'owners'"),
    ],
)
def test_targets_out_of_reach_are_told(y, options, expected):
    with pytest.warns(CalibrationWarning, match=rf"(?s)y: targets should lie within.*{re.escape(expected)}"):
        inputs = read_inputs(FRAME, y, **options)
    assert not inputs.reachable.all()


def test_intervals_are_reachable_where_they_touch_the_range():
    inputs = read_inputs(FRAME, lower=[8.0, -90.0, 0.0], upper=[8.0, 0.0, 3.0])
    assert inputs.reachable.all()
    with pytest.warns(CalibrationWarning, match="-90 to -1"):
        read_inputs(FRAME, lower=[8.0, -90.0, 0.0], upper=[8.0, -1.0, 3.0])


def test_parents_that_are_not_the_sum_of_their_children_are_told():
    frame = pd.DataFrame([[1, 1], [1, 0], [0, 1]], ["nation", "east", "west"])
    with pytest.warns(CalibrationWarning, match=r"(?s)'nation' is 6, its children add up to 5"):
        read_inputs(frame, [6, 2, 3], hierarchy={"nation": ["east", "west"]})
    read_inputs(frame, lower=[5, 2, 3], upper=[6, 2, 4], hierarchy={"nation": ["east", "west"]})
    read_inputs(frame, [0.3, 0.1, 0.2], hierarchy={"nation": ["east", "west"]})  # 0.1 + 0.2 is not 0.3


@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("chosen", [None, 1, 2, 4])
def test_the_range_is_that_of_all_choices(selects, chosen):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 5)) * (rng.random((6, 5)) < 0.6)
    low, high = rng.random(5), 1 + rng.random(5)
    low = np.zeros(5) if selects else low
    least, largest = reachable_range(sparse.csr_array(matrix), low, high, chosen)
    sums = []
    for choice in range(1, 2**5):
        who = [bool(choice >> i & 1) for i in range(5)]
        if sum(who) == (5 if chosen is None else chosen):
            for ends in range(2**5):
                sums.append(matrix @ (np.where([ends >> i & 1 for i in range(5)], high, low) * who))
    np.testing.assert_allclose(least, np.min(sums, axis=0), atol=1e-12)
    np.testing.assert_allclose(largest, np.max(sums, axis=0), atol=1e-12)


def test_the_limits_of_a_cluster_are_ratios_to_its_mean_design_weight():
    people = read_households(Axis("household", 3), GivenHouseholds([1, 3, 5], bounds=(1, 2), clusters=[0, 0, 1]))
    low, high = weight_limits(people, on_weight=False)
    np.testing.assert_array_equal(low, [2, 2, 5])
    np.testing.assert_array_equal(high, [4, 4, 10])
    assert check_count(2, people) == 2


def test_the_fingerprint_knows_every_value():
    base = {"design_weights": [1.0, 2, 3, 4], "groups": list("abb"), "bounds": (0, 9), "keep": [1]}
    first = read_inputs(sparse.csc_array(M), Y, **base).fingerprint()
    assert read_inputs(M, Y, **base).fingerprint() == first
    other = M.copy()
    other[1, 1] += 1e-9
    changed = [
        read_inputs(other, Y, **base),
        read_inputs(M, Y + np.array([0, 0, 1e-9]), **base),
        *(
            read_inputs(M, Y, **{**base, **one})
            for one in (
                {"design_weights": [1.0, 2, 3, 5]},
                {"groups": list("aab")},
                {"bounds": (0, 8)},
                {"bounds_on": "weight"},
                {"keep": [2]},
                {"leave_out": [2]},
                {"clusters": [0, 1, 2, 2]},
                {"dtype": "float64"},
                {"importance": [1, 2, 1]},
            )
        ),
    ]
    assert len({first, *(one.fingerprint() for one in changed)}) == 1 + len(changed)


def test_a_matrix_in_csr_shares_memory():
    given = sparse.csr_array(M)
    assert np.shares_memory(read_inputs(given, Y).matrix.data, given.data)
