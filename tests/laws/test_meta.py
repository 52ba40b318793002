"""Law: a model sparsified on the meta device, then loaded, equals the one sparsified after loading, bit by bit."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from parameters import OLDEST
from torch import nn

from l0hooks import (
    Budget,
    GateSpec,
    channel_groups,
    iter_gates,
    param_groups,
    penalty,
    prune,
    set_budget,
    sparsify,
    summary,
)
from l0hooks.errors import SpecError, StateError

transformers = pytest.importorskip("transformers")


class Language(nn.Module):
    """Tied embeddings, positions made in the forward, attention, a layer that has two names."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 16), nn.Embedding(12, 16)
        self.first = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight
        self.again = nn.Sequential(self.first.linear1)

    def forward(self, tokens):
        return self.head(
            self.first(self.words(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)))
        )


class Picture(nn.Module):
    """BatchNorm, a grouped, a depthwise and a transposed convolution, a residual."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth, self.point = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 8, 1, groups=2)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Linear(4, 3)

    def forward(self, x):
        h = self.norm(self.stem(x)).relu()
        return self.head(self.up(h + self.point(self.depth(h))).mean((2, 3)))


class TwoReaders(nn.Module):
    """A layer that reads two groups side by side: its gates lie over it by an index."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(11, 3)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], -1).relu())


def bert():
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return transformers.BertForMaskedLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, use_cache=False, tie_word_embeddings=True,
        )
    )  # fmt: skip


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


tokens, rows, images = torch.arange(24).view(2, 12) % 20, torch.linspace(-1, 1, 12).view(2, 6), torch.rand(2, 3, 6, 6)
TIED = {"words": "weight", "head": "weight", "first.linear?": "output"}
LAYERS = {"*.query": "output", "*.dense": "weight"}
TIES = (
    ("words.weight", "head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
)
CASES = {
    "weight": (mlp, "weight", rows),
    "input": (mlp, "input", rows),
    "output": (mlp, GateSpec(granularity="output", init_keep_prob=0.7), rows),
    "block": (mlp, (2, 2), rows),
    "stg": (mlp, GateSpec(family="stg"), rows),
    "mixed": (mlp, {"0": "output", "*": "weight"}, rows),
    "coupled": (mlp, "coupled", rows),
    "coupled by example": (mlp, GateSpec(granularity="coupled", noise="example"), rows),
    "two readers": (TwoReaders, "coupled", rows[:, :4]),
    "kernels": (Picture, "kernel", images),
    "convolutions": (Picture, "weight", images),
    "coupled convolutions": (Picture, "coupled", images),
    "tied": (Language, TIED, tokens),
    "attention": (Language, {"first.self_attn": "weight"}, tokens),
    "coupled attention": (Language, "coupled", tokens),
    "BERT": (bert, LAYERS, tokens),
    "coupled BERT": (bert, "coupled", tokens),
    "GPT-2": (gpt2, {"*.wte": "weight", "all": "weight"}, tokens),
    "coupled GPT-2": (gpt2, "coupled", tokens),
    "coupled Llama": (llama, "coupled", tokens),
}
HUGGING_FACE = {"BERT", "coupled BERT", "GPT-2", "coupled GPT-2", "coupled Llama"}


def first_tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def retie(model):
    """Ties of weights that have no gates: torch forgets them, the user ties again."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for source, name in TIES:
        if source in parameters and name in parameters:
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, parameters[source])


def materialised(build, spec, x, dense, how, *, inside):
    """The model sparsified on the meta device, and then given its weights."""
    with torch.device("meta"):
        model = build().train()
        if inside:
            sparsify(model, spec, example_inputs=(x,))
    if not inside:
        sparsify(model, spec, example_inputs=(x,))
    assert all(gate.log_alpha.is_meta for _, gate in iter_gates(model))
    if how == "to_empty":
        model._apply(lambda t: torch.full_like(t, 77, device="cpu"))  # to_empty, as memory may well be
        retie(model)
        restore_hidden(model, build)
        model.load_state_dict(dense)
    else:
        restore_hidden(model, build)
        model.load_state_dict(copy.deepcopy(dense), assign=True)
        retie(model)
    return model


def marks_of(case):
    """Of transformers' models one is fast."""
    return OLDEST if case in HUGGING_FACE and case != "coupled GPT-2" else ()


def restore_hidden(model, build):
    """Buffers that no checkpoint holds are the user's to fill."""
    state = model.state_dict()
    for name, buffer in build().named_buffers():
        if name not in state:
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = buffer


def assert_equal_bits(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


def step(model, x):
    optimizer = torch.optim.SGD(param_groups(model, lr=0.01, gate_lr=0.5))
    torch.manual_seed(5)
    loss = first_tensor(model(x)).float().square().sum() + penalty(model, l0=0.1, params=0.01, l2=0.1)
    loss.backward()
    optimizer.step()
    return loss.detach()


LOADED = [  # transformers itself assigns
    pytest.param(case, how, marks=marks_of(case) if how == "assign" or case not in HUGGING_FACE else pytest.mark.slow)
    for case in CASES
    for how in ("to_empty", "assign")
]


@pytest.mark.parametrize(("case", "how"), LOADED)
@pytest.mark.filterwarnings("ignore")
def test_what_was_sparsified_on_meta_equals_what_was_sparsified_loaded(case, how):
    build, spec, x = CASES[case]
    torch.manual_seed(1)
    dense = build().state_dict()
    loaded = build().train()
    loaded.load_state_dict(dense)
    report = sparsify(loaded, spec, example_inputs=(x,))
    model = materialised(build, spec, x, dense, how, inside=how == "assign")
    assert summary(model) == summary(loaded) == replace(report, note="")  # only weights with data are tried
    assert [n for n, _ in iter_gates(model)] == [n for n, _ in iter_gates(loaded)]
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert_equal_bits(ours[key], value)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for key, value in loaded.named_buffers(remove_duplicate=False):
        assert_equal_bits(buffers[key], value)
    assert len(list(model.parameters())) == len(list(loaded.parameters()))  # ties are ties
    assert_equal_bits(first_tensor(model.eval()(x)), first_tensor(loaded.eval()(x)))
    assert_equal_bits(penalty(model, l0=1.0, l2=1.0, macs=1e-3), penalty(loaded, l0=1.0, l2=1.0, macs=1e-3))
    assert_equal_bits(step(model.train(), x), step(loaded.train(), x))
    for key, value in loaded.state_dict().items():
        assert_equal_bits(model.state_dict()[key], value)
    for one in (model, loaded):
        torch.manual_seed(2)
        with torch.no_grad():
            for _, gate in iter_gates(one):
                gate.log_alpha.normal_().mul_(3)
    ours, theirs = (prune(one.eval(), example_inputs=(x,)).state_dict() for one in (model, loaded))
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert_equal_bits(ours[key], value)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=marks_of(name)) for name, (_, spec, _) in CASES.items() if spec == "coupled"]
)
@pytest.mark.filterwarnings("ignore")
def test_the_groups_of_a_model_on_meta_are_those_of_the_model(case):
    build, _, x = CASES[case]
    with torch.device("meta"):
        model = build()
        inside = channel_groups(model, (x,))
    expected = channel_groups(build(), (x,))
    assert str(channel_groups(model, (x,))) == str(inside) == str(expected)
    assert len(expected) > 0


def test_a_report_and_penalties_of_a_model_on_meta():
    with torch.device("meta"):
        model = mlp()
    report = sparsify(model, GateSpec(init_keep_prob=0.25), example_inputs=(rows,))
    expected = sparsify(mlp(), GateSpec(init_keep_prob=0.25), example_inputs=(rows,))
    assert report == expected
    assert report.sparsity == 1.0
    assert report.expected_sparsity == pytest.approx(0.75)
    assert report.macs == 48 + 64 + 32
    assert summary(model, example_inputs=(rows,)) == report.__class__(**{**vars(report), "model_macs": 144})
    assert penalty(model, l0=1.0, l2=1.0, macs=1.0).is_meta
    assert [len(group["params"]) for group in param_groups(model, lr=0.1, gate_lr=1.0)] == [6, 3]


def test_unrelated_weights_on_meta_have_gates_of_their_own():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    report = sparsify(model, "weight")
    assert report.gates == 32
    assert report.model_parameters == 40


def test_a_weight_that_is_tied_on_meta_must_be_gated_at_all_its_places():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = nn.Parameter(model[0].weight.data)  # two parameters over one storage
    with pytest.raises(SpecError, match="a tied weight needs the same gates at all its places"):
        sparsify(model, {"0": "weight"})
    assert sparsify(model, "weight").gates == 16
    model.to_empty(device="cpu")
    assert model[0].parametrizations.weight.original is model[1].parametrizations.weight.original


class Forked(nn.Module):
    """One group that two layers read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        h = self.a(x).relu()
        return self.b(h), self.c(h)


@pytest.mark.parametrize(("build", "spec", "x"), [(Forked, "coupled", rows), (Language, TIED, tokens)])
def test_gates_shared_by_several_weights_are_not_emptied_at_the_second(build, spec, x):
    """to_empty meets a shared gate once for each of its weights: the second time it has data that must not be lost."""
    with torch.device("meta"):
        model = build()
    sparsify(model, spec, example_inputs=(x,))
    poison = []

    def empty(tensor):
        poison.append(torch.full_like(tensor, 77, device="cpu"))
        return poison[-1]

    model._apply(empty)
    gates = [gate for _, gate in iter_gates(model)]
    assert sum(tensor.shape == gates[0].log_alpha.shape for tensor in poison) > 1
    assert all(bool((gate.log_alpha == gate.start).all()) for gate in gates)


def test_trained_gates_survive_every_other_move():
    model = mlp()
    sparsify(model, "coupled", example_inputs=(rows,))
    values = {}
    for name, gate in iter_gates(model):
        gate.log_alpha.data.normal_()
        values[name] = gate.log_alpha.detach().clone()
    model.half().float().to("cpu")
    for name, gate in iter_gates(model):
        assert_equal_bits(gate.log_alpha.detach(), values[name])


def with_memory(tensor):
    """One function for any number of traversals, as those who shard a model keep it."""
    return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor


@pytest.mark.parametrize("spec", ["weight", "coupled"])
def test_trained_gates_survive_the_very_function_that_gave_them_memory(spec):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    sparsify(model, spec, example_inputs=(torch.randn(2, 8),))
    model._apply(with_memory)
    for _, gate in iter_gates(model):
        assert gate.log_alpha.eq(gate.start).all()
        with torch.no_grad():
            gate.log_alpha.uniform_(-3, 3)
    trained = [gate.log_alpha.clone() for _, gate in iter_gates(model)]
    model._apply(with_memory)
    for (_, gate), before in zip(iter_gates(model), trained, strict=True):
        assert torch.equal(gate.log_alpha, before)


@pytest.mark.parametrize("tied", [False, True])
def test_a_gated_checkpoint_loads_into_a_model_on_meta(tied):
    build, spec, x = (Language, TIED, tokens) if tied else (mlp, "weight", rows)
    model = build()
    sparsify(model, spec)
    for _, gate in iter_gates(model):
        gate.log_alpha.data.normal_().mul_(3)
    for how in ("to_empty", "assign"):
        with torch.device("meta"):
            again = build()
        sparsify(again, spec)
        if how == "to_empty":
            again.to_empty(device="cpu")
        again.load_state_dict(copy.deepcopy(model.state_dict()), assign=how == "assign")
        assert_equal_bits(again.eval()(x), model.eval()(x))
        assert len(list(again.parameters())) == len(list(model.parameters()))


def test_a_copy_of_a_model_on_meta_is_materialised_by_itself():
    with torch.device("meta"):
        model = Language()
    sparsify(model, TIED)
    twin = copy.deepcopy(model)
    twin.to_empty(device="cpu")
    assert all(gate.log_alpha.is_meta for _, gate in iter_gates(model))
    assert twin.words.parametrizations.weight.original is twin.head.parametrizations.weight.original
    assert all(bool((gate.log_alpha == gate.start).all()) for _, gate in iter_gates(twin))


def test_a_budget_waits_for_data():
    with torch.device("meta"):
        model = mlp()
    names = list(model.state_dict())
    with pytest.raises(StateError, match=r"must have data(.|\n)*device meta(.|\n)*set_budget\(model"):
        sparsify(model, "weight", budget=Budget(keep=20))
    assert list(model.state_dict()) == names
    sparsify(model, "weight")
    with pytest.raises(StateError, match="must have data"):
        set_budget(model, Budget(keep=20))
    dense = mlp().state_dict()
    model.load_state_dict(dense, assign=True)
    (rule,) = set_budget(model, Budget(keep=20))
    other = mlp()
    other.load_state_dict(dense)
    sparsify(other, "weight", budget=Budget(keep=20))
    for (_, a), (_, b) in zip(iter_gates(model), iter_gates(other), strict=True):
        assert_equal_bits(a.log_alpha, b.log_alpha)
    assert rule.target == 20


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("build", "got"),
    [(Decides, "DataDependent"), (lambda: nn.Sequential(nn.Linear(6, 6), BesideData()), "Device")],
)
def test_a_model_that_needs_data_to_run_says_so(build, got):
    with torch.device("meta"):
        model = build()
    with pytest.raises(SpecError, match=rf"run without data(.|\n)*got: .*{got}(.|\n)*try: sparsify it after"):
        sparsify(model, "weight", example_inputs=(rows,))
    assert sparsify(model, "weight").gates == 36


class BesideData(nn.BatchNorm1d):
    """Statistics with data, in a model without."""

    def __init__(self):
        super().__init__(6)
        with torch.device("cpu"):
            self.running_mean, self.running_var = torch.zeros(6), torch.ones(6)


def test_a_model_on_meta_cannot_be_pruned():
    with torch.device("meta"):
        model = mlp()
    sparsify(model, "weight")
    with pytest.raises(StateError, match=r"prune at '0': weights and gates must have data(.|\n)*to_empty"):
        prune(model)
    assert len(list(iter_gates(model))) == 3


def test_nothing_warns():
    with torch.device("meta"):
        model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify(model, "weight", example_inputs=(rows,))
        model.load_state_dict(mlp().state_dict(), assign=True)
