"""One meaning of a pattern over gated weights, whoever asks: penalties, temperature schedules and budgets."""

import pytest
import torch
from torch import nn

from l0hooks import Budget, iter_gates, penalty, set_budget, sparsify, temperature_schedule
from l0hooks.errors import SpecError
from l0hooks.schedules import linear


class Shared(nn.Module):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.plain = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight
        self.again = self.plain

    def forward(self, x):
        return self.again(self.second(torch.relu(self.first(x))))


def shared():
    model = Shared()
    sparsify(model, "weight")
    return model


def coupled():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    sparsify(model, "coupled", example_inputs=(torch.zeros(2, 4),))
    return model


MODELS = {
    "the first of tied weights": (shared, "first", 16),
    "the second of tied weights": (shared, "second", 16),
    "a layer's first name": (shared, "plain", 8),
    "a layer's second name": (shared, "again", 8),
    "the writer of a coupled group": (coupled, "0", 6),
    "the reader of a coupled group": (coupled, "2", 6),
}
models = pytest.mark.parametrize(("make", "pattern", "count"), MODELS.values(), ids=MODELS)


@models
def test_a_penalty_takes_every_name(make, pattern, count):
    model = make()
    gate = next(g for _, g in iter_gates(model) if g.log_alpha.numel() == count)
    torch.testing.assert_close(penalty(model, l0={pattern: 2.0}), 2 * gate.expected_l0())


@models
def test_a_temperature_schedule_takes_every_name(make, pattern, count):
    model = make()
    temperature_schedule(model, {pattern: linear(0.5, 0.25, 4)})
    assert [g.log_alpha.numel() for _, g in iter_gates(model) if g.temperature == 0.5] == [count]


@models
def test_a_budget_takes_every_name(make, pattern, count):
    (rule,) = set_budget(make(), {pattern: Budget(keep=3, steps=5)})
    assert rule.size.whole == count


CALLS = {
    "penalty": lambda model, pattern: penalty(model, l0={pattern: 1.0}),
    "temperature_schedule": lambda model, pattern: temperature_schedule(model, {pattern: linear(0.5, 0.25, 4)}),
    "set_budget": lambda model, pattern: set_budget(model, {pattern: Budget(keep=3, steps=5)}),
}


@pytest.mark.parametrize("where", CALLS)
def test_a_pattern_without_a_gate_lists_near_names(where):
    with pytest.raises(SpecError, match=rf"{where}(.|\n)*got: 'secnd', which matches none(.|\n)*'second'"):
        CALLS[where](shared(), "secnd")


@pytest.mark.parametrize("where", CALLS)
def test_a_layer_without_gates_is_no_match(where):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsify(model, {"0": "weight"})
    with pytest.raises(SpecError, match=r"got: '1', which matches none(.|\n)*one of '0'"):
        CALLS[where](model, "1")
