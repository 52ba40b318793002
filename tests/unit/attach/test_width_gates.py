"""Gates on residual width in everything that is done with a gated model."""

import copy
import io
import pickle

import pytest
import torch
from width_models import ALL_KINDS, WORDS, Encoder, close_a_third, gated, stream_model

from l0hooks import Budget, GateSpec, channel_groups, iter_gates, param_groups, penalty, prune, recover, score, sparsify
from l0hooks.attach.walk import iter_gated
from l0hooks.attach.width_weight import WidthWeight
from l0hooks.errors import L0HooksWarning, SpecError, StateError
from l0hooks.structure.width.fold import CentreFixed

WIDTH = GateSpec(granularity="coupled", kinds=("width",))
EVERY = GateSpec(granularity="coupled", kinds=ALL_KINDS)


def run(model):
    with torch.no_grad():
        return model(WORDS)


def test_width_that_is_asked_for_and_not_there_is_told():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    spec = GateSpec(granularity="coupled", kinds=("neuron", "width"))
    with pytest.warns(L0HooksWarning, match="residual width is gated where all norms .* are certain"):
        sparsify(model, spec, example_inputs=(torch.zeros(2, 4),))


def test_an_excluded_layer_of_the_stream_is_told():
    model, inputs = stream_model("pre LayerNorm")
    with pytest.warns(L0HooksWarning, match="a stream of which a layer is excluded"):
        sparsify(model, EVERY, example_inputs=inputs, exclude="head")


def test_an_unknown_kind_is_refused():
    with pytest.raises(SpecError, match="the name must be known"):
        GateSpec(granularity="coupled", kinds=("depths",))


def test_a_stream_given_by_hand_is_gated_without_naming_its_kind():
    model, inputs = stream_model("pre LayerNorm")
    groups = list(channel_groups(model, inputs, kinds=("width",)))
    sparsify(model, "coupled", example_inputs=inputs, groups=groups)
    (one,) = iter_gated(model)
    assert one.coupled.group.kind == "width"
    with torch.no_grad():
        one.gate.log_alpha[:3] = -9.0
    small = prune(model.eval(), example_inputs=inputs)
    assert small.head.in_features == model.head.in_features - 3
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_a_budget_that_fails_takes_the_hooks_away_again():
    model, inputs = stream_model("pre LayerNorm")
    before = copy.deepcopy(model.state_dict())
    budget = Budget(sparsity=0.5, unit="params", steps=3)
    with pytest.raises(ZeroDivisionError):
        sparsify(model, EVERY, example_inputs=inputs, budget=budget, scores=lambda gated: 1 / 0)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_is_independent(how):
    model, _ = gated("pre LayerNorm", ALL_KINDS)
    twin = how(model)
    expected = run(model)
    assert torch.equal(run(twin), expected)
    for _, gate in iter_gates(twin):
        gate.log_alpha.data.fill_(9.0)
    assert torch.equal(run(model), expected)
    assert not torch.equal(run(twin), expected)


def test_a_checkpoint_brings_gates_and_open_channels_back():
    model, _ = gated("post LayerNorm", ALL_KINDS)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, inputs = stream_model("post LayerNorm")
    sparsify(other, EVERY, example_inputs=inputs)
    other.load_state_dict(torch.load(file))
    assert torch.equal(run(other.eval()), run(model))


def test_noise_reproduces_and_differs_between_forwards():
    model, _ = gated("pre LayerNorm", ALL_KINDS)
    model.train()
    torch.manual_seed(4)
    first, second = run(model), run(model)
    torch.manual_seed(4)
    assert torch.equal(run(model), first)
    assert not torch.equal(first, second)


def test_one_draw_for_each_example_is_for_what_is_read_and_a_stream_has_one_for_all():
    model, inputs = stream_model("pre LayerNorm")
    spec = GateSpec(granularity="coupled", kinds=ALL_KINDS, noise="example")
    sparsify(model, spec, example_inputs=inputs)
    for _, gate in iter_gates(model):
        gate.log_alpha.data.fill_(-1.5)
    seen = []
    model.last.register_forward_hook(lambda module, args, output: seen.append(output))
    model.train()(torch.cat([WORDS[:1], WORDS[:1]]))
    (output,) = seen
    assert not torch.equal(output[0], output[1])  # heads and neurons: a draw for each
    closed = (output == 0).all(1)
    assert torch.equal(closed[0], closed[1])
    assert 0 < int(closed[0].sum()) < 16


def test_the_gradient_of_a_gate_is_that_of_the_product_at_every_place():
    model, inputs = gated("post LayerNorm")
    (one,) = iter_gated(model)
    for trained in (False, True):
        model.zero_grad()
        if trained:
            one.gate.log_alpha.data.clamp_(min=-0.5)  # open, whatever is drawn at a median
            model.train()
        torch.manual_seed(0)
        model(*inputs).square().mean().backward()
        slope = one.gate.log_alpha.grad.clone()
        assert slope.isfinite().all()
        assert slope.any()


def test_slopes_of_evaluation_agree_with_finite_differences():
    model, inputs = gated("post LayerNorm", ALL_KINDS)
    model.double()
    one = max(iter_gated(model), key=lambda one: one.coupled.group.size if one.coupled.group.kind == "width" else 0)
    model(*inputs).square().mean().backward()
    index = int(one.gate.support().nonzero()[0])
    slope, step, values = float(one.gate.log_alpha.grad[index]), 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            one.gate.log_alpha[index] += sign * step
            values.append(float(model(*inputs).square().mean()))
            one.gate.log_alpha[index] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)


def test_penalties_count_each_gate_alone():
    model, _ = gated("pre LayerNorm", ALL_KINDS)
    expected = 0.0
    for one in iter_gated(model):
        for gate in one.coupled.group.gated if one.coupled.number >= 0 else ():
            weight = dict(model.named_parameters())
            path, _, last = gate.names[0].rpartition(".")
            value = weight[f"{path}.parametrizations.{last}.original".lstrip(".")].detach()
            rows = value.movedim(gate.axis, 0).flatten(1) if value.dim() > 1 else value[:, None]
            keep = one.gate.keep_prob().detach()
            each = rows.square().sum(1)[torch.from_numpy(gate.indices)].sum(1)
            expected += float((keep * each).sum())
    assert float(penalty(model, expected_l2=1.0).detach()) == pytest.approx(expected, rel=1e-5)


def test_scores_of_a_stream_are_its_taylor_slopes_at_every_place():
    model, inputs = stream_model("pre RMSNorm")
    sparsify(model, WIDTH, example_inputs=inputs)
    (values,) = score(model, [inputs], loss=lambda m, batch: m(*batch).square().mean()).values()
    dense, _ = stream_model("pre RMSNorm")
    (group,) = channel_groups(dense, inputs, kinds=("width",))
    z = torch.ones(16, requires_grad=True)
    own = dict(dense.named_parameters())
    changed = {}
    for gate in group.width.gates:
        weight = own[gate.names[0]]
        changed[gate.names[0]] = weight.detach() * z.view([-1 if d == gate.axis else 1 for d in range(weight.dim())])
    changed["head.weight"] = changed["embed.weight"]
    torch.func.functional_call(dense, changed, inputs).square().mean().backward()
    assert torch.allclose(values, z.grad.square() / 2, rtol=1e-3, atol=1e-9)


def test_recovery_is_refused():
    model, inputs = gated("pre LayerNorm", ALL_KINDS)
    with pytest.raises(StateError, match="layers must have kept all their outputs"):
        recover(model, [inputs])


def test_cuts_while_training_leave_the_width_to_the_end():
    model, inputs = stream_model("pre LayerNorm")
    budget = Budget(sparsity=0.5, unit="params", steps=30, cut_every=5)
    sparsify(model, EVERY, example_inputs=inputs, budget=budget)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.02, gate_lr=2.0))
    (stream,) = [one for one in iter_gated(model) if one.coupled.group.kind == "width"]
    whole = sum(p.numel() for p in model.parameters())
    for _ in range(35):
        loss = model.train()(*inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(p.numel() for p in model.parameters()) < whole  # neurons went
    assert stream.gate.log_alpha.numel() == 16
    small = prune(model, example_inputs=inputs)
    assert small.embed.weight.shape[1] == int(stream.gate.support().sum()) < 16
    assert torch.allclose(run(model.eval()), run(small.eval()), atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_computes_the_same():
    model, inputs = gated("pre LayerNorm", ALL_KINDS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(*inputs), model(*inputs), atol=1e-6)
    model.train()
    compiled(*inputs).square().mean().backward()
    assert all(gate.log_alpha.grad is not None for _, gate in iter_gates(model))


def test_half_precision_is_pruned_within_its_rounding():
    model, inputs = gated("pre LayerNorm")
    model.bfloat16()
    small = prune(model, example_inputs=inputs)
    expected, got = run(model), run(small)
    assert float((expected - got).abs().max() / expected.abs().max()) < 0.05


def test_pruning_leaves_no_hook_and_the_model_trains_on():
    model, inputs = gated("pre LayerNorm", ALL_KINDS)
    before = run(model)
    small = prune(model, example_inputs=inputs)
    hooks = [hook for module in small.modules() for hook in module._forward_pre_hooks.values()]
    assert not hooks
    assert torch.equal(run(model), before)
    assert not any(
        isinstance(getattr(hook, "__self__", None), CentreFixed)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )
    model.train()(*inputs).square().mean().backward()
    assert all(gate.log_alpha.grad is not None for _, gate in iter_gates(model))


def test_a_weight_that_reads_and_writes_is_one_parametrization():
    model, inputs = stream_model("pre LayerNorm")
    sparsify(model, EVERY, example_inputs=inputs)
    gating = model.blocks[0].down.parametrizations.weight[0]
    assert isinstance(gating, WidthWeight)
    assert [gating.plan.groups[number].kind for number in gating.numbers] == ["neuron", "width"]
    close_a_third(model)
    model.eval()
    neurons, width = (gate.value() for gate in gating.gates)
    original = model.blocks[0].down.parametrizations.weight.original
    assert torch.allclose(model.blocks[0].down.weight, width[:, None] * original * neurons)


def test_an_encoder_without_norms_has_no_stream():
    model = Encoder(lambda width: torch.nn.Identity()).eval()
    kinds = [group.kind for group in channel_groups(model, (WORDS,), kinds=ALL_KINDS)]
    assert "width" not in kinds
