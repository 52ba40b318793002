"""Budgets in time, by a clock that counts: on schedule while training, and met by the pruned model at the end."""

import copy
import dataclasses
import pickle

import pytest
import torch
from coupled_models import MODELS, coupled_groups, gates_of, mlp, perceptron_groups, state_of
from fake_clock import FakeClock, seconds
from hypothesis import given, settings
from hypothesis import strategies as st

from l0hooks import Budget, finish_budget, param_groups, penalty, prune, set_budget, sparsify, summary
from l0hooks.errors import InvalidValueError, L0HooksWarning, SpecError, StateError
from l0hooks.training import LatencyTable, recipe
from l0hooks.training.lagrangian import LagrangianRule
from l0hooks.training.measured_target import largest_within

SIZES = (5, 40, 24, 3)
STEPS = FakeClock(step=8, number=1e-6)


def made(clock=STEPS, spec="coupled", name="mlp", seed=0, **options):
    """A model under a budget in time, its input and its rule."""
    torch.manual_seed(seed)
    model, x = (mlp(*SIZES), torch.randn(6, 5)) if name == "mlp" else (MODELS[name][0](), MODELS[name][1]())
    groups = perceptron_groups(*SIZES) if name == "mlp" else coupled_groups(name)
    budget = Budget(**{"speedup": 2.0, "steps": 8, "clock": clock, **options})
    sparsify(model, spec, example_inputs=(x,), groups=groups, budget=budget)
    return model, x, gates_of(model)[0].rule


def train(model, x, steps, lr=0.3):
    optimizer = torch.optim.SGD(param_groups(model, lr=lr, gate_lr=lr))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).square().mean() + penalty(model, budget=1.0)).backward()
        optimizer.step()


def share(model, x, name="mlp", clock=STEPS):
    """The pruned model's time over a dense one's."""
    dense = mlp(*SIZES) if name == "mlp" else MODELS[name][0]()
    return seconds(prune(model, example_inputs=(x,)), (x,), clock) / seconds(dense, (x,), clock)


def kept(model):
    return [int(gate.support().sum()) for gate in gates_of(model)]


# --- what is reached --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "branched", "residual", "attentive", "grouped"])
@pytest.mark.parametrize("steps", [0, 4])
def test_the_pruned_model_is_as_fast_as_asked_and_no_larger_support_is(name, steps):
    clock = FakeClock(number=1e-6)
    model, x, rule = made(clock, name=name, steps=steps, speedup=1.5)
    train(model, x, steps, lr=0.01)
    assert rule.finished
    found = share(model, x, name, clock)
    assert found <= 1 / 1.5
    assert rule.measured.share == pytest.approx(found)
    assert rule.measured.speedup >= 1.5
    if found < 0.98 / 1.5:  # else near enough; what the next larger supports take
        counts, rule._support.counts = rule._support.counts, None
        for part in (0.05, 0.2, 0.6):
            masks = rule.support_at(rule.target + (rule.size.whole - rule.target) * part)
            rule._support.counts = [int(mask.sum()) for mask in masks]
            rule._support._key = ()
            assert rule._support.counts == list(counts) or share(model, x, name, clock) > 1 / 1.5


def test_measured_times_decide_where_the_table_is_wrong():
    model, x, rule = made(steps=0)
    assert share(model, x) <= 0.5
    layers = [dataclasses.replace(one, terms=tuple(t / 4 for t in one.terms)) for one in rule.table.layers]
    wrong = LatencyTable("cpu", 1, rule.table.whole, tuple(layers))  # most of the time cannot be saved
    other, _, its = made(steps=0, speedup=1.2, table=wrong)
    assert its.size.of(rule.size.counts * 0.5) > 1.2 * rule.size.of(rule.size.counts * 0.5)
    assert 0.7 < share(other, x) <= 1 / 1.2


def test_processors_that_work_in_eights_are_found_out():
    model, x, rule = made(FakeClock(step=8), steps=0)
    macs, _, _ = made(None, steps=0, speedup=None, sparsity=0.5, unit="macs")
    clock = FakeClock(step=8)
    assert share(model, x, clock=clock) <= 0.5 < share(macs, x, clock=clock)
    assert rule.measured.speedup >= 2


@pytest.mark.parametrize("method", ["shift", "lagrangian"])
@pytest.mark.parametrize("options", [{}, {"uniform": True, "round_to": 8}, {"min_keep": 8}, {"cut_every": 2}])
def test_it_works_with_other_settings(method, options):
    if method == "lagrangian" and "cut_every" in options:
        pytest.skip("refused")
    model, x, rule = made(method=method, **options)
    train(model, x, 8)
    assert rule.finished
    assert isinstance(rule, LagrangianRule) == (method == "lagrangian")
    assert share(model, x) <= 0.5
    least = max(options.get("round_to", 1), options.get("min_keep", 1))
    assert all(n >= least and n % options.get("round_to", 1) == 0 for n in kept(model))


@pytest.mark.parametrize("name", ["mlp", "branched"])
def test_the_expected_time_is_what_the_schedule_says_after_every_step(name):
    model, x, rule = made(FakeClock(number=1e-6), name=name, speedup=1.5)
    assert rule.start == rule.expected()
    for step in range(1, 9):
        train(model, x, 1, lr=0.05)
        assert rule.step == step
        assert rule.expected() == pytest.approx(rule.scheduled, rel=1e-5)
    assert rule.finished
    assert rule.target == rule.size.of(torch.tensor(kept(model)).double().numpy())


def test_sparsity_and_keep_are_shares_and_microseconds():
    clock = FakeClock(number=1e-6)
    assert made(clock, steps=0, speedup=None, sparsity=0.5, unit="latency")[2].goal == 0.5
    whole = made(clock, steps=0)[2].size.whole
    _, _, rule = made(clock, steps=0, speedup=None, keep=int(0.6 * whole), unit="latency")
    assert rule.measured.share <= int(0.6 * whole) / whole < rule.measured.share * 1.1


def test_it_can_be_finished_early_and_a_recipe_takes_a_speedup():
    model, x, rule = made(**{k: v for k, v in vars(recipe(steps=100, granularity="coupled").budget(speedup=2.0)).items()
                             if k in ("unit", "steps", "cut_every")})  # fmt: skip
    assert rule.budget.unit == "latency"
    with pytest.warns(L0HooksWarning, match="schedule of a budget has not ended"):
        prune(model, example_inputs=(x,))
    assert "µs kept, the target is" in str(summary(model))
    finish_budget(model)
    assert share(model, x) <= 0.5


def test_a_table_that_is_given_is_not_measured_again():
    first = FakeClock(step=8, number=1e-6)
    _, _, rule = made(first)
    second = FakeClock(step=8, number=1e-6)
    _, _, other = made(second, table=rule.table)
    assert second.calls == 0 < first.calls
    assert other.table is rule.table
    assert other.size.whole == rule.size.whole


# --- what cannot be reached ------------------------------------------------------------------------------------------


def test_if_no_support_is_fast_enough_the_nearest_stays_and_a_warning_names_both():
    clock = FakeClock(step=8, number=1e-6)
    model, x, rule = made(clock)
    clock.extra = 2 * seconds(mlp(*SIZES), (x,), clock)  # from now on every call takes this long besides
    with pytest.warns(
        L0HooksWarning, match=r"no support within the budget's limits[\s\S]*2\.00 times faster"
    ) as caught:
        finish_budget(model)
    assert f"{rule.measured.speedup:.2f} times faster: the nearest" in str(caught[0].message)
    assert kept(model) == [1, 1]
    assert rule.measured.speedup < 2


def test_what_the_table_already_shows_to_be_out_of_reach_is_refused():
    with pytest.raises(InvalidValueError, match="the size must be one that the gates can reach"):
        made(min_keep=20)


def test_a_copy_does_not_know_its_model():
    model, _, _ = made()
    other = copy.deepcopy(model)
    with pytest.warns(L0HooksWarning, match=r"fixed by the times of pruned models[\s\S]*a copy, which does not know"):
        finish_budget(other)
    rule = gates_of(other)[0].rule
    assert rule.measured is None
    assert rule.target <= gates_of(model)[0].rule.target
    assert rule.table is not None


def test_a_model_that_can_no_longer_be_cut_keeps_what_the_table_says(monkeypatch):
    model, _, rule = made()

    def refuse(*_, **__):
        raise StateError("it cannot be cut")

    monkeypatch.setattr("l0hooks.training.measured_target.smaller_copy", refuse)
    with pytest.warns(L0HooksWarning, match="it cannot be cut"):
        finish_budget(model)
    assert rule.finished
    assert rule.size.of(torch.tensor(kept(model)).double().numpy()) <= rule.size.whole / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 2.0, "sparsity": 0.5}, "exactly one of sparsity, keep and speedup"),
        ({}, "exactly one of sparsity, keep and speedup"),
        ({"speedup": 1.0}, "speedup must be how many times faster"),
        ({"speedup": float("nan")}, "speedup must be how many times faster"),
        ({"speedup": 2.0, "unit": "params"}, "a speedup is one in time"),
        ({"sparsity": 0.5, "clock": STEPS}, "only budgets in time use a clock or a table"),
        ({"sparsity": 0.5, "unit": "lattency"}, "did you mean 'latency'"),
    ],
)
def test_budgets_that_cannot_be(options, message):
    with pytest.raises(InvalidValueError, match=message):
        Budget(**options)


@pytest.mark.parametrize("spec", ["weight", "output", {"0": "weight", "2": "coupled"}])
def test_gates_that_save_no_time_are_refused_and_nothing_is_changed(spec):
    model, x = mlp(*SIZES), torch.randn(6, 5)
    before = state_of(model)
    groups = perceptron_groups(*SIZES) if "coupled" in str(spec) else None
    with pytest.raises(SpecError, match=r"only members of coupled groups save time[\s\S]*other gates on '0'"):
        sparsify(model, spec, example_inputs=(x,), groups=groups, budget=Budget(speedup=2.0))
    assert not gates_of(model)
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())


def test_parts_and_missing_inputs_are_refused():
    model, x = mlp(*SIZES), torch.randn(6, 5)
    sparsify(model, "coupled", example_inputs=(x,), groups=perceptron_groups(*SIZES))
    with pytest.raises(SpecError, match=r"the whole model is timed[\s\S]*got: no example_inputs"):
        set_budget(model, Budget(speedup=2.0))
    with pytest.raises(SpecError, match=r"the whole model is timed[\s\S]*got: gates under other budgets"):
        set_budget(model, {"0": Budget(speedup=2.0), "*": Budget(sparsity=0.5)}, example_inputs=(x,))


def test_a_table_of_another_model_is_refused():
    table = made(steps=0)[2].table
    model, x = mlp(5, 40, 16, 3), torch.randn(6, 5)
    with pytest.raises(SpecError, match=r"a table must be of this model[\s\S]*a table with '2' of lengths \(40, 24\)"):
        sparsify(model, "coupled", example_inputs=(x,), budget=Budget(speedup=2.0, table=table))
    few = LatencyTable("cpu", 1, table.whole, table.layers[:1])
    with pytest.raises(SpecError, match="a table without '2'"):
        made(table=few)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 8])
def test_a_checkpoint_goes_on_under_the_times_of_another_machine(steps):
    model, x, _ = made()
    train(model, x, steps)
    other, _, its = made(FakeClock(step=4, each=3e-6, number=5e-6), seed=1)
    other.load_state_dict(model.state_dict())
    assert its.step == steps
    if steps == 8:  # the support stays, whatever it takes here
        assert kept(other) == kept(model)
        assert torch.equal(other.eval()(x), model.eval()(x))
    else:
        train(other, x, 5)
        assert its.finished
        assert its.measured.speedup >= 2
    assert its.target == its.size.of(torch.tensor(kept(other)).double().numpy())


def test_a_checkpoint_from_before_the_end_loads_into_a_finished_model():
    model, x, rule = made()
    state = copy.deepcopy(model.state_dict())
    train(model, x, 8)
    model.load_state_dict(state)
    assert not rule.finished
    train(model, x, 8)
    assert share(model, x) <= 0.5


def test_a_checkpoint_of_another_speedup_is_refused():
    model, _, _ = made()
    other, _, _ = made(speedup=1.5)
    with pytest.raises(StateError, match=r"0\.5 of the time with 64 gates, latency in 8 steps"):
        model.load_state_dict(other.state_dict())


def test_a_finished_model_is_copied_and_pickled_whole():
    model, _, _ = made(steps=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept(other) == kept(model)
        rule = gates_of(other)[0].rule
        assert str(rule.table) == str(gates_of(model)[0].rule.table)
        assert rule.measured == gates_of(model)[0].rule.measured


# --- the search -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0.02, 1.0), min_size=1, max_size=30), st.floats(0.1, 0.95), st.floats(0, 1), st.floats(0.0, 0.3)
)
def test_the_search_finds_the_largest_size_of_any_rising_function(values, goal, first, floor):
    steps, seen = sorted(values), []

    def share_at(size):
        seen.append(size)
        place = min(int(size * len(steps)), len(steps) - 1)
        return floor + (1 - floor) * steps[place]

    size, met = largest_within(share_at, first, 0.01, 1.0, goal)
    tried = {one: share_at(one) for one in list(seen)}
    assert size in tried
    assert len(tried) <= 13
    if met:
        assert size == max(one for one, share in tried.items() if share <= goal)
        above = [one for one, share in tried.items() if share > goal]
        assert tried[size] >= 0.98 * goal or min([*above, 1.0]) - size <= 0.9**11
    else:
        assert tried[0.01] > goal
        assert tried[size] == min(tried.values())


def test_the_search_needs_few_models_on_a_line():
    seen = []

    def share_at(size):
        seen.append(size)
        return 0.3 + 0.7 * size

    assert largest_within(share_at, 0.5, 0.01, 1.0, 0.5)[1]
    assert len(seen) <= 4
