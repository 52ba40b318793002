"""``channel_groups`` on every model: what it calls free is irrelevant once nothing reads it, and it frees enough."""

from collections import Counter

import pytest
import torch
from structure_models import HUGGING_FACE, ZOO
from structure_oracle import TOLERANCE, check_consistent, draw, effect, leak, tensors_of
from torch import nn

from l0hooks.errors import UnsupportedModuleError
from l0hooks.structure import channel_groups

ALL = ZOO | HUGGING_FACE
_FOUND = {}

# torch's own recurrent layers set this attribute whenever they run
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights.* during export:UserWarning")


def found(name):
    """The model, its inputs and its groups: traced once."""
    if name not in _FOUND:
        entry = ALL[name]
        model = entry.make()
        torch.manual_seed(1)
        inputs = entry.inputs()
        _FOUND[name] = model, inputs, channel_groups(model, inputs)
    return _FOUND[name]


def free(groups):
    count = Counter()
    for group in groups:
        count[group.kind] += group.size
    return count


@pytest.mark.parametrize("name", ALL)
def test_closed_members_are_irrelevant(name):
    model, _, groups = found(name)
    check_consistent(model, groups)
    assert len(groups)
    for share in (1 / 3, 1 / 3, 1 / 3, 1):
        assert leak(model, ALL[name].inputs(), draw(groups, share)) <= TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_the_same_noise_in_open_members_shows(name):
    model, inputs, groups = found(name)
    assert max(effect(model, inputs, draw([group])) for group in groups) > 100 * TOLERANCE


@pytest.mark.parametrize("name", [name for name, entry in ALL.items() if entry.free is not None])
def test_what_is_free_and_what_is_frozen(name):
    """Against numbers worked out by hand."""
    _, _, groups = found(name)
    assert free(groups) == ALL[name].free, str(groups)
    for reason in ALL[name].frozen:
        assert any(reason in frozen.reason for frozen in groups.frozen), str(groups)


@pytest.mark.parametrize("name", ALL)
def test_every_group_can_be_read(name):
    _, _, groups = found(name)
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
        assert f"{group.size:,} {group.kind}s" in line


def test_the_model_is_left_alone():
    model, inputs = ALL["VGG"].make().train(), ALL["VGG"].inputs()
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
    model, inputs, groups = found("ViT")
    assert str(channel_groups(model, inputs)) == str(groups)


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
    groups = {group.kind: group for group in found("ViT")[2] if "blocks.0" in group.name}
    where, reads = sites(groups["head"])["blocks.0.qkv.weight", 0]
    assert not reads
    assert where == [[part * 16 + head * 4 + i for part in range(3) for i in range(4)] for head in range(4)]
    assert sites(groups["head"])["blocks.0.proj.weight", 1] == ([[4 * h + i for i in range(4)] for h in range(4)], True)


def test_grouped_queries_are_counted_in_heads_of_keys():
    groups = [group for group in found("HFLlama")[2] if group.kind == "head"]
    assert [group.size for group in groups] == [2, 2]
    widths = {site.names[0].split(".")[-2]: site.indices.shape[1] for site in groups[0].sites}
    assert widths == {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}


def test_tied_names_stand_together():
    groups = found("TiedLanguageModel")[2]
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
