"""Layers that are used in training only: cut where their graph can be traced, else what they read stays."""

import warnings

import pytest
import torch
from torch import nn

from l0hooks import GateSpec, channel_groups, iter_gates, prune, sparsify
from l0hooks.errors import L0HooksWarning
from l0hooks.structure import training_trace

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Assisted(nn.Module):
    """A network with a head for training, as GoogLeNet has two: ``norms`` puts norms before and inside the head."""

    def __init__(self, norms=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        before, inside = (nn.BatchNorm2d(8), nn.BatchNorm1d(6)) if norms else (nn.Identity(), nn.ReLU())
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.helper = nn.Sequential(before, pool, nn.Linear(8, 6), inside, nn.Linear(6, 4))
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        shared = self.stem(x)
        found = self.head(self.body(shared).relu().mean((2, 3)))
        return (found, self.help(shared)) if self.training else found

    def help(self, shared):
        return self.helper(shared)


class Branching(Assisted):
    """What torch.export cannot trace in training mode."""

    def help(self, shared):
        return self.helper(shared) if shared.mean() < 1e9 else shared


class Fixed(Assisted):
    """A size that is written down, in the part for training."""

    def help(self, shared):
        return self.helper(shared.view(-1, 8, 8, 8))


class Wanting(Assisted):
    """A model that takes other arguments in training."""

    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("no targets")
        return super().forward(x)


def closed(model, spec):
    sparsify(model, spec, example_inputs=(X,))
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha[::2], gate.log_alpha[1::2] = -20, 20
    return model


@pytest.mark.parametrize("noise", ["step", "example"])
@pytest.mark.parametrize("norms", [False, True])
def test_a_layer_that_is_used_in_training_only_is_gated_and_cut_where_it_reads(norms, noise):
    model = closed(Assisted(norms), GateSpec(granularity="coupled", noise=noise))
    small = prune(model, example_inputs=(X,))
    assert small.stem[0].out_channels == small.body.in_channels == small.helper[2].in_features == 4
    if norms:
        assert small.helper[0].num_features == 4
    for got, expected in zip(small.train()(X), model.train()(X), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("norms", [False, True])
def test_what_is_inside_such_a_layer_is_left_alone(norms):
    groups = channel_groups(Assisted(norms), (X,))
    assert [group.name for group in groups] == ["stem.0", "body"]
    assert [part.modules[0] for part in groups.frozen if part.reason == "used in training only"] == ["helper.2"]


@pytest.mark.parametrize("spec", ["coupled", "output"])
@pytest.mark.parametrize("kind", [Branching, Fixed])
def test_where_it_cannot_be_cut_what_it_reads_stays(kind, spec, capfd):
    model = closed(kind(), spec)
    assert channel_groups(kind(), (X,)).frozen[-1].modules == ("stem.0",)
    small = prune(model, example_inputs=(X,))
    assert small.stem[0].out_channels == 8
    for got, expected in zip(small.train()(X), model.train()(X), strict=True):
        torch.testing.assert_close(got, expected)
    assert capfd.readouterr() == ("", "")


def test_a_part_for_training_that_does_not_run_on_the_examples_is_not_traced():
    assert [group.name for group in channel_groups(Wanting(), (X,))] == ["stem.0", "body"]
    small = prune(closed(Wanting(), "coupled"), example_inputs=(X,))
    assert small.eval()(X).shape == (4, 4)


def test_a_smaller_model_that_cannot_train_is_told(monkeypatch):
    monkeypatch.setattr(training_trace, "_all_unused", lambda *_: False)  # as if nothing had been seen
    model = closed(Assisted(), "coupled")
    with pytest.warns(L0HooksWarning, match=r"(?s)should run in training mode.*got: RuntimeError"):
        prune(model, example_inputs=(X,))


def test_everything_is_as_it_was():
    model = Assisted(norms=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    channel_groups(model, (X,))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_such_layers_is_exported_once(monkeypatch):
    calls = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kw: calls.append(args) or export(*args, **kw))
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2), "spare": nn.Linear(2, 2)})
    model.forward = lambda x: model["b"](model["a"](x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        channel_groups(model, (torch.zeros(2, 3),))
    assert len(calls) == 1
