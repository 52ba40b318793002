"""The table of layers against a clock that counts: what it predicts is what pruned models take."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from coupled_models import MODELS, coupled_groups, fingerprint, gates_of, mlp, perceptron_groups, set_support, state_of
from fake_clock import FakeClock, seconds
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes
from torch import nn

from l0hooks import prune, sparsify
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import InvalidValueError, SpecError, StateError
from l0hooks.structure import declare_group
from l0hooks.training import LatencyTable, latency_table
from l0hooks.training.clocks import clock_for, interleaved, least_seconds, ratio, shared
from l0hooks.training.latency import time_of
from l0hooks.training.time_table import fitted


def gated(name="mlp"):
    torch.manual_seed(0)
    model, x = MODELS[name][0](), MODELS[name][1]()
    sparsify(model.eval(), "coupled", example_inputs=(x,), groups=coupled_groups(name))
    return model, x


def supports_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [gate.log_alpha.numel() for gate in gates_of(model)]
    keeps = [int(torch.randint(1, n + 1, (), generator=generator)) for n in sizes]
    return [torch.randperm(n, generator=generator) < k for n, k in zip(sizes, keeps, strict=True)]


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "branched", "residual", "grouped"])
@pytest.mark.parametrize("seed", range(3))
def test_it_predicts_what_pruned_models_take_by_a_clock_that_counts_multiply_adds(name, seed):
    (model, x), clock = gated(name), FakeClock()
    size = time_of(latency_table(model, (x,), clock=clock), list(iter_gated(model)))
    assert size.whole == pytest.approx(1e6 * seconds(MODELS[name][0](), (x,), clock))
    supports = supports_of(model, seed)
    set_support(model, supports)
    kept = np.array([float(support.sum()) for support in supports])
    assert size.of(kept) == pytest.approx(1e6 * seconds(prune(model, example_inputs=(x,)), (x,), clock))


def test_activations_between_the_layers_shrink_with_the_members_that_write_them():
    model, x, clock = mlp(5, 12, 8, 3), torch.randn(6, 5), FakeClock(number=1e-6)
    sparsify(model, "coupled", example_inputs=(x,), groups=perceptron_groups(5, 12, 8, 3))
    table = latency_table(model, (x,), clock=clock)
    assert table.rest == pytest.approx(6 * (12 + 8))  # two activations
    size = time_of(table, list(iter_gated(model)))
    assert size.of(np.array([3.0, 2.0])) == pytest.approx(6 * (5 * 3 + 3 * 2 + 2 * 3 + 3 + 2), rel=0.02)
    fixed = dataclasses.replace(table, each_written=0.0)
    assert time_of(fixed, list(iter_gated(model))).of(np.array([3.0, 2.0])) > size.of(np.array([3.0, 2.0]))


def test_layers_that_take_more_alone_than_the_model_are_scaled_down():
    model, x = gated()
    table = latency_table(model, (x,), clock=FakeClock())
    size = time_of(dataclasses.replace(table, whole=table.whole / 2), list(iter_gated(model)))
    assert size.whole == pytest.approx(table.whole / 2)
    assert size.constant == pytest.approx(0, abs=1e-9)


def test_layers_that_are_alike_are_timed_once_and_count_as_often_as_they_are_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.again, self.last = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            x = torch.relu(self.again(torch.relu(self.inner(torch.relu(self.first(x))))))
            return self.last(torch.relu(x))

    model, x, clock = Twice(), torch.randn(3, 4), FakeClock()
    sparsify(model, "coupled", example_inputs=(x,))
    table = latency_table(model, (x,), clock=clock)
    assert [layer.names for layer in table.layers] == [("first",), ("inner", "again"), ("last",)]
    assert table.whole == pytest.approx(4 * 3 * 16)


def test_a_group_declared_by_hand():
    model, x, clock = mlp(5, 12, 3), torch.randn(6, 5), FakeClock()
    group = declare_group(model, outputs=["0"], inputs=["2"])
    sparsify(model, "coupled", example_inputs=(x,), groups=[group])
    size = time_of(latency_table(model, (x,), clock=clock), list(iter_gated(model)))
    assert size.of(np.array([4.0])) == pytest.approx(6 * (5 * 4 + 4 * 3))


def test_a_layer_with_a_forward_of_its_own_is_taken_to_be_proportional():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0 * x.sum()

    model, x = nn.Sequential(Own(5, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(6, 5)
    sparsify(model, "coupled", example_inputs=(x,), groups=[declare_group(model, outputs=["0"], inputs=["2"])])
    table = latency_table(model, (x,), clock=FakeClock())
    assert [layer.measured for layer in table.layers] == [False, True]
    assert "not timed" in str(table)
    assert time_of(table, list(iter_gated(model))).of(np.array([4.0])) == pytest.approx(6 * (5 * 4 + 4 * 3))


def test_readings_are_taken_in_multiples_of_round_to():
    model, x = mlp(5, 24, 3), torch.randn(6, 5)
    sparsify(model, "coupled", example_inputs=(x,), groups=perceptron_groups(5, 24, 3))
    for round_to in (8, {"neuron": 8}):
        table = latency_table(model, (x,), clock=FakeClock(), round_to=round_to)
        assert [outputs for _, outputs, _ in table.layers[0].times] == [24, 16, 8, 8]


@given(st.tuples(*[st.floats(0, 5)] * 4).filter(lambda terms: sum(terms) > 1))
def test_the_fit_finds_the_terms_that_made_the_readings(terms):
    a, b, c, d = terms
    readings = tuple((i, o, a + b * i + c * o + d * i * o) for i in (20, 14, 8, 3) for o in (10, 7, 4, 2))
    assert fitted(readings) == pytest.approx(terms, abs=1e-6)


# --- the model, the file, what is refused ----------------------------------------------------------------------------


def test_the_model_is_not_changed_and_no_random_number_is_drawn():
    model, x = gated("branched")
    model.train()
    before, states, random = fingerprint(model), state_of(model), torch.get_rng_state()
    latency_table(model, (x,), clock=FakeClock())
    assert fingerprint(model) == before
    assert all(torch.equal(value, states[name]) for name, value in state_of(model).items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_table_survives_its_file_and_prints(tmp_path):
    model, x = gated("branched")
    table = latency_table(model, (x,), clock=FakeClock(number=1e-7))
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    lines = str(table).splitlines()
    assert lines[0].startswith(f"microseconds on cpu, {torch.get_num_threads()} thread")
    assert len(lines) == 2 + len(table.layers)
    assert "right (Conv2d)" in str(table)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("no table")
    with pytest.raises(InvalidValueError, match=r"LatencyTable\.load.*: the file must be one that LatencyTable\.save"):
        LatencyTable.load(path)
    path.write_text(json.dumps({"device": "cpu"}))
    with pytest.raises(InvalidValueError, match="must be of the right type"):
        LatencyTable.load(path)


def test_gates_that_save_no_time_are_refused():
    model, x = mlp(5, 6, 3), torch.randn(3, 5)
    with pytest.raises(SpecError, match=r"only members of coupled groups save time[\s\S]*got: no gates"):
        latency_table(model, (x,))
    sparsify(model, "weight")
    with pytest.raises(SpecError, match="other gates on '0'"):
        latency_table(model, (x,))


def test_a_wrapper_is_refused():
    model, x = gated()
    with pytest.raises(
        StateError, match=r"the model must run as it was sparsified[\s\S]*a wrapper that holds it at '0'"
    ):
        latency_table(nn.Sequential(model), (x,))


def test_the_meta_device_is_refused():
    model, x = gated()
    with pytest.raises(StateError, match="device meta"):
        latency_table(model.to("meta"), (x,))


def test_devices_without_a_clock_are_refused():
    with pytest.raises(SpecError, match=r"can time calls on CPU and CUDA only[\s\S]*got: device meta"):
        clock_for(torch.device("meta"))


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_the_clock_of_the_processor_calls_once():
    called = []
    assert clock_for(torch.device("cpu"))(lambda: called.append(1)) >= 0
    assert called == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_clock_of_cuda_waits_for_the_device():
    x = torch.randn(4096, 4096, device="cuda")
    clock = clock_for(x.device)
    clock(lambda: x @ x)
    assert clock(lambda: [x @ x for _ in range(20)]) > 5 * clock(lambda: x @ x)


def test_the_least_reading_counts_and_the_first_call_does_not():
    readings = iter([0.001, 5.0, 3.0, 4.0])
    assert least_seconds(lambda run: next(readings), lambda: None) == 3.0


def test_functions_are_called_in_turn():
    order = []

    def clock(run):
        run()
        return 1.0

    first, second = interleaved(clock, [lambda: order.append("a"), lambda: order.append("b")])
    assert order == ["a", "b"] * (len(first) + 1)
    assert ratio(first, second) == 1.0


def test_rounds_go_on_until_the_ratio_is_known():
    generator = np.random.default_rng(0)

    def noisy(run):
        return float(run() * (1 + 0.05 * generator.standard_normal()))

    steady = interleaved(lambda run: run(), [lambda: 2.0, lambda: 1.0])
    scattered = interleaved(noisy, [lambda: 2.0, lambda: 1.0])
    assert len(steady[0]) < len(scattered[0]) <= 40
    assert ratio(scattered[1], scattered[0]) == pytest.approx(0.5, rel=0.05)


def _read(rank):
    return shared(lambda run: 1.0 + rank)(lambda: None)


@pytest.mark.slow
def test_several_processes_take_the_readings_of_the_first():
    assert in_processes(_read) == [1.0, 1.0]
