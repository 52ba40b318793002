"""How example inputs may be given: by position, by name, or both."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0hooks import Budget, channel_groups, iter_gates, prune, sparsify, summary
from l0hooks.errors import SpecError
from l0hooks.structure.example_inputs import positional
from l0hooks.training import Distillation


class Classifier(nn.Module):
    """Like those of transformers: a mask and labels that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, labels: Any = None, *, other: Any = None) -> Tensor:
        hidden = torch.relu(self.first(tokens))
        out: Tensor = self.last(hidden if mask is None else hidden * mask)
        return out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1,), (1,)),
        ([1, 2], (1, 2)),
        ({"tokens": 1}, (1,)),
        ({"labels": 1, "tokens": 2}, (2, None, 1)),
        (UserDict({"mask": 3, "tokens": 2}), (2, 3)),
        ((5, {"labels": 1}), (5, None, 1)),
        ((5, {"image": 1}), (5, {"image": 1})),
        ((5, {"tokens": 1}), (5, {"tokens": 1})),
        ((5, {}), (5, {})),
        (({"image": 1},), ({"image": 1},)),
        ((), ()),
    ],
)
def test_arguments_come_in_the_order_of_forward(given: Any, expected: tuple[Any, ...]) -> None:
    assert positional(Classifier(), given) == expected
    assert positional(Classifier(), expected) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": 1}, r"expected: tokens, mask, labels\s+got: image\s+try: example_inputs=\(inputs,\) for a model"),
        ({"tokens": 1, "other": 2}, r"can be given by position.(.|\n)*got: other"),
        ({"mask": 1}, r"without a default must be given.\s+expected: tokens\s+got: mask"),
        (torch.zeros(2, 4), r"must come as a tuple, or by name.(.|\n)*got: Tensor\s+try: example_inputs=\(x,\)"),
        ("tokens", r"must come as a tuple, or by name.(.|\n)*got: str"),
    ],
)
def test_what_cannot_be_put_in_order_is_refused(given: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        positional(Classifier(), given)


@pytest.mark.parametrize("verb", [summary, prune, lambda model, example_inputs: channel_groups(model, example_inputs)])
def test_every_verb_refuses_a_tensor(verb: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    sparsify(model, "output")
    with pytest.raises(SpecError, match="example_inputs: arguments must come as a tuple, or by name"):
        verb(model, example_inputs=torch.zeros(2, 4))


X, MASK = torch.randn(4, 6), torch.rand(4, 1)


@pytest.mark.parametrize(
    "given",
    [{"mask": MASK, "tokens": X}, (X, {"mask": MASK}), UserDict({"tokens": X, "mask": MASK})],
    ids=["names", "both", "like a tokenizer"],
)
def test_names_do_what_positions_do_everywhere(given: Any) -> None:
    found = []
    for inputs in (given, (X, MASK)):
        torch.manual_seed(0)
        model = Classifier()
        groups = str(channel_groups(model, inputs))
        budget = Budget(sparsity=0.4, unit="macs", steps=3, cut_every=1)
        told = str(sparsify(model, "coupled", example_inputs=inputs, budget=budget))
        rule = next(iter_gates(model))[1].rule
        for _ in range(3):
            rule.advance()
        counted = str(summary(model, example_inputs=inputs))
        small = prune(model.eval(), example_inputs=inputs)
        distillation = Distillation(model, Classifier(), hidden={"first": 1.0}, example_inputs=inputs)
        shapes = [tuple(p.shape) for p in distillation.parameters()]
        found.append((groups, told, counted, small.first.out_features, small(X, MASK).tolist(), shapes))
    assert found[0] == found[1]
