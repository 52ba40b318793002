"""``Gate`` by itself: start, modes, support, projection, temperature."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from l0hooks import Budget, Gate, iter_gates, set_temperature, sparsify
from l0hooks.errors import InvalidValueError, StateError

FAMILIES = ["hard_concrete", "straight_through", "stg", "deterministic"]
ESTIMATORS = ["median", "paper", "mean"]


def located(values, **options):
    """A gate in evaluation mode, at these locations."""
    gate = Gate(len(values), **options).eval()
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor(values))
    return gate


@pytest.mark.parametrize("shape", [5, (5,), [2, 3], (2, 1, 3), torch.Size([4]), ()], ids=str)
def test_a_gate_has_the_shape_asked_for(shape):
    gate = Gate(shape)
    expected = (shape,) if isinstance(shape, int) else tuple(shape)
    for tensor in (gate.log_alpha, gate(), gate.eval()(), gate.keep_prob(), gate.support(), gate.noise()):
        assert tensor.shape == expected
    assert gate.support().dtype == torch.bool
    assert gate.log_alpha.dtype == torch.float32
    assert gate.expected_l0().shape == ()


@pytest.mark.parametrize("shape", [0, -1, (2, 0), (3, -2)], ids=str)
def test_empty_shapes_are_refused(shape):
    with pytest.raises(InvalidValueError, match="every axis must be positive"):
        Gate(shape)


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_keep_probability_asked_for_is_the_one_given(family, probability):
    gate = Gate(3, family=family, init_keep_prob=probability)
    torch.testing.assert_close(gate.keep_prob(), torch.full((3,), probability), rtol=1e-5, atol=0)
    assert gate.expected_l0().item() == pytest.approx(3 * probability, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_start_has_a_mean_of_95_percent(family):
    gate = Gate(3, family=family)
    mean = gate.family.mean(gate.log_alpha, gate.temperature)
    torch.testing.assert_close(mean, torch.full((3,), 0.95), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_keep_prob": 1.0}, "init_keep_prob"),
        ({"init_mean": 0.0}, "init_mean"),
        ({"init_mean": 0.5, "init_keep_prob": 0.5}, "cannot be given together"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"gamma": 0.2}, "stretch interval"),
        ({"family": "soft"}, "the name must be known(.|\n)*got: 'soft'"),
        ({"estimator": "mode"}, "the test-time gate must be known(.|\n)*got: 'mode'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InvalidValueError, match=message):
        Gate(3, **options)


def test_training_samples_and_evaluation_does_not():
    gate = Gate(1000, init_keep_prob=0.5)
    first, second = gate(), gate()
    assert not torch.equal(first, second)
    assert first.min().item() == 0
    assert first.max().item() == 1
    gate.eval()
    assert torch.equal(gate(), gate())


def test_samples_have_the_keep_probability():
    gate = Gate(200_000, init_keep_prob=0.3)
    share = float((gate() > 0).float().mean())
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 200_000)


@pytest.mark.parametrize("temperature", [0.2, 2 / 3, 1.5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_stays_exactly_if_its_value_is_not_zero(family, estimator, temperature):
    locations = torch.linspace(-8, 8, 401).tolist()
    gate = located(locations, family=family, estimator=estimator, temperature=temperature)
    assert torch.equal(gate() != 0, gate.support())
    assert 0 < int(gate.support().sum()) < 401


@pytest.mark.parametrize("temperature", [0.2, 2 / 3, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_stays_exactly_if_its_keep_probability_is_above_one_half(family, temperature):
    gate = located(torch.linspace(-8, 8, 401).tolist(), family=family, temperature=temperature)
    clear = (gate.keep_prob() - 0.5).abs() > 1e-5
    assert torch.equal(gate.support()[clear], (gate.keep_prob() > 0.5)[clear])
    assert int(clear.sum()) >= 400


def test_the_support_does_not_depend_on_the_estimator():
    locations = torch.linspace(-6, 6, 241).tolist()
    first, *others = [located(locations, estimator=estimator).support() for estimator in ESTIMATORS]
    for other in others:
        assert torch.equal(first, other)


def test_each_estimator_is_its_formula():
    locations = [-3.0, -1.2, -0.3, 0.0, 0.8, 2.5]
    beta, gamma, zeta = 0.5, -0.2, 1.3

    def stretched(logit):
        return min(1.0, max(0.0, gamma + (zeta - gamma) / (1 + math.exp(-logit))))

    def mean(logit):
        draws = [(i + 0.5) / 200_000 for i in range(200_000)]
        u = torch.tensor(draws, dtype=torch.float64)
        s = torch.sigmoid((torch.log(u / (1 - u)) + logit) / beta)
        return float((gamma + (zeta - gamma) * s).clamp(0, 1).mean())

    formulas = {"median": lambda x: stretched(x / beta), "paper": stretched, "mean": mean}
    for estimator, formula in formulas.items():
        gate = located(locations, estimator=estimator, temperature=beta, gamma=gamma, zeta=zeta)
        kept = [stretched(x / beta) > 0 for x in locations]
        expected = [formula(x) if keep else 0.0 for x, keep in zip(locations, kept, strict=True)]
        torch.testing.assert_close(gate(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_values_are_differentiable_inside_and_flat_outside():
    gate = located([-5.0, 0.1, 9.0])
    gate().sum().backward()
    assert (gate.log_alpha.grad > 0).tolist() == [False, True, False]


# ---------------------------------------------------------------------------------------------------- temperature


class Selecting(nn.Module):
    """Standalone gates, parametrized weights and a fitter's list, on several levels."""

    def __init__(self):
        super().__init__()
        self.select = Gate(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([Gate(2), Gate(3)]))
        self.again = self.select


def test_set_temperature_reaches_every_gate():
    model = Selecting()
    sparsify(model, "weight")
    set_temperature(model, 0.25)
    assert [gate.temperature for _, gate in iter_gates(model)] == [0.25] * 4
    assert {gate.temperature for gate in model.modules() if isinstance(gate, Gate)} == {0.25}


def test_iter_gates_names_each_gate_once():
    model = Selecting()
    sparsify(model, "weight")
    found = list(iter_gates(model))
    assert [name for name, _ in found] == [
        "select",
        "body.0.parametrizations.weight.0.gate",
        "body.1.0",
        "body.1.1",
    ]
    assert len({id(gate) for _, gate in found}) == 4
    for name, gate in found:
        assert model.get_submodule(name) is gate


def test_a_gate_shared_by_two_weights_comes_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    sparsify(model, "weight")
    assert len(list(iter_gates(model))) == 1


def test_a_model_without_gates_has_none_and_no_temperature_to_set():
    assert list(iter_gates(nn.Linear(2, 2))) == []
    set_temperature(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_temperature_is_refused_and_no_gate_changed(value):
    model = Selecting()
    with pytest.raises(InvalidValueError, match="set_temperature: temperature must be positive"):
        set_temperature(model, value)
    with pytest.raises(InvalidValueError, match="temperature must be positive"):
        model.select.temperature = value
    assert {gate.temperature for _, gate in iter_gates(model)} == {2 / 3}


def test_the_temperature_enters_samples_values_and_keep_probabilities():
    gate = located([-0.5, 0.5])
    before = gate().tolist(), gate.keep_prob().tolist()
    set_temperature(gate, 0.3)
    assert gate().tolist() != before[0]
    assert gate.keep_prob().tolist() == pytest.approx(
        [1 / (1 + math.exp(-(x - 0.3 * math.log(0.1 / 1.1)))) for x in (-0.5, 0.5)], rel=1e-5
    )


# ----------------------------------------------------------------------------------------------------- projection

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e4),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e4, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=100.0),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=100.0),
    "AdamW one by one": lambda p: torch.optim.AdamW(p, lr=100.0, foreach=False),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=100.0, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=100.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=100.0),
}


def step(gate, optimizer, direction):
    optimizer.zero_grad()
    (direction * gate.log_alpha).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_ends_within_the_limits_and_gates_recover(name, family):
    gate = Gate(3, family=family)
    low, high = gate.limits
    optimizer = OPTIMIZERS[name](gate.parameters())
    for _ in range(3):
        step(gate, optimizer, 1.0)
        assert gate.log_alpha.tolist() == pytest.approx([low] * 3)
    assert not bool(gate.support().any())
    torch.testing.assert_close(gate.keep_prob() > 0, torch.ones(3, dtype=torch.bool))
    for _ in range(12):  # momentum needs a while to turn round
        step(gate, optimizer, -1.0)
        assert low <= float(gate.log_alpha.detach().min())
        assert float(gate.log_alpha.detach().max()) <= high
    assert gate.log_alpha.tolist() == pytest.approx([high] * 3)
    assert bool(gate.support().all())


def test_a_closed_gate_has_a_penalty_gradient_that_moves_it():
    gate = Gate(1)
    step(gate, torch.optim.SGD(gate.parameters(), lr=1e9), 1.0)
    gate.log_alpha.grad = None
    gate.expected_l0().backward()
    assert float(gate.log_alpha.grad) > 0


def test_a_start_beyond_the_limits_is_not_pulled_back():
    gate = Gate(2, init_keep_prob=1 - 1e-7)
    start = gate.log_alpha.detach().clone()
    assert float(start[0]) > 10
    step(gate, torch.optim.SGD(gate.parameters(), lr=0.0), 1.0)
    assert torch.equal(gate.log_alpha, start)


@pytest.mark.parametrize("how", ["deepcopy", "deepcopy of a used one", "pickle", "inside a model"])
def test_copied_gates_are_projected_too(how):
    if how == "inside a model":
        model = nn.Sequential(nn.Linear(2, 2))
        sparsify(model, "weight")
        gate = next(gate for _, gate in iter_gates(copy.deepcopy(model)))
    else:
        original = Gate(3)
        if how == "deepcopy of a used one":
            step(original, torch.optim.SGD(original.parameters(), lr=1e4), 1.0)
        gate = pickle.loads(pickle.dumps(original)) if how == "pickle" else copy.deepcopy(original)
    step(gate, torch.optim.AdamW(gate.parameters(), lr=1e4), 1.0)
    torch.testing.assert_close(gate.log_alpha.detach(), torch.full_like(gate.log_alpha, gate.limits[0]))


def test_reloaded_gates_are_projected_too():
    gate = Gate(3)
    optimizer = torch.optim.SGD(gate.parameters(), lr=1e4)
    for _ in range(2):
        step(gate, optimizer, 1.0)
    gate.load_state_dict(Gate(3).state_dict(), assign=True)
    step(gate, torch.optim.AdamW(gate.parameters(), lr=1e4), 1.0)
    torch.testing.assert_close(gate.log_alpha.detach(), torch.full((3,), gate.limits[0]))


def test_gates_are_not_kept_alive():
    gates = [Gate(2), copy.deepcopy(Gate(2))]
    alive = [weakref.ref(gate) for gate in gates]
    del gates
    gc.collect()
    assert [gate() for gate in alive] == [None, None]


# ------------------------------------------------------------------------------------------------- dtype and state


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_a_gate_stays_in_float32(cast):
    gate = Gate(3)
    same = gate.log_alpha
    assert getattr(gate, cast)() is gate
    assert gate.log_alpha.dtype == gate().dtype == gate.eval()().dtype == torch.float32
    assert gate.log_alpha is same


def test_a_gate_moves_to_meta():
    gate = Gate(3).to("meta")
    assert gate.log_alpha.is_meta
    assert gate.log_alpha.dtype == torch.float32


def test_the_state_holds_the_temperature():
    gate = Gate(3, init_keep_prob=0.2, temperature=0.3)
    again = Gate(3)
    again.load_state_dict(gate.state_dict())
    assert again.temperature == 0.3
    assert torch.equal(again.log_alpha, gate.log_alpha)


def test_a_gate_prints_its_shape_temperature_and_estimator():
    assert repr(Gate((2, 3), temperature=0.5, estimator="mean")) == ("Gate((2, 3), temperature=0.5, estimator='mean')")


def test_gradients_of_a_sample_are_those_of_the_formula():
    gate = Gate(500, init_keep_prob=0.6)
    z = gate()
    z.sum().backward()
    z = z.detach().double()
    # inside, z = γ + (ζ − γ)·s with s = σ((logit u + logα)/β): dz/dlogα = (ζ − γ)·s·(1 − s)/β
    s = (z + 0.1) / 1.2
    expected = torch.where((z > 0) & (z < 1), 1.2 * s * (1 - s) * 1.5, 0.0)
    torch.testing.assert_close(gate.log_alpha.grad.double(), expected, rtol=1e-4, atol=1e-5)
    assert 0 < int((expected > 0).sum()) < 500


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["log_alpha", "multipliers"])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused_before_anything_is_loaded(name, number):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    sparsify(model, "weight", budget=Budget(sparsity=0.5, steps=3, method="lagrangian"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    damaged = {key: value + 1 for key, value in state.items()}
    key = next(key for key in reversed(state) if key.endswith(name))
    damaged[key] = state[key].clone()
    damaged[key].view(-1)[0] = number
    damaged |= {key: value for key, value in state.items() if key.endswith("_extra_state")}
    with pytest.raises(StateError, match=rf"{name} must be finite\.\n  got: 1 of"):
        model.load_state_dict(damaged)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
