"""Every model of the zoo: gate, train a step, close gates, prune, compare, save, load."""

import pickle

import pytest
import torch
from models import GRANULARITIES, ZOO
from torch import Tensor
from torch.utils import _pytree as pytree

from l0hooks import iter_gates, param_groups, penalty, prune, sparsify, summary

CASES = [(name, granularity) for name, entry in ZOO.items() for granularity in entry.granularities]
TOLERANCE = 1e-6  # of the output's scale; torch's fused attention path rounds otherwise than the plain one


def outputs(model, inputs):
    args, kwargs = inputs
    found = pytree.tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def train_a_step(model, inputs):
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-3, gate_lr=1e-2))
    loss = sum(out.square().mean() for out in outputs(model.train(), inputs))
    (loss + penalty(model, l0=1e-3, l2=1e-3)).backward()
    untouched = [name for name, gate in iter_gates(model) if gate.log_alpha.grad is None]
    optimizer.step()
    optimizer.zero_grad()
    assert untouched == []


def assert_same(first, second, inputs):
    with torch.no_grad():
        expected, got = outputs(first, inputs), outputs(second, inputs)
    assert len(expected) == len(got) > 0
    for a, b in zip(expected, got, strict=True):
        assert bool(torch.isfinite(a).all())
        torch.testing.assert_close(b, a, rtol=0, atol=TOLERANCE * max(1.0, float(a.abs().max())))


def name_of(case):
    return f"{case[0]}-{'x'.join(map(str, case[1])) if isinstance(case[1], tuple) else case[1]}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_from_a_dense_model_to_a_plain_sparse_one(case, close_gates):
    name, granularity = case
    entry = ZOO[name]
    torch.manual_seed(1)
    model = entry.make()
    report = sparsify(model, entry.spec(granularity), **entry.options)
    assert report.gates > 0

    train_a_step(model, entry.inputs(3))
    closed = close_gates(model)
    assert 0 < closed < report.gates
    model.eval()
    pruned = prune(model)

    assert list(iter_gates(pruned)) == []
    small, large = entry.inputs(1), entry.inputs(4)
    assert_same(model, pruned, small)
    assert_same(model, pruned, large)

    torch.manual_seed(2)
    fresh = entry.make()
    fresh.load_state_dict(pruned.state_dict(), strict=True)
    assert list(fresh.state_dict()) == list(pruned.state_dict())
    assert_same(pruned, fresh.eval(), large)
    assert summary(model).parameters - summary(model).parameters_kept == zeros_added(entry, pruned, model)
    assert b"l0hooks" not in pickle.dumps(pruned)


@pytest.mark.parametrize("case", [c for c in CASES if c[1] in ("input", "output")], ids=name_of)
def test_closed_channels_are_cut_out_where_that_changes_nothing(case, close_gates):
    name, granularity = case
    entry = ZOO[name]
    args, kwargs = entry.inputs(2)
    if kwargs:
        pytest.skip("prune takes positional arguments")
    torch.manual_seed(1)
    model = entry.make()
    sparsify(model, entry.spec(granularity), **entry.options)
    close_gates(model)
    model.eval()
    dense, (small, report) = prune(model), prune(model, example_inputs=args, return_report=True)
    assert type(small) is type(dense)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters()) or report.note
    for batch in (1, 4):
        inputs = entry.inputs(batch)
        assert_same(dense, small, inputs)


def zeros_added(entry, pruned, gated):
    """Exact zeros in the pruned weights, less those that were there before."""
    dense = {id(p): p for p in pruned.parameters()}
    before = {
        name.replace("parametrizations.", "").removesuffix(".original"): p for name, p in gated.named_parameters()
    }
    by_name = {id(p): name for name, p in pruned.named_parameters()}
    return sum(int((p == 0).sum()) - int((before[by_name[key]] == 0).sum()) for key, p in dense.items())


def test_every_granularity_meets_every_kind_of_model():
    assert {g for _, g in CASES} == set(GRANULARITIES)
    assert len(ZOO) == 18
