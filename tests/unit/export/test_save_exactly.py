"""What a file gives back besides the weights, and which models and factories are refused."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from l0hooks import iter_gates, load_pruned, prune, save_pruned, sparsify
from l0hooks.errors import InvalidValueError, StateError


def closed(model, spec, x, *, noted):
    """The pruned model, with two gates of every array closed."""
    sparsify(model, spec, example_inputs=(x,))
    for _, gate in iter_gates(model):
        gate.log_alpha.data[1:3] = -9.0
    small, report = prune(model, example_inputs=(x,), return_report=True)
    assert noted in report.note
    return small.eval()


def again(small, factory, path):
    save_pruned(small, path / "small.safetensors")
    return load_pruned(factory, path / "small.safetensors").eval()


# --- graphs after earlier cuts ----------------------------------------------------------------------------------------


class TwoStages(nn.Module):
    """Attention that can be cut as modules, then a layer whose channels the code counts by hand."""

    def __init__(self, bias=True):
        super().__init__()
        self.heads, self.head_dim, self.split_size = 4, 4, 16
        self.embed, self.qkv, self.proj = nn.Linear(5, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mid, self.wide, self.out = nn.Linear(16, 6), nn.Linear(6, 8), nn.Linear(8, 3, bias=bias)
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        batch, length, _ = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            for t in self.qkv(x).split(self.split_size, dim=-1)
        )
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))
        return self.out((self.wide(self.mid(x)).relu() * self.scale).reshape(batch, -1, 8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch's own, when copying a graph
@pytest.mark.parametrize("bias", [True, False])
def test_a_graph_after_earlier_cuts_comes_back(bias, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5)
    small = closed(TwoStages(bias), {"proj": "coupled", "wide": "output"}, x, noted="GraphModule")
    assert isinstance(small, torch.fx.GraphModule)
    assert small.qkv.weight.shape == (24, 14)
    assert small.wide.weight.shape == (6, 6)
    loaded = again(small, lambda: TwoStages(bias), tmp_path)
    assert torch.equal(loaded(x), small(x))
    assert torch.equal(again(copy.deepcopy(loaded), lambda: TwoStages(bias), tmp_path)(x), small(x))


class Reshaping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 8), nn.Linear(8, 2), Scaled()
        self.mask, self.random = torch.rand(2), torch.rand(2)

    def forward(self, x):
        return self.norm(self.b(self.a(x).relu().reshape(-1, 8)) * self.mask)


class Scaled(nn.Module):
    """Its factor is in the extra state alone."""

    def __init__(self):
        super().__init__()
        self.factor = 1.0

    def forward(self, x):
        return x * self.factor

    def get_extra_state(self):
        return {"factor": self.factor, "seen": [1, (2, None)], 3: torch.tensor([0.5, 2.0], dtype=torch.bfloat16)}

    def set_extra_state(self, state):
        assert list(state) == ["factor", "seen", 3]
        assert state["seen"] == [1, (2, None)]
        assert torch.equal(state[3], torch.tensor([0.5, 2.0], dtype=torch.bfloat16))
        self.factor = state["factor"]


def test_a_graph_holds_the_extra_state_and_attributes_of_its_model(tmp_path):
    model, x = Reshaping(), torch.randn(2, 4)
    model.norm.factor = 3.5
    small = closed(model, "coupled", x, noted="GraphModule")
    assert torch.equal(again(small, Reshaping, tmp_path)(x), small(x))


# --- outside the state ------------------------------------------------------------------------------------------------


class Caching(nn.Module):
    """Buffers and attributes that evaluation fills, and one buffer under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 8), nn.Linear(8, 2), Scaled()
        self.length = 0
        self.register_buffer("table", torch.zeros(0), persistent=False)
        self.register_buffer("unset", None, persistent=False)
        self.register_buffer("random", torch.rand(8), persistent=False)
        self.plain, self.nothing = torch.rand(4), None
        self.norm.register_buffer("shared", self.random, persistent=False)
        self.tied = self.a.weight.detach()

    def forward(self, x):
        if self.length < len(x):
            self.length, self.table, self.unset = len(x), torch.rand(len(x), 1), torch.rand(2)
            self.nothing = torch.rand(2)
        h = self.a(x * self.plain).relu() * self.random + self.norm.shared
        return self.norm(self.b(h) * self.table[: len(x)] + self.unset * self.nothing)


def test_tensors_outside_the_state_come_back(tmp_path):
    model, x = Caching().eval(), torch.randn(3, 4)
    model.norm.factor = 0.25
    y = model(x)
    model.random.mul_(2)
    y = model(x)
    loaded = again(model, Caching, tmp_path)
    assert torch.equal(loaded(x), y)
    assert loaded.length == 3
    assert loaded.norm.shared is loaded.random
    assert loaded.norm.factor == 0.25
    assert sorted(load_file(tmp_path / "small.safetensors")) == sorted(
        [*(f"{n}.{k}" for n in "ab" for k in ("weight", "bias")), "nothing", "plain", "random", "table", "unset"]
    )


class Lazily(nn.Linear):
    def forward(self, x):
        self.register_buffer("seen", x.detach().clone(), persistent=False)
        return super().forward(x)


def test_a_tensor_without_a_place_is_named(tmp_path):
    model = Lazily(2, 2)
    model(torch.ones(1, 2))
    with pytest.warns(UserWarning, match="(?s)same tensors outside the state.*seen: left out"):
        again(model, lambda: Lazily(2, 2), tmp_path)
    more = nn.Linear(2, 2)
    more.late = torch.ones(2)
    save_pruned(nn.Linear(2, 2), tmp_path / "small")
    with pytest.warns(UserWarning, match="(?s)same tensors outside the state.*late: as the factory built them"):
        load_pruned(lambda: more, tmp_path / "small")


# --- factories of another model ---------------------------------------------------------------------------------------


def convolution(kernel=3, **options):
    return nn.Sequential(nn.Conv2d(3, 4, kernel, **options), nn.ReLU(), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (lambda: convolution(5), r"'0\.weight' must fit.*kernel of \(5, 5\)"),
        (lambda: convolution(stride=2), r"'0' must fit.*'stride': \(2, 2\)"),
        (lambda: convolution(padding=1), r"'0' must fit.*'padding': \(1, 1\)"),
        (lambda: convolution(dilation=2), "'dilation'"),
        (lambda: convolution(padding=1, padding_mode="circular"), "'circular'"),
        (lambda: nn.Sequential(*convolution()[:2], nn.MaxPool2d(2), convolution()[2]), r"tensors"),
        (lambda: nn.Sequential(convolution()[0], nn.LeakyReLU(0.5), convolution()[2]), "'negative_slope': 0.5"),
    ],
)
def test_a_factory_of_other_kernels_or_settings_is_refused(factory, match, tmp_path):
    save_pruned(convolution(), tmp_path / "small")
    with pytest.raises(InvalidValueError, match=f"(?s){match}"):
        load_pruned(factory, tmp_path / "small")


def test_a_factory_of_another_epsilon_gets_that_of_the_file_or_is_refused_and_of_another_dropout_is_not(tmp_path):
    def build(eps=1e-5, p=0.1, norm=nn.LayerNorm):
        return nn.Sequential(nn.Linear(2, 4), norm(4, eps=eps), nn.Dropout(p))

    save_pruned(build(), tmp_path / "small")
    assert load_pruned(lambda: build(eps=0.1), tmp_path / "small")[1].eps == 1e-5
    assert load_pruned(lambda: build(p=0.7), tmp_path / "small")[2].p == 0.7
    save_pruned(build(norm=nn.BatchNorm1d), tmp_path / "small")
    with pytest.raises(InvalidValueError, match=r"(?s)'1' must fit.*0\.1"):
        load_pruned(lambda: build(eps=0.1, norm=nn.BatchNorm1d), tmp_path / "small")


def test_a_refused_model_is_left_as_it_was(tmp_path):
    save_pruned(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), tmp_path / "small")
    model = nn.Sequential(nn.Linear(3, 4, bias=True), nn.BatchNorm1d(4, eps=0.1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InvalidValueError, match="must fit"):
        load_pruned(lambda: model, tmp_path / "small")
    assert model[0].out_features == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("given", [nn.Linear(2, 2), "small", None])
def test_a_model_in_place_of_a_factory_is_refused(given, tmp_path):
    save_pruned(nn.Linear(2, 2), tmp_path / "small")
    with pytest.raises(InvalidValueError, match=r"(?s)function that builds.*try: load_pruned\(lambda: \w+\(\.\.\.\)"):
        load_pruned(given, tmp_path / "small")


def gated():
    model = nn.Linear(2, 2)
    sparsify(model)
    return model


@pytest.mark.parametrize(("factory", "got"), [(dict, "a dict"), (gated, "a model with gates")])
def test_a_factory_of_no_dense_model_is_refused(factory, got, tmp_path):
    save_pruned(nn.Linear(2, 2), tmp_path / "small")
    with pytest.raises(InvalidValueError, match=f"(?s)must return the dense model.*{got}"):
        load_pruned(factory, tmp_path / "small")


# --- models that no file of tensors gives back ------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.extra, self.a = extra, nn.Linear(2, 2)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def nested():
    value = []
    for _ in range(200):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("extra", "got"),
    [
        (Scaled(), "holds a Scaled"),
        ({"a": {1, 2}}, "holds a set"),
        (b"ab", "holds a bytes"),
        (nested(), "nested deeper"),
        (torch.zeros(2, dtype=torch.float8_e5m2), "float8_e5m2"),
        (torch.zeros(3_000_000), "12,000,000 bytes"),
    ],
)
def test_an_extra_state_that_is_no_plain_data_is_refused_on_save(extra, got, tmp_path):
    with pytest.raises(StateError, match=f"(?s)'_extra_state'.*must consist of tensors.*{got}"):
        save_pruned(Odd(extra), tmp_path / "small")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra", [None, 1, float("inf"), "text", {}, (), torch.zeros(0, 2), torch.tensor(3)])
def test_plain_extra_states_come_back(extra, tmp_path):
    loaded = again(Odd(extra), lambda: Odd(7), tmp_path)
    assert type(loaded.extra) is type(extra)
    assert torch.equal(loaded.extra, extra) if isinstance(extra, torch.Tensor) else loaded.extra == extra


class Renamed(nn.Linear):
    def state_dict(self, *args, **kwargs):
        return {f"{name}_packed": tensor for name, tensor in super().state_dict(*args, **kwargs).items()}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("build", "got"),
    [
        (lambda: torch.jit.script(nn.Linear(2, 2)), "TorchScript: torch.jit.save"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 2))), "TorchScript at '0'"),
        (lambda: nn.LazyLinear(2), "a lazy layer"),
        (lambda: Renamed(2, 2), "'weight_packed' in the state"),
        (lambda: nn.Linear(2, 2).state_dict(), "a OrderedDict"),
    ],
)
def test_a_model_that_cannot_come_back_is_refused_on_save(build, got, tmp_path):
    with pytest.raises(StateError, match=f"(?s)must be plain and dense.*{got}"):
        save_pruned(build(), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_the_plan_is_plain_json(tmp_path):
    save_pruned(Caching(), tmp_path / "small")
    data = (tmp_path / "small").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    plan = json.loads(header["__metadata__"]["l0hooks"])
    assert set(plan) == {"format", "sha256", "tied", "hidden", "modules", "graph", "inside"}
