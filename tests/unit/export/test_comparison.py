"""Comparing two models on examples of several sizes."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0hooks.errors import L0HooksWarning, StateError
from l0hooks.export import comparison as comparison_module
from l0hooks.export.comparison import Comparison
from l0hooks.export.examples import batches, lengths
from l0hooks.export.outputs import difference, leaves, outputs_of


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
    return [half for half, _ in lengths(model, inputs, *outputs_of(model, [inputs]))]


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
    """Computes something else at other lengths or batch sizes than these."""

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
    assert comparison.wrong(longer, accepts=lambda inputs: inputs[0].shape[1] == 8) == ""


def test_the_error_of_a_model_that_fails_is_reported():
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


@dataclasses.dataclass
class Unregistered:
    """A class that torch cannot take apart."""

    value: Tensor
    name: str = "a"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.tensor([1.0, -4.0]), torch.tensor([1.0, -4.0]), 0.0),
        (torch.tensor([4.0, 4.0, -4.0]), torch.tensor([5.0, 4.0, -4.0]), 0.25),
        (torch.tensor([[1.0, 1.0], [8.0, 8.0]]), torch.tensor([[1.5, 1.0], [8.0, 8.0]]), 0.5),
        (torch.tensor([2.0, 3.0, 2.0, -1e9]), torch.tensor([3.0, 3.0, 2.0, -1e9]), 0.5),
        (torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, -torch.inf]), 0.0),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), 0.0),
        (torch.tensor([1.0]), torch.tensor([1.0, 1.0]), torch.inf),
        (torch.tensor([1.0j, 2.0]), torch.tensor([2.0, 2.0]).to(torch.complex64), math.sqrt(5)),
        ({"y": torch.ones(2), "n": 3}, {"y": torch.ones(2), "n": 4}, torch.inf),
        ({"y": torch.ones(2), "n": "a"}, {"y": torch.ones(2), "n": "b"}, torch.inf),
        (Unregistered(torch.ones(2)), Unregistered(torch.ones(2)), 0.0),
        (Unregistered(torch.ones(2)), Unregistered(torch.zeros(2)), 1.0),
        (Unregistered(torch.ones(2)), Unregistered(torch.ones(2), "b"), torch.inf),
    ],
)
def test_the_difference_is_a_share_of_the_scale(a: object, b: object, expected: float):
    assert difference(list(leaves(a)), list(leaves(b))) == pytest.approx(expected)


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
    assert shapes(comparison.inputs[-1:]) == [((2, 4),)]
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
    assert difference([x], [Detour()(x)]) > comparison.allowed
    assert comparison.wrong(Detour()) == ""
    assert comparison.wrong(Detour(1e-6)).startswith("a difference of 1.")
    assert Comparison(nn.Identity(), (x,), stays=False).wrong(Detour()) != ""  # the model may have changed since


class Off(nn.Module):
    """A layer that is off by ``error``, and what else a model may return beside its numbers."""

    def __init__(self, error=0.0, how=lambda y: y, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.error, self.how = nn.Linear(8, 6), error, how
        self.to(dtype)

    def forward(self, x):
        return self.how(self.layer(x) * (1 + self.error))


def masked(y):
    return torch.cat([y, torch.full_like(y, -1e4 if y.dtype == torch.float16 else -1e9)], -1)


def masked_later(y):
    return torch.cat([y, y - 1e9], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("make", "how"),
    [
        (torch.randn, lambda y: y),
        (torch.zeros, lambda y: y - y.mean()),
        (lambda *shape: torch.full(shape, torch.nan), lambda y: y),
        (torch.randn, masked),
        (torch.randn, masked_later),
        (torch.randn, lambda y: torch.complex(y.float(), y.float())),
        (torch.randn, lambda y: Unregistered(y)),
        (torch.randn, lambda y: (y.sum() * 0, (y.double() * 1e6).long())),
        (torch.randn, lambda y: {"scores": y.float().sigmoid(), "ranks": y.argsort(-1)}),
    ],
)
def test_an_error_of_one_percent_is_found_and_none_is_not(dtype, make, how):
    comparison = Comparison(Off(how=how, dtype=dtype), (make(4, 8).to(dtype),))
    assert comparison.wrong(Off(how=how, dtype=dtype)) == ""
    assert comparison.wrong(Off(0.01, how=how, dtype=dtype)) != ""


def test_one_parameter_in_half_precision_leaves_no_room():
    model, wrong = Off(), Off(0.001)
    for one in (model, wrong):
        one.unused = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    assert Comparison(model, (torch.randn(4, 8),)).wrong(wrong) != ""


def test_outputs_that_show_nothing_are_refused():
    with pytest.raises(StateError, match="at least one finite number"):
        Comparison(Off(), (torch.zeros(0, 8),))
    with pytest.raises(StateError, match="an output of type generator"):
        Comparison(Off(how=lambda y: (one for one in y)), (torch.zeros(2, 8),))


@pytest.mark.parametrize("autocast", [False, True])
def test_code_that_names_dtypes_is_compared_in_float64_all_the_same(autocast):
    class Half(Off):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = self.layer(x).float() + torch.ones(6, dtype=torch.float32)
            return y.to(torch.float32) * (1 + self.error)

    comparison = Comparison(Half(), (torch.randn(4, 8),))
    assert comparison.wrong(Half(1e-9)) == ""
    assert "in float64" in comparison.wrong(Half(1e-7))


def test_without_room_for_a_float64_copy_the_own_dtype_decides_and_says_so(monkeypatch):
    monkeypatch.setattr(comparison_module, "has_room", lambda count, dtype, device: False)
    comparison = Comparison(Off(), (torch.randn(4, 8),))
    with pytest.warns(L0HooksWarning, match=r"float64 copy(.|\n)*does not fit(.|\n)*1.2e-05 of an output's scale"):
        assert comparison.wrong(Off(1e-6)) == ""
    assert comparison.wrong(Off(1e-4)) != ""


def test_a_model_that_takes_no_example_is_wrong():
    assert Comparison(Off(), (torch.randn(4, 8),)).wrong(Off(), accepts=lambda inputs: False) != ""
