"""The noise law (DESIGN.md §5): every training forward has noise of its own, and a recomputation sees it again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parameters import OLDEST
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import l0hooks
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.errors import StateError
from l0hooks.gates.noise import GateNoise, NoiseSource

pytestmark = pytest.mark.usefixtures("both_ways")
SPECS = ["weight", "input", "output"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Net(nn.Module):
    """Two blocks, checkpointed on request, and a method other than forward."""

    def __init__(self, *, recompute: bool = False, **options: Any) -> None:
        super().__init__()
        self.block1, self.block2 = Block(), Block()
        self.recompute, self.options = recompute, options

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block1, self.block2):
            x = checkpoint(block, x, **self.options) if self.recompute else block(x)
        return x

    def encode(self, x: Tensor) -> Tensor:
        return self.block2.first(torch.tanh(self.block1.first(x)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gated(model: nn.Module, spec: str = "weight") -> nn.Module:
    # half-open gates: every draw shows
    l0hooks.sparsify(model, l0hooks.GateSpec(granularity=spec, init_mean=0.5))
    return model


def x(batch: int = 3) -> Tensor:
    return torch.linspace(-2, 2, 6 * batch).reshape(batch, 6)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other)


DOORS: dict[str, Callable[[Net], Tensor]] = {
    "model": lambda net: net(x()),
    "submodule": lambda net: net.block1(x()),
    "leaf": lambda net: net.block1.first(x()),
    "method": lambda net: net.encode(x()),
    "weight read": lambda net: net.block1.first.weight,
    "functional_call": lambda net: functional_call(net, dict(net.named_parameters()), (x(),)),
    "averaged": lambda net: AveragedModel(net)(x()),
    "wrapper": lambda net: nn.Sequential(net)(x()),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("door", DOORS)
def test_every_forward_draws_anew_by_whatever_door(door: str, spec: str) -> None:
    net = gated(Net(), spec)
    draws = [DOORS[door](net) for _ in range(3)]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


@pytest.mark.parametrize("door", DOORS)
def test_manual_seed_reproduces_a_run(door: str) -> None:
    net = gated(Net())
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(torch.stack([DOORS[door](net).sum() for _ in range(3)]))
    assert torch.equal(*runs)


def test_registration_and_evaluation_consume_no_random_numbers() -> None:
    net = Net()
    state = torch.get_rng_state()
    gated(net)
    net.eval()
    net(x())
    l0hooks.summary(net, example_inputs=(x(),))
    l0hooks.prune(net, example_inputs=(x(),))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_is_deterministic() -> None:
    net = gated(Net()).eval()
    assert torch.equal(net(x()), net(x()))


def test_different_gates_have_independent_noise_in_one_forward() -> None:
    net, drawn = gated(Net()), []
    for site in iter_sites(net):
        site.module.register_forward_pre_hook(lambda *_, gate=site.gating.gate: drawn.append(gate.noise().flatten()))
    net(x())
    first = torch.stack(drawn)
    assert torch.corrcoef(first).fill_diagonal_(0).abs().max() < 0.7  # 36 numbers each
    assert len(first.unique()) == first.numel()


def test_noise_is_uniform_and_independent_from_step_to_step() -> None:
    gate = l0hooks.Gate(2000)
    draws = torch.stack([gate.noise() for _ in range(50)])
    expected = torch.linspace(0, 1, 101)
    empirical = (draws.flatten()[:, None] <= expected).double().mean(0)
    assert (empirical - expected).abs().max() < 0.006  # 1.36/sqrt(1e5) is the 5 % bound of Kolmogorov-Smirnov: 0.0043
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.12


class Tied(nn.Module):
    """One weight behind two modules, and one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a(x), self.a(x), self.b(x)


def test_sites_that_share_a_gate_share_its_draw() -> None:
    model = Tied()
    l0hooks.sparsify(model, l0hooks.GateSpec(init_mean=0.5))
    one, two, three = model(x())
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert not torch.equal(one, model(x())[0])


CHECKPOINTING = [
    {"use_reentrant": reentrant, "preserve_rng_state": preserve}
    for reentrant in (False, True)
    for preserve in (True, False)
]


def reference_and_checkpointed(**options: Any) -> tuple[nn.Module, nn.Module]:
    plain = gated(Net())
    recomputing = copy.deepcopy(plain)
    recomputing.recompute, recomputing.options = True, options
    return plain, recomputing


def leaf(batch: int) -> Tensor:
    return x(batch).requires_grad_()  # reentrant checkpointing wants an input that does


@pytest.mark.parametrize("options", CHECKPOINTING, ids=str)
@pytest.mark.parametrize("forwards", [1, 2, 3])
@pytest.mark.parametrize("order", ["one backward", "in order", "reversed"])
def test_recomputation_sees_the_noise_of_its_own_forward(options: dict[str, Any], forwards: int, order: str) -> None:
    results = []
    for model in reference_and_checkpointed(**options):
        torch.manual_seed(3)
        losses = [model(leaf(2 + i)).square().sum() for i in range(forwards)]
        if order == "one backward":
            losses = [torch.stack(losses).sum()]
        for loss in reversed(losses) if order == "reversed" else losses:
            loss.backward()
        results.append(gradients(model))
    assert_same(*results)


def regions(net: Net) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "model": net,
        "submodule": net.block1,
        "leaf": net.block1.first,
        "method": net.encode,
        "lambda": lambda h: net.block2(torch.relu(net.block1.second(h))),
        "weight read": lambda h: h @ net.block1.first.weight,
    }


@pytest.mark.parametrize("options", CHECKPOINTING, ids=str)
@pytest.mark.parametrize("region", list(regions(Net())))
def test_recomputation_of_any_region_outside_the_models_forward(options: dict[str, Any], region: str) -> None:
    net = gated(Net())
    results = []
    for use in (False, True):
        torch.manual_seed(5)
        function = regions(net)[region]
        outputs = [checkpoint(function, leaf(n), **options) if use else function(leaf(n)) for n in (2, 3)]
        sum(out.square().sum() for out in outputs).backward()
        results.append(gradients(net))
    assert_same(*results)


@pytest.mark.parametrize("preserve", [True, False])
def test_nested_checkpoints(preserve: bool) -> None:
    net = gated(Net())
    options = {"use_reentrant": False, "preserve_rng_state": preserve}
    inner = lambda h: checkpoint(net.block2, net.block1(h), **options)  # noqa: E731
    results = []
    for use in (False, True):
        torch.manual_seed(5)
        outputs = [checkpoint(inner, leaf(n), **options) if use else net.block2(net.block1(leaf(n))) for n in (2, 3)]
        sum(out.square().sum() for out in outputs).backward()
        results.append(gradients(net))
    assert_same(*results)


@pytest.mark.parametrize("options", CHECKPOINTING, ids=str)
def test_dropout_beside_gates_keeps_its_own_mask_when_rng_is_preserved(options: dict[str, Any]) -> None:
    net = gated(Net())
    region = lambda h: net.block2(torch.dropout(net.block1.first(h), 0.5, train=True))  # noqa: E731
    results = []
    for use in (False, True):
        torch.manual_seed(5)
        out = checkpoint(region, leaf(4), **options) if use else region(leaf(4))
        out.square().sum().backward()
        results.append(gradients(net))
    if options["preserve_rng_state"]:
        assert_same(*results)


def test_unrecorded_forwards_in_between_do_not_disturb_a_recomputation() -> None:
    results = []
    for model in reference_and_checkpointed(use_reentrant=False, preserve_rng_state=False):
        torch.manual_seed(5)
        loss = model(leaf(3)).square().sum()
        with torch.no_grad():
            seen = [model(x()) for _ in range(2)]
        assert not torch.equal(*seen)
        loss.backward()
        results.append(gradients(model))
    assert_same(*results)


def test_one_leaf_twice_in_a_region_outside_a_forward_is_refused_not_wrong() -> None:
    net = gated(Net())
    twice = lambda h: net.block1.first(torch.tanh(net.block1.first(h)))  # noqa: E731
    out = checkpoint(twice, leaf(3), use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(StateError, match="at most one call of a gated module"):
        out.sum().backward()


def test_a_forward_that_is_no_longer_remembered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l0hooks.gates.noise._MEMORY", 4)
    net = gated(Net(recompute=True, use_reentrant=False))
    loss = net(leaf(3)).sum()
    for _ in range(4):
        net(x())
    with pytest.raises(StateError, match="must still be remembered"):
        loss.backward()


def test_a_first_forward_inside_a_backward_hook_draws() -> None:
    net, probe = gated(Net()), leaf(3)
    seen: list[Tensor] = []
    probe.register_hook(lambda grad: seen.extend([net(x()).detach(), net(x()).detach()]))
    (probe * 2).sum().backward()
    assert not torch.equal(*seen)


def test_gradient_accumulation_uses_each_forwards_own_noise() -> None:
    net = gated(Net())
    torch.manual_seed(1)
    for n in (2, 3):
        net(x(n)).square().sum().backward()
    accumulated = gradients(net)
    torch.manual_seed(1)
    losses = [net(x(n)).square().sum() for n in (2, 3)]
    separate = [torch.autograd.grad(loss, list(net.parameters())) for loss in losses]
    assert_same(accumulated, [a + b for a, b in zip(*separate, strict=True)])


def test_an_interrupted_forward_does_not_freeze_the_noise() -> None:
    net = gated(Net())
    for error in (ValueError, KeyboardInterrupt):
        handle = net.block2.register_forward_pre_hook(lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            net(x())
        handle.remove()
        assert not torch.equal(net(x()), net(x()))
        assert not torch.equal(net.block1(x()), net.block1(x()))


def test_an_optimiser_step_ends_a_forward_that_was_interrupted() -> None:
    net = gated(Net())
    handle = net.block2.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        net(x())
    handle.remove()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert not torch.equal(net.block1(x()), net.block1(x()))


def test_a_standalone_gate_pickles() -> None:
    gate = pickle.loads(pickle.dumps(l0hooks.Gate(5, init_keep_prob=0.3)))
    assert not torch.equal(gate.noise(), gate.noise())
    torch.testing.assert_close(gate.keep_prob(), torch.full((5,), 0.3))


def test_a_deepcopy_after_a_training_forward_is_complete_and_independent() -> None:
    net = gated(Net())
    net(x()).sum().backward()
    twin = copy.deepcopy(net)
    sources = {id(site.gating.gate.noise_source.source) for model in (net, twin) for site in iter_sites(model)}
    assert len(sources) == 2
    assert not torch.equal(twin(x()), twin(x()))
    torch.manual_seed(2)
    from_net = net(x())
    torch.manual_seed(2)
    assert torch.equal(twin(x()), from_net)
    twin(x()).sum().backward()
    twin.eval()
    net(x())  # the original still trains


def test_an_averaged_copy_averages_the_gates() -> None:
    net = gated(Net())
    average = AveragedModel(net)
    average.update_parameters(net)
    with torch.no_grad():
        for _, gate in l0hooks.iter_gates(net):
            gate.log_alpha.add_(1)
    before = average.eval()(x())
    average.update_parameters(net)
    for (_, mean), (_, gate) in zip(l0hooks.iter_gates(average), l0hooks.iter_gates(net), strict=True):
        torch.testing.assert_close(mean.log_alpha, gate.log_alpha - 0.5)
    assert not torch.equal(average(x()), before)  # the folded weight was not kept


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


COMPILED: dict[str, Callable[[Net], Callable[[Tensor], Tensor]]] = {
    "model": lambda net: net,
    "method": lambda net: net.encode,
    "function": lambda net: lambda h: net(h) + net(h + 1),
}


# the method is never recomputed; a graph draws its noise by one operator, whose two ways one kind of call tells apart
WAYS = {"model": ("by Numba", "by torch"), "method": ("by torch",), "function": ("by torch",)}
FAST = {("model", "weight", True), ("method", "input", False)}
OTHERS = {("model", "output", False): OLDEST, ("function", "input", True): OLDEST}
OTHERS |= dict.fromkeys(
    [("model", "input", True), ("method", "weight", False), ("function", "weight", False)], (pytest.mark.slow,)
)
GRAPHS = [
    pytest.param(way, what, spec, recompute, marks=OTHERS.get((what, spec, recompute), ()))
    for what, spec, recompute in sorted(
        FAST | OTHERS.keys()
    )  # each pair of a call, a granularity and a recomputation once
    for way in WAYS[what]
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("both_ways", "what", "spec", "recompute"), GRAPHS, indirect=["both_ways"])
def test_fullgraph_compilation_computes_the_same(what: str, spec: str, recompute: bool) -> None:
    options = {"use_reentrant": False, "preserve_rng_state": False}
    net = gated(Net(recompute=recompute, **options), spec)
    function = COMPILED[what](net)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        torch.manual_seed(9)
        outputs = [call(x(4)) for _ in range(3)]
        assert not torch.equal(outputs[0], outputs[1])
        sum(out.square().sum() for out in outputs).backward()
        results.append([*outputs, *gradients(net)])
    assert_same(*results)


BOTH_WAYS_COMPILED = pytest.mark.parametrize(
    ("both_ways", "preserve"),
    [
        ("by Numba", True),
        *(pytest.param(*case, marks=OLDEST) for case in (("by Numba", False), ("by torch", True), ("by torch", False))),
    ],
    indirect=["both_ways"],
)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("both_ways", ["by Numba", pytest.param("by torch", marks=OLDEST)], indirect=True)
def test_compiled_evaluation_and_temperature_schedules_recompile_at_most_twice() -> None:
    net = gated(Net())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for step in range(8):
        l0hooks.set_temperature(net, 0.6 - 0.05 * step)
        compiled(x()).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    net.eval()
    torch.testing.assert_close(compiled(x()), net(x()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler, of its own
@pytest.mark.usefixtures("fresh_compiler")
@BOTH_WAYS_COMPILED
def test_compiled_blocks_inside_an_eager_model_and_an_eager_checkpoint(preserve: bool) -> None:
    net = gated(Net())
    results = []
    for use in (False, True):
        model = copy.deepcopy(net)
        model.recompute, model.options = use, {"use_reentrant": False, "preserve_rng_state": preserve}
        if use:
            model.block1.compile(fullgraph=True, backend="aot_eager")
            model.block2 = torch.compile(model.block2, fullgraph=True, backend="aot_eager")
        for _ in range(2):  # the second round runs what the first one compiled
            torch.manual_seed(9)
            outputs = [model(leaf(4)) for _ in range(2)]
            sum(out.square().sum() for out in outputs).backward()
            grads = gradients(model)
        results.append(grads)
    assert_same(*results)


@pytest.mark.usefixtures("fresh_compiler")
@BOTH_WAYS_COMPILED
def test_a_compiled_block_checkpointed_outside_the_models_forward(preserve: bool) -> None:
    net = gated(Net())
    compiled = torch.compile(net.block1, fullgraph=True, backend="aot_eager")
    results = []
    for use in (False, True):
        torch.manual_seed(9)
        options = {"use_reentrant": False, "preserve_rng_state": preserve}
        outputs = [checkpoint(compiled, leaf(n), **options) if use else net.block1(leaf(n)) for n in (4, 4)]
        sum(out.square().sum() for out in outputs).backward()
        results.append(gradients(net))
    assert_same(*results)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own use of torch.jit
@pytest.mark.usefixtures("fresh_compiler")
def test_the_default_compiler_computes_the_same() -> None:
    net = gated(Net())
    compiled = torch.compile(net, fullgraph=True)
    results = []
    for call in (net, compiled):
        torch.manual_seed(9)
        outputs = [call(x(4)) for _ in range(3)]
        sum(out.square().sum() for out in outputs).backward()
        results.append([*outputs, *gradients(net)])
    assert_same(*results)


def test_sources_do_not_outlive_their_models() -> None:
    import gc

    from l0hooks.gates import noise

    gc.collect()  # models of earlier tests must not go in between
    before = len(noise._sources)
    net = gated(Net())
    assert len(noise._sources) == before + 1
    del net
    gc.collect()
    assert len(noise._sources) <= before


def test_noise_depends_on_the_forward_s_seed_and_the_gate_s_number_only() -> None:
    entry = NoiseSource().add_entry("", ())
    entry.source.owner, entry.source.seed = "", torch.tensor(42)
    like = torch.zeros(4)
    first, second = GateNoise(entry, 0), GateNoise(entry, 1)
    assert torch.equal(first.uniform(like), first.uniform(like))
    assert not torch.equal(first.uniform(like), second.uniform(like))
