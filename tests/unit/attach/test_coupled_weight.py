"""Coupled gates: one gate for a channel, at every weight or input that reads it, and what they cost."""

import copy
import itertools
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coupled_models import (
    MODELS,
    Attentive,
    Branched,
    coupled_groups,
    fingerprint,
    gates_of,
    mlp,
    models,
    set_support,
    state_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from l0hooks import GateSpec, channel_groups, iter_gates, param_groups, penalty, prune, sparsify, summary
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import L0HooksWarning, SpecError, StateError, UnsupportedModuleError
from l0hooks.gates.families import FamilyName

BY_EXAMPLE = GateSpec(granularity="coupled", noise="example", init_mean=0.6)
BY_STEP = GateSpec(granularity="coupled", init_mean=0.6)


def made(name, spec="coupled", **options):
    """A gated model, its input, and its groups."""
    torch.manual_seed(0)
    model, x = MODELS[name][0](), MODELS[name][1]()
    groups = coupled_groups(name)
    sparsify(model, spec, example_inputs=(x,), groups=groups, **options)
    return model, x, groups


def price(model, **strengths):
    return penalty(model, **strengths).item()


@torch.no_grad()
def scatter(model):
    for gate in gates_of(model):
        gate.log_alpha.uniform_(-3, 3)
    return model


def factor_by_hand(groups, gate_values, name, shape):
    """What the gates of all groups make of a weight, element by element."""
    factor = torch.ones(shape)
    for group, values in zip(groups, gate_values, strict=True):
        for site in group.readers:
            if name in site.names:
                for member, positions in enumerate(site.indices):
                    for position in positions:
                        factor.select(site.axis, int(position)).mul_(values[member])
    return factor


# --- where the gates lie ---------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("noise", ["step", "example"])
def test_in_evaluation_a_gate_multiplies_exactly_the_columns_that_read_its_member(name, noise):
    model, _, groups = made(name, GateSpec(granularity="coupled", noise=noise))
    dense = {site.name: site.weight.detach().clone() for site in iter_sites(model)}
    scatter(model.eval())
    values = [one.gate.value().detach() for one in iter_gated(model)]
    assert dense
    for site in iter_sites(model):
        expected = dense[site.name] * factor_by_hand(groups, values, site.name, site.weight.shape)
        torch.testing.assert_close(getattr(site.module, site.tensor_name).detach(), expected, rtol=0, atol=0)


@models
def test_every_reader_and_nothing_else_is_gated(name):
    model, _, groups = made(name)
    assert {site.name for site in iter_sites(model)} == {n for g in groups for site in g.readers for n in site.names}
    assert len(gates_of(model)) == len(groups)
    assert [one.gate.log_alpha.numel() for one in iter_gated(model)] == [g.size for g in groups]
    assert [one.coupled.group.name for one in iter_gated(model)] == [g.name for g in groups]


@models
def test_all_readers_share_one_draw_in_a_forward_and_the_next_forward_has_another(name):
    model, x, groups = made(name, BY_STEP)
    model.train()
    for site in iter_sites(model):
        site.weight.data.uniform_(0.5, 1.0)
    seen = []

    def record(module, args, output, site=None):
        seen[-1][site.name] = (getattr(module, site.tensor_name) / site.weight).detach()

    for site in iter_sites(model):
        site.module.register_forward_hook(lambda m, a, o, site=site: record(m, a, o, site))
    for _ in range(2):
        seen.append({})
        model(x)
    drawn = []
    for factors in seen:
        values = {}
        for number, group in enumerate(groups):
            for reader in group.readers:
                factor = factors[reader.names[0]].movedim(reader.axis, 0).reshape(reader.shape[reader.axis], -1)
                for member, positions in enumerate(reader.indices):
                    here = values.setdefault((number, member), factor[positions[0], 0])
                    torch.testing.assert_close(factor[positions], here.expand_as(factor[positions]), rtol=0, atol=1e-6)
        drawn.append(torch.stack(list(values.values())))
    assert len(torch.unique(drawn[0])) > 1
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name", MODELS)
def test_one_draw_is_the_same_on_the_input_as_on_the_weight(name):
    """Many examples: the gates lie on the weights. The same with weights that pretend to be large: on the inputs."""
    model, x, _ = made(name, BY_STEP)
    x = x.repeat(40, *[1] * (x.dim() - 1))
    found = []
    for pretended in (1, 10**9):
        for site in iter_sites(model):
            site.gating.shape = (pretended,)
        torch.manual_seed(3)
        model.zero_grad()
        y = model.train()(x)
        y.square().sum().backward()
        found.append([y.detach().clone(), *(p.grad.clone() for p in model.parameters())])
    for on_weight, on_input in zip(*found, strict=True):
        torch.testing.assert_close(on_weight, on_input, rtol=1e-4, atol=1e-5 * float(on_weight.abs().max() + 1))


def test_a_small_input_carries_the_gates_and_a_large_one_leaves_them_to_the_weight():
    model = mlp(5, 6, 4)
    sparsify(model, BY_STEP, example_inputs=(torch.randn(2, 5),))
    seen = []
    model[2].register_forward_pre_hook(
        lambda module, args: seen.append(module.parametrizations.weight[0].call.on_input)
    )
    for examples in (4, 5, 400, 1):  # of 6 inputs each; the weight has 24 elements
        model.train()(torch.randn(examples, 5))
    assert seen == [True, False, False, True]


def test_the_weight_shows_its_gates_again_after_a_call_that_failed():
    model = mlp(5, 6, 4)
    sparsify(model, GateSpec(granularity="coupled", init_mean=0.3), example_inputs=(torch.randn(2, 5),))
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size of tensor"):
        model[2](torch.randn(1, 7))
    dense = model[2].parametrizations.weight.original
    assert not torch.equal(model.train()[2].weight, dense)


def test_a_layer_with_two_names_is_gated_once():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(2, 5)
    sparsify(model, "coupled", example_inputs=(x,))
    assert [len(site.module.parametrizations.weight) for site in iter_sites(model)] == [1, 1]
    scatter(model.eval())
    torch.testing.assert_close(prune(model, example_inputs=(x,))(x), model(x))


# --- noise for each example ------------------------------------------------------------------------------------------


def masks(model, x):
    """What multiplies each reader's input in one training forward: {reader: (examples, channels)}."""
    found, raw = {}, {}
    for site in iter_sites(model):
        # before the mask and after it
        site.module.register_forward_pre_hook(
            lambda m, a, n=site.name: raw.__setitem__(n, a[0].detach().clone()), prepend=True
        )
        site.module.register_forward_hook(lambda m, a, o, n=site.name: found.__setitem__(n, a[0].detach()))
    model.train()(x)
    return {n: found[n] / raw[n] for n in found}


def test_each_example_has_its_own_mask_and_every_reader_the_same_for_it():
    model, _, groups = made("branched", BY_EXAMPLE)
    x = torch.rand(64, 3, 5, 5)
    nn.init.constant_(model.norm.bias, 9.0)  # nothing that is read is zero by itself
    found = masks(model, x)
    stem = {name: mask for name, mask in found.items() if name in ("left.weight", "right.weight")}
    assert len(stem) == 2
    left, right = (mask[:, :, 2, 2] for mask in stem.values())
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    for mask in stem.values():  # the same at every position of an example
        torch.testing.assert_close(mask, mask[:, :, :1, :1].expand_as(mask), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert len({tuple(row.tolist()) for row in left.round(decimals=4)}) == 64
    assert left.shape[1] == groups[0].size


def test_the_mean_of_the_masks_is_the_mean_of_the_gates():
    model = mlp(5, 6, 3, activation=nn.Sigmoid)
    x = torch.randn(40_000, 5)
    sparsify(model, BY_EXAMPLE, example_inputs=(x[:2],))
    (mask,) = masks(model, x).values()
    assert mask.shape == (40_000, 6)
    torch.testing.assert_close(mask.mean(0), torch.full((6,), 0.6), rtol=0, atol=0.012)  # 5 standard errors
    assert float(mask.min()) == 0
    assert float(mask.max()) == 1
    together = torch.corrcoef(mask.T) - torch.eye(6)
    assert float(together.abs().max()) < 0.03


@models
def test_noise_for_each_example_reaches_every_gate(name):
    model, x, _ = made(name, BY_EXAMPLE)
    model.train()(x).square().sum().backward()
    assert all(gate.log_alpha.grad is not None and bool(gate.log_alpha.grad.ne(0).any()) for gate in gates_of(model))
    assert all(p.grad is not None for p in model.parameters())


@models
def test_evaluation_and_pruning_do_not_depend_on_the_kind_of_noise(name):
    one, x, _ = made(name, BY_STEP)
    other, _, _ = made(name, BY_EXAMPLE)
    scatter(one.eval())
    other.eval().load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    small, smaller = prune(one, example_inputs=(x,)), prune(other, example_inputs=(x,))
    assert torch.equal(small(x), smaller(x))
    assert [p.shape for p in small.parameters()] == [p.shape for p in smaller.parameters()]
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in smaller.modules())


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 5, 3)], ids=["channels first", "as many columns as channels"])
def test_one_example_without_a_batch_axis_has_one_mask_over_its_channels(shape):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1))
    sparsify(model, BY_EXAMPLE, example_inputs=(torch.randn(2, 3, 5, 5),))
    (mask,) = masks(model, torch.randn(shape)).values()
    assert mask.shape[0] == 4
    torch.testing.assert_close(mask, mask[:, :1, :1].expand_as(mask))


def test_a_vector_is_one_example():
    model = mlp(5, 6, 3, activation=nn.Sigmoid)
    sparsify(model, BY_EXAMPLE, example_inputs=(torch.randn(2, 5),))
    (mask,) = masks(model, torch.randn(5)).values()
    assert mask.shape == (6,)


def test_a_reader_may_be_called_with_its_input_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.two(input=torch.sigmoid(self.one(input=x)))

    model, x = Named(), torch.randn(2, 5)
    sparsify(model, BY_EXAMPLE, example_inputs=(x,))
    model.train()(x).sum().backward()
    assert bool(gates_of(model)[0].log_alpha.grad.ne(0).any())
    scatter(model.eval())
    torch.testing.assert_close(prune(model, example_inputs=(x,))(x), model(x))


class Tied(nn.Module):
    """The embedding writes what the head, its twin, reads."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(F.relu(self.up(x))))


class Functional(nn.Module):
    """A layer that is never called, only its weight is used."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return F.linear(torch.sigmoid(self.one(x)), self.two.weight, self.two.bias)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 4, batch_first=True)
        self.two = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.sigmoid(self.one(x))
        return self.two(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (Tied, lambda: torch.randint(7, (2, 4))),
        (Functional, lambda: torch.randn(2, 5)),
        (SelfAttention, lambda: torch.randn(2, 4, 5)),
    ],
)
def test_groups_with_a_reader_that_no_hook_reaches_have_one_draw_for_all(build, inputs):
    model, x = build(), inputs()
    groups = list(channel_groups(model, (x,)))
    sparsify(model, BY_EXAMPLE, example_inputs=(x,))
    kinds = {site.name: site.gating.example_noise for site in iter_sites(model)}
    for group in groups:
        assert len({kinds[name] for site in group.readers for name in site.names if name in kinds}) == 1
    model.train()(x).square().sum().backward()
    assert all(gate.log_alpha.grad is not None and bool(gate.log_alpha.grad.ne(0).any()) for gate in gates_of(model))


class Quantised(nn.Module):
    """A layer of no type that the library knows."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize("spec", ["coupled", {"all": "coupled"}, {"2": "coupled"}, {Quantised: "coupled"}], ids=str)
def test_what_reads_a_group_may_be_a_layer_of_any_type(spec):
    model, x = nn.Sequential(Quantised(8, 16), nn.ReLU(), Quantised(16, 3)), torch.randn(2, 8)
    assert [group.size for group in channel_groups(model, (x,))] == [16]
    sparsify(model, spec, example_inputs=(x,))
    model.train()(x).square().sum().backward()
    assert bool(gates_of(model)[0].log_alpha.grad.ne(0).any())
    scatter(model.eval())
    small = prune(model, example_inputs=(x,))
    assert small[0].weight.shape[0] == gates_of(model)[0].support().sum()
    torch.testing.assert_close(small(x), model(x))


def test_single_gates_still_want_a_known_layer():
    model = nn.Sequential(Quantised(8, 16), nn.ReLU(), Quantised(16, 3))
    with pytest.raises(UnsupportedModuleError, match=r"'0'(.|\n)*got: Quantised"):
        sparsify(model, {"0": "weight"})
    with pytest.raises(UnsupportedModuleError, match=r"'1'(.|\n)*got: ReLU, which has no weight"):
        sparsify(model, {"1": "coupled"}, example_inputs=(torch.zeros(2, 8),))


class Showing(nn.Linear):
    """Returns its input beside the product, as routers of experts do."""

    def forward(self, x):
        return super().forward(x), x


class ReadBySubclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 6), Showing(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        product, same = self.two(torch.sigmoid(self.one(x)))
        return product + self.three(same)


@pytest.mark.parametrize("noise", ["step", "example"])
def test_a_layer_with_a_forward_of_its_own_gets_its_gates_on_the_weight(noise):
    model, x = ReadBySubclass(), torch.randn(1, 5)  # one row: fewer numbers than the weight has
    spec = GateSpec(granularity="coupled", noise=noise, family="deterministic", init_mean=0.6)
    sparsify(model, spec, example_inputs=(x,))
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    scatter(model)
    torch.testing.assert_close(prune(model, example_inputs=(x,))(x), model(x))


class Autoencoder(nn.Module):
    """The decoder is the encoder, transposed: ``use`` says how."""

    def __init__(self, encoder, use):
        super().__init__()
        self.encoder, self.use = encoder, use

    def forward(self, x):
        return self.use(self.encoder(x).relu(), self.encoder.weight)


AUTOENCODERS = {
    "linear": (lambda: Autoencoder(nn.Linear(8, 6), lambda h, w: F.linear(h, w.t())), (2, 8)),
    "square": (lambda: Autoencoder(nn.Linear(8, 8), lambda h, w: F.linear(h, w.t())), (2, 8)),
    "product": (lambda: Autoencoder(nn.Linear(8, 6), lambda h, w: h @ w), (2, 8)),
    "convolution": (
        lambda: Autoencoder(nn.Conv2d(3, 6, 3, padding=1), lambda h, w: F.conv_transpose2d(h, w, padding=1)),
        (1, 3, 4, 4),
    ),
}


@pytest.mark.parametrize("noise", ["step", "example"])
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_a_weight_that_is_also_used_transposed_is_gated_along_the_axis_that_is_read_there(name, noise):
    build, shape = AUTOENCODERS[name]
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    sparsify(model, GateSpec(granularity="coupled", noise=noise), example_inputs=(x,))
    (gate,) = gates_of(model)
    with torch.no_grad():
        gate.log_alpha[::2], gate.log_alpha[1::2] = -20, 20  # closed and open, whatever the noise
    trained = model.train()(x)
    torch.testing.assert_close(trained, model.eval()(x))
    small = prune(model, example_inputs=(x,))
    assert small.encoder.weight.shape[0] == len(gate.log_alpha) // 2
    torch.testing.assert_close(small(x), trained)


class UsedTwice(nn.Module):
    """A layer that is called, and whose weight the model's own code uses again."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.one(x).relu()
        return self.two(x) + F.linear(x**2, self.two.weight)


@pytest.mark.parametrize("noise", ["step", "example"])
def test_a_weight_that_is_also_used_without_its_layer_is_gated_there_too(noise):
    torch.manual_seed(0)
    model, x = UsedTwice(), torch.randn(4, 5)
    sparsify(model, GateSpec(granularity="coupled", noise=noise), example_inputs=(x,))
    (gate,) = gates_of(model)
    with torch.no_grad():
        gate.log_alpha[::2], gate.log_alpha[1::2] = -20, 20
    torch.testing.assert_close(model.train()(x), model.eval()(x))


def test_only_the_groups_that_need_it_fall_back_to_one_draw():
    model, x = Tied(), torch.randint(7, (2, 4))
    sparsify(model, BY_EXAMPLE, example_inputs=(x,))
    kinds = {site.name: site.gating.example_noise for site in iter_sites(model)}
    assert kinds == {"embed.weight": False, "head.weight": False, "up.weight": False, "down.weight": True}


# --- noise under checkpointing and compilation -----------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, body, **options):
        super().__init__()
        self.body, self.options = body, options

    def forward(self, x):
        return checkpoint(self.body, x, **self.options)


@pytest.mark.parametrize("spec", [BY_STEP, BY_EXAMPLE], ids=["step", "example"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_sees_its_own_noise(spec, reentrant):
    model, x, _ = made("mlp", spec)
    x.requires_grad_()
    model.train()
    gradients = []
    for wrapper in (model, Checkpointed(model, use_reentrant=reentrant, preserve_rng_state=False)):
        torch.manual_seed(5)
        model.zero_grad()
        out = wrapper(x)
        torch.rand(7)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "spec", [pytest.param(BY_STEP, id="step"), pytest.param(BY_EXAMPLE, id="example", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_model_is_one_graph_with_fresh_noise_and_the_same_gradients(spec):
    model, x, _ = made("branched", spec)
    model.train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        torch.manual_seed(5)
        model.zero_grad()
        first, second = run(x), run(x)
        (first.square().sum() + second.sum()).backward()
        results.append([first.detach(), second.detach(), *(p.grad.clone() for p in model.parameters())])
    assert not torch.equal(results[1][0], results[1][1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    value = penalty(compiled, params=1.0, l0=1.0)
    torch.testing.assert_close(value, penalty(model, params=1.0, l0=1.0))
    torch._dynamo.reset()


# --- which groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        ("coupled", {}, {"stem", "left", "right", "hidden"}),
        ({"stem": "coupled"}, {}, {"stem"}),  # the writer
        ({"left": "coupled"}, {}, {"stem", "left"}),  # reads one, writes one
        ({"head": "coupled"}, {}, {"hidden"}),  # a reader
        ({nn.Linear: "coupled"}, {}, {"left", "right", "hidden"}),
        ("coupled", {"exclude": "stem"}, {"left", "right", "hidden"}),
        ("coupled", {"exclude": "hidden"}, {"stem"}),
        ("coupled", {"exclude": ("left", nn.Linear)}, set()),
        (GateSpec(granularity="coupled", kinds=("neuron",)), {}, {"hidden"}),
        (GateSpec(granularity="coupled", kinds=("channel",)), {}, {"stem", "left", "right"}),
        (
            {"head": "coupled", "*": GateSpec(granularity="coupled", kinds=("channel",))},
            {"exclude": "right"},
            {"hidden", "left"},
        ),
    ],
)
def test_patterns_kinds_and_exclusions_choose_groups_by_writers_or_readers(spec, options, expected):
    model, x = Branched(), torch.randn(2, 3, 5, 5)
    groups = {g.name: {s.module for s in (*g.writers, *g.readers)} for g in channel_groups(model, (x,))}
    if options.get("exclude") == "right":  # what reads the stem is excluded with it
        assert "right" in groups["stem"]
    if not expected:
        with pytest.raises(SpecError, match="at least one coupled group"):
            sparsify(model, spec, example_inputs=(x,), **options)
        return
    report = sparsify(model, spec, example_inputs=(x,), **options)
    assert {row.name for row in report.rows} == expected


def test_kinds_tell_heads_from_neurons():
    x = torch.randn(2, 2, 4)
    for kind, names in {"head": {"q"}, "neuron": {"up"}}.items():
        model = Attentive()
        report = sparsify(model, GateSpec(granularity="coupled", kinds=(kind,)), example_inputs=(x,))
        assert {row.kind for row in report.rows} == {kind}
        assert names <= {row.name for row in report.rows}


def test_the_first_pattern_gives_a_group_its_settings():
    model, x = mlp(5, 6, 4, 3), torch.randn(2, 5)
    low = GateSpec(granularity="coupled", init_keep_prob=0.3)
    high = GateSpec(granularity="coupled", init_keep_prob=0.8)
    sparsify(model, {"0": low, "*": high}, example_inputs=(x,))
    assert [round(float(g.keep_prob()[0].detach()), 4) for g in gates_of(model)] == [0.3, 0.8]


def test_coupled_groups_and_other_gates_live_in_one_model():
    model, x = Branched(), torch.randn(2, 3, 5, 5)
    report = sparsify(model, {"head": "coupled", "left": "weight", "right": "output"}, example_inputs=(x,))
    assert [row.granularity for row in report.rows] == ["weight", "output", "coupled"]
    scatter(model.eval())
    pruned = prune(model, example_inputs=(x,))
    torch.testing.assert_close(pruned(x), model(x))
    kept = int(next(one for one in iter_gated(model) if one.coupled).gate.support().sum())
    assert pruned.head.weight.shape == (3, kept)
    written = int(next(one for one in iter_gated(model) if one.name.startswith("right")).gate.support().sum())
    assert 0 < written < 5
    assert pruned.hidden.weight.shape == (kept, 4 + written)  # what "right" no longer writes is not read either
    assert pruned.left.weight.shape == (4, 6, 1, 1)
    assert int((pruned.left.weight != 0).sum()) < 24


def test_a_weight_with_gates_of_its_own_that_writes_a_group_is_counted_once():
    model, x = mlp(5, 6, 3), torch.randn(2, 5)
    report = sparsify(model, {"0": "weight", "2": "coupled"}, example_inputs=(x,))
    assert report.parameters == report.parameters_kept == 30 + 6 + 18
    assert report.macs == 30 + 18
    scatter(model.eval())
    torch.testing.assert_close(prune(model, example_inputs=(x,))(x), model(x))


# --- errors ----------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        if float(x.sum()) > 0:
            x = x + 1
        return self.two(F.relu(self.one(x)))


class TransposedToo(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.both, self.out = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(6, 3)

    def forward(self, x):
        h = F.relu(self.both(F.relu(self.one(x))))
        return self.out(F.relu(F.linear(h, self.both.weight.t())))


def gated_mlp():
    model = mlp(5, 6, 3)
    sparsify(model, {"0": "weight"})
    return model


def broken_mlp():
    model = mlp(5, 6, 3)
    model[2].weight.data[0, 0] = float("nan")
    return model


X5 = (torch.ones(2, 5),)
ERRORS = {
    "no example inputs": (lambda: mlp(5, 6, 3), "coupled", None, SpecError, "no example_inputs"),
    "a bare tensor": (lambda: mlp(5, 6, 3), "coupled", X5[0], SpecError, "got: Tensor"),
    "no group": (lambda: nn.Sequential(nn.Linear(5, 3)), "coupled", X5, SpecError, "at least one coupled group"),
    "no group of that kind": (
        lambda: mlp(5, 6, 3), GateSpec(granularity="coupled", kinds=("head",)), X5, SpecError, "at least one coupled"),
    "no module": (lambda: mlp(5, 6, 3), {"conv*": "coupled"}, X5, SpecError, "must match at least one module"),
    "gated already": (gated_mlp, {"2": "coupled"}, X5, StateError, "a gated model.*set_budget"),
    "a reader gated otherwise": (
        lambda: mlp(5, 6, 3), {"2": "weight", "0": "coupled"}, X5, SpecError, "'2.weight'.*only once"),
    "a reader with NaN": (broken_mlp, "coupled", X5, SpecError, "'2.weight'.*finite"),
    "a branch on data": (Branching, "coupled", X5, UnsupportedModuleError, "torch.export.*data|data.*branch"),
    "inputs that do not fit": (lambda: mlp(5, 6, 3), "coupled", (torch.ones(2, 4),), Exception, "shape|size|export"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_leaves_the_model_as_it_was(case):
    build, spec, inputs, error, match = ERRORS[case]
    model = build()
    before, values, random = fingerprint(model), state_of(model), torch.get_rng_state()
    with pytest.raises(error, match=f"(?s){match}"):
        sparsify(model, spec, example_inputs=inputs)
    assert fingerprint(model) == before
    assert all(torch.equal(v, model.state_dict()[k]) or v.isnan().any() for k, v in values.items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("noise", ["step", "example"])
def test_of_two_groups_along_two_axes_of_one_weight_the_first_is_gated_and_the_other_left_out(noise):
    torch.manual_seed(0)
    model = TransposedToo()
    with pytest.warns(L0HooksWarning, match=r"(?s)stays the group both .*'both.weight'.*one axis") as caught:
        sparsify(model, GateSpec(granularity="coupled", noise=noise), example_inputs=X5)
    assert caught[0].filename == __file__
    (gate,) = gates_of(model)
    with torch.no_grad():
        gate.log_alpha[::2], gate.log_alpha[1::2] = -20, 20
    torch.testing.assert_close(model.train()(*X5), model.eval()(*X5))
    small = prune(model, example_inputs=X5)
    assert (small.one.out_features, small.both.weight.shape, small.out.in_features) == (3, (8, 3), 3)


def test_groups_given_along_two_axes_of_one_weight_are_refused():
    model = TransposedToo()
    groups = channel_groups(model, X5)
    before = fingerprint(model)
    with pytest.raises(SpecError, match=r"(?s)'both.weight'.*one axis.*exclude='both'"):
        sparsify(model, "coupled", groups=list(groups), example_inputs=X5)
    assert fingerprint(model) == before


def test_an_unknown_kind_or_noise_is_refused_with_near_names():
    with pytest.raises(SpecError, match="channel"):
        GateSpec(granularity="coupled", kinds=("channels",))
    with pytest.raises(SpecError, match="example"):
        GateSpec(granularity="coupled", noise="examples")


@models
def test_attaching_draws_no_random_numbers_and_keeps_the_mode(name):
    model, x = MODELS[name][0](), MODELS[name][1]()
    next(model.children()).eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    weights = [p.clone() for p in model.parameters()]
    sparsify(model, "coupled", example_inputs=(x,))
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for n, m in model.named_modules() if "parametrizations" not in n] == modes
    own = {id(g.log_alpha) for g in gates_of(model)}
    kept = [p for p in model.parameters() if id(p) not in own]
    assert sorted(p.detach().sum().item() for p in weights) == sorted(p.detach().sum().item() for p in kept)


def test_pruning_wants_inputs_a_copy_and_the_model_itself():
    model, x, _ = made("mlp")
    before = state_of(model)
    with pytest.raises(StateError, match="no example_inputs"):
        prune(model)
    with pytest.raises(StateError, match="inplace=True"):
        prune(model, example_inputs=(x,), inplace=True)
    with pytest.raises(StateError, match="wrapper"):
        prune(nn.Sequential(model), example_inputs=(x,))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_a_part_of_the_model_cannot_tell_what_its_groups_cost():
    model, *_ = made("mlp")
    for part in (model[:3], model[2:], nn.Sequential(*model)[2]):
        with pytest.raises(StateError, match="whole model"):
            penalty(part, l0=1.0)
        with pytest.raises(StateError, match="whole model"):
            summary(part)


def test_a_wrapper_costs_what_its_model_costs():
    model, *_ = made("mlp")
    wrapper = nn.Sequential(nn.Identity(), model)
    for name in ("l0", "l2", "expected_l2", "params", "macs"):
        assert torch.equal(penalty(wrapper, **{name: 1.0}), penalty(model, **{name: 1.0}))
    assert summary(wrapper).model_parameters_kept == summary(model).model_parameters_kept
    assert price(wrapper, l0={"1.0": 1.0}) == price(model, l0={"0": 1.0}) > 0


def test_a_model_and_its_copy_in_one_module_are_counted_apart():
    model, *_ = made("mlp", BY_STEP)
    both = nn.ModuleList([model, copy.deepcopy(model)])
    scatter(both)
    for name in ("l0", "l2", "expected_l2", "params", "macs"):
        total = sum(penalty(m, **{name: 1.0}) for m in both)
        torch.testing.assert_close(penalty(both, **{name: 1.0}), total)


# --- cost ------------------------------------------------------------------------------------------------------------


def touched(model, groups):
    return {n for g in groups for s in g.sites if not s.buffer for n in s.names[:1]}


def cost(model, x):
    """Parameters of a plain model, and its multiply-adds in layers, for one example."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    layers = ("mm", "addmm", "convolution")
    flops = counter.get_flop_counts().get("Global", {})
    macs = sum(v for op, v in flops.items() if any(f"aten.{name}" == str(op) for name in layers)) // 2 // len(x)
    return sum(p.numel() for p in model.parameters()), macs


@models
def test_summary_and_penalty_say_exactly_what_the_smaller_model_has(name):
    model, x, groups = made(name)
    model.eval()
    random = np.random.default_rng(0)
    for _ in range(3):
        supports = [random.random(g.size) < 0.6 for g in groups]
        for support in supports:
            support[random.integers(len(support))] = True
        set_support(model, supports)
        pruned = prune(model, example_inputs=(x,)).eval()
        report, (parameters, macs) = summary(model), cost(pruned, x)
        assert report.model_parameters_kept == parameters
        named = dict(pruned.named_parameters())
        expected = sum(named[n].numel() for n in touched(model, groups))
        assert report.parameters_kept == expected
        assert price(model, params=1.0) == pytest.approx(expected, rel=1e-5)
        if name != "attentive":  # the products of attention belong to no layer
            assert report.macs_kept == macs
            assert price(model, macs=1.0) == pytest.approx(macs, rel=1e-5)


@models
def test_what_is_whole_costs_what_the_dense_model_costs(name):
    model, x, groups = made(name)
    set_support(model, [np.ones(g.size, bool) for g in groups])
    parameters, macs = cost(MODELS[name][0]().eval(), x)
    report = summary(model)
    assert report.model_parameters == report.model_parameters_kept == parameters
    assert report.parameters == report.parameters_kept <= parameters
    assert report.macs == report.macs_kept
    if name != "attentive":
        assert report.macs == macs


def test_a_group_that_is_closed_keeps_one_member_and_the_summary_knows():
    model, x, groups = made("branched")
    set_support(model, [np.zeros(g.size, bool) for g in groups])
    pruned = prune(model.eval(), example_inputs=(x,))
    assert pruned.stem.out_channels == pruned.hidden.out_features == 1
    assert summary(model).model_parameters_kept == sum(p.numel() for p in pruned.parameters())
    torch.testing.assert_close(pruned(x), model(x))


@models
def test_expected_cost_is_the_mean_over_independent_supports(name):
    model, _, groups = made(name)
    scatter(model)
    plan = next(iter_gated(model)).coupled.plan
    keep = [one.gate.keep_prob().detach().double().numpy() for one in iter_gated(model)]
    random, draws = np.random.default_rng(0), 4000
    tensors = {s.names: s.shape for g in groups for s in g.sites if not s.buffer}
    parameters, macs = [], []
    for _ in range(draws):
        lost = {}
        for group, p in zip(groups, keep, strict=True):
            dead = random.random(group.size) >= p
            for site in group.sites:
                if not site.buffer:
                    lengths = lost.setdefault(site.names, list(site.shape))
                    lengths[site.axis] -= len(site.indices[dead].reshape(-1))
        sizes = {names: int(np.prod(lost.get(names, shape))) for names, shape in tensors.items()}
        parameters.append(sum(sizes.values()))
        macs.append(sum(plan.positions.get(names[0], 0) * size for names, size in sizes.items()))
    for values, got in ((parameters, penalty(model, params=1.0)), (macs, penalty(model, macs=1.0))):
        error = np.std(values) / draws**0.5
        assert abs(np.mean(values) - got.item()) < 5 * error


def test_expected_cost_is_exact_when_all_supports_are_enumerated():
    model, x = mlp(2, 3, 2, 1), torch.randn(2, 2)
    sparsify(model, "coupled", example_inputs=(x,))
    scatter(model)
    keep = torch.cat([g.keep_prob().detach() for g in gates_of(model)]).double()
    expected = 0.0
    for bits in itertools.product((0, 1), repeat=5):
        a, b = sum(bits[:3]), sum(bits[3:])
        chance = np.prod([float(p) if bit else 1 - float(p) for bit, p in zip(bits, keep, strict=True)])
        expected += chance * (a * 2 + a + a * b + b + b * 1)
    assert price(model, params=2.0) == pytest.approx(2 * expected, rel=1e-5)


@models
def test_l0_and_l2_are_those_of_gates_and_read_columns(name):
    model, _, groups = made(name)
    scatter(model)
    keep = [one.gate.keep_prob().detach() for one in iter_gated(model)]
    assert price(model, l0=2.0) == pytest.approx(2 * sum(float(k.sum()) for k in keep), rel=1e-5)
    weights = {site.name: site.weight.detach() for site in iter_sites(model)}
    l2 = expected = 0.0
    for group, probabilities in zip(groups, keep, strict=True):
        for site in group.readers:
            columns = weights[site.names[0]].movedim(site.axis, 0).square()
            for member, positions in enumerate(site.indices):
                square = float(columns[positions].sum())
                l2 += square
                expected += float(probabilities[member]) * square
    assert price(model, l2=1.0) == pytest.approx(l2, rel=1e-5)
    assert price(model, expected_l2=1.0) == pytest.approx(expected, rel=1e-5)
    total = price(model, params=1.0) + price(model, expected_l2=0.5)
    assert price(model, l0l2=(1.0, 1.0)) == pytest.approx(total, rel=1e-5)


class TiedReaders(nn.Module):
    """One weight in two layers, one of which has two names."""

    def __init__(self):
        super().__init__()
        self.up, self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.b.weight = self.a.weight
        self.same = self.a

    def forward(self, x):
        hidden = self.up(x).relu()
        return self.a(hidden) + self.b(2 * hidden)


def test_a_tied_weight_costs_multiply_adds_at_every_layer_that_uses_it():
    model, x = TiedReaders(), torch.randn(5, 8)
    report = sparsify(model, "coupled", example_inputs=(x,))
    assert report.macs == 6 * 8 + 2 * 6 * 3
    kept = float(next(iter_gates(model))[1].expected_l0().detach())
    assert penalty(model, macs=1.0).item() == pytest.approx(kept * (8 + 2 * 3), rel=1e-5)


@pytest.mark.parametrize("name", ["l0", "expected_l2", "params", "macs"])
def test_every_penalty_reaches_every_gate(name):
    model, *_ = made("branched")
    penalty(model, **{name: 1.0}).backward()
    assert all(bool(g.log_alpha.grad.gt(0).all()) for g in gates_of(model))


def test_a_group_written_by_a_bare_parameter_has_a_name_and_a_cost():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.out(F.relu(x @ self.w))

    model, x = Bare(), torch.randn(2, 5)
    report = sparsify(model, "coupled", example_inputs=(x,))
    assert [row.name for row in report.rows] == ["w"]
    assert report.parameters == 30 + 18
    scatter(model.eval())
    torch.testing.assert_close(prune(model, example_inputs=(x,))(x), model(x))


# --- checkpoints, copies, dtypes -------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("spec", ["coupled", BY_EXAMPLE], ids=["step", "example"])
def test_a_dense_checkpoint_loads_beneath_the_gates(name, spec):
    model, x, _ = made(name, spec)
    scatter(model.eval())
    gates = [g.log_alpha.detach().clone() for g in gates_of(model)]
    torch.manual_seed(9)
    dense = MODELS[name][0]().eval()
    assert model.load_state_dict(dense.state_dict(), strict=True)
    assert all(torch.equal(a, b.log_alpha) for a, b in zip(gates, gates_of(model), strict=True))
    for gate in gates_of(model):
        gate.log_alpha.data.fill_(40.0)
    assert torch.equal(model(x), dense(x))


@models
def test_a_gated_checkpoint_loads_into_another_gated_model(name):
    model, x, _ = made(name)
    scatter(model.eval())
    other, _, _ = made(name, BY_EXAMPLE)
    assert other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.eval()(x), model(x))


@models
def test_open_gates_change_nothing(name):
    torch.manual_seed(0)
    dense, x = MODELS[name][0]().eval(), MODELS[name][1]()
    model = copy.deepcopy(dense)
    sparsify(model, "coupled", example_inputs=(x,))
    for gate in gates_of(model):
        gate.log_alpha.data.fill_(40.0)
    assert torch.equal(model(x), dense(x))
    pruned = prune(model, example_inputs=(x,))
    assert torch.equal(pruned(x), dense(x))
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("spec", [BY_STEP, BY_EXAMPLE], ids=["step", "example"])
def test_a_deepcopy_has_gates_and_noise_of_its_own(spec):
    model, x, _ = made("branched", spec)
    copied = copy.deepcopy(model)
    scatter(copied)
    mine = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not any(id(t) in mine for t in (*copied.parameters(), *copied.buffers()))
    assert all(torch.equal(g.log_alpha, g.log_alpha[:1].expand_as(g.log_alpha)) for g in gates_of(model))
    copied.train()(x).sum().backward()
    assert all(g.log_alpha.grad is None for g in gates_of(model))
    assert all(g.log_alpha.grad is not None for g in gates_of(copied))
    shared = {id(g) for s in iter_sites(copied) for g in s.gating.gates}
    assert len(shared) == len(gates_of(copied))
    pruned = prune(copied.eval(), example_inputs=(x,))
    torch.testing.assert_close(pruned(x), copied(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("noise", ["step", "example"])
def test_other_dtypes_train_evaluate_and_prune(dtype, noise):
    model, x = mlp(5, 6, 4, 3).to(dtype), torch.randn(4, 5).to(dtype)
    sparsify(model, GateSpec(granularity="coupled", noise=noise), example_inputs=(x,))
    out = model.train()(x)
    assert out.dtype == dtype
    (out.float().square().sum() + penalty(model, params=1e-3)).backward()
    assert all(g.log_alpha.dtype == g.log_alpha.grad.dtype == torch.float32 for g in gates_of(model))
    scatter(model.eval())
    pruned = prune(model, example_inputs=(x,))
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(pruned(x), model(x), rtol=0, atol=20 * eps * model(x).abs().max().item())


def test_a_model_moved_to_another_dtype_after_gating_still_works():
    model, x, _ = made("branched")
    scatter(model.eval())
    model.double()
    pruned = prune(model, example_inputs=(x.double(),))
    torch.testing.assert_close(pruned(x.double()), model(x.double()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", ["step", "example"])
@pytest.mark.parametrize("family", get_args(FamilyName))
def test_every_family_trains_with_either_noise(family, noise):
    torch.manual_seed(0)
    model, x = mlp(4, 12, 1), torch.randn(5, 4)
    sparsify(model, GateSpec(granularity="coupled", family=family, noise=noise), example_inputs=(x,))
    output = model.train()(x)
    output.square().sum().backward()
    assert output.shape == (5, 1)
    assert all(bool(gate.log_alpha.grad.ne(0).any()) for gate in gates_of(model))


def test_training_closes_channels_that_do_nothing():
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = F.relu(x @ torch.randn(4, 2)) @ torch.ones(2, 1)
    model = mlp(4, 12, 1)
    sparsify(model, GateSpec(granularity="coupled", noise="example"), example_inputs=(x[:2],))
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-2, gate_lr=5e-2))
    for _ in range(300):
        loss = F.mse_loss(model(x), y) + penalty(model, l0=5e-2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = prune(model.eval(), example_inputs=(x,))
    assert 1 <= pruned[0].out_features < 10
    torch.testing.assert_close(pruned(x), model(x), rtol=0, atol=1e-5)
