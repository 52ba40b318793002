"""Gates on whole blocks: what they multiply, their noise, their values in evaluation, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l0hooks
from l0hooks import Budget, GateSpec, L0HooksError, iter_gates, prune, set_budget, sparsify, summary
from l0hooks.attach.layer_gate import LayerGate
from l0hooks.attach.walk import iter_gated
from l0hooks.errors import SpecError, StateError

DEPTH = GateSpec(granularity="coupled", kinds=("layer",))
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self, *, tupled: bool = False) -> None:
        super().__init__()
        self.inner, self.tupled = nn.Linear(4, 4), tupled

    def forward(self, hidden: Tensor, scale: float = 1.0) -> Any:
        y = hidden + scale * self.inner(hidden).relu()
        return (y, "more") if self.tupled else y


class Loop(nn.Module):
    """Keyword arguments and tuples, with or without checkpointing."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Residual(tupled=True) for _ in range(count)])
        self.head = nn.Linear(4, 2)
        self.again = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, more = checkpoint(layer, x, use_reentrant=False) if self.again else layer(hidden=x, scale=0.5)
            assert more == "more"
        return self.head(x)


def gated(model: nn.Module, spec: Any = DEPTH, **options: Any) -> list[LayerGate]:
    torch.manual_seed(0)
    sparsify(model, spec, example_inputs=(X,), **options)
    return [gate for _, gate in iter_gates(model) if isinstance(gate, LayerGate)]


def test_in_evaluation_an_open_gate_is_exactly_one_and_a_closed_one_exactly_zero() -> None:
    model = Loop().eval()
    dense = copy.deepcopy(model)
    gates = gated(model)
    assert torch.equal(model(X), dense(X))
    gates[1].log_alpha.data.fill_(-9.0)
    assert [gate.value().item() for gate in gates] == [1.0, 0.0, 1.0]
    del dense.layers[1]
    assert torch.equal(model(X), dense(X))


def test_in_training_the_output_is_x_plus_z_times_the_rest() -> None:
    model = nn.Sequential(Residual(), Residual())
    gates = gated(model)
    model.train()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda _, args, out: seen.append(out))
    model(X)
    plain = X + model[0].inner(X).relu()
    share = ((seen[0] - X) / (plain - X))[(plain - X).abs() > 1e-3]
    assert 0 < share.min()
    assert share.max() - share.min() < 1e-4
    model(X)[0].sum().backward()
    assert all(gate.log_alpha.grad is not None and bool(gate.log_alpha.grad.isfinite()) for gate in gates)


def test_every_forward_has_new_noise_and_a_recomputed_one_its_own() -> None:
    model = Loop()
    gates = gated(model)
    model.train()
    for gate in gates:
        gate.log_alpha.data.fill_(0.5)
    assert not torch.equal(model(X), model(X))
    grads = []
    for again in (False, True):
        torch.manual_seed(3)
        model.again = again
        for layer in model.layers:
            layer.forward = (lambda own: lambda hidden, scale=0.5: own(hidden, 0.5))(type(layer).forward.__get__(layer))
        model.zero_grad()
        model(X).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_draw_for_each_example_if_asked_for() -> None:
    model = nn.Sequential(Residual(), Residual())
    gates = gated(model, GateSpec(granularity="coupled", kinds=("layer",), noise="example"))
    gates[0].log_alpha.data.fill_(0.0)
    model.train()
    found: list[Tensor] = []
    model[0].register_forward_hook(lambda _, args, out: found.append(out - args[0]))
    x = torch.ones(64, 4)
    model(x)
    assert len({round(value, 4) for value in found[0].sum(1).tolist()}) > 10


def test_of_a_list_that_must_not_become_empty_the_largest_stays() -> None:
    model = Loop().eval()
    gates = gated(model)
    for gate, value in zip(gates, (-9.0, -7.0, -8.0), strict=True):
        gate.log_alpha.data.fill_(value)
    assert [gate.kept() for gate in gates] == [0, 1, 0]
    small = prune(model, example_inputs=(X,))
    assert len(small.layers) == 1
    assert torch.equal(small(X), model(X))


def test_a_sequential_may_become_empty() -> None:
    model = nn.Sequential(nn.Sequential(Residual(), Residual()), nn.Linear(4, 2)).eval()
    for gate in gated(model):
        gate.log_alpha.data.fill_(-9.0)
    small = prune(model, example_inputs=(X,))
    assert len(small[0]) == 0
    assert torch.equal(small(X), model(X))
    assert torch.equal(small(X), small[1](X))


def test_a_block_that_is_a_sequential_runs_its_gate_as_the_identity() -> None:
    class Skip(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    model = nn.Sequential(*(Skip(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))).eval()
    expected = model(X)
    gates = gated(model)
    assert torch.equal(model(X), expected)
    gates[0].log_alpha.data.fill_(-9.0)
    small = prune(model, example_inputs=(X,))
    assert len(small) == 1
    assert len(small[0]) == 2
    assert torch.equal(small(X), model(X))


def test_kinds_choose_and_by_default_blocks_have_no_gates() -> None:
    for kinds, wanted in ((None, False), (("neuron", "layer"), True)):
        model = nn.Sequential(nn.Linear(4, 4), Residual(), Residual(), nn.Linear(4, 1))
        report = sparsify(model, GateSpec(granularity="coupled", kinds=kinds), example_inputs=(X,))
        assert any(row.kind == "layer" for row in report.rows) == wanted


def test_patterns_name_blocks() -> None:
    """A type or a name means blocks even where they are no sums; a wildcard over everything means sums alone."""
    for pattern, names in (("layers.1", ["layers.1"]), (Residual, [f"layers.{n}" for n in range(3)])):
        model = Loop()
        sparsify(model, {pattern: DEPTH}, example_inputs=(X,))
        assert [one.name for one in iter_gated(model)] == names
    model = Loop()
    sparsify(model, DEPTH, example_inputs=(X,), exclude="layers.0")
    assert [one.name for one in iter_gated(model)] == ["layers.1", "layers.2"]
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval()
    sparsify(plain, {"0": DEPTH}, example_inputs=(X,))
    next(gate for _, gate in iter_gates(plain)).log_alpha.data.fill_(-9.0)
    assert torch.equal(prune(plain, example_inputs=(X,))(X), X.tanh())


REFUSED: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), DEPTH, {}, SpecError, "at least one residual block"),
    (Loop, {"layers.0.inner": "weight", "*": DEPTH}, {}, SpecError, "holds coupled gates alone"),
    (Loop, DEPTH, {"example_inputs": None}, SpecError, "no example_inputs"),
    (Loop, DEPTH, {"budget": Budget(sparsity=0.3, unit="params", cut_every=2)}, SpecError, "cut_every"),
]


@pytest.mark.parametrize(("make", "spec", "options", "kind", "message"), REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(
    make: Any, spec: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = make()
    before, modules = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    with pytest.raises(kind, match=message) as caught:
        sparsify(model, spec, **{"example_inputs": (X,), **options})
    assert isinstance(caught.value, L0HooksError)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_call_without_the_input_is_refused() -> None:
    model = nn.Sequential(Residual(), Residual())
    gated(model)
    with pytest.raises(StateError, match="maps its first input to an output of the same shape"):
        model[0](torch.ones(4).expand(2, 4)[:, :4].reshape(2, 4), scale=torch.ones(3, 1, 1))


def test_dense_checkpoints_load_and_those_with_gates_resume() -> None:
    model = Loop()
    dense = copy.deepcopy(model.state_dict())
    gated(model)
    model.load_state_dict(dense)
    other = Loop()
    gates = gated(other)
    gates[0].log_alpha.data.fill_(-2.0)
    model.load_state_dict(other.state_dict())
    assert next(iter_gates(model))[1].log_alpha.item() == -2.0
    state = other.state_dict()
    del state["layers.0.layer_gate.gate.log_alpha"]
    with pytest.raises(RuntimeError, match="log_alpha"):
        model.load_state_dict(state)


def test_prune_leaves_the_gated_model_and_nothing_of_the_gates_in_the_result() -> None:
    model = Loop().eval()
    gates = gated(model)
    gates[0].log_alpha.data.fill_(-9.0)
    expected = model(X)
    small, report = prune(model, example_inputs=(X,), return_report=True)
    assert torch.equal(model(X), expected)
    assert len(model.layers) == 3
    assert report.exported_parameters == report.model_parameters_kept == sum(p.numel() for p in small.parameters())
    assert "layers.0 " in str(summary(model))
    assert "not gated: head" in str(summary(model))
    for module in small.modules():
        assert not (module._forward_hooks)
        assert not (module._forward_pre_hooks)
        assert not (module._forward_hooks_with_kwargs)
        assert not module._load_state_dict_pre_hooks
    small.train()(X).sum().backward()


def test_a_budget_that_has_ended_trains_on_with_blocks_exactly_open_or_closed() -> None:
    model = Loop()
    gated(model)
    set_budget(model, Budget(keep=2, steps=3))
    optimizer = torch.optim.SGD(l0hooks.param_groups(model, lr=0.01, gate_lr=0.5))
    for _ in range(4):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.train()
    trained = model(X)
    assert torch.equal(trained, model.eval()(X))
    assert len(prune(model, example_inputs=(X,)).layers) == 2


@pytest.mark.slow
def test_it_compiles_whole() -> None:
    model = nn.Sequential(Residual(), Residual())
    gated(model)
    model.eval()
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(X), model(X), atol=1e-6)
    model.train()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert not torch.equal(whole(X), whole(X))
