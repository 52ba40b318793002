"""A cut that takes one open member too many is refused, whatever dtype, examples and outputs a model has."""

import pytest
import torch
from torch import nn

from l0hooks import iter_gates, prune, sparsify
from l0hooks.errors import StateError
from l0hooks.export import _prune

X = torch.randn(4, 8)


class Model(nn.Module):
    def __init__(self, how=lambda y: y, dtype=torch.float32, first=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.first = how, first
        self.up, self.mid, self.down = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 6)
        self.to(dtype)

    def forward(self, x):
        return self.how(self.down(torch.relu(self.mid(torch.relu(self.up(self.first(x)))))))


class Mixed(Model):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))


CASES = {
    "float32": (Model, X),
    "float64": (lambda: Model(dtype=torch.float64), X.double()),
    "bfloat16": (lambda: Model(dtype=torch.bfloat16), X.bfloat16()),
    "float16": (lambda: Model(dtype=torch.float16), X.half()),
    "one bfloat16 parameter": (Mixed, X),
    "zeros": (Model, torch.zeros(4, 8)),
    "not a number": (Model, torch.full((4, 8), torch.nan)),
    "one example": (Model, X[:1]),
    "all alike": (Model, X[:1].expand(4, 8)),
    "masked logits": (lambda: Model(lambda y: torch.cat([y, torch.full_like(y, -1e9)], -1)), X),
    "masked with infinity": (lambda: Model(lambda y: torch.cat([y, torch.full_like(y, -torch.inf)], -1)), X),
    "complex": (lambda: Model(lambda y: torch.complex(y, y.flip(-1))), X),
    "integers beside": (lambda: Model(lambda y: (y.sum() * 0, (y * 1e3).round().long())), X),
    "integers alone": (lambda: Model(lambda y: (y * 1e4).round().long()), X),
    "nested": (lambda: Model(lambda y: {"a": [y], "b": (1, "c", None)}), X),
    "a large number beside": (lambda: Model(lambda y: (y, y.new_tensor(1e30))), X),
    "whole numbers": (lambda: Model(first=lambda x: x.float() / 9), torch.randint(9, (4, 8))),
    "booleans": (lambda: Model(first=lambda x: x.float()), torch.rand(4, 8) > 0.5),
    "all true": (lambda: Model(first=lambda x: x.float()), torch.ones(4, 8, dtype=torch.bool)),
}


def gated(name, spec):
    make, x = CASES[name]
    model = make()
    sparsify(model, spec, example_inputs=(x,)) if spec == "coupled" else sparsify(model, spec)
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha.fill_(3.0)
            gate.log_alpha.flatten()[:3] = -9.0
    return model.eval(), x


def one_too_many(gates):
    """The members that stay, but for one of them."""
    found = []
    for group, stays in members(gates):
        wrong = stays.copy()
        wrong[stays.nonzero()[0][0]] = False
        found.append((group, wrong))
    return found


members = _prune.members_that_stay


@pytest.mark.parametrize("name", CASES)
def test_a_right_cut_is_made(name):
    model, x = gated(name, "coupled")
    small = prune(model, example_inputs=(x,))
    assert (small.up.out_features, small.mid.out_features) == (13, 9)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_cut_is_refused(name, monkeypatch):
    monkeypatch.setattr(_prune, "members_that_stay", one_too_many)
    model, x = gated(name, "coupled")
    with pytest.raises(StateError, match="the smaller model must compute what the gated one computes"):
        prune(model, example_inputs=(x,))


@pytest.mark.parametrize("name", sorted(set(CASES) - {"not a number"}))  # for that, no constant is known
def test_closed_outputs_go_where_their_constant_is_folded(name):
    model, x = gated(name, {"up": "output"})
    assert prune(model, example_inputs=(x,)).up.out_features == 13
