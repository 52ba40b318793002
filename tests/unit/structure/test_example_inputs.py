"""How example inputs are to be given."""

import pytest
import torch
from torch import nn

from l0hooks import channel_groups, prune, sparsify, summary
from l0hooks.errors import SpecError
from l0hooks.structure.example_inputs import check_examples


class Classifier(nn.Module):
    def forward(self, tokens, mask=None, labels=None, *, other=None):
        return tokens


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"tokens": 1}, 'example_inputs=(inputs["tokens"],)'),
        ({"labels": 1, "tokens": 2}, 'example_inputs=(inputs["tokens"], None, inputs["labels"])'),
        ({"image": 1}, "example_inputs=(inputs,) for a model that takes one dictionary, else its arguments in order"),
        ({"tokens": 1, "other": 2}, "example_inputs=(inputs,) for a model that takes one dictionary"),
        ({}, "example_inputs=(inputs,) for a model that takes one dictionary"),
    ],
)
def test_a_dictionary_is_spelled_in_the_order_of_forward(given, hint):
    with pytest.raises(SpecError) as caught:
        check_examples(Classifier(), given)
    assert hint in str(caught.value)


@pytest.mark.parametrize("verb", [summary, prune, lambda model, example_inputs: channel_groups(model, example_inputs)])
@pytest.mark.parametrize("given", [torch.zeros(2, 4), {"input": torch.zeros(2, 4)}])
def test_every_verb_refuses_what_is_no_tuple(verb, given):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    sparsify(model, "output")
    with pytest.raises(SpecError, match="example_inputs: the positional arguments must come as a tuple"):
        verb(model, example_inputs=given)


def test_a_list_is_a_tuple():
    check_examples(Classifier(), [1])
