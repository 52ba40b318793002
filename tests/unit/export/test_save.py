"""A pruned model in a file: it comes back exactly, and a file that does not fit is refused."""

import collections
import copy
import functools
import io
import itertools
import json
import pickle
import struct
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from l0hooks import iter_gates, prune, sparsify
from l0hooks.errors import InvalidValueError, StateError
from l0hooks.export.save import load_pruned, save_pruned


class Convolutional(nn.Module):
    """Convolutions, norms with statistics, a depthwise layer, and buffers of both kinds."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.depth = nn.Conv2d(width, width, 3, groups=width)
        self.head = nn.Linear(width, 3)
        self.register_buffer("scale", torch.rand(width, 1, 1))
        self.register_buffer("shift", torch.rand(width, 1, 1), persistent=False)
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("seen", torch.tensor(3), persistent=True)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x))) * self.scale + self.shift
        return self.head(F.relu(self.depth(x)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(F.relu(self.up(x))))


class Heads(nn.Module):
    """Attention that reads its sizes from attributes, as GPT-2 does with ``split_size``."""

    def __init__(self):
        super().__init__()
        self.heads, self.split_size, self.head_dim = 4, 16, 4
        self.embed, self.qkv = nn.Linear(5, 16), nn.Linear(16, 48)
        self.proj, self.out = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        batch, length, _ = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            for t in self.qkv(x).split(self.split_size, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, self.split_size)
        return self.out(x + self.proj(mixed))


def mlp(*sizes):
    sizes = sizes or (5, 8, 6, 3)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


MODELS = {
    "mlp": (mlp, lambda: torch.randn(4, 5)),
    "convolutions": (Convolutional, lambda: torch.randn(2, 3, 6, 6)),
    "tied": (Tied, lambda: torch.randint(11, (2, 4))),
    "attributes": (Heads, lambda: torch.randn(2, 4, 5)),
}
models = pytest.mark.parametrize("name", MODELS)


def pruned(build, x):
    """A pruned model: a third of every group closed, and statistics of its own."""
    torch.manual_seed(1)
    model = build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    sparsify(model.eval(), "coupled", example_inputs=(x,))
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha.uniform_(-0.2, 3)
            gate.log_alpha[torch.randperm(len(gate.log_alpha))[: len(gate.log_alpha) // 3 + 1]] = -4
    return prune(model, example_inputs=(x,))


@functools.cache
def pruned_once(name):
    """A pruned model of the table, which no test changes, and its input."""
    build, inputs = MODELS[name]
    x = inputs()
    return pruned(build, x).eval(), x


@pytest.fixture
def saved(tmp_path):
    """The path of a pruned MLP, and the model."""
    small = pruned(mlp, torch.randn(4, 5))
    save_pruned(small, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors", small


@models
@pytest.mark.parametrize("through", ["as it is", "a deepcopy", "a pickle"])
def test_a_model_comes_back_exactly(name, through, tmp_path):
    build, _ = MODELS[name]
    small, x = pruned_once(name)
    if through == "a deepcopy":
        small = copy.deepcopy(small)
    elif through == "a pickle":
        small = pickle.loads(pickle.dumps(small))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in build().parameters())
    save_pruned(small, tmp_path / "small")
    torch.manual_seed(9)
    loaded = load_pruned(build, tmp_path / "small")
    assert loaded.training  # as the factory left it
    assert type(loaded) is type(small)
    assert str(loaded) == str(small)
    assert list(loaded.state_dict()) == list(small.state_dict())
    for key, tensor in small.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
        assert tensor.dtype == loaded.state_dict()[key].dtype
    assert torch.equal(loaded.eval()(x), small(x))
    loaded.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in loaded.parameters())


def test_tied_weights_come_back_tied_and_are_stored_once(tmp_path):
    small, _ = pruned_once("tied")
    save_pruned(small, tmp_path / "small")
    assert len(load_file(tmp_path / "small")) == len(list(small.parameters()))
    loaded = load_pruned(Tied, tmp_path / "small")
    assert loaded.head.weight is loaded.embed.weight


def test_repaired_attributes_come_back(tmp_path):
    small, _ = pruned_once("attributes")
    assert (small.heads, small.split_size, small.head_dim) == (2, 8, 4)
    save_pruned(small, tmp_path / "small")
    loaded = load_pruned(Heads, tmp_path / "small")
    assert (loaded.heads, loaded.split_size, loaded.head_dim) == (2, 8, 4)


def test_buffers_that_the_state_leaves_out_come_back_if_they_were_cut(tmp_path):
    small = pruned(Convolutional, torch.randn(2, 3, 6, 6))
    assert len(small.shift) < 8
    small.cache = torch.ones(99)
    save_pruned(small, tmp_path / "small")
    loaded = load_pruned(Convolutional, tmp_path / "small")
    assert torch.equal(loaded.shift, small.shift)
    assert torch.equal(loaded.cache, small.cache)
    assert "cache" not in loaded.state_dict()
    assert "shift" not in loaded.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_come_back(dtype, tmp_path):
    x = torch.randn(4, 5, dtype=dtype)
    small = pruned(lambda: mlp().to(dtype), x)
    save_pruned(small, tmp_path / "small")
    loaded = load_pruned(lambda: mlp().to(dtype), tmp_path / "small")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(x), small(x))


def test_a_model_trained_on_after_pruning_is_saved_as_it_is(tmp_path):
    small, x = pruned(mlp, torch.randn(4, 5)), torch.randn(4, 5)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(x).square().sum().backward()
    optimizer.step()
    save_pruned(small, tmp_path / "small")
    assert torch.equal(load_pruned(mlp, tmp_path / "small")(x), small(x))


def test_a_plain_model_that_was_never_pruned_is_saved_too(tmp_path):
    for build, inputs in MODELS.values():
        model, x = build().eval(), inputs()
        save_pruned(model, tmp_path / "plain")
        loaded = load_pruned(build, tmp_path / "plain").eval()
        assert torch.equal(loaded(x), model(x))


def test_frozen_parameters_and_the_factorys_mode_stay(saved):
    path, _ = saved

    def factory():
        model = mlp().eval()
        model[0].weight.requires_grad_(False)
        return model

    loaded = load_pruned(factory, path)
    assert not loaded.training
    assert [p.requires_grad for p in loaded.parameters()] == [False, *[True] * 5]


def test_saving_changes_nothing(saved, tmp_path):
    _, small = saved
    before = {k: v.clone() for k, v in small.state_dict().items()}
    attributes = [sorted(vars(m)) for m in small.modules()]
    save_pruned(small, tmp_path / "again")
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in before.items())
    assert [sorted(vars(m)) for m in small.modules()] == attributes


def test_the_file_is_safetensors_with_a_json_plan_and_no_pickle(saved):
    path, small = saved
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    plan = json.loads(header["__metadata__"]["l0hooks"])
    assert plan["format"] == "l0hooks 2"
    assert set(header) - {"__metadata__"} == set(small.state_dict())
    assert not data.startswith(b"PK")
    assert b"torch" not in data
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(data[8:])
    with safe_open(path, framework="np") as file:  # without l0hooks
        assert sorted(file.keys()) == sorted(small.state_dict())


# --- files that are refused -------------------------------------------------------------------------------------------


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length])


def with_plan(path, change):
    """The file again with a changed plan."""
    _, header = header_of(path.read_bytes())
    plan = json.loads(header["__metadata__"]["l0hooks"])
    change(plan)
    save_file(load_file(path), path, metadata={"l0hooks": json.dumps(plan)})


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    path, _ = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InvalidValueError, match=r"small\.safetensors"):
        load_pruned(mlp, path)


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(saved):
    path, small = saved
    data, x = path.read_bytes(), torch.randn(4, 5)
    length, _ = header_of(data)
    refused = 0
    positions = [*range(0, 8 + length, 11), *range(8 + length, len(data), 37)]
    for position in positions:
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            loaded = load_pruned(mlp, path)
        except InvalidValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert torch.equal(loaded(x), small(x))  # whitespace that pads the header
    assert refused >= len(positions) - 2


def test_a_flipped_byte_in_the_data_says_so(saved):
    path, _ = saved
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InvalidValueError, match="differ from those that were written"):
        load_pruned(mlp, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["modules"]["sizes"][0].__setitem__(2, 99),
        lambda plan: plan["tied"].update({"0.weight": "2.weight"}),
        lambda plan: plan.pop("sha256"),
        lambda plan: plan.pop("tied"),
        lambda plan: plan.update(sha256="0" * 64),
    ],
)
def test_a_changed_plan_is_refused(saved, change):
    path, _ = saved
    with_plan(path, change)
    with pytest.raises(InvalidValueError, match="differ from those that were written"):
        load_pruned(mlp, path)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (None, "without a plan"),
        ({"format": "pt"}, "without a plan"),
        ({"l0hooks": "{"}, "not JSON"),
        ({"l0hooks": "[1]"}, "format None"),
        ({"l0hooks": '{"format": "l0hooks 99"}'}, "format 'l0hooks 99'"),
    ],
)
def test_a_file_without_a_plan_of_l0hooks_is_refused(saved, metadata, match):
    path, _ = saved
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(InvalidValueError, match=match):
        load_pruned(mlp, path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save(mlp().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InvalidValueError, match=r"weights\.pt"):
        load_pruned(mlp, tmp_path / "weights.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_pruned(mlp, tmp_path / "nowhere.safetensors")


def batch_normed():
    return nn.Sequential(*mlp(), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (lambda: mlp(5, 2, 2, 3), "must fit.*at most"),
        (lambda: mlp(4, 8, 6, 3), "must fit"),
        (lambda: mlp(5, 8, 3), "must hold the tensors.*besides"),
        (batch_normed, "must hold the tensors.*also"),
        (Tied, "must hold the tensors"),
        (lambda: mlp().double(), "must fit.*float64"),
    ],
    ids=["narrower", "fewer inputs", "fewer layers", "more layers", "another model", "another dtype"],
)
def test_a_factory_of_another_model_is_refused(saved, factory, match):
    path, _ = saved
    with pytest.raises(InvalidValueError, match=f"(?s){match}.*factory"):
        load_pruned(factory, path)


class Untied(Tied):
    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())


@pytest.mark.parametrize(("build", "factory"), [(Tied, Untied), (Untied, Tied)])
def test_a_factory_that_ties_other_weights_is_refused(build, factory, tmp_path):
    save_pruned(pruned(build, torch.randint(11, (2, 4))), tmp_path / "small")
    with pytest.raises(InvalidValueError, match="must hold the tensors"):
        load_pruned(factory, tmp_path / "small")


@pytest.mark.parametrize("crossed", [False, True])
def test_a_factory_that_ties_the_same_names_to_others_is_refused(crossed, tmp_path):
    """Four layers, two of them tied to the other two: the tensors have equal names and shapes either way."""

    def build(crossed=False):
        model = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        model[2].weight, model[3].weight = model[int(crossed)].weight, model[1 - int(crossed)].weight
        return nn.Sequential(*model)

    gated = build()
    sparsify(gated, "weight")
    save_pruned(prune(gated), tmp_path / "small")
    if crossed:
        with pytest.raises(
            InvalidValueError, match=r"'2.weight'.*\n  expected: tied to '1.weight'\n  got: tied to '0.weight'"
        ):
            load_pruned(lambda: build(crossed=True), tmp_path / "small")
    else:
        again = load_pruned(build, tmp_path / "small")
        assert again[2].weight is again[0].weight


# --- models that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["weight", "coupled"])
def test_a_model_with_gates_is_refused(granularity, tmp_path):
    model = mlp()
    sparsify(model, granularity, example_inputs=(torch.randn(2, 5),))
    with pytest.raises(StateError, match="prune it first"):
        save_pruned(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_tensors_are_refused(tmp_path):
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse_csr())
    with pytest.raises(StateError, match="sparse tensors"):
        save_pruned(model, tmp_path / "small")


def test_a_foreign_graph_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"torch\.export\.save"):
        save_pruned(torch.fx.symbolic_trace(mlp()), tmp_path / "small")


class Tables(nn.Module):
    """A tied weight, a buffer of integers and one of numbers that no state holds."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("places", torch.arange(4), persistent=False)
        self.register_buffer("scale", torch.full((8,), 0.5), persistent=False)

    def forward(self, tokens):
        h = self.words(tokens + self.places[: tokens.shape[1]])
        return self.out(self.head((self.hidden(h) * self.scale).relu()))


@pytest.fixture
def shrunk_tables():
    x = torch.arange(4).view(1, 4)
    model = Tables()
    model.head.bias.requires_grad_(False)
    sparsify(model, "coupled", example_inputs=(x,))
    for _, gate in iter_gates(model):
        gate.log_alpha.data[1:3] = -9.0
    return prune(model, example_inputs=(x,)).eval(), x


def on_meta(build=Tables):
    with torch.device("meta"):
        return build()


def test_a_factory_on_the_meta_device_takes_the_tensors_of_the_file(tmp_path, shrunk_tables):
    small, x = shrunk_tables
    assert small.hidden.out_features == 6
    assert small.scale.shape == (6,)
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(on_meta, tmp_path / "small.safetensors").eval()
    assert torch.equal(again(x), small(x))
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert again.out.weight is again.words.weight
    assert again.hidden.out_features == 6
    assert torch.equal(again.places, torch.arange(4))
    assert all(p.requires_grad for p in again.parameters())  # as in the factory's model


def test_a_factory_must_give_data_to_what_the_file_does_not_hold(tmp_path, shrunk_tables):
    class More(Tables):
        def __init__(self):
            super().__init__()
            self.register_buffer("late", torch.zeros(2), persistent=False)

    small, _ = shrunk_tables
    save_pruned(small, tmp_path / "small.safetensors")
    with pytest.raises(InvalidValueError, match=r"on the meta device(.|\n)*got: nothing for late"):
        load_pruned(lambda: on_meta(More), tmp_path / "small.safetensors")


def test_a_model_on_the_meta_device_cannot_be_saved(tmp_path):
    with pytest.raises(StateError, match=r"must be plain and dense(.|\n)*got: parameters on the meta device"):
        save_pruned(nn.Linear(2, 2, device="meta"), tmp_path / "small.safetensors")


# --- graphs -----------------------------------------------------------------------------------------------------------


class Reshaping(nn.Module):
    """Its code hard-codes a size."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x).relu().reshape(-1, 8))


@pytest.fixture(scope="module")
def graph():
    """A pruned model that came out as a graph, and its input."""
    torch.manual_seed(0)
    model, x = Reshaping(), torch.randn(2, 4)
    sparsify(model, "coupled", example_inputs=(x,))
    for _, gate in iter_gates(model):
        gate.log_alpha.data[1:3] = -9.0
    small, report = prune(model, example_inputs=(x,), return_report=True)
    assert "GraphModule" in report.note
    return small, x


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def in_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


TREE_WARNING = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch's own


@TREE_WARNING
@pytest.mark.parametrize(
    "ways",
    [
        (),
        (copy.deepcopy,),
        (pickled,),
        (in_a_file,),
        (copy.deepcopy, copy.deepcopy),
        (copy.deepcopy, pickled),
        (pickled, copy.deepcopy),
        (pickled, pickled),
    ],
    ids=lambda ways: " then ".join(way.__name__ for way in ways) or "as it is",
)
def test_a_graph_and_its_copies_come_back_exactly(graph, ways, tmp_path):
    small, x = graph
    for way in ways:
        small = way(small)
    assert torch.equal(small(x), graph[0](x))
    save_pruned(small, tmp_path / "small")
    loaded = load_pruned(Reshaping, tmp_path / "small")
    assert list(loaded.state_dict()) == list(graph[0].state_dict())
    assert torch.equal(loaded(x), graph[0](x))
    save_pruned(loaded, tmp_path / "again")
    assert torch.equal(load_pruned(Reshaping, tmp_path / "again")(x), graph[0](x))


WITHOUT_THE_LIBRARY = """
import pickle, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "l0hooks":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch

with open(sys.argv[1], "rb") as file:
    model, x, y = pickle.load(file)
assert torch.equal(model(x), y)
assert not [name for name in sys.modules if name.startswith("l0hooks")]
"""


@pytest.mark.slow  # it starts a process; the zoo looks for the name in pickles
def test_a_pickled_graph_needs_no_l0hooks(graph, tmp_path):
    small, x = graph
    path = tmp_path / "graph.pickle"
    path.write_bytes(pickle.dumps((small, x, small(x).detach())))
    assert b"l0hooks" not in path.read_bytes()
    subprocess.run([sys.executable, "-c", WITHOUT_THE_LIBRARY, str(path)], check=True, timeout=120)


@TREE_WARNING
def test_a_copy_of_a_graph_trains_on_and_is_saved_as_it_is(graph, tmp_path):
    small, x = copy.deepcopy(graph[0]), graph[1]
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(x).square().sum().backward()
    optimizer.step()
    save_pruned(small, tmp_path / "small")
    assert torch.equal(load_pruned(Reshaping, tmp_path / "small")(x), small(x))
    assert not torch.equal(small(x), graph[0](x))


def test_a_graph_is_not_rebuilt_on_the_meta_device(graph, tmp_path):
    save_pruned(graph[0], tmp_path / "small.safetensors")
    with pytest.raises(InvalidValueError, match=r"made from a model that has data(.|\n)*got: a factory that builds on"):
        load_pruned(lambda: on_meta(Reshaping), tmp_path / "small.safetensors")


class Named(nn.Module):
    """Its layer has the name of the module that holds a graph's recipe."""

    def __init__(self):
        super().__init__()
        self.recipe, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.recipe(x).relu().reshape(-1, 8))


def test_a_layer_may_have_the_name_of_the_recipe(tmp_path):
    model, x = Named(), torch.randn(2, 4)
    sparsify(model, "coupled", example_inputs=(x,))
    for _, gate in iter_gates(model):
        gate.log_alpha.data[1:3] = -9.0
    small = prune(model, example_inputs=(x,))
    assert list(small.state_dict()) == list(Named().state_dict())
    assert small.state_dict()["recipe.weight"].shape == (6, 4)
    save_pruned(small, tmp_path / "small")
    assert torch.equal(load_pruned(Named, tmp_path / "small")(x), small(x))


How = collections.namedtuple("How", ["scale"])


class Choosing(Reshaping):
    def forward(self, x, how):
        return super().forward(x) * how.scale


def test_a_graph_of_inputs_that_no_file_holds_is_refused(tmp_path):
    model, inputs = Choosing(), (torch.randn(2, 4), How(2.0))
    sparsify(model, "coupled", example_inputs=inputs)
    for _, gate in iter_gates(model):
        gate.log_alpha.data[1:3] = -9.0
    small = prune(model, example_inputs=inputs)
    assert isinstance(small, torch.fx.GraphModule)
    with pytest.raises(StateError, match="an example input of type How"):
        save_pruned(small, tmp_path / "small")
