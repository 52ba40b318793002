"""What prune would refuse after training is told by sparsify before it, and the rest is pruned exactly."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn

from l0hooks import channel_groups, iter_gates, prune, sparsify
from l0hooks.errors import L0HooksWarning, SpecError, StateError, UnsupportedModuleError
from l0hooks.export.dry_run import dry_run
from l0hooks.export.group_search import GroupSearch

X = torch.randn(3, 8)


class Layered(nn.Module):
    """A group before, one whose code holds 16 by hand, and a group after."""

    def __init__(self, code=torch.relu, blocks=1):
        super().__init__()
        torch.manual_seed(0)
        self.code = code
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)
        self.ups = nn.ModuleList(nn.Linear(12, 16) for _ in range(blocks))
        self.downs = nn.ModuleList(nn.Linear(16, 12) for _ in range(blocks))

    def forward(self, x):
        h = torch.relu(self.first(x))
        for up, down in zip(self.ups, self.downs, strict=True):
            h = torch.relu(down(self.code(torch.relu(up(h)))))
        return self.last(h)


def repeated(h):
    """No graph can repeat fewer channels by a tensor that has a number for each."""
    return torch.repeat_interleave(h, torch.tensor([1] * 16), 1, output_size=16)


def shifted(h):
    """A graph can be cut, modules cannot."""
    return torch.cat([h[:, 8:16], h[:, :8]], 1) if h.shape[1] == 16 else h * float("nan")


class Repeated(nn.Module):
    """The same in a module of its own, where the rewritten graph loses the tensor."""

    def forward(self, h):
        return repeated(h)


class Stacked(nn.Module):
    """Conv channels that are repeated by numbers written in the code."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mid, self.body = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        h = torch.relu(self.mid(torch.relu(self.stem(x))))
        h = torch.repeat_interleave(h, torch.tensor([1] * 8), 1, output_size=8)
        return self.head(torch.relu(self.body(h)).mean((2, 3)))


class Projected(nn.Module):
    """Attention with a fused projection whose code repeats the heads by numbers written in it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 4, 2).permute(2, 0, 3, 1, 4)
        h = torch.repeat_interleave(torch.softmax(q @ k.mT, -1) @ v, torch.tensor([1] * 4), 1, output_size=4)
        return self.down(torch.relu(self.up(self.proj(h.transpose(1, 2).reshape(x.shape[0], -1, 8)))))


CASES = {
    "linear": (lambda: Layered(repeated), X, ["ups.0"]),
    "convolution": (Stacked, torch.randn(2, 3, 12, 12), ["mid"]),
    "attention": (Projected, torch.randn(2, 5, 8), ["qkv"]),
    "three blocks": (lambda: Layered(repeated, 3), X, ["ups.0", "ups.1", "ups.2"]),
}


def close(model):
    with torch.no_grad():
        for number, (_, gate) in enumerate(iter_gates(model)):
            chosen = torch.randperm(gate.log_alpha.numel(), generator=torch.Generator().manual_seed(number))
            gate.log_alpha.fill_(2.0)
            gate.log_alpha[chosen[: max(1, len(chosen) // 3)]] = -9.0
    return model.eval()


def state_of(model):
    tensors = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    return tensors, [(dict(vars(m)), m.training, type(m)) for m in model.modules()]


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, (number, tensor) in before[0].items():
        assert after[0][name][0] == number
        assert torch.equal(after[0][name][1], tensor)
    for (table, training, kind), (now, trains, kind_now) in zip(before[1], after[1], strict=True):
        assert (table.keys(), training, kind) == (now.keys(), trains, kind_now)
        assert all(now[key] is value or now[key] == value for key, value in table.items() if key[0] != "_")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_prune_refuses_is_left_out_with_the_reason_and_the_rest_is_pruned_exactly(name):
    make, x, bad = CASES[name]
    groups = channel_groups(make(), (x,))
    refused = make()
    sparsify(refused, "coupled", example_inputs=(x,), dry_run=False)
    with pytest.raises(StateError, match="must compute what the gated one computes"):
        prune(close(refused), example_inputs=(x,))

    model = make()
    with pytest.warns(
        L0HooksWarning, match=r"(?s)without gates stays what prune could not cut: .*repeats must"
    ) as told:
        report = sparsify(model, "coupled", example_inputs=(x,))
    text = str(next(one.message for one in told if issubclass(one.category, L0HooksWarning)))
    assert all(f"{one} outputs" in text for one in bad)
    assert len(report.rows) == len(groups) - len(bad)
    small = prune(close(model), example_inputs=(x,))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in make().parameters())
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5)
    alone = make()  # each of them alone is refused, too: none was left out for nothing
    sparsify(alone, "coupled", example_inputs=(x,), groups=[g for g in groups if g.name == bad[-1]], dry_run=False)
    with pytest.raises(StateError, match="must compute what the gated one computes"):
        prune(close(alone), example_inputs=(x,))


def test_groups_that_were_given_and_cannot_be_cut_are_an_error_that_names_them():
    model = Layered(repeated)
    groups = list(channel_groups(model, (X,)))
    before = state_of(model)
    with pytest.raises(SpecError, match=r"(?s)must be such that prune can cut them.*ups.0 outputs.*dry_run=False"):
        sparsify(model, "coupled", example_inputs=(X,), groups=groups)
    assert_same(before, state_of(model))
    good = [group for group in groups if group.name != "ups.0"]
    assert len(sparsify(model, "coupled", example_inputs=(X,), groups=good).rows) == 2


def test_if_no_group_can_be_cut_it_is_an_error_and_nothing_is_changed():
    model = Layered(repeated)
    before = state_of(model)
    with pytest.raises(SpecError, match=r"(?s)prune can cut them.*ups.0 outputs"):
        sparsify(model, "coupled", example_inputs=(X,), exclude=["first", "last"])
    assert_same(before, state_of(model))


@pytest.mark.parametrize("code", [torch.relu, shifted, repeated, Repeated()])
def test_a_dry_run_changes_nothing_and_draws_no_random_numbers(code):
    model = Layered(code).train()
    model.register_buffer("calls", torch.zeros(()))
    model.first.register_forward_hook(lambda *_: [model.calls.add_(1)][1:].clear())
    groups = channel_groups(model, (X,))
    before, drawn = state_of(model), torch.get_rng_state()
    found = [dry_run(model, groups, (X,)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same(before, state_of(model))
    assert found[0] == found[1]


def test_the_note_names_the_line_for_which_a_graph_comes_out():
    model = Layered(shifted)
    report = sparsify(model, "coupled", example_inputs=(X,))
    assert "may return graphs" in report.note
    assert "unflatten" in str(report)
    with pytest.warns(L0HooksWarning, match="graph"):
        small = prune(close(model), example_inputs=(X,))
    torch.testing.assert_close(small(X), model(X), rtol=0, atol=1e-5)
    assert sparsify(Layered(), "coupled", example_inputs=(X,)).note == ""


def test_examples_of_zeros_do_not_hide_a_wrong_cut():
    class Hidden(nn.Module):
        """Cut as modules it computes something else, unless its input is zero."""

        def forward(self, h):
            return h * (h.shape[1] / 16)

    model = Layered(Hidden())
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    assert "output's scale" in sparsify(model, "coupled", example_inputs=(torch.zeros(3, 8),)).note


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


class Counting(nn.Module):
    """Each call computes something else, and no copy begins anew."""

    numbers = itertools.count()

    def forward(self, h):
        return h + next(self.numbers)


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Uncopied(6, 2))
    before = state_of(model)
    with pytest.raises(UnsupportedModuleError, match=r"(?s)can be copied.*one of a kind.*dry_run=False"):
        sparsify(model, "coupled", example_inputs=(X,))
    assert_same(before, state_of(model))
    assert sparsify(model, "coupled", example_inputs=(X,), dry_run=False).gates == 6


def test_a_model_whose_evaluation_varies_is_refused():
    with pytest.raises(
        StateError, match=r"(?s)a copy of the model must compute what the model computes.*deterministic"
    ):
        sparsify(Layered(Counting()), "coupled", example_inputs=(X,))


def test_outputs_without_a_number_are_refused():
    class Nowhere(nn.Module):
        def forward(self, h):
            return h * float("nan")

    with pytest.raises(
        StateError, match=r"(?s)sparsify: outputs must be such that prune can compare them.*without one"
    ):
        sparsify(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2), Nowhere()), "coupled", example_inputs=(X,))


def test_nothing_is_tried_on_the_meta_device():
    model = copy.deepcopy(Layered()).to("meta")
    groups = channel_groups(model, (X,))
    assert dry_run(model, groups, (X,)).refused == {}


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_what_is_good_can_be_cut_together_and_nothing_refused_could_be_added(seed):
    rng = random.Random(seed)
    count = rng.randint(1, 9)
    bad = {n for n in range(count) if rng.random() < rng.choice([0, 0.2, 0.5, 1])}
    pairs = [set(rng.sample(range(count), 2)) for _ in range(rng.randint(0, 2)) if count > 1]  # not together
    kinds = list(range(count)) if seed % 2 else [rng.randint(0, 2) for _ in range(count)]

    def fault(numbers):
        return "wrong" if bad & set(numbers) or any(pair <= set(numbers) for pair in pairs) else ""

    search = GroupSearch(kinds)
    search.add(range(count), fault)
    assert sorted([*search.good, *search.refused]) == list(range(count))
    assert not fault(search.good)
    if seed % 2:
        assert all(fault([*search.good, number]) for number in search.refused)
    else:  # groups of one kind are given up together
        assert bad <= search.refused.keys()


def test_one_bad_group_among_many_is_found_in_few_tries():
    for kinds in ([*range(64)], [0] * 64):
        for bad in range(64):
            tries = []
            search = GroupSearch(kinds)
            search.add(range(64), lambda numbers, bad=bad, tries=tries: tries.append(1) or "wrong" * (bad in numbers))
            assert (list(search.refused), len(search.good)) == ([bad], 63)
            assert len(tries) <= 2 * 6 + 3


def test_many_layers_with_the_same_fault_cost_four_tries():
    tries = []
    search = GroupSearch(["attention"] * 48)
    search.add(range(48), lambda numbers: tries.append(1) or "wrong" * bool(numbers))
    assert len(search.refused) == 48
    assert len(tries) == 4
