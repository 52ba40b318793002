"""Groups declared by hand equal those that tracing finds; errors name the line that stopped an export."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0hooks import (
    GateSpec,
    channel_groups,
    iter_gates,
    load_pruned,
    param_groups,
    penalty,
    prune,
    save_pruned,
    sparsify,
)
from l0hooks.errors import SpecError, StateError, UnsupportedModuleError
from l0hooks.structure import declare_group


def columns(*ranges):
    """A row for each member, of width 1, over these ranges."""
    return np.concatenate([np.arange(*r) for r in ranges])[:, None]


# --- laws: a declaration equals what tracing finds -------------------------------------------------------------------


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
        self.slope, self.out = nn.PReLU(5), nn.Linear(5 * 9, 4)

    def forward(self, x):
        return self.out(self.slope(self.two(F.relu(self.norm(self.one(x))))).flatten(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.norm, self.head = nn.GroupNorm(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = self.norm(x + self.b(F.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, fused=False):
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(8, 24)
        else:
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.unflatten(-1, (-1, 2)).transpose(1, 2) for p in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.each, self.norm = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.BatchNorm2d(8, affine=False),
        )
        self.down, self.spread = nn.ConvTranspose2d(8, 6, 2), nn.ConvTranspose2d(6, 6, 2, groups=6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.out(self.spread(F.relu(self.down(self.norm(self.each(F.relu(self.up(x))))))))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv1d(2, 4, 1), nn.Conv1d(2, 5, 3, padding=1)
        self.norm, self.mix = nn.InstanceNorm1d(9, affine=True), nn.Conv1d(9, 3, 1)

    def forward(self, x):
        return self.mix(self.norm(torch.cat([self.left(x), self.right(x)], 1)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.down(F.relu(self.up(x))))


class Shared(nn.Module):
    """One layer under two names, twice in a row."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = self.two

    def forward(self, x):
        return self.out(F.relu(self.again(F.relu(self.two(F.relu(self.one(x)))))))


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


FUSED = np.stack([np.r_[h : h + 2, 8 + h : 10 + h, 16 + h : 18 + h] for h in range(0, 8, 2)])
PARTS = [("qkv", FUSED[:, i : i + 2]) for i in (0, 2, 4)]  # the same in three entries
HEADS = {"inputs": "proj", "kind": "head"}
# name: (model, input, declarations in the order of tracing)
LAWS = {
    "mlp": (mlp, lambda: torch.randn(3, 5), [
        {"outputs": "0", "through": "1", "inputs": "3"}, {"outputs": ["3"], "inputs": ("5",)}]),
    "convolutional": (Convolutional, lambda: torch.randn(2, 3, 5, 5), [
        {"outputs": "one", "through": ["norm"], "inputs": "two"},
        {"outputs": "two", "through": "slope", "inputs": "out"}]),
    "residual": (Residual, lambda: torch.randn(2, 3, 4, 4), [
        {"outputs": ["stem", "b"], "through": "norm", "inputs": ["a", "head"]}, {"outputs": "a", "inputs": "b"}]),
    "heads": (Attention, lambda: torch.randn(2, 3, 8), [{"outputs": ["q", "k", "v"], "size": 4, **HEADS}]),
    "fused heads": (lambda: Attention(True), lambda: torch.randn(2, 3, 8), [{"outputs": ("qkv", FUSED), **HEADS}]),
    "fused in parts": (lambda: Attention(True), lambda: torch.randn(2, 3, 8), [{"outputs": PARTS, **HEADS}]),
    "depthwise": (Separable, lambda: torch.randn(2, 3, 5, 5), [
        {"outputs": "up", "through": ["each", "norm"], "inputs": "down"},
        {"outputs": "down", "through": "spread", "inputs": "out"}]),
    "concatenation": (Joined, lambda: torch.randn(2, 2, 4), [
        {"outputs": "left", "through": ("norm", columns((4,))), "inputs": ("mix", torch.arange(4)[:, None])},
        {"outputs": "right", "through": ("norm", columns((4, 9))), "inputs": ("mix", columns((4, 9)).tolist())}]),
    "tied": (Tied, lambda: torch.randint(7, (2, 4)), [
        {"outputs": ["embed", "down"], "inputs": ["up", "head"]}, {"outputs": "up", "inputs": "down"}]),
    "shared": (Shared, lambda: torch.randn(2, 4), [
        {"outputs": ["one", "two"], "inputs": ["two", "out"]}]),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    build, inputs, declarations = LAWS[name]
    model, x = build(), inputs()
    return model, x, [declare_group(model, **d) for d in declarations]


def content(group):
    sites = [(s.names, tuple(s.shape), s.axis, s.indices.tolist(), s.reads, s.buffer) for s in group.sites]
    return group.kind, group.size, sites


@torch.no_grad()
def close(model, share=1 / 3):
    for number, (_, gate) in enumerate(iter_gates(model)):
        generator = torch.Generator().manual_seed(number)
        closed = torch.randperm(gate.log_alpha.numel(), generator=generator)[
            : max(1, int(gate.log_alpha.numel() * share))
        ]
        gate.log_alpha.fill_(3.0).view(-1)[closed] = -40.0
    return model


@pytest.mark.parametrize("name", LAWS)
def test_a_declaration_is_what_tracing_finds(name):
    model, x, declared = made(name)
    found = channel_groups(model, (x,))
    assert [content(g) for g in declared] == [content(g) for g in found]
    assert [str(g) for g in declared] == [str(g) for g in found]


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("noise", ["step", "example"])
def test_both_ways_prune_to_the_same_model(name, noise):
    model, x, declared = made(name)
    traced = copy.deepcopy(model)
    spec = GateSpec(granularity="coupled", noise=noise)
    reports = sparsify(model, spec, example_inputs=(x,), groups=declared), sparsify(traced, spec, example_inputs=(x,))
    assert str(reports[0]) == str(reports[1])
    small, other = (prune(close(m.eval()), example_inputs=(x,)) for m in (model, traced))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in small.state_dict().items())
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5)


def test_a_part_of_what_tracing_finds_may_be_given():
    model, x, _ = made("convolutional")
    found = channel_groups(model, (x,))
    report = sparsify(model, "coupled", example_inputs=(x,), groups=[g for g in found if g.name == "two"])
    assert [row.name for row in report.rows] == ["two"]


def test_patterns_kinds_and_exclude_choose_among_the_groups_given():
    for spec, options, names in (
        ({"one": "coupled"}, {}, ["one"]),
        ("coupled", {"exclude": "one"}, ["two"]),
        ({"out": "coupled", "one": "weight"}, {}, ["two", "one"]),
    ):
        model, x, groups = made("convolutional")
        report = sparsify(model, spec, example_inputs=(x,), groups=groups, **options)
        assert sorted(row.name.removesuffix(".weight") for row in report.rows) == sorted(names)
    model, x, groups = made("convolutional")
    with pytest.raises(SpecError, match="groups given"):
        sparsify(model, GateSpec(granularity="coupled", kinds=("head",)), example_inputs=(x,), groups=groups)


def test_the_kind_is_guessed_or_given():
    assert declare_group(Convolutional(), outputs="two", inputs="out").kind == "channel"
    assert declare_group(mlp(), outputs="3", inputs="5").kind == "neuron"
    assert declare_group(mlp(), outputs="3", inputs="5", kind="channel").kind == "channel"


def test_hugging_face_layers_can_be_declared():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, x = nn.Sequential(Conv1D(6, 4), nn.GELU(), Conv1D(3, 6)), torch.randn(2, 5, 4)
    group = declare_group(model, outputs="0", inputs="2")
    assert [content(group)] == [content(g) for g in channel_groups(model, (x,))]


def test_a_group_norm_makes_members_of_whole_groups():
    model = Residual()
    names = {"outputs": ["stem", "b"], "through": "norm", "inputs": ["a", "head"]}
    assert declare_group(model, **names).size == 4
    assert declare_group(model, **names, size=2).size == 2
    with pytest.raises(SpecError, match=r"(?s)whole groups of a GroupNorm.*size=4"):
        declare_group(model, **names, size=8)


# --- models that cannot be exported ----------------------------------------------------------------------------------


class Branching(nn.Module):
    """Branches on data and calls into numpy on the way."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.next = nn.Conv2d(2, 9, 3), nn.BatchNorm2d(9), nn.Conv2d(9, 6, 3)
        self.fc1, self.fc2 = nn.Linear(6 * 4, 12), nn.Linear(12, 3)

    def forward(self, x):
        if x.mean() > 0:
            x = x * 2
        h = F.relu(self.norm(self.conv(x)))
        scale = float(np.tanh(x.detach().numpy().std()))
        return self.fc2(torch.tanh(self.fc1(self.next(h).flatten(1)))) * scale


class Steps(nn.Module):
    """Runs its block a number of times that depends on the data."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.out = nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 2)

    def forward(self, x):
        h = self.embed(x)
        for _ in range(1 + int(x.abs().sum()) % 3):
            h = h + self.block(F.relu(h))
        return self.out(h)


UNTRACEABLE = {
    "branching": (Branching, lambda: torch.randn(4, 2, 6, 6), [
        {"outputs": "conv", "through": "norm", "inputs": "next"}, {"outputs": "next", "inputs": "fc1"},
        {"outputs": "fc1", "inputs": "fc2"}]),
    "steps": (Steps, lambda: torch.randn(4, 4), [{"outputs": ["embed", "block"], "inputs": ["block", "out"]}]),
}  # fmt: skip


@pytest.mark.parametrize("noise", ["step", "example"])
@pytest.mark.parametrize("name", UNTRACEABLE)
def test_a_model_that_cannot_be_exported_trains_prunes_saves_and_loads(name, noise, tmp_path):
    torch.manual_seed(0)
    build, inputs, declarations = UNTRACEABLE[name]
    model, x = build(), inputs()
    with pytest.raises(UnsupportedModuleError, match="declare_group"):
        sparsify(model, "coupled", example_inputs=(x,))
    groups = [declare_group(model, **d) for d in declarations]
    spec = GateSpec(granularity="coupled", noise=noise)
    report = sparsify(model, spec, example_inputs=(x,), groups=groups)
    assert report.gates == sum(group.size for group in groups)
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-3, gate_lr=1e-2))
    (model(x).square().mean() + penalty(model, params=1e-3, macs=1e-4)).backward()
    assert all(gate.log_alpha.grad is not None for _, gate in iter_gates(model))
    optimizer.step()
    close(model.eval())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small, report = prune(model, example_inputs=(x,), return_report=True)
    assert type(small) is build
    assert report.note == ""
    assert sum(p.numel() for p in small.parameters()) == report.model_parameters_kept < report.model_parameters
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    for batch in (x, x[:1], inputs()):
        torch.testing.assert_close(small(batch), model(batch), rtol=0, atol=1e-5)
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(build, tmp_path / "small.safetensors").eval()
    assert torch.equal(again(x), small(x))


def prune_declared(model, x, *, dry_run=True, **names):
    """Gate one declared group, close a third of it and prune; checks that the model is unchanged."""
    sparsify(model, "coupled", example_inputs=(x,), groups=[declare_group(model, **names)], dry_run=dry_run)
    close(model.eval())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        return prune(model, example_inputs=(x,))
    finally:
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def refused(match, model, x, **names):
    """``sparsify`` refuses the group and leaves the model as it was; without a dry run ``prune`` does."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SpecError, match=f"(?s)in a dry run of prune, .*{match}"):
        prune_declared(model, x, **names)
    assert {k: v for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == {}
    with pytest.raises(StateError, match=f"(?s){match}"):
        prune_declared(model, x, dry_run=False, **names)


class TwoReaders(nn.Module):
    """Two layers read the hidden one; ``branch`` makes it impossible to export."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch
        self.up, self.norm, self.one, self.two = nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 3), nn.Linear(9, 3)

    def forward(self, x):
        if self.branch and x.sum() > 1000:
            x = x + 1
        h = F.relu(self.norm(self.up(x)))
        return self.one(h) + self.two(h)


@pytest.mark.parametrize("branch", [False, True], ids=["exportable", "not"])
@pytest.mark.parametrize(
    "names",
    [
        {"outputs": "up", "through": "norm", "inputs": "one"},
        {"outputs": "up", "inputs": ["one", "two"]},
        {"outputs": "up", "inputs": "one"},
    ],
    ids=["a reader", "a norm", "both"],
)
def test_a_forgotten_layer_ends_in_a_refusal(names, branch):
    torch.manual_seed(0)
    told = r"(irrelevant, whatever they hold|as modules: .*as a graph)"
    refused(told, TwoReaders(branch), torch.randn(5, 4), **names)


class Summed(nn.Module):
    """Members that are zero on the examples are read by a sum and by no other layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 3)

    def forward(self, x):
        if x.sum() > 1000:
            return x[:, :3]
        h = F.relu(self.up(x))
        return self.down(h) + h.sum(-1, keepdim=True)


@pytest.mark.parametrize("bias", [-50.0, 50.0])
def test_members_that_are_zero_on_the_examples_are_no_proof(bias):
    torch.manual_seed(0)
    model, x = Summed(), torch.randn(5, 4)
    model.up.bias.data.fill_(bias)
    refused("irrelevant, whatever they hold", model, x, outputs="up", inputs="down")


class FixedSize(nn.Module):
    def __init__(self, branch=True):
        super().__init__()
        self.branch = branch
        self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 3)

    def forward(self, x):
        if self.branch and x.sum() > 1000:
            return x[:, :3]
        return self.down(F.relu(self.up(x)).view(-1, 9))


def test_a_fixed_size_in_a_model_that_cannot_be_exported_is_reported():
    told = r"as modules: RuntimeError.*as a graph: .*branches on data.*sizes"
    refused(told, FixedSize(), torch.randn(5, 4), outputs="up", inputs="down")


def test_a_declared_model_with_fixed_sizes_becomes_a_graph_if_it_can_be_exported():
    torch.manual_seed(0)
    model, x = FixedSize(False), torch.randn(5, 4)
    small = prune_declared(model, x, outputs="up", inputs="down")
    assert isinstance(small, torch.fx.GraphModule)
    assert small.up.weight.shape == (6, 4)
    torch.testing.assert_close(small(x), model(x))


def mistakes(name):
    """The declarations of a law with one layer forgotten, or its members in another order."""
    declarations = LAWS[name][2]
    for number, role in itertools.product(range(len(declarations)), ("outputs", "through", "inputs")):
        named = declarations[number].get(role, ())
        pair = isinstance(named, tuple) and len(named) == 2 and not isinstance(named[1], str)
        entries = [named] if isinstance(named, str) or pair else list(named)
        for at, entry in enumerate(entries):
            changed = [entries[:at] + entries[at + 1 :]]
            if not isinstance(entry, str):
                rows = np.asarray(entry[1])
                changed += [
                    [*entries[:at], (entry[0], r), *entries[at + 1 :]]
                    for r in (rows[::-1], rows[[1, 0, *range(2, len(rows))]])
                ]
            for other in changed:
                yield [*declarations[:number], {**declarations[number], role: other}, *declarations[number + 1 :]]


@pytest.mark.parametrize("branch", [False, True], ids=["exportable", "not"])
@pytest.mark.parametrize("name", LAWS)
def test_a_mistake_is_refused_or_does_not_matter(name, branch):
    def look(module, args):
        if branch and args[0].sum() > 1e6:
            return (args[0] * 2,)
        return None

    refused = 0
    for declarations in mistakes(name):
        torch.manual_seed(0)
        build, inputs, _ = LAWS[name]
        model, x = build(), inputs()
        model.register_forward_pre_hook(look)
        try:
            groups = [declare_group(model, **d) for d in declarations]
            sparsify(model, "coupled", example_inputs=(x,), groups=groups)
            small = prune(close(model.eval()), example_inputs=(x,))
        except (SpecError, StateError):
            refused += 1
            continue
        x = inputs()
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5)
    assert refused >= 2


class Foreign(nn.Module):
    """Returns arrays and plain numbers, and raises an error of its own if sizes do not fit."""

    def __init__(self, wrong):
        super().__init__()
        self.up, self.down, self.wrong = nn.Linear(4, 9), nn.Linear(9, 3), wrong

    def forward(self, x):
        h = F.relu(self.up(x))
        if self.wrong == "raises" and h.shape[1] != 9:
            raise KeyError(h.shape[1])
        if self.wrong == "differs":
            return (self.down(h) * h.shape[1]).numpy()
        count = [self.down(h).detach().numpy()]
        return count * (h.shape[1] if self.wrong == "count" else 1)


@pytest.mark.parametrize("wrong", ["raises", "differs", "count", "argmax", None])
def test_arrays_are_compared_and_foreign_errors_are_refusals(wrong):
    torch.manual_seed(0)
    model, x = Foreign(wrong), torch.randn(5, 4)
    if wrong in ("raises", "differs", "count"):
        with torch.no_grad():
            refused("as modules", model, x, outputs="up", inputs="down")
    else:
        assert prune_declared(model, x, outputs="up", inputs="down").up.out_features == 6


# --- refusals --------------------------------------------------------------------------------------------------------


class ManyLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out, self.conv, self.read = (
            nn.Linear(4, 8),
            nn.Linear(8, 3),
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 4, 1),
        )
        self.ln, self.relu, self.slope, self.bn = nn.LayerNorm(8), nn.ReLU(), nn.PReLU(), nn.BatchNorm2d(8)
        self.grouped, self.multiplied = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 16, 1, groups=8)
        self.each, self.gn, self.plain = (
            nn.Conv2d(8, 8, 1, groups=8),
            nn.GroupNorm(2, 8, affine=False),
            nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        )
        self.attention, self.rnn = nn.MultiheadAttention(8, 2), nn.GRU(8, 8)
        self.embed, self.normed = nn.Embedding(5, 8), nn.Embedding(5, 8, max_norm=1.0)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
        self.lazy = nn.LazyLinear(8)
        self.square, self.also = nn.Linear(8, 8), nn.Linear(8, 8)
        self.also.weight = self.square.weight
        self.turned = nn.Linear(3, 8)
        self.turned.weight = nn.Parameter(self.out.weight.detach().t())


FC = {"outputs": "fc", "inputs": "out"}
REFUSALS = {
    "unknown name": ({**FC, "outputs": "fcc"}, SpecError, r"outputs.*'fcc'.*did you mean 'fc'"),
    "unknown kind": ({**FC, "kind": "heads"}, SpecError, "kind.*'heads'.*head"),
    "no output": ({**FC, "outputs": []}, SpecError, "outputs: at least one layer"),
    "no input": ({**FC, "inputs": ()}, SpecError, "inputs: at least one layer"),
    "a module": ({**FC, "outputs": nn.Linear(1, 1)}, SpecError, "outputs.*named by a string"),
    "a number in the list": ({**FC, "inputs": ["out", 3]}, SpecError, r"an entry is a module's name.*got: 3"),
    "size that does not divide": ({**FC, "size": 3}, SpecError, "'fc'.*8 channels must make 3 members"),
    "reader of another width": ({**FC, "inputs": "rnn"}, UnsupportedModuleError, "inputs 'rnn'.*must be a Linear.*GRU"),
    "size of one": ({**FC, "size": 1}, SpecError, "size.*at least two"),
    "size no integer": ({**FC, "size": 4.0}, SpecError, r"size.*4\.0"),
    "flat indices": ({**FC, "inputs": ("out", np.arange(8))}, SpecError, r"\(members, width\).*indices\[:, None\]"),
    "ragged indices": ({**FC, "inputs": ("out", [[0], [1, 2]])}, SpecError, "integer array.*ragged"),
    "float indices": ({**FC, "inputs": ("out", np.zeros((8, 1)))}, SpecError, "integer array.*float64"),
    "index beyond": ({**FC, "inputs": ("out", columns((1, 9)))}, SpecError, "between 0 and 7.*1 to 8"),
    "index below": ({**FC, "inputs": ("out", columns((-1, 7)))}, SpecError, "between 0 and 7.*-1 to 6"),
    "index twice": ({**FC, "inputs": ("out", columns((4,), (4,)))}, SpecError, "every position belongs to one"),
    "rows": ({**FC, "inputs": ("out", columns((4,)))}, SpecError, "a row for each member.*4 rows, not 8"),
    "layer twice": ({**FC, "outputs": ["fc", "fc"]}, SpecError, "'fc'.*named twice"),
    "an embedding reads": ({**FC, "inputs": "embed"}, UnsupportedModuleError, "inputs 'embed'.*got: Embedding"),
    "max_norm": ({**FC, "outputs": "normed"}, UnsupportedModuleError, "max_norm mixes"),
    "layer norm": ({**FC, "through": "ln"}, UnsupportedModuleError, "through 'ln'.*mixes all channels.*LayerNorm"),
    "no parameters": ({**FC, "through": "relu"}, UnsupportedModuleError, "through 'relu'.*ReLU.*leave out layers"),
    "one slope": ({**FC, "through": "slope"}, UnsupportedModuleError, "a slope for each channel.*leave the layer out"),
    "plain norm": ({**FC, "through": "plain"}, SpecError, "through 'plain'.*leave the layer out"),
    "plain group norm": ({**FC, "through": "gn"}, UnsupportedModuleError, "affine=False"),
    "grouped between": ({**FC, "through": "grouped"}, UnsupportedModuleError, "only depthwise.*groups=2 of 8 channels"),
    "multiplied": ({**FC, "through": "multiplied"}, UnsupportedModuleError, "only depthwise.*8 channels to 16"),
    "plain convolution between": ({**FC, "through": "read"}, UnsupportedModuleError, "only depthwise.*inputs=..."),
    "grouped writes": (
        {"outputs": "grouped", "inputs": "read"}, UnsupportedModuleError, "couples its channels.*groups=2"),
    "depthwise reads": ({"outputs": "conv", "inputs": "each"}, UnsupportedModuleError, "inputs 'each'.*through="),
    "a norm writes": ({"outputs": "bn", "inputs": "read"}, UnsupportedModuleError, "outputs 'bn'.*through="),
    "linear between": ({**FC, "through": "square"}, UnsupportedModuleError, "must be a BatchNorm.*got: Linear"),
    "attention": ({**FC, "outputs": "attention"}, UnsupportedModuleError, "got: MultiheadAttention"),
    "weight_norm": ({**FC, "outputs": "weighted"}, SpecError, "plain, initialised.*no parameter 'weighted.weight'"),
    "lazy": ({**FC, "outputs": "lazy"}, SpecError, "plain, initialised.*no parameter 'lazy.weight'"),
    "tied, one declared": (
        {"outputs": "square", "inputs": "out"}, SpecError, "'square.weight'.*tied.*'also.weight'.*undeclared"),
    "tied, along another axis": (
        {"outputs": "square", "inputs": "also"}, SpecError, "'square.weight'.*tied.*'also.weight'.*undeclared"),
    "tied, other indices": (
        {"outputs": ["fc", "square", ("also", columns((8,))[::-1])], "inputs": "out"}, SpecError,
        "tied.*other indices"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("case", REFUSALS)
def test_a_declaration_that_cannot_be_is_refused(case):
    names, error, match = REFUSALS[case]
    with pytest.raises(error, match=f"(?s)^declare_group: (?!declare_group).*{match}"):
        declare_group(ManyLayers(), **names)


def test_a_weight_that_shares_memory_in_another_shape_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    with pytest.raises(SpecError, match=r"(?s)not share memory.*in another shape"):
        declare_group(model, outputs="0", inputs="1")


def test_a_gated_model_cannot_be_declared():
    model = mlp()
    sparsify(model, {"3": "weight"})
    with pytest.raises(SpecError, match=r"(?s)inputs '3'.*plain.*remove gates"):
        declare_group(model, outputs="0", through="1", inputs="3")


def groups_of(model, *names):
    return [declare_group(model, outputs=a, inputs=b) for a, b in names]


def narrow():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def untied():
    model = Tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


MISFITS = {
    "no sequence": (lambda m: groups_of(m, ("3", "5"))[0], "sequence of ChannelGroup.*got: ChannelGroup"),
    "no groups": (lambda m: ["3"], "sequence of ChannelGroup.*got: str"),
    "overlap": (lambda m: groups_of(m, ("3", "5")) * 2, "'3.weight'.*must not share channels.*axis 0"),
    "overlap in part": (
        lambda m: [declare_group(m, outputs=("3", columns(r)), inputs=("5", columns(r))) for r in ((4,), (3, 6))],
        "must not share channels"),
    "another shape": (
        lambda m: groups_of(narrow(), ("0", "3")), "declared or found in this model.*'0.weight' of shape"),
    "another model": (lambda m: groups_of(Shared(), ("one", "out")), "which the model does not have"),
    "nothing given": (lambda m: [], "groups given"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_groups_that_do_not_fit_leave_the_model_as_it_was(case):
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(3, 5)
    build, match = MISFITS[case]
    groups, before, random = build(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(SpecError, match=f"(?s){match}"):
        sparsify(model, "coupled", example_inputs=(x,), groups=groups)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), random)


def test_groups_of_a_model_with_other_ties_are_refused():
    groups = [declare_group(untied(), outputs=["embed", "down"], inputs=["up", "head"])]
    with pytest.raises(SpecError, match=r"(?s)embed.weight as one tensor, where the model has .*head.weight"):
        sparsify(Tied(), "coupled", example_inputs=(torch.zeros(2, 3, dtype=torch.long),), groups=groups)


def test_groups_may_share_an_axis():
    model, x = mlp(), torch.randn(3, 5)
    halves = [declare_group(model, outputs=("3", columns(r)), inputs=("5", columns(r))) for r in ((3,), (3, 6))]
    sparsify(model, "coupled", example_inputs=(x,), groups=halves)
    assert len(list(iter_gates(model))) == 2
    assert prune(close(model.eval()), example_inputs=(x,))[3].out_features == 4


def test_groups_need_a_coupled_granularity_and_example_inputs():
    model = mlp()
    groups = groups_of(model, ("3", "5"))
    with pytest.raises(SpecError, match=r"(?s)groups are gated together.*coupled"):
        sparsify(model, "weight", groups=groups)
    with pytest.raises(SpecError, match="no example_inputs"):
        sparsify(model, "coupled", groups=groups)
    assert next(iter_gates(model), None) is None


# --- what stopped the export -----------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.numpy() * 2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@torch.library.custom_op("l0hooks_tests::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    return x.clone()


class Stopper(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.fc, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        return getattr(self, self.how)(self.fc(x))

    def branch(self, x):
        if x.sum() > 0:
            return x + 1
        return x

    def loop(self, x):
        while bool((x > 1).any()):
            x = x / 2
        return x

    def item(self, x):
        size = int(x.abs().sum().item())
        return x.new_zeros(size + 1)

    def order(self, x):
        values = sorted(x.sum(0).tolist())
        return x * values[0]

    def array(self, x):
        return torch.from_numpy(x.detach().numpy() * 2)

    def function(self, x):
        return Twice.apply(x)

    def pointer(self, x):
        return x * float(x.data_ptr() != 0)

    def operator(self, x):
        return unknown(x)

    def own(self, x):
        raise KeyError("no such token")

    def count(self, x):
        positive = x[x[:, 0] > 0]
        return x if len(positive) == 0 else positive


STOPS = {
    "branch": "branches on data at .*test_declare.py:[0-9]+, in Stopper.branch: `if x.sum\\(\\) > 0:`",
    "loop": "branches on data at .*in Stopper.loop: `while bool",
    "item": "turns data into a Python number at .*in Stopper.item: `size = int",
    "order": "depends on the values of data at .*in Stopper.order: `values = sorted",
    "array": "calls into numpy at .*in Stopper.array: `return torch.from_numpy",
    "function": "calls into numpy at .*in Twice.forward",
    "pointer": "reads the address of a tensor's memory at .*in Stopper.pointer",
    "operator": "does not know at .*in Stopper.operator: `return unknown\\(x\\)`",
    "count": "branches on data at .*in Stopper.count: `return x if len",
}


@pytest.mark.parametrize("how", STOPS)
def test_the_line_that_stopped_the_export_is_named(how):
    model = nn.Sequential(nn.Linear(4, 4), Stopper(how))
    before = copy.deepcopy(model.state_dict())
    for call in (
        lambda: channel_groups(model, (torch.ones(3, 4),)),
        lambda: sparsify(model, "coupled", example_inputs=(torch.ones(3, 4),)),
    ):
        with pytest.raises(
            UnsupportedModuleError, match=f"(?s)torch.export.*{STOPS[how]}.*module '1': Stopper.*declare_group"
        ):
            call()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


class Decoder(nn.Module):
    """A decoder of transformers; ``options`` go with every call."""

    def __init__(self, **options):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        self.inner, self.options = transformers.GPT2LMHeadModel(config), options

    def forward(self, tokens):
        return self.inner(tokens, **self.options)


def test_a_decoder_is_traced_without_its_cache():
    model = Decoder()
    assert channel_groups(model, (torch.ones(2, 4, dtype=torch.int64),))
    assert model.inner.config.use_cache


def test_a_decoder_that_is_told_to_return_its_cache_gets_a_hint():
    message = r"(?s)DynamicCache.*try: use_cache=False in the call"
    with pytest.raises(UnsupportedModuleError, match=message) as caught:
        channel_groups(Decoder(use_cache=True), (torch.ones(2, 4, dtype=torch.int64),))
    assert "declare_group" not in str(caught.value)


def test_a_model_that_fails_is_distinguished_from_one_that_cannot_be_exported():
    with pytest.raises(
        UnsupportedModuleError,
        match=r"(?s)must run on.*itself fails at .*in Stopper.own: .*'1'.*KeyError: 'no such token'",
    ):
        channel_groups(nn.Sequential(nn.Linear(4, 4), Stopper("own")), (torch.ones(3, 4),))
    with pytest.raises(
        UnsupportedModuleError, match=r"(?s)itself fails \(module '3': Linear\); RuntimeError: mat1 and mat2"
    ):
        channel_groups(nn.Sequential(*mlp()[:3], nn.Linear(7, 2)), (torch.ones(3, 5),))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
def test_interrupts_and_full_memory_go_through(error):
    class Full(nn.Module):
        def forward(self, x):
            raise error

    with pytest.raises(error):
        channel_groups(Full(), (torch.ones(2),))


def test_masks_of_rows_are_traced():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.two(F.relu(self.one(x))[x[:, 0] > 0])

    groups = channel_groups(Masked(), (torch.randn(5, 4),))
    assert not len(groups)
    assert any("depends on the data" in frozen.reason for frozen in groups.frozen)
