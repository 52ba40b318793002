"""Comparing two models on examples of several sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0hooks.export.comparison import Comparison, batches, difference, lengths, outputs


class Words(nn.Module):
    """Token ids and a mask of the same length."""

    def __init__(self, longest=8):
        super().__init__()
        self.embed, self.place, self.out = nn.Embedding(11, 6), nn.Parameter(torch.randn(longest, 6)), nn.Linear(6, 3)

    def forward(self, ids, mask):
        x = self.embed(ids) + self.place[: ids.shape[1]]
        return self.out((x * mask[..., None]).sum(1))


def words(examples=2, length=8):
    return torch.randint(11, (examples, length)), torch.ones(examples, length)


def halves(model, inputs):
    return lengths(model, inputs, *outputs(model, [inputs]))


def shapes(inputs):
    return [tuple(tuple(t.shape) for t in arguments) for arguments in inputs]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([(1, 4)], [((1, 4),), ((3, 4),)]),
        ([(5, 4)], [((5, 4),), ((1, 4),)]),
        ([(2, 4), (2, 3)], [((2, 4), (2, 3)), ((1, 4), (1, 3))]),
        ([(2, 4), (3, 4)], [((2, 4), (3, 4))]),
    ],
)
def test_examples_come_at_two_batch_sizes_if_they_have_one(given, expected):
    assert shapes(batches([torch.zeros(shape) for shape in given])) == expected


def test_words_come_at_half_their_length_with_all_that_is_as_long():
    assert shapes(halves(Words(), words())) == [((2, 4), (2, 4))]


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (2, 3, 8, 6), [((2, 3, 4, 3),)]),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 48, 2)), (2, 3, 8, 6), []),
        (nn.Conv1d(3, 4, 3), (2, 3, 8), [((2, 3, 4),)]),
        (nn.Linear(8, 4), (2, 8), []),
        (nn.Linear(8, 4), (2, 6, 8), [((2, 3, 8),)]),
        (nn.Linear(1, 4), (2, 1), []),
    ],
)
def test_an_axis_is_halved_where_the_model_takes_it(model, shape, expected):
    assert shapes(halves(model, (torch.randn(shape),))) == expected


def test_a_length_that_turns_examples_into_others_is_left_out():
    class Regrouped(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 8)

    assert shapes(halves(Regrouped(), (torch.randn(4, 8),))) == []


class OnlyAt(nn.Module):
    """Another model at lengths or batch sizes it was not made for."""

    def __init__(self, model, examples, length):
        super().__init__()
        self.model, self.right = model, (examples, length)

    def forward(self, ids, mask):
        y = self.model(ids, mask)
        return y if ids.shape == self.right else y + 1


def test_what_differs_at_another_size_only_is_found():
    model, inputs = Words(), words()
    comparison = Comparison(model, inputs)
    assert comparison.wrong(model) == ""
    assert "a difference of" in comparison.wrong(OnlyAt(model, *inputs[0].shape))

    class LongOnly(OnlyAt):
        def forward(self, ids, mask):
            return self.model(ids, mask) + (ids.shape[1] != self.right[1])

    longer = LongOnly(model, *inputs[0].shape)
    assert "a difference of" in comparison.wrong(longer)
    assert comparison.wrong(longer, every_size=False) == ""


def test_a_model_that_fails_is_told_with_its_error():
    class Fails(nn.Module):
        def forward(self, ids, mask):
            return F.linear(mask, torch.zeros(3, 5))

    assert Comparison(Words(), words()).wrong(Fails()).startswith("RuntimeError: mat1 and mat2")


@pytest.mark.parametrize("nan_at", [2, 1])
def test_a_model_that_is_not_a_number_at_either_batch_size_is_wrong(nan_at):
    class Sometimes(nn.Module):
        def forward(self, x):
            return torch.full_like(x, torch.nan) if len(x) == nan_at else x

    assert Comparison(nn.Identity(), (torch.ones(2, 3),)).wrong(Sometimes()) != ""


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.tensor([1.0, -4.0]), torch.tensor([1.0, -4.0]), 0.0),
        (torch.tensor([1.0, -4.0]), torch.tensor([2.0, -4.0]), 0.25),
        (torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, -torch.inf]), 0.0),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), 0.0),
        (torch.tensor([1.0]), torch.tensor([1.0, 1.0]), torch.inf),
        ({"y": torch.ones(2), "n": 3}, {"y": torch.ones(2), "n": 4}, 0.0),
    ],
)
def test_the_difference_is_a_share_of_the_scale(a: Tensor, b: Tensor, expected: float):
    assert difference(a, b) == expected


def test_models_that_remember_the_size_they_saw_are_left_as_they_were():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.window = 8

        def forward(self, x):
            self.window = min(self.window, x.shape[-1])  # as some transformers do
            return x[..., : self.window].sum(-1)

    model, small = Remembers(), Remembers()
    comparison = Comparison(model, (torch.randn(2, 8),))
    assert shapes(comparison.shorter) == [((2, 4),)]
    assert comparison.wrong(small) == ""
    assert model.window == small.window == 8


class Detour(nn.Module):
    """The identity up to rounding: 6e-5 in float32."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = offset

    def forward(self, x):
        return (x + 1e3) - 1e3 + self.offset


def test_a_difference_that_is_rounding_in_float32_is_decided_in_float64():
    x = torch.rand(4, 8)
    comparison = Comparison(nn.Identity(), (x,))
    assert difference(x, Detour()(x)) > comparison.allowed
    assert comparison.wrong(Detour()) == ""
    assert comparison.wrong(Detour(1e-4)).startswith("a difference of 1.")
    assert Comparison(nn.Identity(), (x,), stays=False).wrong(Detour()) != ""  # the model may have changed since
