"""Atoms, the classes they are merged into, and label tensors that say which class removes which element.

Atom 0 stands for *frozen*; a class that is united with it is never removed. A label tensor has the shape of the
activation it describes; axes along which labels do not vary have stride 0, so that most operations touch a vector.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
_NOT_FROZEN = np.int64(2**62)
_NO_REASON = _NOT_FROZEN - 1  # frozen by a union with atom 0


class Classes:
    """A union–find over atoms with vectorised operations; the smallest atom of a class is its root.

    Freezing marks a class and merges nothing, so that each class keeps its own reason. :meth:`roots` returns 0 for
    every frozen class.
    """

    def __init__(self) -> None:
        self._parent: Ints = np.zeros(1, np.int64)
        self._why: Ints = np.full(1, _NO_REASON)  # of a root: index of its reason, _NOT_FROZEN if it is not frozen
        self._size = 1
        self._reasons: list[str] = []

    def __len__(self) -> int:
        return self._size

    def new(self, count: int) -> Tensor:
        """``count`` atoms, each a class of its own: int64, shape (count,)."""
        first, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            spare = np.arange(len(self._parent), 2 * self._size)
            self._parent = np.concatenate([self._parent, spare])
            self._why = np.concatenate([self._why, np.full(len(spare), _NOT_FROZEN)])
        return torch.arange(first, self._size, device="cpu")

    def roots(self, labels: Tensor) -> Tensor:
        """The root of every label, 0 if frozen; axes of stride 0 keep it."""
        small = squeeze_constant(labels)
        found = self._find(small.numpy())
        found = np.where(self._why[found] < _NOT_FROZEN, 0, found)
        return torch.from_numpy(found).reshape(small.shape).expand(labels.shape)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Merge the class of every element of ``a`` with that of the element of ``b`` it broadcasts to."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        together = [d for d in range(a.dim()) if a.size(d) > 1 and a.stride(d) == b.stride(d) == 0]
        for d in together:
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        left, right = self._find(a.reshape(-1).numpy()), self._find(b.reshape(-1).numpy())
        while True:
            frozen = (self._why[left] < _NOT_FROZEN) & (self._why[right] < _NOT_FROZEN)
            differ = (left != right) & ~frozen
            if not differ.any():
                return
            left, right = left[differ], right[differ]
            self._link(np.minimum(left, right), np.maximum(left, right))
            left, right = self._find(left), self._find(right)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Mark every class in ``labels`` as never removed, and remember the reason."""
        roots = self._find(squeeze_constant(labels).reshape(-1).numpy())
        roots = roots[self._why[roots] == _NOT_FROZEN]
        if len(roots):
            self._why[roots] = len(self._reasons)
            self._reasons.append(reason)

    def is_frozen(self, labels: Tensor) -> bool:
        """Whether all labels are frozen."""
        return bool((self._why[self._find(squeeze_constant(labels).numpy())] < _NOT_FROZEN).all())

    def count(self, labels: Tensor) -> int:
        """The number of classes in ``labels``; all frozen classes count as one."""
        return len(np.unique(squeeze_constant(self.roots(labels)).numpy()))

    def first_frozen(self, labels: Tensor) -> int:
        """The atom in ``labels`` that was frozen first; 0 if none is, or none with a reason."""
        atoms = squeeze_constant(labels).reshape(-1).numpy()
        why = self._why[self._find(atoms)]
        return int(atoms[why.argmin()]) if why.min(initial=_NO_REASON) < _NO_REASON else 0

    def reason_of(self, labels: Tensor) -> str:
        """Why ``labels`` are frozen: the first reason that was given for one of them, "" if there is none."""
        atom = self.first_frozen(labels)
        return self._reasons[int(self._why[self._find(np.array([atom]))[0]])] if atom else ""

    def save(self) -> tuple[Ints, Ints]:
        """The present state, for :meth:`restore` while there are no new atoms or reasons."""
        return self._parent.copy(), self._why.copy()

    def restore(self, state: tuple[Ints, Ints]) -> None:
        """Return to a saved state."""
        self._parent, self._why = state

    def _find(self, atoms: Ints) -> Ints:
        """The roots of ``atoms``, frozen or not; shortens their paths."""
        roots = self._parent[atoms]
        while True:
            further = self._parent[roots]
            if np.array_equal(further, roots):
                break
            roots = further
        self._parent[atoms] = roots
        return roots

    def _link(self, low: Ints, high: Ints) -> None:
        """Merge pairs of roots; a pair with atom 0 freezes the other root instead, so that it keeps its reason."""
        zero = low == 0
        self._why[high[zero]] = np.minimum(self._why[high[zero]], _NO_REASON)
        low, high = low[~zero], high[~zero]
        np.minimum.at(self._parent, high, low)
        while True:  # each round halves the chains among these pairs
            further = self._parent[self._parent[high]]
            if np.array_equal(further, self._parent[high]):
                break
            self._parent[high] = further
        for ends in (low, high):
            np.minimum.at(self._why, self._find(ends), self._why[ends])


def squeeze_constant(labels: Tensor) -> Tensor:
    """The same labels with every axis of stride 0 cut to length 1."""
    for d in range(labels.dim()):
        if labels.size(d) > 1 and labels.stride(d) == 0:
            labels = labels.narrow(d, 0, 1)
    return labels


def constant(shape: torch.Size | tuple[int, ...], label: int = 0) -> Tensor:
    """One label everywhere."""
    return torch.full((1,) * len(shape), label, dtype=torch.int64, device="cpu").expand(tuple(shape))


def along(vector: Tensor, axis: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Labels of ``shape`` that vary along ``axis`` only."""
    view = [1] * len(shape)
    view[axis] = -1
    return vector.reshape(view).expand(tuple(shape))


def compress(labels: Tensor, roots: Tensor) -> Tensor:
    """``labels`` with stride 0 along every axis where their ``roots`` do not vary."""
    shape = labels.shape
    for d in range(labels.dim()):
        if not varies(roots, d):
            labels, roots = labels.narrow(d, 0, 1), roots.narrow(d, 0, 1)
    return labels.expand(shape)


def squeeze_other(labels: Tensor, axis: int) -> Tensor:
    """``labels`` with every axis of stride 0 but ``axis`` cut to length 1."""
    for d in range(labels.dim()):
        if d != axis and labels.size(d) > 1 and labels.stride(d) == 0:
            labels = labels.narrow(d, 0, 1)
    return labels


def varies(labels: Tensor, axis: int) -> bool:
    """Whether labels differ along ``axis``."""
    if labels.size(axis) < 2 or labels.stride(axis) == 0:
        return False
    small = squeeze_other(labels, axis)
    return bool((small != small.narrow(axis, 0, 1)).any())
