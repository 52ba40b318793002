"""Mixtures of experts: closed experts take no part in routing, and cutting them and their neurons changes nothing."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l0hooks
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import L0HooksWarning, SpecError
from l0hooks.structure.routers import hidden_experts

pytest.importorskip("transformers")
from expert_models import (
    ALL,
    MODELS,
    TOKENS,
    VECTORS,
    Sigmoids,
    close,
    gated,
    mixture,
    output,
    pretrained,
)

FUSED = ["Mixtral", "Qwen3Moe", "Olmoe"]
every = pytest.mark.parametrize("name", MODELS)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def of_kind(groups: Any, kind: str, inside: str = "expert") -> list[Any]:
    return [group for group in groups if group.kind == kind and inside in group.name]


def set_open(model: nn.Module) -> None:
    """Open gates to exactly 1, so that folding changes no weight and no gradient."""
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            gate.log_alpha[gate.log_alpha > 0] = 14.0


@every
def test_the_smaller_model_computes_what_the_gated_one_does(name: str) -> None:
    model, x = gated(name)
    small = l0hooks.prune(model, example_inputs=(x,))
    for given in (x, x[:1], x[:, :4], torch.cat([x, x.flip(0), x])):
        with torch.no_grad():
            assert gap(output(model, given), output(small, given)) <= 1e-5
    counts = {m.num_experts for m in small.modules() if "num_experts" in vars(m) and "config" not in vars(m)}
    assert counts <= {4}
    assert not hidden_experts(small)
    assert b"l0hooks" not in pickle.dumps(small)


@every
def test_the_gradients_of_the_next_step_are_the_same(name: str) -> None:
    model, x = gated(name)
    set_open(model)
    small = l0hooks.prune(model, example_inputs=(x,))
    for one in (model, small):
        one.zero_grad()
        output(one, x).square().mean().backward()
    groups = [one.coupled.group for one in iter_gated(model) if one.coupled]
    touched = {n for group in groups for site in group.sites for n in site.names}
    plain = dict(small.named_parameters())
    compared = 0
    for full, parameter in model.named_parameters():
        own = full.replace("parametrizations.", "").replace(".original", "")
        if own not in touched and own in plain:
            assert gap(parameter.grad, plain[own].grad) <= 1e-4
            compared += 1
    assert compared > 3
    for group in groups:
        if group.kind == "expert" and group.router is not None and not group.router.logits:
            row = model.get_submodule(group.router.module).weight.grad
            kept = row.abs().sum(1) > 0
            assert gap(row[kept], small.get_submodule(group.router.module).weight.grad) <= 1e-4


@pytest.mark.parametrize("name", FUSED)
def test_experts_agree_with_a_model_cut_by_hand(name: str) -> None:
    """The oracle knows nothing of the library: a model built with fewer experts, and rows copied into it."""
    model, x = gated(name, l0hooks.GateSpec(granularity="coupled", kinds=("expert",)))
    set_open(model)
    dense = MODELS[name][0]()
    config = copy.deepcopy(dense.config)
    config.num_local_experts = config.num_experts = 4
    small = type(dense)(config).eval()
    stays = [one.gate.support().nonzero().flatten() for one in iter_gated(model)]
    state = dense.state_dict()
    for layer, rows in enumerate(stays):
        for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            key = f"model.layers.{layer}.mlp.{part}"
            state[key] = state[key][rows]
    small.load_state_dict(state)
    with torch.no_grad():
        assert gap(output(small, x), output(model, x)) <= 1e-5
        assert gap(output(dense, x), output(model, x)) > 1e-2  # the closed ones were chosen before


@every
def test_what_is_found(name: str) -> None:
    make, x = MODELS[name]
    found = l0hooks.channel_groups(make(), (x,))
    experts, neurons = of_kind(found, "expert"), of_kind(found, "neuron")
    assert [(group.size, group.least) for group in experts] == [(6, 2), (6, 2)]
    assert [group.multiple for group in neurons] == [8, 8]
    total = sum(p.numel() for p in make().parameters())
    inside = sum(group.parameters_each * group.size for group in experts)
    assert inside / total > 0.5
    named = {name for one in found.frozen for name in one.modules if "experts" in name}
    assert named <= {"blocks.0", "blocks.1"}


@pytest.mark.slow
def test_experts_are_gated_only_if_asked_for() -> None:
    model = mixture()
    l0hooks.sparsify(model, "coupled", example_inputs=(VECTORS,))
    assert "expert" not in {one.coupled.group.kind for one in iter_gated(model) if one.coupled}
    assert not hidden_experts(model)


@every
def test_a_closed_expert_is_never_chosen_in_training(name: str) -> None:
    model, x = gated(name, l0hooks.GateSpec(granularity="coupled", kinds=("expert",)), experts=3)
    model.train()
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            gate.log_alpha.clamp_(min=-30).masked_fill_(gate.log_alpha < 0, -30.0).masked_fill_(gate.log_alpha > 0, 14)
    output(model, x).square().mean().backward()
    for one in iter_gated(model):
        closed = one.gate.log_alpha.detach() < 0
        router = model.get_submodule(one.coupled.group.router.module)
        assert bool((router.weight.grad[closed] == 0).all())
        assert bool((router.weight.grad[~closed] != 0).any())


@every
def test_noise_is_fresh_in_every_forward_and_seeded(name: str) -> None:
    model, x = gated(name)
    model.train()
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            gate.log_alpha.zero_()
    torch.manual_seed(3)
    first, second = output(model, x), output(model, x)
    torch.manual_seed(3)
    assert torch.equal(first, output(model, x))
    assert not torch.equal(first, second)


@every
def test_as_many_experts_stay_as_the_router_chooses(name: str) -> None:
    model, x = gated(name, experts=6)
    small, report = l0hooks.prune(model, example_inputs=(x,), return_report=True)
    with torch.no_grad():
        assert gap(output(model, x), output(small, x)) <= 1e-5
    kept = [row for row in report.rows if row.kind == "expert"]
    assert [round(row.gates * (1 - row.sparsity)) for row in kept] == [2, 2]
    model.train()
    assert bool(output(model, x).isfinite().all())  # also where a draw opens none


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit"),
    [*((name, "params") for name in MODELS), *itertools.product(["Qwen3Moe", "a list"], ["gates", "macs"])],
)
def test_budgets_end_on_what_was_asked_for(name: str, unit: Any) -> None:
    make, x = MODELS[name]
    model = make()
    budget = l0hooks.Budget(sparsity=0.3, unit=unit, steps=2)
    l0hooks.sparsify(model, ALL, example_inputs=(x,), budget=budget)
    optimizer = torch.optim.SGD(l0hooks.param_groups(model, lr=1e-3, gate_lr=0.1))
    for _ in range(3):
        output(model.train(), x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    small, report = l0hooks.prune(model.eval(), example_inputs=(x,), return_report=True)
    (progress,) = report.budgets
    assert progress.kept <= progress.target
    with torch.no_grad():
        assert gap(output(model, x), output(small, x)) <= 1e-5
    if unit == "params":
        assert sum(p.numel() for p in small.parameters()) == progress.kept
    if unit == "macs":
        counted = l0hooks.structure.macs.count_positions(small, (x,))
        assert l0hooks.structure.macs.total_macs(small, counted) == pytest.approx(progress.kept)


@pytest.mark.slow
@every
def test_a_file_of_the_smaller_model_is_loaded_right(name: str, tmp_path: Path) -> None:
    model, x = gated(name)
    small = l0hooks.prune(model, example_inputs=(x,))
    l0hooks.save_pruned(small, tmp_path / "small")
    again = l0hooks.load_pruned(MODELS[name][0], tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(output(small, x), output(again, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_uniform_experts_load_in_plain_transformers_and_generate_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # which the integration needs
    from l0hooks.integrations.transformers import save_pretrained

    model = MODELS[name][0]()
    budget = l0hooks.Budget(sparsity=0.4, unit="params", steps=0, uniform=True)
    l0hooks.sparsify(model, ALL, example_inputs=(TOKENS,), budget=budget)
    small = l0hooks.prune(model, example_inputs=(TOKENS,))
    saved = save_pretrained(small, tmp_path, example_inputs=(TOKENS,))
    assert saved.plain
    assert any("experts" in number for number in saved.config)
    again = type(small).from_pretrained(tmp_path).eval()
    for cached in (True, False):
        settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "use_cache": cached}
        wanted = model.eval().generate(TOKENS, **settings)
        assert torch.equal(wanted, small.generate(TOKENS, **settings))
        assert torch.equal(wanted, again.generate(TOKENS, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GptOss", "DeepseekV3"])
def test_routers_with_biases_and_corrections(family: str) -> None:
    model = pretrained(family)
    found = l0hooks.channel_groups(model, (TOKENS,))
    assert of_kind(found, "neuron", ".experts")
    l0hooks.sparsify(model, ALL, example_inputs=(TOKENS,))
    close(model)
    small = l0hooks.prune(model.eval(), example_inputs=(TOKENS,))
    with torch.no_grad():
        for given in (TOKENS, TOKENS[:1, :5]):
            assert gap(output(model, given), output(small, given)) <= 1e-5


def test_a_router_that_works_by_groups_is_frozen_with_the_reason() -> None:
    found = l0hooks.channel_groups(pretrained("by groups"), (TOKENS,))
    assert not of_kind(found, "expert")
    assert any("works by groups of experts" in one.reason for one in found.frozen)


@pytest.mark.slow
def test_experts_that_cannot_be_hidden_are_frozen_with_the_reason() -> None:
    found = l0hooks.channel_groups(mixture(Sigmoids), (VECTORS,))
    assert not of_kind(found, "expert")
    reasons = {one.reason for one in found.frozen if one.reason.startswith("experts: ")}
    assert len(reasons) > 0
    spec = l0hooks.GateSpec(granularity="coupled", kinds=("expert",))
    with pytest.raises(SpecError, match="at least one coupled group must match"):
        l0hooks.sparsify(mixture(Sigmoids), spec, example_inputs=(VECTORS,))


def test_layers_in_a_list_are_no_experts() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.head(x)

    found = l0hooks.channel_groups(Layers(), (torch.randn(4, 6),))
    assert {group.kind for group in found} == {"neuron"}
    assert not any("experts" in one.reason for one in found.frozen)


@every
def test_copies_and_pickles_have_gates_and_routers_of_their_own(name: str) -> None:
    model, x = gated(name)
    with torch.no_grad():
        expected = output(model, x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(other, x), expected)
            for _, gate in l0hooks.iter_gates(other):
                gate.log_alpha.fill_(14.0)
            assert not torch.equal(output(other, x), expected)
        assert torch.equal(output(model, x), expected)


@pytest.mark.slow
def test_training_with_cuts_goes_on_uncut_and_says_so() -> None:
    model = mixture()
    budget = l0hooks.Budget(sparsity=0.3, unit="params", steps=2, cut_every=1)
    l0hooks.sparsify(model, ALL, example_inputs=(VECTORS,), budget=budget)
    optimizer = torch.optim.SGD(l0hooks.param_groups(model, lr=1e-3, gate_lr=0.1))

    def train() -> None:
        for _ in range(3):
            output(model.train(), VECTORS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(L0HooksWarning, match="gates on experts, which prune alone cuts"):
        train()
    assert l0hooks.prune(model.eval(), example_inputs=(VECTORS,)) is not model


def test_a_gated_model_written_by_transformers_says_that_closed_experts_are_chosen(tmp_path: Path) -> None:
    model, _ = gated("Mixtral")
    with pytest.warns(L0HooksWarning, match="a router that chooses among all experts"):
        model.save_pretrained(tmp_path / "closed")
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(model):
            gate.log_alpha.fill_(14.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", L0HooksWarning)
        model.save_pretrained(tmp_path / "open")


def test_neurons_of_single_experts_stay_ungated_where_experts_of_a_list_have_gates() -> None:
    class Dense(nn.Module):
        """Every expert runs on every token, so that a graph shows the neurons of each."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 16)) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.softmax(self.gate(x), -1)
            return sum(expert(x) * weights[..., n, None] for n, expert in enumerate(self.experts))

    def make() -> nn.Module:
        return mixture(Dense)

    found = l0hooks.channel_groups(make(), (VECTORS,))
    assert [(group.size, group.least) for group in of_kind(found, "expert")] == [(4, 1), (4, 1)]
    assert len(of_kind(found, "neuron", "experts")) == 8
    model = make()
    with pytest.warns(L0HooksWarning, match="8 groups within single experts"):
        l0hooks.sparsify(model, ALL, example_inputs=(VECTORS,))
    close(model)
    small = l0hooks.prune(model.eval(), example_inputs=(VECTORS,))
    with torch.no_grad():
        assert gap(output(model, VECTORS), output(small, VECTORS)) <= 1e-5
