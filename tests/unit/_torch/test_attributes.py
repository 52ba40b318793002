"""A run in evaluation leaves the model as it was, whatever its code writes: ``sparsify`` and ``prune`` included."""

import collections
import copy

import pytest
import torch
from torch import nn

from l0hooks import Budget, channel_groups, iter_gates, prune, sparsify
from l0hooks._torch.attributes import Attributes


class Writing(nn.Module):
    """Writes to everything it has, in training and in evaluation."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("unset", None)
        self.plain, self.cache, self.seen, self.longest = torch.zeros(2), {}, [], 0
        self.inner = {"table": torch.zeros(2)}
        self.queue = collections.deque([1], maxlen=4)

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.unset = x.detach().clone()
        self.plain += 1
        self.inner["table"].add_(1)
        self.cache[len(self.cache)] = x.detach()
        self.seen.append(len(x))
        self.queue.append(2)
        self.longest = max(self.longest, len(x))
        self.late = x.detach()
        return self.b(self.a(x).relu())


def contents(model):
    """Everything that a model holds besides weights, as comparable text."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Writing):
            held = vars(module) | dict(module.named_buffers(recurse=False)) | {"unset": module.unset}
            found[name] = repr({k: v for k, v in held.items() if not k.startswith("_") and k != "training"})
    return found


X = torch.randn(3, 4)


def closed(model, spec="coupled"):
    sparsify(model, spec, example_inputs=(X,))
    for _, gate in iter_gates(model):
        gate.log_alpha.data[:2] = -9.0
    return model


VERBS = {
    "sparsify": lambda model: sparsify(model, "weight", example_inputs=(X,)),
    "a budget of multiply-adds": lambda model: sparsify(
        model, "weight", example_inputs=(X,), budget=Budget(sparsity=0.5, unit="macs")
    ),
    "channel_groups": lambda model: channel_groups(model, (X,)),
    "sparsify coupled": lambda model: sparsify(model, "coupled", example_inputs=(X,)),
}


@pytest.mark.filterwarnings("ignore:.*were assigned during export:UserWarning")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_leaves_what_the_model_wrote(verb, used):
    model = Writing()
    if used:
        model(X)
    before, buffers = contents(model), dict(model.named_buffers())
    VERBS[verb](model)
    assert contents(model) == before
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())


@pytest.mark.filterwarnings("ignore:.*were assigned during export:UserWarning")
@pytest.mark.parametrize("spec", ["weight", "input", "coupled"])
@pytest.mark.parametrize("inplace", [False, True])
def test_prune_leaves_what_the_model_wrote(spec, inplace):
    if inplace and spec == "coupled":
        return
    model = closed(Writing(), spec)
    model(X)
    before = contents(model)
    small = prune(model, example_inputs=(X,), inplace=inplace)
    assert contents(model) == before
    assert contents(small) == before
    torch.testing.assert_close(small.eval()(X), copy.deepcopy(model).eval()(X))


def test_an_error_in_the_run_leaves_it_too():
    class Failing(Writing):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("late")

    model = Failing()
    before = contents(model)
    with pytest.raises(RuntimeError, match="late"):
        sparsify(model, "weight", example_inputs=(X,))
    assert contents(model) == before


def test_a_tensor_of_another_size_gets_its_own_back():
    model = nn.Linear(2, 2)
    model.table = torch.arange(3.0)
    before = Attributes(model)
    model.table.resize_(5).zero_()
    before.restore()
    assert torch.equal(model.table, torch.arange(3.0))


def test_what_did_not_change_is_not_touched():
    model = nn.BatchNorm1d(3)
    version = model.running_mean._version
    Attributes(model).restore()
    assert model.running_mean._version == version
