"""``preview``: what a budget would leave, before any training."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from test_sparsify import state_of
from torch import nn

from l0hooks import Budget, GateSpec, preview, prune, score, sparsify
from l0hooks.errors import InvalidValueError, SpecError
from l0hooks.structure.macs import count_positions, total_macs


class Block(nn.Module):
    """Attention and a feed-forward network, both on residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.qkv, self.out = nn.ModuleList(nn.Linear(8, 16) for _ in range(3)), nn.Linear(16, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (one(x).unflatten(-1, (-1, 4)).transpose(1, 2) for one in self.qkv)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.norm((x + self.down(torch.relu(self.up(x)))).transpose(1, 2)).transpose(1, 2)


X = (torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)),)


def model_of() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 2))


def sizes_of(model: nn.Module) -> dict[str, int]:
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "multiply-adds": round(total_macs(model, count_positions(model, X))),
    }


@pytest.mark.parametrize(("unit", "row"), [("params", "parameters"), ("memory", "bytes"), ("macs", "multiply-adds")])
@pytest.mark.parametrize("uniform", [False, True])
def test_what_is_left_is_what_pruning_in_one_shot_leaves(unit: Any, row: str, uniform: bool) -> None:
    model = model_of()
    budget = Budget(sparsity=0.5, unit=unit, steps=70, schedule="linear", cut_every=7, uniform=uniform)
    before = state_of(model)
    found = preview(model, "coupled", budget, example_inputs=X)
    assert state_of(model) == before
    at_once = Budget(sparsity=0.5, unit=unit, steps=0, uniform=uniform)
    sparsify(model, "coupled", example_inputs=X, budget=at_once)
    small = prune(model, example_inputs=X)
    assert {one.name: one.left for one in found.sizes} == sizes_of(small)
    assert {one.name: one.dense for one in found.sizes} == sizes_of(model_of())
    (mine,) = (one for one in found.sizes if one.name == row)
    assert mine.left <= 0.5 * mine.dense
    heads, neurons = {one.name: one for one in found.kinds}["head"], {one.name: one for one in found.kinds}["neuron"]
    blocks = [small.get_submodule(str(n)) for n in range(2)]
    assert heads.left == sum(block.get_submodule("out").in_features // 4 for block in blocks)
    assert neurons.left == sum(block.get_submodule("down").in_features for block in blocks)
    assert (heads.groups, heads.dense, heads.smallest, neurons.dense, neurons.smallest) == (2, 8, 2, 48, 2)


@pytest.mark.parametrize("spec", ["coupled", "weight", {"*down": "coupled", "*out": "weight"}])
def test_the_smallest_size_is_the_smallest_that_a_budget_can_ask_for(spec: Any) -> None:
    def budget(keep: int) -> Budget:
        return Budget(keep=keep, unit="params", min_keep=3)

    found = preview(model_of(), spec, Budget(sparsity=0.1, unit="params", min_keep=3), example_inputs=X)
    smallest = found.sizes[0].smallest
    assert preview(model_of(), spec, budget(smallest), example_inputs=X).sizes[0].left == smallest
    with pytest.raises(InvalidValueError, match=f"at least a params size of {smallest:,}"):
        preview(model_of(), spec, budget(smallest - 1), example_inputs=X)


def test_zeros_in_weights_that_stay_take_their_bytes() -> None:
    found = preview(model_of(), "weight", Budget(sparsity=0.9))
    assert [one.name for one in found.sizes] == ["parameters", "bytes"]
    assert found.sizes[0].share < 0.2
    assert found.sizes[1].share == 1


def test_scores_decide_what_would_go() -> None:
    model = model_of()
    data = [X]
    budget = Budget(sparsity=0.5, unit="params")

    def scores(gated: nn.Module) -> Any:
        return score(gated, data, loss=lambda model, batch: model(*batch).square().sum())

    found = preview(model, "coupled", budget, example_inputs=X, scores=scores)
    sparsify(model, "coupled", example_inputs=X, budget=Budget(sparsity=0.5, unit="params", steps=0), scores=scores)
    assert found.sizes[0].left == sizes_of(prune(model, example_inputs=X))["parameters"]


def test_parts_may_have_budgets_of_their_own() -> None:
    parts = {"0.*": Budget(sparsity=0.5, unit="params"), "1.*": Budget(keep=20, unit="gates")}
    found = preview(model_of(), GateSpec(granularity="coupled", kinds=("head", "neuron")), parts, example_inputs=X)
    rows = found.left.rows
    assert sum(round(r.gates * (1 - r.sparsity)) for r in rows if r.name.startswith("1.")) == 20


def test_it_prints_a_table_and_gives_plain_data() -> None:
    found = preview(model_of(), "coupled", Budget(sparsity=0.5, unit="params"), example_inputs=X)
    lines = str(found).splitlines()
    assert lines[0].split() == ["dense", "left", "share", "smallest"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "parameters",
        "bytes",
        "multiply-adds",
        *("head, 2 groups", "neuron, 2 groups"),
    ]
    assert json.loads(json.dumps(found.to_dict()))["sizes"]["parameters"]["left"] == found.sizes[0].left


def test_what_sparsify_refuses_is_refused() -> None:
    model = model_of()
    before = state_of(model)
    with pytest.raises(SpecError, match="example_inputs"):
        preview(model, "coupled", Budget(sparsity=0.5))
    with pytest.raises(InvalidValueError, match="the size must be one that the gates can reach"):
        preview(model, "coupled", Budget(sparsity=0.99, unit="params"), example_inputs=X)
    assert state_of(model) == before
