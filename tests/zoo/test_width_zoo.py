"""Residual width: a pruned model computes what the gated one does, on whole models."""

import copy

import pytest
import torch
from torch import nn
from width_models import ALL_KINDS, NAMES, TRANSFORMERS, Logits, close_a_third, gated, resized, stream_model

from l0hooks import Budget, GateSpec, channel_groups, iter_gates, prune, sparsify, summary
from l0hooks.attach.walk import iter_gated
from l0hooks.export.cut_groups import members_that_stay
from l0hooks.export.save import load_pruned, save_pruned
from l0hooks.structure.cut_modules import plan_cuts, sliced

TOLERANCE = 1e-5  # of the output's scale
SIZES = [(1, 9), (3, 9), (3, 5), (2, 12)]
FAST = ("Llama", *NAMES[len(TRANSFORMERS) :])
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in FAST]


def first(output):
    """The first tensor of an output."""
    return output if isinstance(output, torch.Tensor) else output[0]


def gap(model, small, inputs):
    with torch.no_grad():
        expected, got = first(model(*inputs)), first(small(*inputs))
    return float((expected - got).abs().max() / expected.abs().max())


def stream_of(model):
    """The gate of the widest stream, and its group."""
    found = [one for one in iter_gated(model) if one.coupled.group.kind == "width"]
    return max(found, key=lambda one: one.coupled.group.size)


@pytest.mark.parametrize("kinds", [("width",), ALL_KINDS], ids=["width", "all kinds"])
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_a_narrower_model_computes_what_the_gated_one_does(name, kinds):
    model, inputs = gated(name, kinds)
    one = stream_of(model)
    small = prune(model, example_inputs=inputs)
    assert not any(type(module).__module__.startswith("l0hooks") for module in small.modules())
    assert max(gap(model, small, resized(inputs, examples=b, length=n)) for b, n in SIZES) < TOLERANCE
    stays = int(one.gate.support().sum())
    assert 0 < stays < one.coupled.group.size
    for site in one.coupled.group.sites:
        assert small.get_parameter(site.names[0]).shape[site.axis] == stays
    norms = {norm.module for norm in one.coupled.group.width.norms}
    assert norms
    assert not any(small.get_submodule(norm)._forward_pre_hooks for norm in norms)


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_gradients_of_the_next_step_are_those_of_the_gated_model(name):
    model, inputs = gated(name, ALL_KINDS)
    small = prune(model, example_inputs=inputs)
    cuts = {n: c for c in plan_cuts(members_that_stay(list(iter_gated(model)))) for n in c.names}
    for one in (model, small):
        first(one(*inputs)).square().mean().backward()
    own = dict(model.named_parameters())
    offset = 1.0 if name == "Gemma 3" else 0.0
    for key, parameter in small.named_parameters():
        path, _, last = key.rpartition(".")
        weight = own.get(key, own.get(f"{path}.parametrizations.{last}.original".lstrip(".")))
        grad, value = weight.grad, weight.detach()
        if key in cuts:
            grad, value = sliced(grad, cuts[key]), sliced(value, cuts[key])
        shift = offset if "norm" in path else 0.0  # a weight w of Gemma's norms multiplies with 1 + w
        known = value + shift != 0  # the row of a padding token is not
        scale = (parameter.detach() + shift) / torch.where(known, value + shift, 1.0)  # small = scale · weight
        wrong = (grad - scale * parameter.grad)[known].abs() - 1e-3 * grad[known].abs()
        assert float(wrong.max()) <= 1e-5 * float(grad.abs().max()) + 1e-9, key


@pytest.mark.parametrize("name", FAST)
def test_a_forward_in_training_has_one_draw_for_all_places_of_a_stream(name):
    model, inputs = gated(name)
    one = stream_of(model)
    one.gate.log_alpha.data.fill_(-1.5)  # about half of them open
    closed: list[frozenset[int]] = []

    def note(module, args, output):
        channels = output.movedim(1, -1) if isinstance(module, nn.GroupNorm) else output
        closed.append(frozenset((channels.flatten(0, -2) == 0).all(0).nonzero().flatten().tolist()))

    for norm in {norm.module for norm in one.coupled.group.width.norms}:
        model.get_submodule(norm).register_forward_hook(note)
    model.train()
    draws = []
    for _ in range(2):
        closed.clear()
        model(*inputs)
        assert len(set(closed)) == 1
        assert len(closed) > 1
        assert 0 < len(closed[0]) < one.coupled.group.size
        draws.append(closed[0])
    assert draws[0] != draws[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "BERT", "pre LayerNorm", "GroupNorm"])
def test_with_every_channel_open_nothing_changes(name):
    dense, inputs = stream_model(name)
    model = copy.deepcopy(dense)
    sparsify(model, GateSpec(granularity="coupled", kinds=("width",)), example_inputs=inputs)
    for _, gate in iter_gates(model):
        gate.log_alpha.data.fill_(9.0)
    model.eval()
    assert gap(dense, model, inputs) < TOLERANCE
    assert gap(dense, prune(model, example_inputs=inputs), inputs) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_with_every_channel_closed_one_stays_and_the_outputs_are_the_same(name):
    model, inputs = gated(name)
    one = stream_of(model)
    one.gate.log_alpha.data.fill_(-9.0)
    small = prune(model, example_inputs=inputs)
    with torch.no_grad():
        assert torch.allclose(first(model(*inputs)), first(small(*inputs)), atol=1e-6)
    assert {small.get_parameter(s.names[0]).shape[s.axis] for s in one.coupled.group.sites} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "pre LayerNorm", "pre RMSNorm", "GroupNorm"])
def test_the_file_of_a_narrower_model_gives_it_back(name, tmp_path):
    model, inputs = gated(name, ALL_KINDS)
    small = prune(model, example_inputs=inputs)
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(lambda: stream_model(name)[0], tmp_path / "small.safetensors").eval()
    assert torch.equal(first(small(*inputs)), first(again(*inputs)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sparsity"), [("pre LayerNorm", 0.5), ("Llama", 0.4)])
def test_a_budget_of_parameters_counts_the_width_on_both_sides_of_a_weight(name, sparsity):
    model, inputs = stream_model(name)
    dense = sum(p.numel() for p in model.parameters())
    spec = GateSpec(granularity="coupled", kinds=ALL_KINDS)
    sparsify(model, spec, example_inputs=inputs, budget=Budget(sparsity=sparsity, unit="params", steps=20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(25):
        loss = first(model.train()(*inputs)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    small, report = prune(model, example_inputs=inputs, return_report=True)
    left = sum(p.numel() for p in small.parameters())
    one_channel = max(one.coupled.group.parameters_each for one in iter_gated(model))
    assert left <= (1 - sparsity) * dense + 1
    assert left >= (1 - sparsity) * dense - one_channel
    assert report.exported_parameters == left
    assert gap(model.eval(), small, inputs) < TOLERANCE


def test_expected_parameters_are_the_mean_over_draws_of_the_exported_ones():
    model, inputs = stream_model("pre LayerNorm")
    spec = GateSpec(granularity="coupled", kinds=("neuron", "width"))
    sparsify(model, spec, example_inputs=inputs)
    every = list(iter_gated(model))
    plan = every[0].coupled.plan
    close_a_third(model)
    expected = float(every[0].coupled.expected("params").detach())
    generator = torch.Generator().manual_seed(0)
    probabilities = [gate.keep_prob().detach() for gate in every[0].coupled.gates]
    draws = torch.stack(
        [torch.stack([torch.bernoulli(p, generator=generator).sum() for p in probabilities]) for _ in range(4000)]
    )
    counted = [plan.parameters(lambda n, row=row: int(row[n])) for row in draws]
    mean, spread = torch.tensor(counted).float().mean(), torch.tensor(counted).float().std() / 4000**0.5
    assert abs(expected - mean) < 4 * spread


@pytest.mark.slow
def test_heads_and_neurons_are_gated_without_width_unless_it_is_named():
    model, inputs = stream_model("Llama")
    report = sparsify(model, "coupled", example_inputs=inputs)
    assert {row.kind for row in report.rows} == {"head", "neuron"}
    model, inputs = stream_model("Llama")
    sparsify(model, GateSpec(granularity="coupled", kinds=("width",)), example_inputs=inputs)
    assert {row.kind for row in summary(model).rows} == {"width"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "BERT", "ViT"])
def test_other_groups_are_those_found_without_width(name):
    model, inputs = stream_model(name)
    found = channel_groups(model, inputs, kinds=ALL_KINDS)
    assert [str(g) for g in found if g.kind != "width"] == [str(g) for g in channel_groups(model, inputs)]


@pytest.mark.slow
def test_what_an_encoder_returns_stays_frozen_when_it_is_an_output():
    wrapped, _ = stream_model("T5")
    assert isinstance(wrapped, Logits)
    words = torch.randint(3, 97, (2, 9))
    found = channel_groups(wrapped.model, (words, None, words), kinds=("width",))
    assert not len(found)
    assert any("an output of the model" in one.reason for one in found.frozen)
