"""Sparse matrices whose indices are out of range: refused, where SciPy crashes or guesses."""

import numpy as np
import pytest
from scipy import sparse

from l0hooks.calibration import Calibrator
from l0hooks.calibration.cli import main
from l0hooks.calibration.data.files import read_matrix_file
from l0hooks.errors import InvalidValueError

MATRIX = sparse.random_array((6, 10), density=0.4, rng=np.random.default_rng(0), format="csr")


def first(array, value):
    changed = np.array(array)
    changed[1] = value
    return changed


CHANGES = {
    "far": {"indices": first(MATRIX.indices, 10)},
    "very far": {"indices": first(MATRIX.indices, 99_999_999)},
    "beyond 32 bits": {"indices": MATRIX.indices.astype(np.int64) + 2**33},
    "negative": {"indices": first(MATRIX.indices, -1)},
    "fractions": {"indices": MATRIX.indices + 0.5},
    "NaN": {"indices": np.full(MATRIX.nnz, np.nan)},
    "narrower": {"shape": np.array([6, 3])},
    "falling pointers": {"indptr": first(MATRIX.indptr, 23)},
    "negative pointers": {"indptr": first(MATRIX.indptr, -3)},
    "wrapping pointers": {"indptr": first(MATRIX.indptr.astype(np.int64), 2**32 + int(MATRIX.indptr[1]))},
    "pointers past the end": {"indptr": first(MATRIX.indptr, 10**6)},
    "no pointers": {"indptr": np.zeros(0, np.int32)},
    "a format of numbers": {"format": np.array(3.0)},
    "an unknown format": {"format": np.array(b"odd")},
    "another format": {"format": np.array(b"csc")},
    "a negative shape": {"shape": np.array([-6, 10])},
    "a shape of text": {"shape": np.array(["a", "b"])},
    "a huge shape": {"shape": np.array([2**62, 10])},
    "no shape": {"shape": None},
    "few data": {"data": MATRIX.data[:-1]},
    "text": {"indices": MATRIX.indices.astype(str)},
}


def file_of(path, change):
    arrays = {name: getattr(MATRIX, name) for name in ("data", "indices", "indptr")}
    arrays |= {"format": np.array(b"csr"), "shape": np.array(MATRIX.shape), "_is_array": np.array(True), **change}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_a_good_file_is_read(tmp_path):
    assert (read_matrix_file(file_of(tmp_path / "M.npz", {})).matrix != MATRIX).nnz == 0


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_with_other_indices_is_refused(name, tmp_path):
    path = file_of(tmp_path / "M.npz", CHANGES[name])
    with pytest.raises(InvalidValueError, match=r"M\.npz"):
        read_matrix_file(path)


def test_the_command_says_so(tmp_path, capsys):
    path = file_of(tmp_path / "M.npz", CHANGES["very far"])
    (tmp_path / "y.csv").write_text("value\n" + "3\n" * 6)
    assert main(["calibrate", str(path), str(tmp_path / "y.csv")]) == 2
    assert "indices from 0 to 9" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr", "coo"])
@pytest.mark.parametrize("bad", [-1, 10**6])
def test_a_matrix_in_memory_with_other_indices_is_refused(kind, bad):
    matrix = MATRIX.asformat(kind).copy()
    (matrix.col if kind == "coo" else matrix.indices)[0] = bad
    with pytest.raises(InvalidValueError, match="indices of a sparse matrix must lie within its shape"):
        Calibrator(3, progress=False).fit(matrix, np.ones(6))


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr", "coo", "lil", "dok", "dia"])
def test_every_format_is_still_read(kind):
    Calibrator(3, progress=False, max_epochs=5).fit(MATRIX.asformat(kind), MATRIX @ np.ones(10), keep=[0])
