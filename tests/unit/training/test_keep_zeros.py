"""Zeros of a pruned plain model stay zero under every optimiser, and nothing else stands still."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import l0hooks
from l0hooks import Budget, keep_zeros, prune, sparsify

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd with momentum and decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def pruned() -> nn.Sequential:
    gated = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsify(gated, "weight", budget=Budget(sparsity=0.7, steps=0))
    plain = prune(gated)
    assert isinstance(plain, nn.Sequential)
    return plain


def zeros(model: nn.Module) -> list[Tensor]:
    return [p.detach() == 0 for p in model.parameters() if p.dim() > 1]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        x = torch.randn(16, 8)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (model(x) - 1).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_and_the_rest_moves(name: str) -> None:
    model = pruned()
    before, start = zeros(model), [p.detach().clone() for p in model.parameters()]
    keep_zeros(model)
    train(model, OPTIMIZERS[name](list(model.parameters())))
    assert all(map(torch.equal, before, zeros(model)))
    for old, new in zip(start, model.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_without_it_the_zeros_are_lost() -> None:
    model = pruned()
    before = zeros(model)
    train(model, torch.optim.Adam(model.parameters()))
    assert not any(map(torch.equal, before, zeros(model)))


def test_momentum_from_before_does_not_move_them() -> None:
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    model.load_state_dict(start)
    before = zeros(model)
    keep_zeros(model)
    train(model, optimizer)
    assert all(map(torch.equal, before, zeros(model)))


def test_gradients_of_zeros_count_in_no_norm() -> None:
    model = pruned()
    keep_zeros(model)
    model(torch.randn(16, 8)).square().sum().backward()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            assert parameter.grad is not None
            assert not parameter.grad[parameter == 0].any()
            assert parameter.grad.any()


def test_other_models_and_removed_ones_are_let_alone() -> None:
    model, other = pruned(), pruned()
    kept = keep_zeros(model)
    optimizer = torch.optim.Adam([*model.parameters(), *other.parameters()], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.ones(2, 8)) + other(torch.ones(2, 8))).square().sum().backward()
        optimizer.step()
    assert kept.zeros == sum(int(z.sum()) for z in zeros(model))
    assert sum(int(z.sum()) for z in zeros(other)) < kept.zeros
    kept.remove()
    train(model, torch.optim.Adam(model.parameters(), lr=0.1))
    assert sum(int(z.sum()) for z in zeros(model)) < kept.zeros


def test_a_step_of_an_optimizer_without_them_costs_nothing() -> None:
    model = pruned()
    keep_zeros(model)
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(1.0)
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model.get_parameter("0.weight"), torch.ones(16, 8))


def test_the_model_stays_plain() -> None:
    model = pruned()
    keep_zeros(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(torch.ones(2, 8)), model(torch.ones(2, 8)))
    assert type(model[0]) is nn.Linear


def test_a_weight_of_zeros_alone_trains_unless_it_is_named() -> None:
    model = pruned()
    with torch.no_grad():
        model.get_parameter("2.weight").zero_()
    with pytest.warns(l0hooks.errors.L0HooksWarning, match=r"zero altogether are left to train.\n  got: 2.weight"):
        kept = keep_zeros(model)
    assert kept.names == ("0.weight",)
    kept.remove()
    assert keep_zeros(model, ["0", "2"]).names == ("0.weight", "2.weight")


def test_a_tied_weight_counts_once() -> None:
    model = pruned()
    twice = nn.ModuleList([model, model[0]])
    assert keep_zeros(twice).names == ("0.0.weight", "0.2.weight")


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(l0hooks.errors.StateError, match=r"weights must hold exact zeros"):
        keep_zeros(nn.Linear(3, 3))
    with pytest.raises(l0hooks.errors.SpecError, match=r"a pattern must match at least one module"):
        keep_zeros(pruned(), "layer*")
    with pytest.raises(l0hooks.errors.StateError, match=r"dense and have data.\n  got: a weight on the meta device"):
        keep_zeros(nn.Linear(2, 2, device="meta"))
    gated = nn.Sequential(nn.Linear(8, 4))
    sparsify(gated, "weight", budget=Budget(sparsity=0.5, steps=0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        stored = prune(gated, sparse_format="csr")
    with pytest.raises(l0hooks.errors.StateError, match=r"a weight stored as torch.sparse_csr"):
        keep_zeros(stored)
