"""Label tensors, and their union–find checked against one written with sets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l0hooks.structure.union_find import Classes, along, compress, constant, squeeze_constant, squeeze_other, varies

ATOMS = 12
SETTINGS = settings(max_examples=200, deadline=None, derandomize=True, database=None)


class Naive:
    """Classes as sets of atoms; the one that holds atom 0 is frozen."""

    def __init__(self, atoms):
        self.classes = [{atom} for atom in range(atoms)]

    def of(self, atom):
        return next(c for c in self.classes if atom in c)

    def unite(self, a, b):
        one, two = self.of(a), self.of(b)
        if one is not two:
            self.classes.remove(two)
            one |= two

    def roots(self):
        return [min(self.of(atom)) for atom in range(sum(map(len, self.classes)))]


@st.composite
def label_tensors(draw):
    """Labels with some axes of stride 0, in any order."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    n = len(shape)
    constants = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    small = [1 if same else size for size, same in zip(shape, constants, strict=True)]
    count = int(torch.tensor(small).prod())
    values = draw(st.lists(st.integers(0, ATOMS - 1), min_size=count, max_size=count))
    labels = torch.tensor(values).reshape(small).expand(shape)
    return labels.permute(draw(st.permutations(range(n))))


@st.composite
def broadcastable(draw):
    """Two label tensors that broadcast."""
    first = draw(label_tensors())
    shape = [draw(st.sampled_from([size, 1])) for size in first.shape][draw(st.integers(0, first.dim() - 1)) :]
    count = int(torch.tensor(shape).prod())
    values = draw(st.lists(st.integers(0, ATOMS - 1), min_size=count, max_size=count))
    second = torch.tensor(values).reshape(shape)
    return (first, second) if draw(st.booleans()) else (second, first)


def fresh():
    classes = Classes()
    assert classes.new(ATOMS - 1).tolist() == list(range(1, ATOMS))
    return classes


OPERATIONS = st.lists(st.one_of(broadcastable(), label_tensors(), st.sampled_from(["save", "restore"])), max_size=12)


@pytest.mark.slow
@SETTINGS
@given(OPERATIONS)
def test_classes_are_those_of_the_naive_union_find(operations):
    classes, naive = fresh(), Naive(ATOMS)
    saved = (classes.save(), [set(c) for c in naive.classes])
    for operation in operations:
        if operation == "save":
            saved = classes.save(), [set(c) for c in naive.classes]
        elif operation == "restore":
            classes.restore(saved[0])
            naive.classes = [set(c) for c in saved[1]]
            saved = classes.save(), [set(c) for c in naive.classes]
        elif isinstance(operation, tuple):
            classes.unite(*operation)
            for a, b in zip(*(t.reshape(-1).tolist() for t in torch.broadcast_tensors(*operation)), strict=True):
                naive.unite(a, b)
        else:
            classes.freeze(operation, "why")
            for a in operation.reshape(-1).tolist():
                naive.unite(0, a)
        expected = naive.roots()
        assert classes.roots(torch.arange(ATOMS)).tolist() == expected
        for atom in range(ATOMS):
            assert classes.is_frozen(torch.tensor([atom])) == (expected[atom] == 0)
    assert len(classes) == ATOMS


@SETTINGS
@given(OPERATIONS, label_tensors())
def test_questions_about_a_tensor_are_those_about_its_elements(operations, labels):
    classes = fresh()
    for operation in operations:
        if isinstance(operation, tuple):
            classes.unite(*operation)
        elif not isinstance(operation, str):
            classes.freeze(operation, "why")
    roots = classes.roots(labels)
    every = classes.roots(torch.arange(ATOMS))
    assert torch.equal(roots, every[labels])
    assert classes.count(labels) == len(roots.unique())
    assert classes.is_frozen(labels) == bool((roots == 0).all())
    assert all(roots.stride(d) == 0 for d in range(labels.dim()) if labels.stride(d) == 0 and labels.size(d) > 1)

    small = compress(labels, roots)
    assert small.shape == labels.shape
    assert torch.equal(classes.roots(small), roots)
    for d in range(labels.dim()):
        same = bool((roots == roots.narrow(d, 0, 1)).all())
        assert varies(roots, d) == (not same)
        if same and labels.size(d) > 1:
            assert small.stride(d) == 0


@SETTINGS
@given(label_tensors())
def test_constant_axes_are_squeezed_without_loss(labels):
    assert torch.equal(squeeze_constant(labels).expand(labels.shape), labels)
    for axis in range(labels.dim()):
        other = squeeze_other(labels, axis)
        assert other.size(axis) == labels.size(axis)
        assert torch.equal(other.expand(labels.shape), labels)


def test_long_chains_unite_at_once():
    classes = Classes()
    atoms = classes.new(5_000)
    classes.unite(atoms[:-1], atoms[1:])
    assert classes.count(atoms) == 1
    again = classes.new(5_000)
    classes.unite(again[1:], torch.cat([torch.zeros(1, dtype=torch.int64), again[1:-1]]))
    assert classes.roots(again).tolist() == [again[0]] + [0] * 4_999


def test_new_atoms_are_their_own_roots_however_many():
    classes = Classes()
    vectors = [classes.new(n) for n in (3, 0, 1, 100, 2)]
    classes.unite(vectors[0], vectors[2])
    assert torch.equal(classes.roots(vectors[3]), vectors[3])
    assert len(classes) == 107


def test_the_first_reason_is_kept_and_spread():
    classes = fresh()
    a, b, c, d = torch.arange(1, 5).split(1)
    assert classes.reason_of(a) == ""
    classes.freeze(a, "first")
    classes.freeze(torch.cat([a, b]), "second")
    assert [classes.reason_of(t) for t in (a, b, torch.cat([b, a]))] == ["first", "second", "first"]
    classes.unite(b, c)
    assert classes.reason_of(c) == "second"
    classes.unite(torch.zeros(1, dtype=torch.int64), d)  # atom 0 has no reason
    assert classes.is_frozen(d)
    assert classes.reason_of(d) == ""
    assert classes.first_frozen(torch.cat([d, b, a])) == a
    assert classes.first_frozen(torch.tensor([7, 0])) == 0
    classes.unite(d, a)
    assert classes.reason_of(a) == "first"


def test_freezing_what_is_frozen_changes_nothing():
    classes = fresh()
    classes.freeze(torch.arange(1, 4), "why")
    state = classes.save()
    classes.freeze(torch.tensor([2]), "again")
    assert all((now == then).all() for now, then in zip(classes.save(), state, strict=True))


def test_along_and_constant():
    labels = along(torch.tensor([4, 5, 6]), 1, (2, 3, 2))
    assert labels.tolist() == [[[4, 4], [5, 5], [6, 6]]] * 2
    assert (labels.stride(0), labels.stride(2)) == (0, 0)
    assert torch.equal(along(torch.tensor([4, 5]), -1, torch.Size([3, 2])), torch.tensor([[4, 5]] * 3))
    assert [varies(labels, d) for d in range(3)] == [False, True, False]
    same = constant((2, 3), 7)
    assert same.tolist() == [[7, 7, 7]] * 2
    assert same.untyped_storage().nbytes() == 8
    assert constant(()).item() == 0


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty_labels(shape):
    classes, empty = fresh(), torch.zeros(shape, dtype=torch.int64)
    classes.unite(empty, empty)
    classes.freeze(empty, "why")
    assert classes.roots(empty).shape == shape
    assert classes.count(empty) == 0
    assert classes.is_frozen(empty)
    assert classes.reason_of(empty) == ""
