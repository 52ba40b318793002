"""``channel_groups`` on every model: what it calls free is irrelevant once nothing reads it, and it frees enough."""

import re
import sys
import types
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from structure_oracle import TOLERANCE, attributes_of, check_consistent, draw, effect, leak, tensors_of
from torch import nn
from traced_models import CHANGED, ENTRIES, traced
from transformers import T5Config, T5ForConditionalGeneration

from l0hooks import iter_gates, prune, sparsify
from l0hooks.errors import UnsupportedModuleError
from l0hooks.structure import channel_groups
from l0hooks.structure.macs import count_positions

# torch's own recurrent layers set this attribute whenever they run
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights.* during export:UserWarning")


def free(groups):
    count = Counter()
    for group in groups:
        count[group.kind] += group.size
    return count


@pytest.mark.parametrize("name", ENTRIES)
def test_closed_members_are_irrelevant(name):
    model, _, groups = traced(name)
    check_consistent(model, groups)
    assert len(groups)
    for share in (1 / 3, 1 / 3, 1 / 3, 1):
        assert leak(model, ENTRIES[name].inputs(), draw(groups, share)) <= TOLERANCE


@pytest.mark.parametrize("name", ENTRIES)
def test_the_same_noise_in_open_members_shows(name):
    model, inputs, groups = traced(name)
    assert max(effect(model, inputs, draw([group])) for group in groups) > 100 * TOLERANCE


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.free is not None])
def test_what_is_free_and_what_is_frozen(name):
    """Against numbers worked out by hand."""
    _, _, groups = traced(name)
    assert free(groups) == ENTRIES[name].free, str(groups)
    for reason in ENTRIES[name].frozen:
        assert any(reason in frozen.reason for frozen in groups.frozen), str(groups)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_group_can_be_read(name):
    _, _, groups = traced(name)
    lines = str(groups).splitlines()
    assert len(lines) == len(groups) + len(groups.frozen)
    assert all(
        f.reason and f.modules and all(f.modules) and str(f) == line
        for f, line in zip(groups.frozen, lines[len(groups) :], strict=True)
    )
    for group, line in zip(groups, lines, strict=False):
        assert str(group) == line
        assert group.name
        assert group.name in line
        assert re.search(rf": {group.size:,} (groups of \d+ )?{group.kind}s,", line)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_attributes_of_the_model_are_left_alone(name):
    traced(name)
    assert name not in CHANGED


class Keeping(nn.Module):
    """Keeps what it computes in a list, a dictionary, an object, a buffer and attributes, as detection heads do."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
        self.listed, self.by_length, self.cache = [], {}, types.SimpleNamespace(layers=[types.SimpleNamespace()])
        self.register_buffer("grid", None, persistent=False)
        self.length = None

    def forward(self, x):
        if self.length != x.shape[1]:
            self.length, self.anchors = x.shape[1], torch.arange(x.shape[1], device=x.device) * 1.0
            self.grid = self.anchors[:, None] + 1
        self.by_length.setdefault(x.shape[1], self.anchors[None, :, None])
        h = torch.relu(self.one(x))
        self.listed.append(h)
        self.cache.layers[0].keys = h
        return self.two(h * self.by_length[x.shape[1]] + self.grid)


@pytest.fixture(scope="module")
def attributes_in_forward():
    """Skip where torch.export refuses models that set attributes in forward: torch 2.9 does."""

    class Sets(nn.Module):
        def forward(self, x):
            self.kept = {len(x): x + 1}
            return x

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.export(Sets(), (torch.ones(2),), strict=False)
    except ValueError:
        pytest.skip("this torch exports no model that sets attributes in forward")


@pytest.mark.usefixtures("attributes_in_forward")
@pytest.mark.parametrize("mode", [True, False])
def test_what_a_model_keeps_is_put_back(mode):
    model, x = Keeping().train(mode), torch.randn(2, 5, 4)
    before = attributes_of(model)
    channel_groups(model, (x,))
    count_positions(model, (x,))
    assert attributes_of(model) == before
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    before = attributes_of(model)
    channel_groups(model, (x,))
    assert attributes_of(model) == before
    assert "keeps tensors of a forward with gradients" in sparsify(model, "coupled", example_inputs=(x,)).note
    for _, gate in iter_gates(model):
        gate.log_alpha.data[::3] = -9.0
    model.listed.clear(), model.cache.layers.clear(), model.cache.layers.append(types.SimpleNamespace())
    before = attributes_of(model)
    small = prune(model, example_inputs=(x,))
    assert attributes_of(model) == before
    torch.testing.assert_close(small.eval()(x), model.eval()(x))


class Biased(nn.Module):
    """Attention that keeps its table of biases in evaluation and drops it in training, as LeViT and TinyViT do."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)
        self.biases, self.kept = nn.Parameter(torch.randn(4, 5)), {}
        self.register_buffer("index", (torch.arange(5) - torch.arange(5)[:, None]).abs(), persistent=False)

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def bias(self):
        if self.training:
            return self.biases[:, self.index]
        if "cpu" not in self.kept:
            self.kept["cpu"] = self.biases[:, self.index]
        return self.kept["cpu"]

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), 5, -1, 6).transpose(1, 2).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias()[None])
        return self.out(h.transpose(1, 2).flatten(2))


@pytest.mark.usefixtures("attributes_in_forward")
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_table_kept_in_evaluation_is_cut_with_its_heads(evaluated):
    model, x = Biased().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model(x) if evaluated else None
    (group,) = channel_groups(model, (x,))
    assert (group.kind, group.size) == ("head", 4)
    assert "biases" in {site.names[0] for site in group.sites}
    assert ("cpu" in model.kept) == evaluated
    sparsify(model, "coupled", example_inputs=(x,))
    for _, gate in iter_gates(model):
        gate.log_alpha.data[1] = -9.0
    with torch.no_grad():
        model(x) if evaluated else None
    small = prune(model, example_inputs=(x,))
    assert type(small) is Biased
    assert not small.training
    torch.testing.assert_close(small(x), model(x))
    assert small.biases.shape == (3, 5)


@pytest.mark.slow
def test_a_model_made_of_parts_with_copies_of_its_settings_keeps_no_keys():
    """T5's encoder and decoder hold copies of the configuration, with use_cache on."""
    config = T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 20, (2, 5))
    before = attributes_of(model)
    groups = channel_groups(model, (ids, torch.ones_like(ids), ids))
    assert Counter(group.kind for group in groups) == {"head": 3, "neuron": 2}
    assert attributes_of(model) == before
    sparsify(model, "coupled", example_inputs=(ids, torch.ones_like(ids), ids))
    for _, gate in iter_gates(model):
        gate.log_alpha.data[0] = -9.0
    small = prune(model, example_inputs=(ids, torch.ones_like(ids), ids))
    assert small.decoder.config.use_cache
    assert model.decoder.config.use_cache
    torch.testing.assert_close(small(ids, decoder_input_ids=ids).logits, model(ids, decoder_input_ids=ids).logits)


def test_the_model_is_left_alone():
    model, inputs = ENTRIES["VGG"].make().train(), ENTRIES["VGG"].inputs()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    channel_groups(model, inputs)
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors_of(model).items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_groups_are_the_same_every_time():
    model, inputs, groups = traced("ViT")
    assert str(channel_groups(model, inputs)) == str(groups)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_parameter_is_removable_or_frozen_with_its_reason(name):
    model, _, groups = traced(name)
    named = {named for group in groups for site in group.sites for named in site.names}
    named |= {part.partition(" (")[0] for frozen in groups.frozen for part in frozen.modules}
    missing = [n for n, _ in model.named_parameters() if n not in named and n.rpartition(".")[0] not in named]
    assert missing == []


def test_what_is_not_used_in_evaluation_is_frozen_by_name():
    class Helped(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.helper = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x, help=False):
            x = torch.relu(self.one(x))
            return (self.two(x), self.helper(x)) if help else self.two(x)

    groups = channel_groups(Helped(), (torch.zeros(2, 4),))
    assert ("helper",) in [f.modules for f in groups.frozen if f.reason == "not used in evaluation"]


def test_channels_that_go_together_are_shown_as_groups():
    """Eight groups of four channels under a GroupNorm are not eight channels; two halves of a GLU are one neuron."""
    normed = nn.Sequential(nn.Conv2d(3, 32, 1), nn.GroupNorm(8, 32), nn.Conv2d(32, 2, 1))
    assert ": 8 groups of 4 channels, " in str(channel_groups(normed, (torch.zeros(1, 3, 2, 2),))[0])
    gated = nn.Sequential(nn.Linear(3, 10), nn.GLU(), nn.Linear(5, 2))
    assert ": 5 neurons, " in str(channel_groups(gated, (torch.zeros(1, 3),))[0])


class Positions(nn.Module):
    """Made anew for a longer input, as those of Wav2Vec2-Conformer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("pe", self.made(10), persistent=False)

    def made(self, n):
        return torch.sin(torch.arange(n)[:, None] * torch.arange(1, 9) / 10)

    def forward(self, n):
        if self.pe.shape[0] < n:
            self.pe = self.made(n)
        return self.pe[:n]


class Positioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.p, self.x, self.out = Positions(), nn.Linear(8, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.relu(self.x(x) + self.p(self.positions(x.shape[1]))))


def test_what_only_a_buffer_holds_is_not_cut():
    model, x = Positioned().eval(), torch.randn(2, 10, 4)
    groups = channel_groups(model, (x,))
    assert [group.size for group in groups] == [6]
    assert any("only a buffer" in part.reason and part.modules == ("positions.pe",) for part in groups.frozen)
    sparsify(model, "coupled", example_inputs=(x,))
    for _, gate in iter_gates(model):
        gate.log_alpha.data[::3] = -9.0
    small, longer = prune(model, example_inputs=(x,)), torch.randn(2, 12, 4)
    torch.testing.assert_close(small(longer), model(longer))


def test_frequencies_that_a_buffer_holds_are_not_cut():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", torch.arange(1.0, 9.0))
            self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, t):
            return self.two(torch.relu(self.one(torch.sin(t[:, None] * self.frequencies))))

    assert [group.name for group in channel_groups(Fourier(), (torch.zeros(2),))] == ["one"]


def sites(group):
    return {(site.names[0], site.axis): (site.indices.tolist(), site.reads) for site in group.sites}


def test_the_sites_of_a_perceptron():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    (group,) = channel_groups(model, (torch.zeros(4, 2),))
    each = [[0], [1], [2]]
    vectors = {(f"1.{name}", 0): (each, False) for name in ("weight", "bias", "running_mean", "running_var")}
    assert (
        sites(group)
        == {("0.weight", 0): (each, False), ("0.bias", 0): (each, False), ("3.weight", 1): (each, True)} | vectors
    )
    assert group.parameters_each == 2 + 1 + 2 + 2


def test_flattening_reads_a_channel_at_every_position():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 3, 1))
    (group,) = channel_groups(model, (torch.zeros(2, 1, 1, 3),))
    assert sites(group)["2.weight", 1] == ([[0, 1, 2], [3, 4, 5]], True)
    assert group.kind == "channel"


def test_heads_of_a_fused_projection():
    groups = {group.kind: group for group in traced("ViT")[2] if "blocks.0" in group.name}
    where, reads = sites(groups["head"])["blocks.0.qkv.weight", 0]
    assert not reads
    assert where == [[part * 16 + head * 4 + i for part in range(3) for i in range(4)] for head in range(4)]
    assert sites(groups["head"])["blocks.0.proj.weight", 1] == ([[4 * h + i for i in range(4)] for h in range(4)], True)


def test_grouped_queries_are_counted_in_heads_of_keys():
    groups = [group for group in traced("HFLlama")[2] if group.kind == "head"]
    assert [group.size for group in groups] == [2, 2]
    widths = {site.names[0].split(".")[-2]: site.indices.shape[1] for site in groups[0].sites}
    assert widths == {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}


def test_tied_names_stand_together():
    groups = traced("TiedLanguageModel")[2]
    stream = next(group for group in groups if group.size == 16)
    tied = next(site for site in stream.sites if "embed.weight" in site.names)
    assert set(tied.names) == {"embed.weight", "head.weight"}
    assert tied.reads


def test_a_model_that_cannot_be_traced_says_why():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModuleError, match=r"torch\.export"):
        channel_groups(Branching(), (torch.ones(2),))


class Masked(nn.Module):
    """Rows chosen by what is in them: a shape that depends on the data."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.two(torch.relu(self.one(x)))
        return self.out(x[x[:, 0] > 0]).sum(0)


def test_shapes_that_depend_on_data_are_frozen():
    torch.manual_seed(0)
    model, inputs = Masked(), (torch.randn(8, 4),)
    groups = channel_groups(model, inputs)
    assert free(groups) == {"neuron": 6}
    assert leak(model, inputs, draw(groups)) <= TOLERANCE
    assert any("depends on the data" in frozen.reason for frozen in groups.frozen)


class Talkative(nn.Module):
    """Many layers, words of its own on stderr, and a branch on data at the end."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))

    def forward(self, x):
        sys.stderr.write("a word of the model\n")
        x = self.layers(x)
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_traced_prints_no_graph(capfd):
    with pytest.raises(UnsupportedModuleError) as caught:
        channel_groups(Talkative(), (torch.zeros(2, 4),))
    assert len(str(caught.value).splitlines()) <= 15
    captured = capfd.readouterr()
    assert captured.out == ""
    assert set(captured.err.splitlines()) == {"a word of the model"}


class Overwritten(nn.Module):
    """One channel of the second layer's output is filled with a number made of the first layer's."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.other = nn.Linear(8, 3)

    def forward(self, x):
        y, z = torch.relu(self.one(x)), torch.relu(self.two(x)).clone()
        z[:, -1] = y[:, 0].mean()
        return self.out(z) + self.other(y)


def test_a_channel_whose_number_is_written_into_others_stays():
    model, x = Overwritten(), torch.randn(4, 6)
    for group in channel_groups(model, (x,)):
        first = [site for site in group.sites if site.names == ("one.weight",)]
        assert not any(0 in site.indices for site in first)
    sparsify(model, "coupled", example_inputs=(x,))
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha[:3] = -9
    model.eval()
    torch.testing.assert_close(prune(model, example_inputs=(x,))(x), model(x))
