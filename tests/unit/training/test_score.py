"""Scores against finite differences, dense sums and brute force; one shot from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l0hooks
from l0hooks import Budget, prune, score, set_budget, sparsify
from l0hooks.attach.plain import plain_copy
from l0hooks.attach.walk import iter_gated
from l0hooks.training.layer_inputs import as_matrix, as_weight, has_rows, input_rows, output_rows


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.tanh(self.one(x)))
        return y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(54, 3)
    )


CASES: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "weights": (mlp, "weight", (5, 6)),
    "inputs": (mlp, "input", (5, 6)),
    "outputs": (mlp, "output", (5, 6)),
    "coupled": (mlp, "coupled", (5, 6)),
    "tied": (Tied, "weight", (5, 6)),
    "kernels": (convolutions, {nn.Conv2d: "kernel"}, (5, 2, 8, 8)),
    "blocks": (convolutions, {"4": (3, 2), nn.Conv2d: "output"}, (5, 2, 8, 8)),
    "coupled channels": (convolutions, "coupled", (5, 2, 8, 8)),
}


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch).sum(1) - 1).square().mean()


@torch.no_grad()
def by_differences(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """½·mean (∂loss/∂z)² by central differences: all weights behind one gate times 1 ± ε."""
    names = {id(gate): name for name, gate in l0hooks.iter_gates(model)}
    found, step = {}, 1e-4
    for one in iter_gated(model):
        total = torch.zeros(one.gate.log_alpha.numel(), dtype=torch.float64)
        for number in range(len(total)):
            slopes = []
            for sign in (step, -step):
                copied = plain_copy(model).double().eval()
                for site in one.weights():
                    values = [torch.ones_like(g.log_alpha) for g in site.gating.gates]
                    (place,) = [k for k, g in enumerate(site.gating.gates) if g is one.gate]
                    values[place].view(-1)[number] += sign
                    weight = copied.get_parameter(site.name)
                    weight.data = weight.data * site.gating.factor(values).double()
                slopes.append(torch.stack([loss(copied, batch.double()) for batch in batches]))
            total[number] = ((slopes[0] - slopes[1]) / (2 * step)).square().mean() / 2
        found[names[id(one.gate)]] = total.view(one.gate.log_alpha.shape).float()
    return found


@pytest.mark.parametrize("case", CASES)
def test_taylor_scores_are_squared_slopes(case: str) -> None:
    make, spec, shape = CASES[case]
    model, batches = make(), [torch.randn(shape) for _ in range(2)]
    sparsify(model, spec, example_inputs=(batches[0],))
    found, expected = score(model, batches, loss=loss), by_differences(model, batches)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = float(expected[name].max())
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-3 * scale)


def test_without_a_loss_outputs_are_preserved() -> None:
    model, batches = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(7, 4).split(1)
    sparsify(model, "coupled", example_inputs=(batches[0],))
    ((_, found),) = score(model, batches).items()
    plain = plain_copy(model)
    hidden = plain[1](plain[0](torch.cat(batches)))  # type: ignore[index]
    change = (hidden * plain[2].weight).square().mean(0) / 2  # type: ignore[index]
    torch.testing.assert_close(found, change)  # one number per batch: the signs cancel


def test_magnitude_and_wanda_are_dense_sums() -> None:
    model, x = mlp(), torch.randn(40, 6)
    sparsify(model, {"0": "weight", "2": "input", "4": "output"})
    weights = [plain_copy(model)[n].weight for n in (0, 2, 4)]  # type: ignore[index]
    inputs = [x, *(plain_copy(model)[:n](x) for n in (2, 4))]  # type: ignore[index]
    by_size, by_change = score(model, criterion="magnitude"), score(model, x.split(10), criterion="wanda")
    for number, axis in ((0, None), (1, 0), (2, 1)):
        weight, mean = weights[number].detach(), inputs[number].detach().square().mean(0)
        for found, dense in ((by_size, weight.square()), (by_change, weight.square() * mean)):
            expected = dense if axis is None else dense.sum(axis)
            torch.testing.assert_close(list(found.values())[number], expected)


def test_activations_are_those_that_are_read_or_written() -> None:
    model, x = mlp(), torch.randn(40, 6)
    sparsify(model, {"2": "input", "4": "output"})
    plain = plain_copy(model)
    read, written = score(model, x.split(10), criterion="activation").values()
    torch.testing.assert_close(read, plain[:2](x).square().mean(0).detach())  # type: ignore[index]
    torch.testing.assert_close(written, plain(x).square().mean(0).detach())


def test_the_order_is_nearly_that_of_the_true_losses() -> None:
    """Closing each neuron in turn, measured, against what the scores say of a trained model."""
    x = torch.randn(400, 10)
    y = torch.sin(x[:, :3].sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    dense = copy.deepcopy(model)
    sparsify(model, "coupled", example_inputs=(x,))
    true = []
    for number in range(24):
        cut = copy.deepcopy(dense)
        cut.get_parameter("2.weight").data[:, number] = 0
        true.append((cut(x) - dense(x)).square().mean().item())
    ((_, found),) = score(model, x.split(4)).items()
    ranks = torch.stack([torch.tensor(true).argsort().argsort(), found.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    sparsify(model, "weight")
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for criterion in ("taylor", "wanda", "activation", "magnitude"):
        score(model, torch.randn(8, 6, generator=torch.Generator()).split(4), criterion=criterion)  # type: ignore[arg-type]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_frozen_weights_and_half_precision_are_scored() -> None:
    model, x = mlp().bfloat16().requires_grad_(False), torch.randn(12, 6).bfloat16()
    sparsify(model, "coupled", example_inputs=(x,))
    assert all(value.dtype == torch.float32 and bool((value > 0).all()) for value in score(model, x.split(3)).values())
    assert not any(site.weight.requires_grad for one in iter_gated(model) for site in one.sites)


@pytest.mark.parametrize("family", ["hard_concrete", "straight_through", "stg", "deterministic"])
@pytest.mark.parametrize("temperature", [None, 4.0])
def test_one_shot_keeps_the_best_as_they_are(family: str, temperature: float | None) -> None:
    model, x = mlp(), torch.randn(32, 6)
    dense = copy.deepcopy(model)
    spec = l0hooks.GateSpec(granularity="weight", family=family, temperature=temperature)  # type: ignore[arg-type]
    report = sparsify(model, spec, budget=Budget(keep=60, steps=0), scores=lambda gated: score(gated, x.split(8)))
    assert report.parameters_kept == 60
    scores = torch.cat([v.flatten() for v in score(model, x.split(8)).values()])
    small = prune(model)
    kept = torch.cat([small.get_parameter(f"{n}.weight").flatten() for n in (0, 2, 4)])
    before = torch.cat([dense.get_parameter(f"{n}.weight").flatten() for n in (0, 2, 4)])
    best = torch.zeros(len(before), dtype=torch.bool)
    best[scores.argsort(descending=True)[:60]] = True
    assert torch.equal(kept, torch.where(best, before, 0.0))  # exactly 1


def test_scores_count_by_what_a_gate_saves() -> None:
    """Two groups with equal scores: the one whose members cost more parameters loses more of them."""
    model, x = (
        nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 200)),
        torch.ones(2, 4),
    )
    sparsify(model, "coupled", example_inputs=(x,))
    names = [name for name, _ in l0hooks.iter_gates(model)]
    equal = dict.fromkeys(names, torch.arange(1.0, 17.0))
    rules = {}
    for unit in ("gates", "params"):
        gated = copy.deepcopy(model)
        set_budget(gated, Budget(sparsity=0.3, unit=unit, steps=0), scores=equal)  # type: ignore[arg-type]
        rules[unit] = [int(gate.support().sum()) for _, gate in l0hooks.iter_gates(gated)]
    assert abs(rules["gates"][0] - rules["gates"][1]) <= 1
    assert rules["params"][0] > rules["params"][1]


def test_scores_start_the_gates_of_a_budget_that_trains() -> None:
    model, x = mlp(), torch.randn(32, 6)
    report = sparsify(
        model, "weight", budget=Budget(sparsity=0.5, steps=10), scores=lambda gated: score(gated, x.split(8))
    )
    assert report.budgets[0].step == 0
    scores = torch.cat([v.flatten() for v in score(model, x.split(8)).values()])
    location = torch.cat([gate.log_alpha.detach().flatten() for _, gate in l0hooks.iter_gates(model)])
    inside = (location > location.min()) & (location < location.max())
    assert torch.equal(scores[inside].argsort(), location[inside].argsort())


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(5, 3), (4, 7, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (3, 4, 11)),
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 4, 9, 8)),
        (nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(2, 1), groups=4), (3, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding="valid"), (4, 9, 8)),
        (nn.Conv3d(2, 4, 2, padding=1, padding_mode="circular"), (3, 2, 4, 5, 3)),
    ],
)
def test_rows_times_the_weight_are_the_outputs(module: nn.Module, shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), module.get_parameter("weight"), module.get_parameter("bias")
    assert has_rows(module)
    rows, matrix = input_rows(module, x), as_matrix(module, weight)
    found = rows @ matrix.mT + bias.view(matrix.shape[0], 1, -1)
    torch.testing.assert_close(found, output_rows(module, module(x)), rtol=1e-4, atol=1e-5)
    assert torch.equal(as_weight(module, matrix, weight.shape), weight)


def test_what_cannot_be_scored_is_refused() -> None:
    x = torch.randn(8, 6)
    model = mlp()
    with pytest.raises(l0hooks.errors.StateError, match=r"gates must multiply weights"):
        score(model, [x])
    sparsify(model, "weight")
    with pytest.raises(l0hooks.errors.SpecError, match=r"at least one batch"):
        score(model, [])
    with pytest.raises(l0hooks.errors.SpecError, match=r"batches are a sequence of them.\n  got: one Tensor"):
        score(model, x)
    with pytest.raises(l0hooks.errors.SpecError, match=r"did you mean 'taylor'"):
        score(model, [x], criterion="tayler")  # type: ignore[arg-type]
    with pytest.raises(l0hooks.errors.InvalidValueError, match=r"score: batch 1: gradients must be finite"):
        score(model, [x, x * torch.inf])
    with pytest.raises(l0hooks.errors.SpecError, match=r"must hold floating-point numbers.\n  got: str"):
        score(model, [x], loss=lambda m, b: "loss")
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    sparsify(attention, "weight")
    with pytest.raises(l0hooks.errors.SpecError, match=r"looks at the inputs of Linear and Conv layers"):
        score(attention, [torch.randn(2, 3, 8)], criterion="wanda")
    with pytest.raises(l0hooks.errors.StateError, match=r"a weight on the meta device"):
        score(_gated_on_meta(), [x])


def test_scores_that_do_not_fit_are_refused_before_anything_changes() -> None:
    model, x = mlp(), torch.randn(8, 6)
    sparsify(model, "weight")
    scores = dict(score(model, [x]))
    name = next(iter(scores))
    for wrong, message in (
        ({}, r"must be those of this model's gates.\n  expected: shape \(8, 6\)\n  got: none"),
        (scores | {name: torch.ones(3)}, r"got: shape \(3,\)"),
        (scores | {name: -scores[name]}, r"scores must be finite and not negative"),
        (scores | {name: scores[name] * torch.nan}, r"scores must be finite and not negative"),
    ):
        with pytest.raises(l0hooks.L0HooksError, match=message):
            set_budget(model, Budget(sparsity=0.5), scores=wrong)
        assert all(gate.rule is None for _, gate in l0hooks.iter_gates(model))
    plain = mlp()
    with pytest.raises(l0hooks.errors.SpecError, match=r"scores start the gates of a budget"):
        sparsify(plain, "weight", scores=scores)
    with pytest.raises(ZeroDivisionError):
        sparsify(plain, "weight", budget=Budget(sparsity=0.5), scores=lambda gated: {"": torch.ones(1) * (1 // 0)})
    assert not list(l0hooks.iter_gates(plain))


def test_one_shot_has_no_multipliers() -> None:
    with pytest.raises(l0hooks.errors.InvalidValueError, match=r"multipliers need steps to rise"):
        Budget(sparsity=0.5, steps=0, method="lagrangian")


def _gated_on_meta() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 3, device="meta"))
    sparsify(model, "weight")
    return model
