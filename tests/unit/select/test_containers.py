"""Taking rows and columns: every kind of data against dense NumPy indexing."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from l0hooks.errors import InvalidValueError, UnsupportedModuleError
from l0hooks.select.containers import indices_like, length, scaled, take, total

FORMATS = ["csr", "csc", "coo", "bsr", "dia", "dok", "lil"]
SHAPE = (6, 5)
CHOSEN = {0: np.array([0, 2, 5]), 1: np.array([1, 4])}


def numbers(dtype=np.float64):
    x = np.random.default_rng(0).integers(0, 3, SHAPE)
    return (x if dtype is not bool else x > 1).astype(dtype)


def expected(axis, dtype=np.float64):
    return numbers(dtype)[CHOSEN[axis]] if axis == 0 else numbers(dtype)[:, CHOSEN[axis]]


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, bool])
def test_sparse_data_stay_sparse_whatever_their_format(name, kind, axis, dtype):
    x = getattr(sp, f"{name}_{kind}")(numbers(dtype))
    wanted = CHOSEN[axis % 2]
    got = take(x, wanted, axis)
    assert sp.issparse(got)
    assert isinstance(got, sp.sparray) == (kind == "array")
    assert got.format == (name if name in ("csr", "csc", "coo", "lil") else "csr")
    assert got.dtype == dtype
    assert np.array_equal(got.toarray(), expected(axis % 2, dtype))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("order", ["C", "F", "reversed", "strided"])
def test_arrays_of_every_layout(axis, order):
    x = numbers()
    x = {
        "C": x,
        "F": np.asfortranarray(x),
        "reversed": np.ascontiguousarray(x[::-1])[::-1],
        "strided": np.repeat(x, 2, 1)[:, ::2],
    }[order]
    assert np.array_equal(take(x, CHOSEN[axis % 2], axis), expected(axis % 2))
    if order != "reversed":
        got = take(torch.from_numpy(x), CHOSEN[axis % 2], axis)
        assert np.array_equal(got.numpy(), expected(axis % 2))


def test_frames_keep_their_labels_and_dtypes():
    frame = pd.DataFrame(numbers(), index=list("uvwxyz"), columns=list("abcde")).assign(c="text")
    assert take(frame, CHOSEN[0], 0).equals(frame.loc[["u", "w", "z"]])
    assert take(frame, CHOSEN[1], -1).equals(frame[["b", "e"]])
    assert take(frame["c"], CHOSEN[0], 0).equals(frame["c"].loc[["u", "w", "z"]])
    assert take(frame[[]], CHOSEN[0], 0).shape == (3, 0)


def test_masked_arrays_and_tensors_with_a_graph():
    masked = np.ma.masked_equal(numbers(), 1)
    assert np.array_equal(take(masked, CHOSEN[0], 0).mask, masked.mask[CHOSEN[0]])
    x = torch.ones(SHAPE, requires_grad=True)
    take(x, CHOSEN[0], 0).sum().backward()
    assert x.grad[:, 0].tolist() == [1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("x", "axis", "kind", "message"),
    [
        ([1, 2], 0, UnsupportedModuleError, "known kind(.|\n)*got: list"),
        (None, 0, UnsupportedModuleError, "known kind"),
        (torch.eye(2).to_sparse(), 0, UnsupportedModuleError, "must be dense"),
        (torch.tensor(1.0), 0, InvalidValueError, "must have the axis"),
        (np.zeros(3), 1, InvalidValueError, "must have the axis"),
        (pd.Series([1.0]), 1, InvalidValueError, "must have the axis"),
        (sp.coo_array(np.ones(3)), 0, InvalidValueError, "two axes"),
    ],
    ids=str,
)
def test_other_data_are_refused(x, axis, kind, message):
    with pytest.raises(kind, match=message):
        length("here", x, axis)


def test_lengths_and_kinds_of_indices():
    for x in (numbers(), torch.zeros(SHAPE), pd.DataFrame(numbers()), sp.dia_array(numbers())):
        assert [length("here", x, axis) for axis in (0, 1, -1)] == [6, 5, 5]
    assert isinstance(indices_like(torch.zeros(2), CHOSEN[0], torch.device("cpu")), torch.Tensor)
    assert isinstance(indices_like(np.zeros(2), CHOSEN[0], torch.device("cpu")), np.ndarray)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64, bool])
def test_products_and_sums_of_every_dtype(dtype):
    x = np.array([0, 1, 3]).astype(dtype)
    factors = torch.tensor([1.0, 0.5, 0.5])
    wanted = x * np.array([1.0, 0.5, 0.5])
    assert np.allclose(scaled(x, factors), wanted)
    assert np.allclose(scaled(torch.from_numpy(x), factors).numpy(), wanted)
    assert np.allclose(scaled(pd.Series(x), factors), wanted)
    assert total(x) == total(torch.from_numpy(x)) == total(pd.Series(x)) == x.astype(float).sum()
    assert scaled(pd.Series([1, 2, 3], dtype="Int64"), factors).tolist() == [1, 1, 1.5]
