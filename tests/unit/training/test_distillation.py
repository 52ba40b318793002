"""The distillation loss against its formula, its gradients, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import l0hooks
from l0hooks import Budget, param_groups, prune, sparsify
from l0hooks.training import Distillation


class Model(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, width), nn.Tanh())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        h = self.body(x)
        return {"loss": torch.zeros(()), "hidden": h, "logits": self.head(h) * scale}


X = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))


def test_logits_are_matched_by_divergence() -> None:
    student, teacher = Model(), Model()
    output, loss = Distillation(student, teacher, temperature=3.0)(X, scale=2.0)
    with torch.no_grad():
        y, t = student(X, 2.0)["logits"], teacher(X, 2.0)["logits"]
        expected = 9 * F.kl_div(F.log_softmax(y / 3, -1), F.softmax(t / 3, -1), reduction="batchmean")
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(output["logits"].detach(), y)


@pytest.mark.parametrize("match", ["embedding", "numbers"])
def test_embeddings_and_numbers_are_matched_by_their_distance(match: Any) -> None:
    student, teacher = Model(), Model()
    pick = lambda output, inputs: output["hidden"]  # noqa: E731
    _, loss = Distillation(student, teacher, match=match, output=pick)(X)
    with torch.no_grad():
        y, t = student.body(X), teacher.body(X)
        cosine = (y * t).sum(1) / y.norm(dim=1) / t.norm(dim=1)
        expected = (1 - cosine).mean() if match == "embedding" else (y - t).square().sum() / t.square().sum()
    torch.testing.assert_close(loss.detach(), expected)


def test_hidden_states_of_other_widths_are_projected() -> None:
    student, teacher = Model(6), Model(8)
    distillation = Distillation(student, teacher, hidden={"body": 2.0, "body.0": ("body.0", 0.5)}, example_inputs=(X,))
    assert {name: tuple(p.shape) for name, p in distillation.named_parameters()} == {
        "projections.body.weight": (8, 6),
        "projections.body/0.weight": (8, 6),
    }
    _, loss = distillation(X)
    with torch.no_grad():
        plain = Distillation(student, teacher)(X)[1]
        for name, weight in (("body", 2.0), ("body.0", 0.5)):
            projection = distillation.projections[name.replace(".", "/")]
            h, t = projection(student.get_submodule(name)(X)), teacher.get_submodule(name)(X)
            plain = plain + weight * (h - t).square().sum() / t.square().sum()
    torch.testing.assert_close(loss.detach(), plain)
    loss.backward()
    assert all(p.grad is not None for p in [*student.body.parameters(), *distillation.parameters()])
    assert all(p.grad is None for p in teacher.parameters())


def test_the_default_teacher_is_the_model_as_it_was() -> None:
    student = Model()
    dense = copy.deepcopy(student)
    sparsify(student, "weight", budget=Budget(sparsity=0.8, steps=20))
    distillation = Distillation(student)
    optimizer = torch.optim.Adam(param_groups(student, lr=1e-2, gate_lr=0.1))
    losses = []
    for _ in range(60):
        _, loss = distillation(X)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(distillation.teacher(X)["logits"], dense(X)["logits"])
    assert losses[-1] < max(losses) / 2
    assert not list(l0hooks.iter_gates(distillation.teacher))


def test_frozen_weights_have_no_second_copy() -> None:
    student = Model().requires_grad_(False)
    student.head.requires_grad_(True)
    sparsify(student, "weight")
    teacher = Distillation(student).teacher
    memory = {p.data_ptr() for p in student.parameters()}
    assert {name: p.data_ptr() in memory for name, p in teacher.named_parameters()} == {
        "body.0.weight": True,
        "body.0.bias": True,
        "head.weight": False,
        "head.bias": False,
    }
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_models_carry_nothing_of_it() -> None:
    student = Model()
    sparsify(student, "weight", budget=Budget(sparsity=0.5, steps=0))
    distillation = Distillation(student, hidden={"body": 1.0}, example_inputs=(X,))
    distillation(X)
    assert not any(module._forward_hooks for module in distillation.teacher.modules())
    assert list(distillation.state_dict()) == []
    assert type(prune(student)) is Model


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(l0hooks.errors.SpecError, match=r"did you mean 'logits'"):
        Distillation(Model(), match="logit")  # type: ignore[arg-type]
    with pytest.raises(l0hooks.errors.InvalidValueError, match=r"temperature must be positive"):
        Distillation(Model(), temperature=0.0)
    with pytest.raises(l0hooks.errors.InvalidValueError, match=r"weights must not be negative"):
        Distillation(Model(), hidden={"body": -1.0}, example_inputs=(X,))
    with pytest.raises(l0hooks.errors.SpecError, match=r"modules of the student.\n  got: a name that it does not have"):
        Distillation(Model(), hidden={"boddy": 1.0}, example_inputs=(X,))
    with pytest.raises(l0hooks.errors.SpecError, match=r"modules of the teacher"):
        Distillation(Model(), hidden={"body": ("boddy", 1.0)}, example_inputs=(X,))
    with pytest.raises(l0hooks.errors.SpecError, match=r"hidden without example_inputs"):
        Distillation(Model(), hidden={"body": 1.0})
    with pytest.raises(
        l0hooks.errors.StateError, match=r"must compute equal shapes.\n  expected: \(16, 8\)\n  got: \(16, 6\)"
    ):
        Distillation(Model(6), Model(8), output=lambda output, inputs: output["hidden"])(X)
    with pytest.raises(l0hooks.errors.SpecError, match=r"an output must hold floating-point numbers"):
        Distillation(nn.Identity(), nn.Identity())(3)

    class Skips(Model):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
            return {"logits": F.linear(self.body(x), self.head.weight)}

    with pytest.raises(l0hooks.errors.StateError, match=r"a module that was not called"):
        Distillation(Skips(), hidden={"head": 1.0}, example_inputs=(X,))
