"""Recovered weights against dense least squares, exchanges against brute force, and what must stay as it is."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import l0hooks
from l0hooks import Budget, prune, recover, set_budget, sparsify
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.training.exchange import exchange
from l0hooks.training.normal_equations import NormalEquations, conjugate_gradients, solve


def network(width: int = 24) -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def gated(spec: Any = "coupled", sparsity: float = 0.5, model: nn.Module | None = None) -> tuple[nn.Module, Tensor]:
    model = network() if model is None else model
    x = torch.randn(300, 10)
    sparsify(model, spec, example_inputs=(x,), budget=Budget(sparsity=sparsity, unit="params", steps=0))
    return model.eval(), x


def least_squares(x: Tensor, y: Tensor, stays: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases of each output on the inputs that it reads, by NumPy."""
    weight, bias = np.zeros(tuple(stays.shape)), np.zeros(len(stays))
    ones = np.ones((len(x), 1))
    for row, mask in enumerate(stays.numpy()):
        design = np.concatenate([x.double().numpy()[:, mask], ones], axis=1)
        found, *_ = np.linalg.lstsq(design, y[:, row].double().numpy(), rcond=None)
        weight[row, mask], bias[row] = found[:-1], found[-1]
    return weight, bias


@pytest.mark.parametrize("spec", [{"2": "input"}, {"2": "weight"}, {"2": (6, 4)}])
def test_weights_are_those_of_dense_least_squares(spec: Any) -> None:
    model, x = network(), torch.randn(300, 10)
    dense = copy.deepcopy(model)
    sparsify(model, spec, budget=Budget(sparsity=0.4, unit="gates", steps=0))
    recover(model.eval(), x.split(50), ridge=1e-12, exchange=False)
    (site,) = iter_sites(model)
    stays = model.get_submodule("2").weight.detach() != 0  # type: ignore[operator]
    with torch.no_grad():
        weight, bias = least_squares(dense[:2](x), dense[:3](x), stays)
    torch.testing.assert_close(
        site.weight.detach()[stays].double(), torch.from_numpy(weight)[stays], rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        model.get_parameter("2.bias").detach().double(), torch.from_numpy(bias), rtol=1e-3, atol=1e-4
    )


def test_later_layers_see_what_earlier_ones_give_now() -> None:
    model, x = gated()
    dense = copy.deepcopy(model)
    report = recover(model, x.split(100), ridge=1e-10, exchange=False)
    assert [layer.name for layer in report.layers] == ["2", "4"]
    small = prune(model, example_inputs=(x,))
    plain = l0hooks.attach.plain.plain_copy(dense)
    with torch.no_grad():
        inputs, y = small[:4](x), plain(x)  # type: ignore[index]
        weight, _ = least_squares(inputs, y, torch.ones(3, inputs.shape[1], dtype=torch.bool))
    torch.testing.assert_close(small[4].weight.detach().double(), torch.from_numpy(weight), rtol=1e-3, atol=1e-3)  # type: ignore[index]


@pytest.mark.parametrize(
    "spec", ["coupled", "weight", {"0": "output", "2": "input", "4": "weight"}, {"*": (3, 2), "0": "weight"}]
)
def test_errors_fall_and_everything_else_stays(spec: Any) -> None:
    model, x = gated(spec if spec != {"*": (3, 2), "0": "weight"} else {"2": (3, 2), "0": "weight"})
    before = {site.name: (site.weight.detach().clone(), site.gating) for site in iter_sites(model)}
    closed = {
        name: gating.factor([g.value() for g in gating.gates]).expand(w.shape) == 0
        for name, (w, gating) in before.items()
    }
    size = l0hooks.summary(model).model_parameters_kept
    fresh = torch.randn(500, 10)
    with torch.no_grad():
        wanted = l0hooks.attach.plain.plain_copy(model)(fresh)
        error = float((model(fresh) - wanted).square().mean())
        report = recover(model, x.split(100), exchange=False)
        assert float((model(fresh) - wanted).square().mean()) < error
    assert all(layer.after <= layer.before for layer in report.layers)
    assert l0hooks.summary(model).model_parameters_kept == size
    for site in iter_sites(model):
        assert torch.equal(site.weight[closed[site.name]], before[site.name][0][closed[site.name]])
    small = prune(model, example_inputs=(x,))
    torch.testing.assert_close(small(fresh), model(fresh), rtol=1e-4, atol=1e-5)


def test_fractional_gates_are_allowed_for() -> None:
    model, x = network(), torch.randn(300, 10)
    sparsify(model, {"2": "input"})
    (site,) = iter_sites(model.eval())
    with torch.no_grad():
        site.gating.gates[0].log_alpha.uniform_(-2, 2)
    whole = copy.deepcopy(model)
    report = recover(model, x.split(100), ridge=1e-8, exchange=False)
    with torch.no_grad():
        (again,) = iter_sites(whole)
        again.gating.gates[0].log_alpha.copy_(torch.where(site.gating.gates[0].support(), 10.0, -10.0))
    other = recover(whole, x.split(100), ridge=1e-8, exchange=False)
    assert report.layers[0].after == pytest.approx(other.layers[0].after, rel=1e-2)
    torch.testing.assert_close(model(x), whole(x), rtol=1e-3, atol=1e-3)
    assert report.layers[0].after < report.layers[0].before


def test_rows_count_by_their_gradients() -> None:
    """Rows that the loss does not see, as padding, take no part; others by the mean square of their gradient."""
    model, x = network(), torch.randn(300, 10)
    dense = copy.deepcopy(model)
    sparsify(model, {"4": "input"}, budget=Budget(sparsity=0.5, steps=0))
    scale = torch.rand(300) * 3
    scale[200:] = 0

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        found: Tensor = (model(batch) * scale[:, None]).sum()
        return found

    recover(model.eval(), [x], loss=loss, ridge=1e-12, exchange=False)
    stays = model.get_submodule("4").weight.detach() != 0  # type: ignore[operator]
    with torch.no_grad():
        inputs, y = dense[:4](x), dense(x)
    root = scale.double().numpy()[:, None]
    design = np.concatenate([inputs.double().numpy()[:, stays[0].numpy()], np.ones((300, 1))], axis=1) * root
    expected = np.linalg.lstsq(design, y.double().numpy() * root, rcond=None)[0].T
    (site,) = iter_sites(model)
    found = torch.cat([site.weight[:, stays[0]], model.get_parameter("4.bias")[:, None]], dim=1).detach().double()
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-3, atol=1e-4)


def test_a_loss_may_come_with_modules_that_write_in_place_and_frozen_teachers() -> None:
    model = nn.Sequential(
        nn.Linear(10, 24), nn.ReLU(inplace=True), nn.Linear(24, 24), nn.ReLU(inplace=True), nn.Linear(24, 3)
    )
    teacher, x = copy.deepcopy(model).requires_grad_(False), torch.randn(300, 10)
    sparsify(model, "coupled", example_inputs=(x,), budget=Budget(sparsity=0.5, unit="params", steps=0))
    with torch.no_grad():
        before = float((model.eval()(x) - teacher(x)).square().mean())
        recover(model, x.split(100), dense=teacher, loss=lambda m, batch: m(batch))
        assert float((model(x) - teacher(x)).square().mean()) < before / 2


@pytest.mark.parametrize("most", [0, 300 * 24])
@pytest.mark.parametrize("with_loss", [False, True])
def test_outputs_that_do_not_fit_into_memory_are_computed_again(
    most: int, with_loss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = gated()
    other, loss = copy.deepcopy(model), (lambda m, batch: m(batch)) if with_loss else None
    recover(model, x.split(100), loss=loss)
    monkeypatch.setattr("l0hooks.training.layer_runs._MOST_KEPT", most)
    recover(other, x.split(100), loss=loss)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_later_layers_make_up_for_earlier_ones() -> None:
    """Layers without gates: those after the first closed channel are solved for, those before it are not."""
    model, x = network(), torch.randn(4000, 10)
    sparsify(model, {"2": "input"}, budget=Budget(sparsity=0.6, steps=0))
    other, plain = copy.deepcopy(model.eval()), l0hooks.attach.plain.plain_copy(model)
    with torch.no_grad():
        plain.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True)
        both, one = recover(model, x.split(1000)), recover(other, x.split(1000), downstream=False)
        fresh = torch.randn(4000, 10)
        errors = [float((m(fresh) - plain(fresh)).square().mean()) for m in (model, other)]
    assert [[layer.name for layer in report.layers] for report in (both, one)] == [["2", "4"], ["2"]]
    assert errors[0] < errors[1]
    assert torch.equal(model.get_parameter("0.weight"), other.get_parameter("0.weight"))


def test_tied_weights_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.mlp = nn.Embedding(20, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.mlp(self.tokens(x)))
            return y

    model, x = Tied(), torch.randint(20, (64,))
    sparsify(model, "coupled", example_inputs=(x,), budget=Budget(sparsity=0.2, unit="params", steps=0))
    report = recover(model.eval(), x.split(16))
    assert [layer.name for layer in report.layers][-1] == "mlp.2"  # the head comes later


def test_convolutions_and_shared_layers_are_recovered() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 12, 3, padding=1)
            self.second = nn.Conv2d(12, 12, 3, padding=1, groups=2)
            self.last = nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.second(torch.relu(self.first(x))))
            z: Tensor = self.last(y) + self.last(torch.relu(self.second(y)))
            return z

    model, x = Twice(), torch.randn(16, 3, 8, 8)
    sparsify(model, {"last": "input", "second": "kernel"}, budget=Budget(sparsity=0.4, unit="params", steps=0))
    plain = l0hooks.attach.plain.plain_copy(model)
    with torch.no_grad():
        before = float((model.eval()(x) - plain(x)).square().mean())
        report = recover(model, x.split(4))
        assert float((model(x) - plain(x)).square().mean()) < 0.8 * before
    assert [layer.name for layer in report.layers] == ["second", "last"]


def test_conjugate_gradients_find_what_dense_solutions_do() -> None:
    x, y = torch.randn(1, 200, 12).double(), torch.randn(1, 200, 9).double()
    equations = NormalEquations(constant=False)
    equations.add(x, y)
    stays = torch.rand(9, 12) < 0.6
    stays[0] = False
    found = conjugate_gradients(equations.gram[0], equations.cross[0], stays)
    for row, mask in enumerate(stays):
        expected = torch.zeros(12, dtype=torch.float64)
        expected[mask] = torch.linalg.lstsq(x[0][:, mask], y[0][:, row]).solution
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-8)
    error = (y[0] - x[0] @ found.T).square().sum()
    assert equations.error(found[None]) == pytest.approx(float(error), rel=1e-9)


def _error(gram: Tensor, cross: Tensor, features: Tensor) -> float:
    part = gram[features][:, features]
    return -float((cross[:, features] * torch.linalg.solve(part, cross[:, features].T).T).sum()) / 2


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_no_single_exchange_improves_what_is_found(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 16, generator=generator).double() @ torch.randn(16, 16, generator=generator).double()
    y = x @ torch.randn(16, 3, generator=generator).double() * (torch.rand(3, generator=generator) + 0.1)
    gram, cross = x.T @ x + torch.eye(16).double(), y.T @ x
    members = torch.arange(2, 14)[: 12 // width * width].view(-1, width)  # 0 and 1 stay in any case, 14 and 15 are out
    always, count = torch.tensor([0, 1]), len(members) // 2
    stays = torch.zeros(len(members), dtype=torch.bool)
    stays[torch.randperm(len(members), generator=generator)[:count]] = True
    found = exchange(gram, cross, stays, members, always)
    assert int(found.sum()) == count

    def error(which: Tensor) -> float:
        return _error(gram, cross, torch.cat([always, members[which].flatten()]))

    assert error(found) <= error(stays)
    scale = abs(error(stays))
    for old, new in itertools.product(found.nonzero().flatten(), (~found).nonzero().flatten()):
        other = found.clone()
        other[old], other[new] = False, True
        assert error(other) >= error(found) - 1e-3 * scale
    best = min(error(_mask(chosen, len(members))) for chosen in itertools.combinations(range(len(members)), count))
    assert error(found) <= best + 0.1 * scale


def _mask(chosen: tuple[int, ...], count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(chosen)] = True
    return mask


@pytest.mark.parametrize("rule", ["budget", "none"])
def test_exchanged_members_change_the_support_and_nothing_else(rule: str) -> None:
    model, x = network(), torch.randn(400, 10)
    sparsify(model, "coupled", example_inputs=(x,))
    wrong = {name: torch.rand_like(gate.log_alpha) + 0.1 for name, gate in l0hooks.iter_gates(model)}
    if rule == "budget":
        set_budget(model, Budget(sparsity=0.5, unit="params", steps=0), scores=wrong)
    else:
        with torch.no_grad():
            for name, gate in l0hooks.iter_gates(model):
                gate.log_alpha.copy_(torch.where(wrong[name] > 0.6, 10.0, -10.0))
    model.eval()
    kept = [int(gate.support().sum()) for _, gate in l0hooks.iter_gates(model)]
    other = copy.deepcopy(model)
    with_them, without = recover(model, x.split(100)), recover(other, x.split(100), exchange=False)
    assert sum(layer.exchanged for layer in with_them.layers) > 0
    assert with_them.layers[0].after < without.layers[0].after
    assert [int(gate.support().sum()) for _, gate in l0hooks.iter_gates(model)] == kept
    small = prune(model, example_inputs=(x,))
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(other)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_a_dense_model_may_be_given() -> None:
    teacher = network()
    model, x = gated(model=copy.deepcopy(teacher))
    with torch.no_grad():
        for site in iter_sites(model):
            site.weight.add_(0.1 * torch.randn_like(site.weight))
        before = float((model(x) - teacher(x)).square().mean())
        recover(model, x.split(100), dense=teacher)
        assert float((model(x) - teacher(x)).square().mean()) < before / 2


def test_a_dense_model_that_shares_memory_is_the_one_from_before() -> None:
    model, x = gated()
    other, shared = copy.deepcopy(model), l0hooks.attach.plain.plain_copy(model)
    recover(model, x.split(100), dense=shared)
    recover(other, x.split(100))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_modes_gradients_and_attributes_stay() -> None:
    model, x = gated()
    model.train()
    state = torch.get_rng_state()
    recover(model, x.split(100))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_layers_that_cannot_be_recovered_are_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.unused = nn.Linear(10, 8), nn.Linear(8, 8)
            self.up = nn.ConvTranspose1d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(torch.relu(self.a(x))[..., None])
            return y

    model, x = Model(), torch.randn(64, 10)
    sparsify(model, "weight", exclude=[])
    set_budget(model, Budget(sparsity=0.5, steps=0))
    report = recover(model.eval(), x.split(16))
    assert [layer.name for layer in report.layers] == ["a"]
    assert report.skipped == {
        "up.weight": "a weight of ConvTranspose1d",
        "unused.weight": "not called on the first batch",
    }
    assert "as it was: up.weight (a weight of ConvTranspose1d)" in str(report)


def test_what_cannot_be_recovered_is_refused() -> None:
    x = torch.randn(8, 10)
    with pytest.raises(l0hooks.errors.StateError, match=r"must have closed gates.\n  got: no gates"):
        recover(network(), [x])
    model = network()
    sparsify(model, "weight")
    with pytest.raises(l0hooks.errors.StateError, match=r"got: gates that are all open"):
        recover(model, [x])
    model, _ = gated()
    with pytest.raises(l0hooks.errors.InvalidValueError, match=r"ridge must be positive"):
        recover(model, [x], ridge=0.0)
    with pytest.raises(l0hooks.errors.SpecError, match=r"at least one batch"):
        recover(model, [])


def test_a_schedule_that_has_not_ended_is_said() -> None:
    model, x = network(), torch.randn(64, 10)
    sparsify(model, "weight", budget=Budget(sparsity=0.9, steps=3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    with pytest.warns(l0hooks.errors.L0HooksWarning, match=r"expected: step 3\n  got: step 2"):
        recover(model, [x])


def test_inputs_that_are_zero_throughout_do_no_harm() -> None:
    model, _ = gated()
    with pytest.warns(l0hooks.errors.L0HooksWarning, match=r"at least \d+ rows\n  got: 16"):
        recover(model, [torch.zeros(16, 10)])
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_layers_that_no_weights_make_better_stay_as_they_are() -> None:
    """Four rows that say nothing about others: errors on rows that were not used decide."""
    model, _ = gated()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(l0hooks.errors.L0HooksWarning, match=r"'4' and 1 more layers|'2' and 1 more layers"):
        report = recover(model, torch.randn(4, 10).mul(100).split(1))
    for layer in report.layers:
        assert layer.after <= layer.before
        if layer.after == layer.before:
            assert layer.exchanged == 0
            for name, value in model.state_dict().items():
                if name.startswith(f"{layer.name}."):
                    assert torch.equal(value, before[name])
    assert any(layer.after == layer.before for layer in report.layers)


@pytest.mark.parametrize("in_place", [False, True])
def test_layers_that_read_one_tensor_share_a_run_unless_it_is_written_between(in_place: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(10, 24), nn.Linear(24, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            a = self.one(h)
            if in_place:
                h += a
            z: Tensor = self.two(h) + a[:, :3]
            return z

    model, x, runs = Model(), torch.randn(300, 10), []
    sparsify(model, {"one": "input", "two": "weight"}, budget=Budget(sparsity=0.5, steps=0))
    model.first.register_forward_pre_hook(lambda module, _: runs.append(module))
    dense = copy.deepcopy(l0hooks.attach.plain.plain_copy(model))
    recover(model.eval(), [x], dense=dense, ridge=1e-9)
    inputs = [run for run in runs if run is model.first]
    assert len(inputs) == (2 if in_place else 1)
    with torch.no_grad():
        h, y = torch.relu(model.first(x)), torch.relu(dense.first(x))
        h, y = (h + model.one(h), y + dense.one(y)) if in_place else (h, y)
        residual = model.two(h) - dense.two(y)
        slopes, scale = residual.T @ h, dense.two(y).abs().T @ h.abs()  # zero where the weights are open
        opened = model.two.weight != 0
    assert float((slopes / scale)[opened].abs().max()) < 1e-4
    assert float((slopes / scale)[~opened].abs().max()) > 1e-3


def test_solutions_with_few_patterns_are_direct() -> None:
    x, y = torch.randn(2, 50, 6), torch.randn(2, 50, 4)
    equations = NormalEquations(constant=False)
    equations.add(x, y)
    stays = torch.ones(2, 4, 6, dtype=torch.bool)
    stays[:, :, 2] = False
    found = solve(equations.gram, equations.cross, stays)
    for group in range(2):
        expected = conjugate_gradients(equations.gram[group], equations.cross[group], stays[group])
        torch.testing.assert_close(found[group], expected, rtol=1e-6, atol=1e-8)
