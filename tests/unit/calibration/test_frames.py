"""Data frames of any kind are read by name: pandas, polars and pyarrow give the same as arrays do."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from l0hooks.calibration import Calibrator, NamedMatrix
from l0hooks.calibration.data.files import read_matrix_file
from l0hooks.calibration.data.frames import opened
from l0hooks.calibration.data.households import GivenHouseholds
from l0hooks.calibration.data.inputs import read_inputs
from l0hooks.calibration.data.matrix import read_matrix
from l0hooks.calibration.data.targets import GivenTargets
from l0hooks.errors import InvalidValueError

NAMES, WHO = ["people", "income", "owners"], ["h1", "h2", "h3", "h4"]
M = np.array([[1.0, 1.0, 1.0, 1.0], [10.0, 20.0, 0.0, 5.0], [1.0, 0.0, 0.0, 1.0]])
Y = [8.0, 70.0, 3.0]


def polars(frame):
    """A frame without an index, as polars has it."""
    return pytest.importorskip("polars", reason="polars is not installed").from_pandas(frame)


def lazy(frame):
    return polars(frame).lazy()


def arrow(frame):
    module = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    return module.Table.from_pandas(frame, preserve_index=False)


def batch(frame):
    """One that narwhals does not know, and numpy would read without its names."""
    return arrow(frame).to_batches()[0]


KINDS = pytest.mark.parametrize("kind", [pd.DataFrame, polars, lazy, arrow, batch])


@KINDS
@pytest.mark.parametrize("rows", ["target", "household"])
def test_every_frame_gives_the_same_inputs_whatever_its_order(kind, rows):
    expected = read_inputs(
        NamedMatrix(M, NAMES, WHO),
        GivenTargets(Y, groups=["a", "b", "b"], importance=[1, 2, 3]),
        GivenHouseholds([1, 2, 3, 4], ([0.1, 0.2, 0.3, 0.4], [6, 7, 8, 9]), "ratio", ["h2"], ["h4"], [0, 0, 1, 2]),
    )
    table = pd.DataFrame(M, pd.Index(NAMES, name="target"), WHO)
    table = (table if rows == "target" else table.T.rename_axis("household")).reset_index()
    people = pd.DataFrame({"weight": [1, 2, 3, 4], "household": WHO, "cluster": ["x", "x", "y", None]}).iloc[::-1]
    ends = pd.DataFrame({"household": WHO, "lo": [0.1, 0.2, 0.3, 0.4], "hi": [6.0, 7, 8, 9]}).iloc[[1, 3, 0, 2]]
    targets = pd.DataFrame({"value": Y, "source": "x", "group": list("abb"), "importance": [1, 2, 3], "target": NAMES})
    found = read_inputs(
        kind(table),
        GivenTargets(kind(targets.iloc[::-1])),
        GivenHouseholds(
            kind(people.drop(columns="cluster")),
            (kind(ends), kind(ends[["hi", "household"]])),
            "ratio",
            kind(pd.DataFrame({"household": ["h2"]})),
            kind(pd.DataFrame({"household": WHO[::-1], "out": [True, False, False, False]})),
            kind(people),
        ),
    )
    assert found.fingerprint() == expected.fingerprint()
    assert (found.targets.names, found.groups) == (tuple(NAMES), ("a", "b", "b"))
    if rows == "target" or kind is not pd.DataFrame:
        assert found.households.names == tuple(WHO)


@KINDS
def test_named_weights_are_never_applied_by_position(kind):
    shuffled = kind(pd.DataFrame({"household": WHO, "weight": [1.0, 2.0, 3.0, 4.0]}).iloc[[2, 0, 3, 1]])
    matrix = kind(pd.DataFrame(M, columns=WHO).assign(target=NAMES))
    people = read_inputs(matrix, GivenTargets(Y), GivenHouseholds(shuffled)).people
    np.testing.assert_array_equal(people.design, [1.0, 2.0, 3.0, 4.0])
    result = Calibrator(progress=False).fit(matrix, Y, design_weights=shuffled)
    np.testing.assert_allclose(result.inputs.people.design, [1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("kind", [polars, arrow])
def test_names_that_are_not_clear_are_refused(kind):
    cases = {
        r"needs a column 'household'.*'id', 'weight'.*rename": {
            "design_weights": pd.DataFrame({"id": WHO, "weight": 1.0})
        },
        r"one column, or one called 'weight'.*'wait', 'note'": {
            "design_weights": pd.DataFrame({"household": WHO, "wait": 1.0, "note": 2.0})
        },
        r"cast one of them": {"design_weights": pd.DataFrame({"household": [1, 2, 3, 4], "weight": 1.0})},
        r"names must be those.*'h9'": {"keep": pd.DataFrame({"household": ["h9"]})},
        r"no other than one of flags": {"keep": pd.DataFrame({"household": ["h1"], "a": True, "b": True})},
    }
    matrix = NamedMatrix(M, NAMES, ["1", "2", "3", "4"])
    for message, given in cases.items():
        named = matrix if "cast" in message else NamedMatrix(M, NAMES, WHO)
        with pytest.raises(InvalidValueError, match=f"(?s){message}"):
            read_inputs(named, GivenTargets(Y), GivenHouseholds(**{name: kind(one) for name, one in given.items()}))
    with pytest.raises(InvalidValueError, match=r"(?s)needs a column 'target'.*'name', 'value'"):
        read_inputs(M, GivenTargets(kind(pd.DataFrame({"name": NAMES, "value": Y}))))
    with pytest.raises(InvalidValueError, match=r"(?s)hold numbers.*'name'.*called 'target'"):
        read_matrix(kind(pd.DataFrame(M, columns=WHO).assign(name=NAMES)))
    with pytest.raises(InvalidValueError, match=r"(?s)finite.*nan at target 'income', household 'h2'"):
        read_matrix(kind(pd.DataFrame(M, columns=WHO).replace(20, np.nan).assign(target=NAMES)))


@pytest.mark.parametrize("kind", [polars, arrow])
def test_frames_without_names_follow_the_order(kind):
    inputs = read_inputs(
        kind(pd.DataFrame(M, columns=WHO)),
        GivenTargets(kind(pd.DataFrame({"lower": Y, "upper": [9.0, None, 3.0], "value": [None, 71.0, None]}))),
        GivenHouseholds(kind(pd.DataFrame({"weight": [1, 2, 3, 4]}))["weight"]),
    )
    assert (inputs.targets.names, inputs.households.names) == (None, tuple(WHO))
    np.testing.assert_array_equal([inputs.lower, inputs.upper], [[8, 71, 3], [9, 71, 3]])
    np.testing.assert_array_equal(inputs.people.design, [1, 2, 3, 4])


def test_names_given_beside_a_frame_count():
    matrix, targets, _ = read_matrix(NamedMatrix(pd.DataFrame(M, columns=WHO), targets=NAMES))
    assert targets.names == tuple(NAMES)
    np.testing.assert_array_equal(matrix.toarray(), M)


@pytest.mark.parametrize("as_tensor", [torch.tensor, lambda one: torch.tensor(one, requires_grad=True)])
@pytest.mark.parametrize("layout", ["to_dense", "to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta:UserWarning")
def test_tensors_are_read(as_tensor, layout):
    found = read_inputs(
        getattr(as_tensor(M), layout)(),
        GivenTargets(as_tensor(Y)),
        GivenHouseholds(torch.ones(4, dtype=torch.bfloat16)),
    )
    np.testing.assert_array_equal(found.matrix.toarray(), M)
    np.testing.assert_array_equal(found.lower, Y)


def test_what_is_no_matrix_and_no_list_is_refused_in_our_words():
    for y in (8.0, np.float64(8), torch.tensor(8.0)):
        with pytest.raises(InvalidValueError, match=r"(?s)y: there must be one for each target.*expected: 3.*got: 8"):
            read_inputs(M, GivenTargets(y))
    for matrix in (3.0, torch.tensor(3.0), torch.ones(2, 2, 2), torch.ones(2, 2, 2).to_sparse(), None):
        with pytest.raises(InvalidValueError, match=r"M: (it must have two axes|values must be real)"):
            read_matrix(matrix)
    for keep in (3, {"h1": 5}, np.ones((2, 2)), {"h1": 1}):
        with pytest.raises(InvalidValueError, match="keep: it must list households"):
            read_inputs(NamedMatrix(M, NAMES, WHO), GivenTargets(Y), GivenHouseholds(keep=keep))


def test_double_columns_are_refused():
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with pytest.raises(InvalidValueError, match=r"(?s)columns must have distinct names.*'h1' 2 times"):
        read_matrix(pa.table([[1.0], [2.0]], names=["h1", "h1"]))


def test_sparse_columns_stay_sparse():
    pl = pytest.importorskip("polars", reason="polars is not installed")
    size = 20_000
    frame = pl.DataFrame({f"t{i}": np.arange(size) % 97 == i for i in range(60)})
    frame = frame.with_columns(household=pl.arange(size, eager=True))
    opened(frame)
    tracemalloc.start()
    matrix, _, households = read_matrix(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (matrix.shape, matrix.nnz, households.names[:2]) == (
        (60, size),
        sum(len(range(i, size, 97)) for i in range(60)),
        (0, 1),
    )
    assert peak < size * 60 * 8 / 2  # half of the dense matrix


def test_a_large_file_is_not_held_as_objects(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(1, 9, (4000, 50)).astype(float)
    table = pd.DataFrame(values, columns=[f"t{i}" for i in range(50)]).rename_axis("household").reset_index()
    table.to_csv(tmp_path / "M.csv", index=False)
    table.to_parquet(tmp_path / "M.parquet")
    for name in ("M.parquet", "M.csv"):
        read_matrix_file(tmp_path / name)
        tracemalloc.start()
        found = read_matrix_file(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(sparse.csr_array(found.matrix).toarray(), values.T)
        assert peak < 60 * values.size, name  # Python's strings or floats in lists take more


def test_importing_the_library_imports_no_frames():
    names = {"narwhals", "pandas", "polars", "pyarrow"}
    code = f"import sys, l0hooks, l0hooks.calibration; print({names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
