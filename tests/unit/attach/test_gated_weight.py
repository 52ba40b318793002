"""The gated weight: its kept fold is never stale, and its gradients are those of the plain formula."""

import copy
import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.utils import parametrize

import l0hooks
from l0hooks import Budget, GateSpec, iter_gates, prune, set_budget, set_temperature, sparsify
from l0hooks.attach.gated_weight import GatedWeight, iter_sites

GAMMA, ZETA = -0.1, 1.1
WEIGHT = "parametrizations.weight.original"
LOCATION = "parametrizations.weight.0.gate.log_alpha"
GRANULARITIES = ["weight", "input", "output", "kernel", (2, 2)]


def spread(z, granularity):
    """Gates of a Linear(4, 6) over its weight, by hand."""
    if granularity == "input":
        return z[None, :].expand(6, 4)
    if granularity == "output":
        return z[:, None].expand(6, 4)
    if isinstance(granularity, tuple):
        return z.repeat_interleave(granularity[0], 0).repeat_interleave(granularity[1], 1)
    return z


def median(log_alpha, temperature):
    return (GAMMA + (ZETA - GAMMA) / (1 + torch.exp(-log_alpha / temperature))).clamp(0, 1)


def layer(granularity="weight", *, dtype=torch.float32, **options):
    """A gated Linear(4, 6) in evaluation mode with gates between closed and open."""
    module = nn.Linear(4, 6, dtype=dtype)
    sparsify(module, GateSpec(granularity=granularity, **options))
    gate = gate_of(module)
    with torch.no_grad():
        gate.log_alpha.uniform_(-3, 3)
    return module.eval()


def gate_of(module):
    return next(gate for _, gate in iter_gates(module))


def plain(module, granularity="weight", weight=None, log_alpha=None):
    """The evaluation weight by hand."""
    gate = gate_of(module)
    weight = module.parametrizations.weight.original if weight is None else weight
    z = median(gate.log_alpha if log_alpha is None else log_alpha, gate.temperature)
    return weight * spread(z, granularity).to(weight.dtype)


def is_fresh(module, granularity="weight"):
    with torch.no_grad():
        kept = module.weight.clone()
        torch.testing.assert_close(kept, plain(module, granularity))
    torch.testing.assert_close(module.weight, kept)  # with and without gradients alike
    return True


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_evaluation_multiplies_the_weight_with_the_median_gates(granularity):
    module = layer(granularity)
    assert is_fresh(module, granularity)
    x = torch.randn(3, 4)
    torch.testing.assert_close(module(x), F.linear(x, plain(module, granularity), module.bias))


def test_the_fold_is_kept_while_nothing_changes(monkeypatch):
    module = layer()
    folds = []
    original = GatedWeight.fold_into
    monkeypatch.setattr(GatedWeight, "fold_into", lambda self, *given: folds.append(1) or original(self, *given))
    x = torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(5):
            module(x)
    for _ in range(5):
        module(x).sum().backward()
    with torch.inference_mode():
        module(x)
    assert len(folds) == 1
    with torch.no_grad():
        module.parametrizations.weight.original.mul_(2)
    module(x)
    assert len(folds) == 2


def test_reading_a_kept_fold_asks_no_parametrization(monkeypatch):
    module = layer()
    with torch.no_grad():
        kept = module.weight
        monkeypatch.setattr(parametrize.ParametrizationList, "forward", lambda self: pytest.fail("the long way"))
        assert module.weight is kept
        with torch.inference_mode():
            assert module.weight is kept
        gate_of(module).temperature = 0.5
        with pytest.raises(pytest.fail.Exception):
            _ = module.weight


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@torch.no_grad()
def test_a_kept_fold_is_not_read_where_it_is_not_the_weight():
    module = layer()
    kept = module.weight.clone()
    parametrize.register_parametrization(module, "weight", Doubled(), unsafe=True)
    torch.testing.assert_close(module.weight, 2 * kept)
    torch.testing.assert_close(module.weight, 2 * kept)
    torch.testing.assert_close(copy.deepcopy(module).weight, 2 * kept)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    torch.testing.assert_close(module.weight, 2 * kept)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit")  # deprecated; a FutureWarning since torch 2.14
def test_a_recorded_graph_computes_the_fold():
    module, x = layer(), torch.randn(2, 4)
    kept = module.weight.clone()
    traced = torch.jit.trace(module, x, check_trace=False)
    module.parametrizations.weight.original.mul_(2)
    torch.testing.assert_close(traced(x), F.linear(x, 2 * kept, module.bias))


class Reading(nn.Module):
    """A module that reads the gated weight of another in its own forward."""

    def __init__(self):
        super().__init__()
        self.of = layer()

    def forward(self, x):
        return F.linear(x, self.of.weight)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_symbolic_trace_holds_the_call_of_the_parametrization_not_what_it_gave(training):
    module, x = Reading().train(training), torch.randn(2, 4)
    module(x)
    traced = torch.fx.symbolic_trace(module)
    assert "of.parametrizations.weight" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
    module.eval()
    module.of.parametrizations.weight.original.mul_(2)
    torch.testing.assert_close(traced.eval()(x), F.linear(x, plain(module.of)))


@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # a list of parametrizations has no inputs
@pytest.mark.parametrize(
    "register",
    [
        lambda chain, seen: chain.register_full_backward_hook(seen),
        lambda chain, seen: chain[0].register_full_backward_pre_hook(seen),
        lambda chain, seen: chain[0].register_forward_hook(seen),
        lambda chain, seen: nn.modules.module.register_module_forward_pre_hook(seen),
        lambda chain, seen: nn.modules.module.register_module_full_backward_hook(seen),
    ],
)
def test_hooks_on_the_parametrization_run(register):
    module, seen = layer().train(), []
    handle = register(module.parametrizations.weight, lambda owner, *_: seen.append(owner))
    module.weight.sum().backward()
    handle.remove()
    assert any(isinstance(owner, (GatedWeight, parametrize.ParametrizationList)) for owner in seen)


@torch.no_grad()
def test_a_gating_that_samples_is_not_read_as_kept_however_it_was_switched():
    module = layer()
    kept = module.weight.clone()
    for part in module.modules():
        part.training = True  # without train()
    assert not torch.equal(module.weight, kept)
    for part in module.modules():
        part.training = False
    torch.testing.assert_close(module.weight, kept)


def test_a_second_gated_tensor_of_a_module_is_read_by_itself():
    module = nn.MultiheadAttention(4, 2, kdim=3, vdim=5).eval()
    sparsify(module, "weight")
    with torch.no_grad():
        shapes = [(name, getattr(module, name)) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        for name, weight in shapes:
            chain = module.parametrizations[name]
            assert getattr(module, name) is weight
            torch.testing.assert_close(weight, chain[0].fold(chain.original))


def optimizer_step(optimizer):
    def change(module):
        opt = optimizer(module.parameters())
        module(torch.ones(2, 4)).square().sum().backward()
        opt.step()
        opt.zero_grad()

    return change


@torch.no_grad()
def multiply(tensor):
    tensor.mul_(-1.5)


def moved(module, by):
    """The state of ``module``, its weights and log-odds larger by this."""
    return {k: v if k.endswith("_extra_state") else v + by for k, v in module.state_dict().items()}


def load(**options):
    def change(module):
        other = nn.Linear(4, 6)
        sparsify(other, "weight")
        module.load_state_dict(moved(other, 0.5), **options)

    return change


def load_twice(module):
    """The second checkpoint may take the place in memory that the first replacement has freed."""
    for _ in range(2):
        module.load_state_dict(moved(module, 0.25), assign=True)


def data_between_modes(module):
    module.train()
    module.parametrizations.weight.original.data.mul_(2)
    gate_of(module).log_alpha.data.neg_()
    module.eval()


def other_values_in_the_same_place(module):
    """What a move to another dtype and back may do: same parameter, same address, same version, other values."""

    def move(tensor):
        memory = tensor.detach().numpy()
        memory *= -1.25
        return torch.from_numpy(memory)

    module._apply(move)


def there_and_back(module):
    """Values change by rounding, and the memory may be that of before."""
    module.half().float()


CHANGES = {
    "SGD": optimizer_step(lambda p: torch.optim.SGD(p, lr=0.5)),
    "Adam": optimizer_step(lambda p: torch.optim.Adam(p, lr=0.5)),
    "fused Adam": optimizer_step(lambda p: torch.optim.Adam(p, lr=0.5, fused=True)),
    "foreach AdamW": optimizer_step(lambda p: torch.optim.AdamW(p, lr=0.5, foreach=True)),
    "weight in place": lambda m: multiply(m.parametrizations.weight.original),
    "part of the weight in place": lambda m: multiply(m.parametrizations.weight.original[0, 1:]),
    "gates in place": lambda m: multiply(gate_of(m).log_alpha),
    "load_state_dict": load(),
    "load_state_dict(assign=True)": load(assign=True),
    "load_state_dict(assign=True) twice": load_twice,
    "a dense checkpoint": lambda m: m.load_state_dict(nn.Linear(4, 6).state_dict()),
    "set_temperature": lambda m: set_temperature(m, gate_of(m).temperature / 2),
    "another parameter": lambda m: setattr(m.parametrizations.weight, "original", nn.Parameter(torch.randn(6, 4))),
    "an assigned weight": lambda m: setattr(m, "weight", torch.randn(6, 4)),
    "data between modes": data_between_modes,
    "half precision and back": there_and_back,
    "other values in the same place": other_values_in_the_same_place,
    "init in place": lambda m: nn.init.normal_(m.parametrizations.weight.original),
}


@pytest.mark.parametrize("seen", ["without gradients", "with gradients", "in inference mode"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_kept_fold_is_never_stale(change, seen):
    context = {
        "without gradients": torch.no_grad,
        "with gradients": torch.enable_grad,
        "in inference mode": torch.inference_mode,
    }[seen]
    module = layer()
    for _ in range(2):
        with context():
            before = module.weight.detach().clone()
        CHANGES[change](module)
        with context():
            torch.testing.assert_close(module.weight.detach().clone(), plain(module).detach())
            if change != "half precision and back":  # rounded once, rounded for good
                assert not torch.equal(module.weight, before)
    assert is_fresh(module)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_fold_follows_the_weights_dtype(dtype):
    module = layer()
    assert module.weight.dtype == torch.float32
    module.to(dtype)
    assert module.weight.dtype == dtype
    assert is_fresh(module)


def test_the_fold_follows_the_estimator():
    module = layer()
    module(torch.ones(1, 4))
    gate_of(module).estimator = "paper"
    z = (GAMMA + (ZETA - GAMMA) * torch.sigmoid(gate_of(module).log_alpha)).clamp(0, 1)
    kept = median(gate_of(module).log_alpha, 2 / 3) > 0
    torch.testing.assert_close(module.weight, module.parametrizations.weight.original * z * kept)


def test_editing_a_copy_never_reaches_the_original():
    module = layer()
    expected = module.weight.detach().clone()
    twin = copy.deepcopy(module)
    assert torch.equal(twin.weight, expected)
    multiply(twin.parametrizations.weight.original)
    multiply(gate_of(twin).log_alpha)
    assert is_fresh(twin)
    assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_caller_who_changes_the_weight_it_was_given_spoils_nothing(context):
    module = layer()
    expected = module.weight.detach().clone()
    with context():
        given = module.weight
        if given.requires_grad:
            given = given.detach()
        given.mul_(3)
        assert torch.equal(module.weight, expected)
    assert torch.equal(module.weight, expected)
    module.weight.mul_(3)
    assert torch.equal(module.weight, expected)


def test_functional_call_uses_the_tensors_it_is_given_and_leaves_the_own_ones_kept():
    module = layer()
    x = torch.eye(4)
    own = module(x).detach()
    bias = module.bias.detach()
    memory = np.empty((6, 4), dtype=np.float32)
    for key, name in ((LOCATION, "log_alpha"), (WEIGHT, "weight")):
        for value in (9.0, -9.0, 1.0, 0.0):  # each tensor takes the place in memory of the one before it
            memory[:] = value
            given = torch.from_numpy(memory)
            expected = plain(module, **{name: given}).T + bias
            torch.testing.assert_close(functional_call(module, {key: given}, (x,)), expected)
    assert torch.equal(module(x), own)


def test_functional_call_gives_gradients_to_the_tensors_it_is_given():
    module = layer()
    with torch.no_grad():
        gate_of(module).log_alpha.fill_(-9.0)  # closed here, open there
    given = {
        WEIGHT: torch.randn(6, 4, requires_grad=True),
        LOCATION: torch.empty(6, 4).uniform_(-1, 1).requires_grad_(),
    }
    out = functional_call(module, given, (torch.eye(4),))
    probe = torch.randn_like(out)
    got = torch.autograd.grad(out, [*given.values()], probe)
    by_hand = plain(module, weight=given[WEIGHT], log_alpha=given[LOCATION]).T + module.bias
    expected = torch.autograd.grad(by_hand, [*given.values()], probe)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert bool(a.all())


def test_inference_mode_first_then_training_use():
    module = layer()
    x = torch.randn(3, 4)
    with torch.inference_mode():
        seen = module(x).clone()
    out = module(x)
    torch.testing.assert_close(out.detach(), seen)
    out.sum().backward()
    assert module.parametrizations.weight.original.grad is not None
    assert gate_of(module).log_alpha.grad is not None


def test_a_model_made_of_inference_tensors_computes_freshly():
    module = layer()
    with torch.inference_mode():
        module.load_state_dict(moved(module, 0.5), assign=True)
        torch.testing.assert_close(module.weight, plain(module))
        module.parametrizations.weight.original.mul_(2)
        gate_of(module).log_alpha.neg_()
        torch.testing.assert_close(module.weight, plain(module))


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("estimator", ["median", "paper", "mean"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_gradients_in_evaluation_are_those_of_the_formula(granularity, estimator):
    module = layer(granularity, dtype=torch.float64, estimator=estimator)
    gate = gate_of(module)
    x, probe = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    (module(x) * probe).sum().backward()
    weight = module.parametrizations.weight.original.detach().clone().requires_grad_()
    log_alpha = gate.log_alpha.detach().double().requires_grad_()
    if estimator == "mean":  # E[z] by the midpoint rule over the noise
        u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        s = torch.sigmoid((torch.logit(u) + log_alpha[..., None]) * 1.5)
        z = (GAMMA + (ZETA - GAMMA) * s).clamp(0, 1).mean(-1)
    else:
        z = median(log_alpha, 2 / 3 if estimator == "median" else 1.0)
    z = torch.where(median(log_alpha.detach(), 2 / 3) > 0, z, 0.0)
    (F.linear(x, weight * spread(z, granularity), module.bias.detach()) * probe).sum().backward()
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if estimator == "mean" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(module.parametrizations.weight.original.grad, weight.grad, **tolerance)
    torch.testing.assert_close(gate.log_alpha.grad.double(), log_alpha.grad, **tolerance)
    assert bool((gate.log_alpha.grad != 0).any())


@pytest.mark.parametrize("family", ["straight_through", "stg", "deterministic"])
def test_every_family_has_gradients_in_evaluation(family):
    module = layer("output", family=family)
    with torch.no_grad():
        gate_of(module).log_alpha.copy_(torch.tensor([-1.2, -0.8, 0.2, 0.4, 0.7, 1.3]))
    module(torch.ones(2, 4)).sum().backward()
    z = gate_of(module)().detach()
    weight = module.parametrizations.weight.original
    torch.testing.assert_close(weight.grad, 2 * z[:, None].expand(6, 4))
    slope = gate_of(module).log_alpha.grad / (2 * weight.detach().sum(1))
    x = gate_of(module).log_alpha.detach().requires_grad_()
    if family == "stg":
        expected = ((x > 0) & (x < 1)).float()
    elif family == "straight_through":
        expected = torch.zeros(6)
    else:
        (expected,) = torch.autograd.grad(median(x, 2 / 3).sum(), x)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["weight", "gates", "both"])
def test_gradients_go_only_where_they_are_wanted(frozen):
    module = layer()
    weight, log_alpha = module.parametrizations.weight.original, gate_of(module).log_alpha
    weight.requires_grad_(frozen == "gates")
    log_alpha.requires_grad_(frozen == "weight")
    module(torch.randn(2, 4)).sum().backward()
    assert (weight.grad is not None) == (frozen == "gates")
    assert (log_alpha.grad is not None) == (frozen == "weight")


def test_gradients_belong_to_the_forward_that_was_made():
    def gradient(change):
        torch.manual_seed(2)
        module = layer()
        out = module(torch.ones(2, 4)).sum()
        change(module)
        out.backward()
        return gate_of(module).log_alpha.grad

    expected = gradient(lambda module: None)
    assert torch.equal(gradient(lambda module: set_temperature(module, 0.2)), expected)
    assert torch.equal(gradient(lambda module: setattr(gate_of(module), "estimator", "mean")), expected)
    assert torch.equal(gradient(lambda module: module.train()), expected)


def test_a_weight_that_was_changed_before_backward_is_noticed():
    module = layer()
    out = module(torch.ones(2, 4)).sum()
    multiply(module.parametrizations.weight.original)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_gradients_follow_the_gates():
    module = layer()
    x = torch.ones(2, 4)
    for value in (0.5, -0.5, 9.0):
        module.zero_grad()
        with torch.no_grad():
            gate_of(module).log_alpha.fill_(value)
        module(x).sum().backward()
        log_alpha = gate_of(module).log_alpha.detach().requires_grad_()
        weight = module.parametrizations.weight.original.detach().requires_grad_()
        F.linear(x, plain(module, weight=weight, log_alpha=log_alpha)).sum().backward()
        torch.testing.assert_close(gate_of(module).log_alpha.grad, log_alpha.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.parametrizations.weight.original.grad, weight.grad)


def test_gradients_accumulate_over_two_evaluations():
    module = layer()
    x = torch.randn(2, 4)
    module(x).sum().backward()
    once = gate_of(module).log_alpha.grad.clone()
    module(x).sum().backward()
    torch.testing.assert_close(gate_of(module).log_alpha.grad, 2 * once)


def test_a_gradient_penalty_on_the_inputs_works_in_evaluation():
    module = layer(dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    weight = module.parametrizations.weight.original.detach().requires_grad_()
    out = F.linear(x, plain(module, weight=weight), module.bias)
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(slope.square().sum(), weight)
    torch.testing.assert_close(module.parametrizations.weight.original.grad, expected)


# --------------------------------------------------------------------------------------------------- transforms


@pytest.mark.filterwarnings("ignore:.torch.jit")  # forward mode itself
def test_transforms_differentiate_the_plain_formula():
    module = layer(dtype=torch.float64)
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(3, 4, dtype=torch.float64)

    def loss(values, example):
        return functional_call(module, values, (example,)).square().sum()

    def by_hand(values, example):
        weight = plain(module, weight=values[WEIGHT], log_alpha=values[LOCATION])
        return F.linear(example, weight, values["bias"]).square().sum()

    for got, expected in (
        (grad(loss)(parameters, x), grad(by_hand)(parameters, x)),
        (
            vmap(grad(loss), in_dims=(None, 0))(parameters, x),
            vmap(grad(by_hand), in_dims=(None, 0))(parameters, x),
        ),
        (jacrev(loss)(parameters, x), jacrev(by_hand)(parameters, x)),
    ):
        for key in parameters:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5)

    def of_gates(function):
        return lambda log_alpha: function({**parameters, LOCATION: log_alpha}, x)

    torch.testing.assert_close(
        hessian(of_gates(loss))(parameters[LOCATION]),
        hessian(of_gates(by_hand))(parameters[LOCATION]),
        rtol=1e-4,
        atol=1e-4,
    )
    direction = (torch.ones_like(parameters[LOCATION]),)
    torch.testing.assert_close(
        jvp(of_gates(loss), (parameters[LOCATION],), direction)[1],
        jvp(of_gates(by_hand), (parameters[LOCATION],), direction)[1],
        rtol=1e-4,
        atol=1e-4,
    )


def test_an_ensemble_of_stacked_parameters_runs_under_vmap():
    models = [layer() for _ in range(3)]
    stacked = {k: torch.stack([m.state_dict()[k] for m in models]) for k, _ in models[0].named_parameters()}
    x = torch.randn(2, 4)
    with torch.no_grad():
        out = vmap(lambda values: functional_call(models[0], values, (x,)))(stacked)
        for i, module in enumerate(models):
            torch.testing.assert_close(out[i], module(x))
    assert is_fresh(models[0])


# ------------------------------------------------------------------------------------------------------- the rest


def test_closed_gates_give_positive_zeros_whatever_the_weight():
    module = layer("output")
    with torch.no_grad():
        gate_of(module).log_alpha.copy_(torch.tensor([-9.0, -9, -9, 9, 9, 9]))
        module.parametrizations.weight.original[0] = torch.tensor([-1.0, torch.inf, -torch.inf, torch.nan])
        weight = module.weight
    assert torch.equal(weight[:3], torch.zeros(3, 4))
    assert not bool(torch.signbit(weight[:3]).any())
    assert torch.equal(weight[3:], module.parametrizations.weight.original[3:])


def test_training_draws_new_gates_for_every_forward_and_evaluation_none():
    module = layer().train()
    x = torch.eye(4)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_sites_come_with_names_owners_and_weights():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    model["b"] = nn.Linear(4, 4)
    model["b"].weight = model["a"].weight
    sparsify(model, {"a": "weight", "b": "weight", "attention": "input"})
    sites = list(iter_sites(model))
    assert [site.name for site in sites] == [
        "a.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "b.weight",
    ]
    assert [site.module_name for site in sites] == ["a", "attention", "attention.out_proj", "b"]
    for site in sites:
        assert site.module is model.get_submodule(site.module_name)
    assert sites[0].weight is sites[3].weight
    assert sites[0].gating.gate is sites[3].gating.gate


def test_the_kept_fold_does_not_keep_the_model_alive():
    module = layer()
    with torch.no_grad():
        module(torch.ones(1, 4))
    alive = weakref.ref(module.parametrizations.weight.original)
    del module
    gc.collect()
    assert alive() is None


def test_a_folded_layer_is_what_prune_returns():
    module = layer("input")
    assert torch.equal(prune(module).weight, module.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["median", "paper", "mean"])
@pytest.mark.parametrize("rule", [False, True])
def test_a_weight_folded_in_pieces_is_the_weight_folded_at_once(dtype, estimator, rule):
    torch.manual_seed(0)
    module = nn.Linear(512, 600).to(dtype)  # more than two pieces
    sparsify(module, GateSpec(estimator=estimator, temperature=1.5))
    gate = gate_of(module)
    gate.log_alpha.data.normal_().mul_(3)
    if rule:
        set_budget(module, Budget(keep=1000, steps=3))
    gating = module.parametrizations.weight[0]
    weight = module.parametrizations.weight.original.detach()
    expected = gating.fold(weight)
    folded = gating.fold_into(weight, torch.full_like(weight, torch.nan))
    assert torch.equal(folded, expected)
    assert not bool(torch.signbit(folded[folded == 0]).any())
    assert gate.kept() == int(gate.support().sum())
    assert gate.mean_keep_prob() == pytest.approx(float(gate.keep_prob().detach().double().mean()), rel=1e-12)
    assert gating.fold_into(weight, out=weight) is weight  # in place
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("side", [8, 64], ids=["without kernels", "with Numba's kernels"])
def test_a_training_forward_of_one_linear_enters_at_most_seven_files(side):
    layer = nn.Linear(side, side)
    sparsify(layer, "weight")
    x, folder, entered = torch.randn(2, side), str(Path(l0hooks.__file__).parent), set()
    layer(x)  # kernels are imported now

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            entered.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    assert 3 <= len(entered) <= 7, sorted(entered)
