"""Select rows or columns of tensors, NumPy arrays, pandas objects and scipy.sparse arrays and matrices."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l0hooks.errors import InvalidValueError, UnsupportedModuleError, explain

Ints = npt.NDArray[np.int64]
_KNOWN_KINDS = "a dense Tensor, a NumPy array, a pandas DataFrame or Series, or a scipy.sparse array or matrix"
_KEPT_FORMATS = ("csr", "csc", "coo", "lil")  # sparse formats in which arbitrary rows are cheap to store


def is_pandas(x: object) -> bool:
    """Whether ``x`` is a pandas DataFrame or Series; pandas is not imported for that."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(x, (pandas.DataFrame, pandas.Series))


def values_of(frame: Any) -> npt.NDArray[Any]:
    """The values of a frame or series; numbers, also nullable ones, become float64 with NaN for missing values."""
    dtypes = [frame.dtype] if frame.ndim == 1 else list(frame.dtypes)
    if all(dtype.kind in "biuf" for dtype in dtypes):
        return np.asarray(frame.to_numpy(dtype=np.float64, na_value=np.nan))
    return np.asarray(frame.to_numpy())


def is_sparse(x: object) -> bool:
    """Whether ``x`` is a scipy.sparse array or matrix, of any format."""
    scipy_sparse = sys.modules.get("scipy.sparse")
    return scipy_sparse is not None and bool(scipy_sparse.issparse(x))


def check_generator(where: str, generator: object) -> None:
    """Raise an error unless the generator is torch's, or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        must, hint = "the generator must be torch's.", "generator=torch.Generator().manual_seed(0)"
        raise InvalidValueError(
            explain(where, must, expected="a torch.Generator or None", got=repr(generator), hint=hint)
        )


def check_counts(where: str, n: int, k: int) -> tuple[int, int]:
    """``n`` and ``k`` as Python integers, after checking that k of n items can be chosen.

    Raises
    ------
    InvalidValueError
        If they are not integers, or not 1 <= k <= n.
    """
    for name, value in (("the number of items", n), ("k", k)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise InvalidValueError(explain(where, f"{name} must be an integer.", got=repr(value)))
    if not 1 <= k <= n:
        raise InvalidValueError(
            explain(where, "k must be at least 1 and at most the number of items.", expected=f"1 <= k <= {n}", got=k)
        )
    return int(n), int(k)


def length(where: str, x: Any, axis: int) -> int:
    """How many items ``x`` has along ``axis``.

    Parameters
    ----------
    where : str
        The name of the caller, for the error message.
    x : Tensor, NumPy array, pandas DataFrame or Series, scipy.sparse array or matrix
    axis : int
        Negative ones count from the end.

    Raises
    ------
    UnsupportedModuleError
        If ``x`` is of another kind, or a sparse or nested tensor.
    InvalidValueError
        If it has no such axis.

    Examples
    --------
    >>> length("here", np.zeros((3, 5)), -1)
    5
    """
    if isinstance(x, Tensor):
        if x.layout != torch.strided or x.is_nested:
            raise UnsupportedModuleError(
                explain(
                    where, "a tensor must be dense.", got=f"layout {x.layout}", hint="x.to_dense(), or scipy.sparse"
                )
            )
    elif not (isinstance(x, np.ndarray) or is_pandas(x) or is_sparse(x)):
        raise UnsupportedModuleError(
            explain(where, "the data must be of a known kind.", expected=_KNOWN_KINDS, got=type(x).__name__)
        )
    elif is_sparse(x) and x.ndim != 2:
        raise InvalidValueError(explain(where, "a sparse array must have two axes.", expected=2, got=x.ndim))
    if not -x.ndim <= axis < x.ndim:
        raise InvalidValueError(
            explain(where, "the data must have the axis that is gated.", expected=axis, got=tuple(x.shape))
        )
    return int(x.shape[axis])


def take(x: Any, indices: Ints, axis: int) -> Any:
    """The items of ``x`` at ``indices`` along ``axis``, as the kind of ``x``; sparse data are never made dense.

    CSR, CSC, COO and LIL keep their format; other sparse formats come back as CSR.

    Parameters
    ----------
    x : Tensor, NumPy array, pandas DataFrame or Series, scipy.sparse array or matrix
    indices : int64, shape (k,)
    axis : int

    Examples
    --------
    >>> take(torch.arange(6).view(2, 3), np.array([0, 2]), -1)
    tensor([[0, 2],
            [3, 5]])
    """
    axis %= x.ndim
    if isinstance(x, Tensor):
        return x.index_select(axis, torch.from_numpy(indices).to(x.device))
    where = (slice(None),) * axis + (indices,)
    if is_pandas(x):
        return x.iloc[where]
    if is_sparse(x):
        rows = x.tocsr() if axis == 0 else x.tocsc()
        return rows[where].asformat(x.format if x.format in _KEPT_FORMATS else "csr")
    return x[where]


def indices_of(mask: Tensor) -> Ints:
    """The indices at which ``mask`` is true, ascending."""
    return np.flatnonzero(mask.cpu().numpy())


def indices_like(x: object, indices: Ints, device: torch.device) -> Tensor | Ints:
    """``indices`` as a tensor on ``device`` if ``x`` is a tensor, else as the NumPy array that they are."""
    return torch.from_numpy(indices).to(device) if isinstance(x, Tensor) else indices


def scaled(x: Any, factors: Tensor) -> Any:
    """The one-dimensional ``x`` times ``factors``, as the kind of ``x``; integers become floating point."""
    if isinstance(x, Tensor):
        return x * factors.to(x.device, x.dtype if x.is_floating_point() else None)
    known = x.dtype if isinstance(x.dtype, np.dtype) else np.dtype(np.float64)  # nullable dtypes of pandas
    return x * factors.cpu().numpy().astype(np.result_type(known, np.float32))


def total(x: Any) -> float:
    """The sum of ``x``, computed in float64."""
    return float(x.detach().double().sum() if isinstance(x, Tensor) else np.asarray(x, np.float64).sum())
