"""``param_groups``: gates at their own rate, never decayed."""

import pytest
import torch
from torch import nn

from l0hooks import Gate, iter_gates, param_groups, sparsify
from l0hooks.errors import InvalidValueError


def model_with_gates():
    model = nn.ModuleDict({"fc": nn.Linear(4, 3), "norm": nn.BatchNorm1d(3), "select": Gate(4)})
    sparsify(model, "weight")
    return model


def names(model, group):
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for p in group["params"]]


def test_weights_and_gates_come_as_two_groups():
    model = model_with_gates()
    weights, gates = param_groups(model, lr=0.1, gate_lr=2.0, weight_decay=0.3)
    assert names(model, weights) == [
        "fc.bias",
        "fc.parametrizations.weight.original",
        "norm.weight",
        "norm.bias",
    ]
    assert names(model, gates) == ["fc.parametrizations.weight.0.gate.log_alpha", "select.log_alpha"]
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.3)
    assert (gates["lr"], gates["weight_decay"]) == (2.0, 0.0)


def test_every_parameter_that_learns_comes_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    sparsify(model, "weight")
    given = [id(p) for group in param_groups(model, lr=1.0, gate_lr=1.0) for p in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_gates_never_decay(optimizer):
    model = model_with_gates()
    before = [gate.log_alpha.detach().clone() for _, gate in iter_gates(model)]
    weight = model["fc"].parametrizations.weight.original
    size = weight.detach().abs().sum()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer(param_groups(model, lr=0.1, gate_lr=0.1, weight_decay=0.5)).step()
    for (_, gate), old in zip(iter_gates(model), before, strict=True):
        assert torch.equal(gate.log_alpha, old)
    assert weight.detach().abs().sum() < size


def test_the_rates_are_those_asked_for():
    model = model_with_gates()
    weight, gate = model["fc"].parametrizations.weight.original, model["select"].log_alpha
    before = weight.detach().clone(), gate.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(param_groups(model, lr=0.125, gate_lr=0.5)).step()
    torch.testing.assert_close(before[0] - weight.detach(), torch.full((3, 4), 0.125))
    torch.testing.assert_close(before[1] - gate.detach(), torch.full((4,), 0.5))


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = model_with_gates()
    model["fc"].requires_grad_(False)
    model["norm"].requires_grad_(False)
    (gates,) = param_groups(model, lr=0.1, gate_lr=2.0)
    assert names(model, gates) == ["select.log_alpha"]
    assert gates["lr"] == 2.0


def test_a_model_without_gates_has_one_group_and_a_lone_gate_too():
    (weights,) = param_groups(nn.Linear(2, 2), lr=0.1, gate_lr=2.0)
    assert (len(weights["params"]), weights["lr"]) == (2, 0.1)
    (gates,) = param_groups(Gate(2), lr=0.1, gate_lr=2.0)
    assert (len(gates["params"]), gates["lr"]) == (1, 2.0)


@pytest.mark.parametrize("name", ["lr", "gate_lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, float("nan")])
def test_negative_numbers_are_refused(name, value):
    with pytest.raises(InvalidValueError, match=rf"param_groups: {name} must not be negative(.|\n)*got: {value}"):
        param_groups(model_with_gates(), **{"lr": 0.1, "gate_lr": 0.1, name: value})


def test_zero_is_allowed():
    groups = param_groups(model_with_gates(), lr=0.0, gate_lr=0.0)
    assert [group["lr"] for group in groups] == [0.0, 0.0]
