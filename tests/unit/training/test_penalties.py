"""Each penalty against a count by hand."""

import itertools
import math
from functools import partial

import pytest
import torch
from penalty_laws import PenaltyLaws, keep
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from l0hooks import Gate, GateSpec, iter_gates, penalty, register_penalty, set_temperature, sparsify
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import SpecError, StateError
from l0hooks.gates.shared_sampling import keep_probs
from l0hooks.training import penalties as room


def build(layer, granularity, example=None):
    """A gated layer whose gates all differ, and its log-odds as nested lists."""
    model = nn.Sequential(layer)
    sparsify(model, {"0": granularity}, example_inputs=None if example is None else (example,))
    gate = next(gate for _, gate in iter_gates(model))
    with torch.no_grad():
        gate.log_alpha.uniform_(-3, 3)
    return model, gate.log_alpha.detach()


@pytest.fixture
def registry():
    """The registry, as it was afterwards."""
    before = dict(room._registry)
    yield room._registry
    room._registry.clear()
    room._registry.update(before)


class TestL0(PenaltyLaws):
    name = "l0"

    def of_gate(self, keep_prob):
        return keep_prob


class TestL2(PenaltyLaws):
    name, counts_closed = "l2", True

    def of_element(self, keep_prob, weight, uses):
        return weight**2


class TestExpectedL2(PenaltyLaws):
    name = "expected_l2"

    def of_element(self, keep_prob, weight, uses):
        return keep_prob * weight**2


class TestL0L2(PenaltyLaws):
    name, strength = "l0l2", (0.3, 0.7)

    def of_element(self, keep_prob, weight, uses):
        return keep_prob * (0.3 + 0.7 / 2 * weight**2)


class TestParams(PenaltyLaws):
    name = "params"

    def of_element(self, keep_prob, weight, uses):
        return keep_prob


class TestMacs(PenaltyLaws):
    name = "macs"

    def of_element(self, keep_prob, weight, uses):
        return keep_prob * uses


class TestOneOfTheUsersOwn(PenaltyLaws):
    """The variance of whether a gate is zero, times two: a function of one gate."""

    name, strength = "spread", (2.0, 1.0)

    @pytest.fixture(autouse=True)
    def _registered(self, registry):
        @register_penalty("spread", strengths=2)
        def spread(gated, factor, other):
            p = gated.gate.keep_prob()
            return factor * (p * (1 - p)).sum() + other * p.sum()

    def of_gate(self, keep_prob):
        return 2 * keep_prob * (1 - keep_prob) + keep_prob


def test_penalties_add_up():
    model, _ = build(nn.Linear(4, 6), "output", torch.zeros(1, 4))
    both = penalty(model, l0=0.1, l2=0.01, macs=1e-3).item()
    assert both == pytest.approx(
        sum(penalty(model, **{k: v}).item() for k, v in {"l0": 0.1, "l2": 0.01, "macs": 1e-3}.items()), rel=1e-6
    )


def test_the_expected_l2_norm_is_that_of_the_weights_whose_gates_are_not_zero():
    """E[Σ (1[z ≠ 0]·w)²] = Σ keep_prob·w², by sampling the gates."""
    model, _ = build(nn.Linear(4, 6), "output")
    gate = next(gate for _, gate in iter_gates(model))
    squares = model[0].parametrizations.weight.original.detach().square().sum(1)
    with torch.no_grad():
        norms = torch.stack([((gate.sample() != 0) * squares).sum() for _ in range(4000)])
    assert abs(norms.mean() - penalty(model, expected_l2=1.0).item()) < 4 * norms.std() / 4000**0.5
    assert norms.std() > 0


def test_descending_the_l0_penalty_closes_gates():
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, "weight")
    optimizer = torch.optim.Adam([gate.log_alpha for _, gate in iter_gates(model)], lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        penalty(model, l0=1.0).backward()
        optimizer.step()
    assert not any(bool(gate.support().any()) for _, gate in iter_gates(model))


# --------------------------------------------------------------------------------- gates wherever they live


class Fitter(nn.Module):
    """Standalone gates on two levels beside gated weights."""

    def __init__(self):
        super().__init__()
        self.samples = Gate(10, init_keep_prob=0.3)
        self.inner = nn.ModuleDict({"features": Gate((2, 2), init_keep_prob=0.75)})
        self.fc = nn.Linear(4, 2)


def test_standalone_gates_inside_a_model_count():
    model = Fitter()
    assert penalty(model, l0=1.0).item() == pytest.approx(10 * 0.3 + 4 * 0.75, rel=1e-5)
    sparsify(model, GateSpec(init_keep_prob=0.5))
    assert penalty(model, l0=1.0).item() == pytest.approx(10 * 0.3 + 4 * 0.75 + 8 * 0.5, rel=1e-5)
    assert penalty(model.inner, l0=1.0).item() == pytest.approx(4 * 0.75, rel=1e-5)
    assert penalty(model.samples, l0=2.0).item() == pytest.approx(2 * 10 * 0.3, rel=1e-5)


def test_iter_gated_names_the_layers_and_the_standalone_gates():
    model = Fitter()
    sparsify(model, "weight")
    found = {one.name: (one.gate, [site.name for site in one.sites]) for one in iter_gated(model)}
    assert set(found) == {"samples", "inner.features", "fc"}
    assert found["samples"] == (model.samples, [])
    assert found["fc"][1] == ["fc.weight"]


@pytest.mark.parametrize("kind", ["one parameter", "two parameters", "one layer, two names"])
def test_tied_weights_count_once_but_work_at_each_place(kind):
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    if kind == "one parameter":
        second.weight = first.weight
    elif kind == "two parameters":
        second.weight = nn.Parameter(first.weight.data)
    else:
        second = first
    weight = first.weight.detach().clone()
    model = nn.Sequential(first, second)
    sparsify(model, GateSpec(init_keep_prob=0.5), example_inputs=(torch.zeros(3, 4),))
    assert penalty(model, l0=1.0).item() == pytest.approx(8, rel=1e-5)
    assert penalty(model, params=1.0).item() == pytest.approx(8, rel=1e-5)
    assert penalty(model, l2=1.0).item() == pytest.approx(float(weight.square().sum()), rel=1e-5)
    assert penalty(model, expected_l2=1.0).item() == pytest.approx(float(weight.square().sum()) / 2, rel=1e-5)
    assert penalty(model, macs=1.0).item() == pytest.approx(2 * 16 / 2, rel=1e-5)


def test_an_attention_layer_counts_all_its_projections():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    sparsify(model, GateSpec(granularity="output", init_keep_prob=0.5))
    assert penalty(model, l0=1.0).item() == pytest.approx((12 + 4) / 2, rel=1e-5)
    assert penalty(model, params=1.0).item() == pytest.approx((48 + 16) / 2, rel=1e-5)


def test_l2_sees_the_gated_weights_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    sparsify(model, {"0": "weight"})
    expected = float(model[0].parametrizations.weight.original.detach().square().sum())
    with torch.no_grad():  # neither gates, nor biases, nor other layers
        next(iter_gates(model))[1].log_alpha.fill_(7.0)
        model[0].bias.fill_(50.0)
        model[1].weight.fill_(50.0)
    assert penalty(model, l2=1.0).item() == pytest.approx(expected, rel=1e-6)


def test_the_mode_and_the_noise_do_not_matter():
    model, _ = build(nn.Linear(4, 6), "weight")
    value = penalty(model, l0=1.0, expected_l2=1.0).item()
    assert penalty(model, l0=1.0, expected_l2=1.0).item() == value
    assert penalty(model.eval(), l0=1.0, expected_l2=1.0).item() == value


def test_the_temperature_matters():
    model, log_alpha = build(nn.Linear(4, 6), "output")
    set_temperature(model, 0.3)
    assert penalty(model, l0=1.0).item() == pytest.approx(sum(keep(a, 0.3) for a in log_alpha), rel=1e-5)


def test_half_precision_weights_are_squared_in_float32():
    model = nn.Sequential(nn.Linear(64, 64).half())
    with torch.no_grad():
        model[0].weight.fill_(16.0)
    sparsify(model, "weight")
    assert penalty(model, l2=1.0).item() == 64 * 64 * 256.0  # beyond float16


# ------------------------------------------------------------------------------------------------- strengths


def three_layers():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 3), "c": Gate(5, init_keep_prob=0.5)})
    sparsify(model, GateSpec(init_keep_prob=0.5))
    return model


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        ({"a": 1.0}, 2),
        ({"a": 1.0, "*": 10.0}, 2 + 30 + 25),
        ({"*": 10.0, "a": 1.0}, 20 + 30 + 25),  # the first one counts
        ({nn.Linear: 1.0}, 5),
        ({Gate: 1.0}, 2.5),
        ({"all-linear": 1.0, "c": 4.0}, 5 + 10),
    ],
    ids=str,
)
def test_strengths_may_differ_by_pattern(strength, expected):
    assert penalty(three_layers(), l0=strength).item() == pytest.approx(expected, rel=1e-5)


def test_strengths_by_pattern_may_be_pairs():
    model = three_layers()
    squares = model["b"].parametrizations.weight.original.detach().square().sum().item()
    assert penalty(model, l0l2={"b": (1.0, 0.5)}).item() == pytest.approx(3 + 0.25 * squares / 2, rel=1e-5)


def test_a_strength_may_be_a_tensor_that_learns():
    multiplier = torch.tensor(0.5, requires_grad=True)
    model = three_layers()
    penalty(model, l0=multiplier).backward()
    assert multiplier.grad.item() == pytest.approx(7.5, rel=1e-5)


def test_a_strength_of_zero_costs_nothing():
    assert penalty(three_layers(), l0=0.0, l2=0.0).item() == 0


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("strengths", "error", "message"),
    [
        ({"l1": 1.0}, SpecError, "penalty: the penalty must be registered(.|\n)*got: 'l1'(.|\n)*'l0'"),
        ({"parms": 1.0}, SpecError, "did you mean 'params'"),
        ({}, SpecError, "at least one strength"),
        ({"l0": {"d": 1.0}}, SpecError, "penalty l0: a pattern must match(.|\n)*got: 'd'"),
        ({"l0": {"a": 1.0, nn.Conv2d: 1.0}}, SpecError, "got: Conv2d, which matches none"),
        ({"l0": (1.0, 2.0)}, SpecError, r"penalty l0: the number of strengths(.|\n)*1 strength\(s\)"),
        ({"l0l2": 1.0}, SpecError, r"penalty l0l2: (.|\n)*expected: 2 strength\(s\)\n  got: 1.0"),
        ({"l0l2": (1.0,)}, SpecError, "number of strengths"),
        ({"l0l2": {"a": 1.0}}, SpecError, "number of strengths"),
        ({"macs": 1.0}, StateError, "penalty macs of 'a.weight': multiply-adds(.|\n)*example_inputs"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(strengths, error, message):
    with pytest.raises(error, match=message):
        penalty(three_layers(), **strengths)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ReLU()], ids=str)
def test_a_model_without_gates_is_refused(model):
    with pytest.raises(StateError, match=r"the model must hold gates(.|\n)*sparsify"):
        penalty(model, l0=1.0)


# -------------------------------------------------------------------------------------------------- registry


def test_a_penalty_of_the_users_own(registry):
    @register_penalty("entropy_like")
    def entropy_like(gated):
        p = gated.gate.keep_prob()
        return (p * (1 - p)).sum()

    assert callable(entropy_like)
    model = three_layers()
    assert penalty(model, entropy_like=2.0).item() == pytest.approx(2 * 15 * 0.25, rel=1e-5)
    assert penalty(model, entropy_like={"a": 1.0}, l0=1.0).item() == pytest.approx(1 + 7.5, rel=1e-5)


def test_a_penalty_of_the_users_own_may_take_several_strengths(registry):
    @register_penalty("mixed", strengths=3)
    def mixed(gated, a, b, c):
        return a + b * gated.gate.expected_l0() + c * len(gated.sites)

    assert penalty(three_layers(), mixed=(1.0, 2.0, 3.0)).item() == pytest.approx(3 + 2 * 7.5 + 3 * 2, rel=1e-5)
    with pytest.raises(SpecError, match=r"expected: 3 strength\(s\)"):
        penalty(three_layers(), mixed=(1.0, 2.0))


@pytest.mark.parametrize("name", ["l0", "macs", "mine"])
def test_a_name_that_is_taken_is_refused_and_keeps_its_meaning(registry, name):
    if name == "mine":
        register_penalty("mine")(lambda gated: gated.gate.expected_l0())
    before = registry[name]
    with pytest.raises(SpecError, match=f"a penalty's name must be new(.|\n)*got: '{name}'"):
        register_penalty(name)(_other)
    assert registry[name] is before


def _other(gated):
    return gated.gate.expected_l0()


def test_a_notebook_cell_may_run_twice(registry):
    cell = """
from l0hooks import register_penalty
@register_penalty("celled")
def celled(gated):
    return {} * gated.gate.expected_l0()
"""
    notebook, elsewhere = {"__name__": "__main__"}, {"__name__": "another_module"}
    for factor in (1, 3):
        exec(cell.format(factor), notebook)
    assert penalty(three_layers(), celled=1.0).item() == pytest.approx(3 * 7.5, rel=1e-5)
    before = registry["celled"]
    with pytest.raises(SpecError, match="a penalty's name must be new"):
        exec(cell.format(5), elsewhere)
    assert registry["celled"] is before


def test_objects_that_are_called_have_no_place_and_replace_nothing(registry):
    register_penalty("called")(partial(_other))
    with pytest.raises(SpecError, match="a penalty's name must be new"):
        register_penalty("called")(partial(_other))


def test_the_penalty_lies_on_the_gates_device():
    model = three_layers().to("meta")
    assert penalty(model, l0=1.0, l2=1.0, l0l2=(1.0, 1.0)).device.type == "meta"


def test_a_weight_with_gates_of_its_own_counts_by_these_and_not_by_the_groups_it_belongs_to():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    sparsify(model, {"0": "weight", "2": "coupled"}, example_inputs=(torch.randn(2, 4),))
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha.fill_(60.0)  # open for certain
    assert penalty(model, params=1.0).item() == pytest.approx(
        sum(p.numel() for p in nn.Sequential(*[nn.Linear(4, 6), nn.Linear(6, 3)]).parameters()) - 3
    )  # all but the bias of the output


@pytest.mark.parametrize("double", [False, True])
def test_gates_counted_together_cost_what_each_costs_alone(double):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "a": Gate(3),
            "b": Gate((2, 4)),
            "hot": Gate(5, temperature=0.9),
            "hot too": Gate(2, temperature=0.9),
            "straight": Gate(4, family="straight_through"),
            "stg": Gate(4, family="stg"),
            "large": Gate(2**15 + 1),
        }
    )
    gates = [gate for _, gate in iter_gates(model)]
    with torch.no_grad():
        for gate in gates:
            gate.log_alpha.add_(torch.randn(gate.log_alpha.shape))
    together = penalty(model, l0=0.5)
    alone = sum(0.5 * gate.keep_prob().double().sum() for gate in gates)
    torch.testing.assert_close(together.double(), alone, rtol=1e-6, atol=0)
    locations = [gate.log_alpha for gate in gates]
    found = torch.autograd.grad(together, locations, create_graph=double)
    expected = torch.autograd.grad(alone, locations, create_graph=double)
    for mine, one in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, one)
    if double:
        found, expected = (torch.autograd.grad(sum(g.sin().sum() for g in gs), locations) for gs in (found, expected))
        for mine, one in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-7)


def test_keep_probs_together_are_those_of_each_gate():
    gates = [Gate(3), Gate((2, 4)), Gate(2, temperature=0.9), Gate(4, family="stg"), Gate(2**15 + 1)]
    with torch.no_grad():
        for gate in gates:
            gate.log_alpha.add_(torch.randn(gate.log_alpha.shape))
    for gate, together in zip(gates, keep_probs(gates), strict=True):
        torch.testing.assert_close(together, gate.keep_prob())
        assert together.shape == gate.log_alpha.shape


def test_patterns_with_strengths_of_their_own_are_counted_apart():
    gates = nn.ModuleDict({"a": Gate(2), "ab": Gate(3), "b": Gate(4), "c": Gate(5)})
    expected = {name: gate.expected_l0().item() for name, gate in gates.items()}
    found = penalty(gates, l0={"a*": 10.0, "*b": 100.0}).item()  # the first pattern that matches
    assert found == pytest.approx(10 * (expected["a"] + expected["ab"]) + 100 * expected["b"], rel=1e-6)


def test_a_sum_of_the_users_own_serves_many_gates(registry):
    calls = []

    def several(gated):
        calls.append(len(gated))
        return torch.stack([one.gate.expected_l0() for one in gated]).sum()

    @register_penalty("counted", together=several)
    def counted(gated):
        raise AssertionError("never one by one")

    model = three_layers()
    assert penalty(model, counted=2.0).item() == pytest.approx(penalty(model, l0=2.0).item())
    assert calls == [3]
    with pytest.raises(SpecError, match=r"terms with one strength(.|\n)*expected: strengths=1(.|\n)*got: strengths=2"):
        register_penalty("pairs", strengths=2, together=several)
    assert "pairs" not in registry


@pytest.mark.parametrize("context", [torch.inference_mode, FakeTensorMode])
def test_what_a_plan_keeps_serves_training_wherever_it_was_made(context):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    sparsify(model, "coupled", example_inputs=(torch.randn(2, 5),))
    coupled = next(iter_gated(model)).coupled
    with context():
        coupled.plan.expected([torch.full((8,), 0.5)], coupled.otherwise, "params")
    cost = penalty(model, params=1.0)
    cost.backward()
    p = next(gate for _, gate in iter_gates(model)).mean_keep_prob()
    assert type(cost) is torch.Tensor
    assert cost.item() == pytest.approx(8 * p * (5 + 1 + 3), rel=1e-5)


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_the_expected_size_of_coupled_groups_is_the_mean_over_independent_members(unit):
    """Every subset of members, weighed with its probability; one group lies on both axes of a square weight."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.square, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = self.first(x).relu()
            return self.last((h + self.square(h)).relu())

    model = Recurrent()
    sparsify(model, "coupled", example_inputs=(torch.randn(2, 3),))
    ((_, gate),) = iter_gates(model)
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([0.5, -0.7, 1.2]))
    p = gate.keep_prob().detach().double()
    cost = 0.0
    for kept in itertools.product((0, 1), repeat=3):
        k, chance = sum(kept), math.prod(float(q if on else 1 - q) for q, on in zip(p, kept, strict=True))
        sizes = {"params": 3 * k + k + k * k + k + 2 * k, "macs": 3 * k + k * k + 2 * k}
        cost += chance * sizes[unit]
    found = penalty(model, **{unit: 1.0})
    assert found.item() == pytest.approx(cost, rel=1e-6)
    (slope,) = torch.autograd.grad(found, gate.log_alpha)
    mean, q = p.sum(), p * (1 - p)
    each = {"params": 7 + 2 * mean + 1 - 2 * p, "macs": 5 + 2 * mean + 1 - 2 * p}[unit]
    torch.testing.assert_close(slope.double(), each * q, rtol=1e-5, atol=1e-7)
