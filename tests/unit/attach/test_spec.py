"""Which modules a pattern means, and what a specification may say."""

import dataclasses
import re

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from l0hooks import GateSpec, sparsify
from l0hooks.attach.spec import as_patterns, as_spec, first_matches, is_excluded, matches, named_modules
from l0hooks.errors import InvalidValueError, L0HooksError, SpecError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3))
        self.layer2 = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3), "act": nn.ReLU()})
        self.attention = nn.MultiheadAttention(4, 2)
        self.table = nn.Embedding(5, 4)
        self.project = Conv1D(4, 4)
        self.fc = nn.Linear(4, 2)


LINEAR = {"attention", "attention.out_proj", "project", "fc"}
CONV = {"layer1.0", "layer1.2", "layer2.conv"}


def name_of(value: object) -> str:
    """The same in every process: sets have no order of their own."""
    return str(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("fc", {"fc"}),
        ("layer?.0", {"layer1.0"}),
        ("layer*conv", {"layer2.conv"}),  # * crosses dots
        ("layer[12].*", {"layer1.0", "layer1.1", "layer1.2", "layer2.conv", "layer2.act"}),
        ("FC", set()),
        ("f", set()),  # a pattern matches the whole name
        (re.compile(r"layer\d\.(0|conv)"), {"layer1.0", "layer2.conv"}),
        (re.compile(r"layer\d"), {"layer1", "layer2"}),  # the whole name, too
        (nn.Conv2d, {"layer1.0", "layer2.conv"}),
        (nn.Linear, {"fc", "attention.out_proj"}),
        (nn.Embedding, {"table"}),
        ("all-linear", LINEAR),
        ("all-conv", CONV),
        ("all", LINEAR | CONV),
    ],
    ids=name_of,
)
def test_a_pattern_means_these_modules(pattern, expected):
    assert {name for name, module in Net().named_modules() if matches(pattern, name, module)} == expected


def test_a_star_means_every_module_and_the_empty_name_the_model_itself():
    model = Net()
    names = {name for name, module in model.named_modules() if matches("*", name, module)}
    assert names == set(dict(model.named_modules()))
    assert matches("", "", model)
    assert not matches("", "fc", model.fc)


def test_the_first_pattern_that_matches_wins():
    found = first_matches(Net(), {"layer1.*": 1, nn.Conv2d: 2, "all": 3}, where="test")
    assert found == {
        **{"layer1.0": 1, "layer1.1": 1, "layer1.2": 1, "layer2.conv": 2},
        **dict.fromkeys(LINEAR, 3),
    }


def test_the_order_of_the_patterns_decides():
    found = first_matches(Net(), {"all": 3, "layer1.0": 1}, where="test")
    assert found["layer1.0"] == 3


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("fc", (LINEAR | CONV) - {"fc"}),
        ("layer1", (LINEAR | CONV) - {"layer1.0", "layer1.2"}),  # also what lies below it
        (["layer1", nn.Linear], {"attention", "project", "layer2.conv"}),
        (nn.MultiheadAttention, (LINEAR | CONV) - {"attention", "attention.out_proj"}),
        (nn.ModuleDict, (LINEAR | CONV) - {"layer2.conv"}),
        (re.compile("layer.*"), LINEAR),
        ("all-linear", CONV),
        ("*", set()),
    ],
    ids=name_of,
)
def test_excluded_modules_and_those_below_them_are_left_alone(exclude, left):
    assert set(first_matches(Net(), {"all": 0}, where="test", exclude=exclude)) == left


def test_exclusion_goes_by_every_module_above():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), nn.Linear(2, 2))
    assert is_excluded(model, "0.0.0", "0")
    assert is_excluded(model, "0.0.0", ["1", "0.0"])
    assert not is_excluded(model, "0.0", "0.0.0")
    assert not is_excluded(model, "1", "0")


@pytest.mark.parametrize("position", ["spec", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer1.3", r"'layer1.3', which matches none\n  try: did you mean 'layer1\.[012]'"),
        ("fcc", "did you mean 'fc'"),
        ("zzzz", "one of 'layer1', 'layer1.0'"),
        (re.compile("layer9"), "re.compile"),
        (nn.LSTM, "got: LSTM, which matches none"),
    ],
    ids=name_of,
)
def test_a_pattern_that_means_nothing_is_an_error_with_near_names(position, pattern, message):
    values, exclude = ({pattern: 1}, ()) if position == "spec" else ({"fc": 1}, pattern)
    with pytest.raises(SpecError, match=message):
        first_matches(Net(), values, where="test", exclude=exclude)


def test_names_do_not_reach_into_parametrizations_and_come_under_every_name():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model["b"] = model["a"]
    sparsify(model, "weight")
    assert [name for name, _ in named_modules(model)] == ["", "a", "b"]


def test_one_pattern_or_several():
    assert as_patterns("a") == ("a",)
    assert as_patterns(nn.Linear) == (nn.Linear,)
    assert as_patterns(["a", nn.Linear]) == ("a", nn.Linear)
    assert as_patterns(()) == ()


@pytest.mark.parametrize("value", ["weight", "input", "output", "kernel", (2, 3)], ids=name_of)
def test_a_shorthand_is_a_granularity(value):
    assert as_spec(value) == GateSpec(granularity=value)


def test_a_specification_stands_for_itself_and_cannot_be_changed():
    spec = GateSpec(granularity="output", init_keep_prob=0.3)
    assert as_spec(spec) is spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.granularity = "input"


@pytest.mark.parametrize(
    "granularity",
    ["rows", "Weight", "", None, 2, (2,), (2, 3, 4), (0, 2), (-1, 2), (2.0, 2), [2, 2], ("a", "b"), "couple"],
    ids=name_of,
)
@pytest.mark.parametrize("make", [as_spec, lambda g: GateSpec(granularity=g)], ids=["shorthand", "GateSpec"])
def test_an_unknown_granularity_is_refused(make, granularity):
    with pytest.raises(SpecError, match="shape of the gates must be known") as caught:
        make(granularity)
    assert repr(granularity) in str(caught.value)


def test_an_almost_known_granularity_gets_a_suggestion():
    with pytest.raises(SpecError, match="did you mean 'weight'"):
        as_spec("weigth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_keep_prob": 0.0}, "init_keep_prob: (.|\n)*strictly between 0 and 1"),
        ({"init_keep_prob": 1.0}, "init_keep_prob: (.|\n)*strictly between 0 and 1"),
        ({"init_keep_prob": -0.1}, "init_keep_prob"),
        ({"init_keep_prob": float("nan")}, "init_keep_prob"),
        ({"init_mean": 0.0}, "init_mean"),
        ({"init_mean": 1.0}, "init_mean"),
        ({"init_mean": 1.5}, "init_mean"),
        ({"init_mean": 0.9, "init_keep_prob": 0.5}, "cannot be given together"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"temperature": float("inf")}, "temperature must be positive"),
        ({"gamma": 0.0}, "stretch interval"),
        ({"gamma": 0.1}, "stretch interval"),
        ({"zeta": 1.0}, "stretch interval"),
        ({"zeta": float("nan")}, "stretch interval"),
        ({"family": "hard_concret"}, "did you mean 'hard_concrete'"),
        ({"estimator": "medien"}, "did you mean 'median'"),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("family", ["hard_concrete", "stg", "deterministic", "straight_through"])
def test_a_specification_refuses_numbers_out_of_range(family, options, message):
    with pytest.raises(InvalidValueError, match=message) as caught:
        GateSpec(**{"family": family, **options})
    assert isinstance(caught.value, L0HooksError)
    assert isinstance(caught.value, ValueError)


def test_a_specification_takes_only_keywords():
    with pytest.raises(TypeError):
        GateSpec("weight")
