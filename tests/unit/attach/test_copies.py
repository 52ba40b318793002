"""Copies of gated models: what they share, and that pruning needs no more memory than it says."""

import copy

import pytest
import torch
from torch import nn

from l0hooks import Budget, iter_gates, prune, set_budget, sparsify
from l0hooks.attach.copies import folded_copy, folded_weights, run_copy
from l0hooks.attach.gated_weight import iter_sites


class Counting(nn.Module):
    """Sets an attribute, and fills a buffer, by what it sees."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(6, 6), 0
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x):
        self.seen = len(x)
        self.last.copy_(x[0])
        return self.fc(x)


@pytest.fixture
def model():
    found = Counting()
    sparsify(found, "weight")
    set_budget(found, Budget(keep=9, steps=1))[0].advance()
    return found.eval()


def test_a_copy_that_is_run_leaves_the_model_alone_and_holds_no_weights(model):
    expected = model(torch.ones(2, 6))
    kept = model.fc.weight
    twin = run_copy(model)
    assert torch.equal(twin(torch.full((5, 6), 3.0))[:1], model.fc(torch.full((1, 6), 3.0)))
    assert (model.seen, twin.seen) == (2, 5)
    assert torch.equal(model.last, torch.ones(6))
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in twin.parameters()} == own
    with torch.no_grad():
        assert twin.fc.weight.data_ptr() == kept.data_ptr()  # not folded again
    for (_, a), (_, b) in zip(iter_gates(model), iter_gates(twin), strict=True):
        assert a is not b
        assert a.rule is not b.rule
        assert a.mask is b.mask
        assert a.held is b.held
    assert torch.equal(model(torch.ones(2, 6)), expected)


def test_a_copy_to_be_folded_has_weights_of_its_own(model):
    model.fc.parametrizations.weight.original.requires_grad_(False)
    sites = list(iter_sites(model))
    with torch.no_grad():
        expected = model.fc.weight.clone()
    twin = folded_copy(model, sites, folded_weights(sites))
    folded = twin.fc.parametrizations.weight.original
    assert torch.equal(folded, expected)
    assert not folded.requires_grad
    with torch.no_grad():
        folded.zero_()
        twin.fc.bias.zero_()
    assert bool(model.fc.parametrizations.weight.original.all())
    assert bool(model.fc.bias.all())
    assert next(iter_gates(twin))[1] is next(iter_gates(model))[1]


def test_copies_of_a_budget_measure_anew(model):
    rule = next(iter_gates(model))[1].rule
    twin = copy.deepcopy(model)
    other = next(iter_gates(twin))[1].rule
    assert other is not rule
    assert other._shift._slopes == []
    assert other.expected() == rule.expected()


@pytest.mark.parametrize("spec", ["weight", "output"])
def test_pruning_leaves_nothing_kept_in_the_model(spec):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    sparsify(model, spec)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = prune(model, example_inputs=(torch.randn(2, 6),))
    assert model.training
    assert all(site.kept._product is None for site in (m.parametrizations.weight[0] for m in (model[0], model[2])))
    own = {p.data_ptr() for p in model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in small.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
