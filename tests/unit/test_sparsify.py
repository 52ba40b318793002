"""``sparsify``: all gates or none, ties, checkpoints, dtypes, devices, frozen weights."""

import copy
import io
import re
from contextlib import nullcontext

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from l0hooks import Gate, GateSpec, iter_gates, param_groups, penalty, prune, set_temperature, sparsify
from l0hooks.attach.gated_weight import iter_sites
from l0hooks.errors import InvalidValueError, L0HooksError, L0HooksWarning, SpecError, UnsupportedModuleError

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def content(tensor):
    """Shape, dtype, device and every bit of a tensor, NaNs included."""
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return "uninitialised"
    about = (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)
    return about if tensor.is_meta else (*about, bytes(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)))


def state_of(model):
    """Everything about a model that a failed call must leave as it was."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "names": list(modules),
        "modules": [id(m) for m in modules.values()],
        "classes": [type(m) for m in modules.values()],
        "namespaces": [set(vars(type(m))) for m in modules.values()],
        "attributes": [list(vars(m)) for m in modules.values()],
        "hooks": [[list(getattr(m, table).items()) for table in HOOKS] for m in modules.values()],
        "training": [m.training for m in modules.values()],
        "parameters": [(n, id(p), content(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        "buffers": [(n, id(b), content(b)) for n, b in model.named_buffers(remove_duplicate=False)],
        "random state": content(torch.get_rng_state()),
        "default dtype": torch.get_default_dtype(),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
    }


class Stumbling(nn.Module):
    """Draws random numbers, then fails."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if torch.rand(()) < 2:
            raise RuntimeError("stumbled")
        return self.fc(x)


class Tied(nn.Module):
    """A language model whose decoder is its embedding."""

    def __init__(self, tokens=6, size=4):
        super().__init__()
        self.embed = nn.Embedding(tokens, size)
        self.body = nn.Linear(size, size)
        self.decode = nn.Linear(size, tokens, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, x):
        return self.decode(self.body(self.embed(x)).relu())


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), nn.Dropout())


def with_weight(value):
    model = mlp()
    model[0].weight = nn.Parameter(value, requires_grad=value.is_floating_point())
    return model


def poisoned(number):
    weight = torch.randn(6, 4)
    weight[-1, -1] = number
    return with_weight(weight)


def gated(spec="weight"):
    model = mlp()
    sparsify(model, {"0": spec})
    return model


def views():
    """Two parameters over one memory."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    return model


def part_of(view):
    """The second weight is a part of the memory of the first one, or the same memory in another order."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(model[0].weight.data[:4] if view is torch.t else model[0].weight.data)
    model[1].weight = nn.Parameter(view(model[0].weight.data))
    return model


def shifted():
    """Two weights of one shape whose memory overlaps."""
    model, buffer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(6, 4)
    model[0].weight, model[1].weight = nn.Parameter(buffer[:4]), nn.Parameter(buffer[2:])
    return model


def frozen_bn_eval():
    model = mlp()
    model[2][1].eval()
    return model


class Int8Params(nn.Parameter):
    """As in bitsandbytes: it quantises itself when it is moved."""

    def __new__(cls, data, requires_grad=False):
        return torch.Tensor._make_subclass(cls, data, requires_grad)

    def to(self, *args, **options):
        return Int8Params(self.data.mul(100).to(torch.int8))


class Quantised(torch.Tensor):
    """As in torchao: it says that its numbers are floating-point and computes with integers."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    def __init__(self, data):
        self.numbers = data.detach().mul(100).to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers / 100)
        raise NotImplementedError(f"{cls.__name__} has no {function}")


def quantised(kind, **options):
    model = mlp()
    model[0].weight = kind(model[0].weight.detach(), **options)
    return model


RNN = ("rnn", lambda: nn.ModuleDict({"rnn": nn.LSTM(4, 4), "fc": nn.Linear(4, 4)}))
# id: (model, spec, options, error, message)
BAD = {
    "pattern_matches_nothing": (mlp, {"0": "weight", "3.fc": "weight"}, {}, SpecError, "'3.fc', which matches none"),
    "exclude_matches_nothing": (mlp, "weight", {"exclude": "conv*"}, SpecError, r"'conv\*', which matches none"),
    "near_name": (
        lambda: nn.ModuleDict({"decoder": nn.Linear(2, 2)}),
        {"decodr": "weight"},
        {},
        SpecError,
        "did you mean 'decoder'",
    ),
    "everything_excluded": (mlp, "weight", {"exclude": "*"}, SpecError, "at least one weight must be left"),
    "empty_specification": (mlp, {}, {}, SpecError, "must not be empty"),
    "no_weight": (mlp, {"1": "weight"}, {}, UnsupportedModuleError, "'1'(.|\n)*ReLU, which has no weight of its own"),
    "container": (mlp, {"2": "weight"}, {}, UnsupportedModuleError, "Sequential(.|\n)*layers inside it"),
    "model_itself": (mlp, {"": "weight"}, {}, UnsupportedModuleError, "Sequential"),
    "lstm": (RNN[1], {"fc": "weight", "rnn": "weight"}, {}, UnsupportedModuleError, "'rnn'(.|\n)*got: LSTM"),
    "lstm_type": (RNN[1], {nn.LSTM: "weight"}, {}, UnsupportedModuleError, "got: LSTM"),
    "lstm_wildcard": (RNN[1], {"fc": "weight", "r*": "weight"}, {}, UnsupportedModuleError, "got: LSTM"),
    "batch_norm": (mlp, {"0": "weight", "2.1": "weight"}, {}, UnsupportedModuleError, "'2.1'(.|\n)*BatchNorm1d"),
    "nothing_gateable": (lambda: nn.LSTM(3, 3), "weight", {}, SpecError, "(?s)Linear, Conv, .* layers.*none in LSTM"),
    "nothing_to_couple": (
        lambda: nn.GRU(3, 3),
        "coupled",
        {"example_inputs": (torch.zeros(2, 3),)},
        SpecError,
        "in GRU",
    ),
    "embeddings_alone": (lambda: nn.Embedding(5, 2), "weight", {}, SpecError, "(?s)embeddings alone.*nn.Embedding: "),
    "a_pattern_typed": (lambda: nn.LSTM(3, 3), {"all": "weight"}, {}, SpecError, "'all', which matches none"),
    "gated_already": (gated, {"2.0": "weight", "0": "weight"}, {}, SpecError, "'0.weight': a weight can be gated only"),
    "gated_already_by_all": (gated, "output", {}, SpecError, "gated only once"),
    "tied_left_out": (Tied, {"embed": "weight"}, {}, SpecError, "'embed.weight'(.|\n)*'decode.weight'(.|\n)*left out"),
    "tied_excluded": (Tied, {"*e": "weight"}, {"exclude": "embed"}, SpecError, "tied weight needs the same gates"),
    "tied_alone": (
        Tied,
        "weight",
        {"exclude": "body"},
        SpecError,
        "'decode.weight'(.|\n)*'embed.weight'(.|\n)*left out",
    ),
    "tied_named": (Tied, {"decode": "weight", "all": "weight"}, {}, SpecError, "'decode.weight'(.|\n)*left out"),
    "tied_other_axes": (
        Tied,
        {"embed": "input", "decode": "input"},
        {},
        SpecError,
        "over the same axes(.|\n)*granularity 'input' there",
    ),
    "tied_other_start": (
        Tied,
        {"embed": "weight", "decode": GateSpec(init_mean=0.8)},
        {},
        SpecError,
        "a tied weight needs the same gates",
    ),
    "tied_views_left_out": (views, {"0": "weight"}, {}, SpecError, "'0.weight'(.|\n)*'1.weight' gated alike"),
    "tied_part": (lambda: part_of(lambda w: w[:4]), "weight", {}, SpecError, "a tied weight needs the same gates"),
    "tied_transposed": (lambda: part_of(torch.t), "weight", {}, SpecError, "a tied weight needs the same gates"),
    "tied_shifted": (shifted, "weight", {}, SpecError, "a tied weight needs the same gates"),
    "mean_and_keep_prob": (
        mlp,
        lambda: {"0": "weight", "2.0": GateSpec(init_mean=0.9, init_keep_prob=0.9)},
        {},
        InvalidValueError,
        "cannot be given together",
    ),
    **{
        f"keep_prob_{p}": (
            mlp,
            lambda p=p: GateSpec(init_keep_prob=p),
            {},
            InvalidValueError,
            f"init_keep_prob: (.|\n)*got: {re.escape(str(p))}",
        )
        for p in (0, 1, 0.0, 1.0, -0.5, 1.5, float("nan"), float("inf"))
    },
    "unknown_granularity": (mlp, {"0": "weight", "2.0": "channel"}, {}, SpecError, "got: 'channel'"),
    "nan": (lambda: poisoned(float("nan")), "output", {}, SpecError, "'0.weight': the weight must be finite"),
    "infinite": (lambda: poisoned(float("inf")), "weight", {}, SpecError, "'0.weight': the weight must be finite"),
    "blocks": (mlp, {"2.0": "weight", "0": (4, 2)}, {}, SpecError, "rows dividing 6 outputs, cols dividing 4 inputs"),
    "integers": (
        lambda: with_weight(torch.ones(6, 4, dtype=torch.int8)),
        "weight",
        {},
        SpecError,
        r"'0.weight'(.|\n)*got: torch\.int8",
    ),
    "quantised_when_moved": (
        lambda: quantised(Int8Params),
        "weight",
        {},
        SpecError,
        "'0.weight'(.|\n)*not quantised(.|\n)*got: torch.float32, Int8Params(.|\n)*before it is quantised",
    ),
    "quantised_already": (
        lambda: quantised(lambda w: Int8Params(w).to("cpu")),
        "output",
        {},
        SpecError,
        "got: torch.int8, Int8Params",
    ),
    "quantised_writer": (
        lambda: quantised(Int8Params),
        "coupled",
        {"example_inputs": (torch.zeros(2, 4),)},
        SpecError,
        "'0.weight'(.|\n)*Int8Params",
    ),
    "complex": (
        lambda: with_weight(torch.ones(6, 4, dtype=torch.complex64)),
        "weight",
        {},
        SpecError,
        r"got: torch\.complex64",
    ),
    "no_elements": (lambda: with_weight(torch.ones(0, 4)), "weight", {}, SpecError, r"got: shape \(0, 4\)"),
    "weight_norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4))),
        "weight",
        {},
        SpecError,
        "'1.weight': the weight must be a plain parameter",
    ),
    "spectral_norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4))),
        "weight",
        {},
        SpecError,
        "another parametrization(.|\n)*remove_parametrizations",
    ),
    "spectral_norm_of_old": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.utils.spectral_norm(nn.Linear(4, 4))),
        "weight",
        {},
        SpecError,
        "'1.weight'(.|\n)*no parameter of that name",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)),
        "weight",
        {},
        SpecError,
        "'1.weight'(.|\n)*got: UninitializedParameter(.|\n)*run a lazy module once",
    ),
    "max_norm": (
        lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1.0), nn.Linear(4, 4)),
        {"*": "weight"},
        {},
        UnsupportedModuleError,
        "max_norm=1.0, sparse=False",
    ),
    "sparse_gradients": (
        lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Linear(4, 4)),
        {"1": "weight", nn.Embedding: "output"},
        {},
        UnsupportedModuleError,
        "max_norm=None, sparse=True",
    ),
    **{
        f"examples_{kind}_{spec}": (mlp, spec, {"example_inputs": examples}, SpecError, f"got: {kind}\n  try: {hint}")
        for spec in ("weight", "coupled")
        for kind, examples, hint in (
            ("Tensor", torch.zeros(2, 4), r"example_inputs=\(x,\)"),
            ("ndarray", torch.zeros(2, 4).numpy(), r"example_inputs=\(x,\)"),
            ("str", "x", r"example_inputs=\(x,\)"),
            ("image", {"image": torch.zeros(2, 4)}, r"example_inputs=\(inputs,\)"),
            ("generator", (t for t in [torch.zeros(2, 4)]), r"example_inputs=\(x,\)"),
            ("set", {1}, r"example_inputs=\(x,\)"),
        )
    },
    "wrong_shape": (frozen_bn_eval, "weight", {"example_inputs": (torch.zeros(2, 5),)}, RuntimeError, "shape"),
    "wrong_count": (mlp, "weight", {"example_inputs": ()}, TypeError, "argument"),
    "failing_forward": (Stumbling, "weight", {"example_inputs": (torch.zeros(2, 4),)}, RuntimeError, "stumbled"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("case", BAD)
def test_a_failed_call_says_why_and_leaves_the_model_bit_identical(case):
    make, spec, options, error, message = BAD[case]
    model = make()
    before = state_of(model)
    with pytest.raises(error, match=message):
        sparsify(model, spec() if callable(spec) else spec, **options)
    after = state_of(model)
    for what in before:
        assert after[what] == before[what], what


@pytest.mark.parametrize("case", [case for case, row in BAD.items() if issubclass(row[3], L0HooksError)])
def test_the_errors_are_also_the_built_in_ones(case):
    assert issubclass(BAD[case][3], (ValueError, TypeError))


def test_a_weight_that_computes_with_its_own_numbers_is_refused_by_name():
    model = mlp()
    del model[0].weight
    model[0].weight = nn.Parameter(Quantised(torch.randn(6, 4)), requires_grad=False)
    with pytest.raises(SpecError, match=r"'0.weight'(.|\n)*, Quantised of "):
        sparsify(model, "weight")


def test_a_failed_call_leaves_a_gated_model_as_it_was():
    model = gated()
    model.train()
    before = state_of(model)
    with pytest.raises(SpecError, match="block sizes"):
        sparsify(model, {"2.0": (5, 5)})
    assert state_of(model) == before


@pytest.mark.parametrize("options", [{}, {"example_inputs": (torch.zeros(2, 4),)}], ids=["plain", "example inputs"])
def test_sparsify_consumes_no_random_numbers(options):
    model = mlp()
    before = torch.get_rng_state()
    sparsify(model, "weight", **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_example_inputs_that_make_the_model_draw_consume_no_random_numbers_either():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    before = torch.get_rng_state()
    model = Noisy(2, 2, bias=False)
    torch.set_rng_state(before)
    sparsify(model, "weight", example_inputs=(torch.zeros(1, 2),))
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_and_parameters_stay_the_objects_they_are():
    model = mlp()
    modules, parameters = [*model.modules()], dict(model.named_parameters())
    sparsify(model, "weight")
    assert set(modules) <= set(model.modules())
    assert model[0].parametrizations.weight.original is parameters["0.weight"]
    assert model[0].bias is parameters["0.bias"]
    assert isinstance(model[0], nn.Linear)


def test_gates_follow_each_modules_mode():
    model = mlp()
    model[0].eval()
    sparsify(model, "weight")
    assert {name: gate.training for name, gate in iter_gates(model)} == {
        "0.parametrizations.weight.0.gate": False,
        "2.0.parametrizations.weight.0.gate": True,
    }


def test_the_report_says_what_was_gated():
    report = sparsify(mlp(), {"0": "output", "2.*": "input"}, exclude="2.1")
    assert [(row.name, row.granularity, row.gates) for row in report.rows] == [("0", "output", 6), ("2.0", "input", 6)]


def test_a_specification_reaches_its_gates():
    spec = GateSpec(
        granularity="output",
        family="stg",
        init_keep_prob=0.25,
        temperature=0.75,
        estimator="mean",
    )
    model = mlp()
    sparsify(model, spec)
    for _, gate in iter_gates(model):
        assert (gate.temperature, gate.estimator, type(gate.family).__name__) == (0.75, "mean", "GaussianFamily")
        torch.testing.assert_close(gate.keep_prob(), torch.full_like(gate.log_alpha, 0.25))


def test_a_second_call_gates_other_layers():
    model = gated()
    report = sparsify(model, {"2.0": "input"})
    assert [row.name for row in report.rows] == ["0", "2.0"]
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert all(gate.log_alpha.grad is not None for _, gate in iter_gates(model))
    model.eval()
    torch.testing.assert_close(prune(model).eval()(x), model(x))


def test_a_wider_pattern_skips_what_cannot_carry_gates():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert [row.name for row in sparsify(model, {"*": "weight"}).rows] == ["0"]


def test_an_attention_projection_can_be_gated_otherwise_or_left_alone():
    def names(spec, **options):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
        sparsify(model, spec, **options)
        return {site.name: site.gating.granularity for site in iter_sites(model)}

    inner, outer = "attention.in_proj_weight", "attention.out_proj.weight"
    assert names("weight") == {inner: "weight", outer: "weight"}
    assert names({"attention": "weight"}) == {inner: "weight", outer: "weight"}
    assert names({"attention": "weight", "attention.out_proj": "output"}) == {inner: "weight", outer: "output"}
    assert names({"attention*": "weight", "attention.out_proj": "output"}) == {inner: "weight", outer: "weight"}
    assert names({"*.out_proj": "input"}) == {outer: "input"}
    assert names("weight", exclude="*.out_proj") == {inner: "weight"}


# ------------------------------------------------------------------------------------------------- tied weights


def sharing(kind):
    if kind == "two parameters":
        return views()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    if kind == "one layer, two names":
        model[2] = model[0]
    else:
        model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("granularity", ["weight", "input", "output", "kernel", (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["one parameter", "two parameters", "one layer, two names"])
def test_tied_weights_get_one_shared_gate(kind, granularity):
    model = sharing(kind)
    report = sparsify(model, granularity)
    assert len(list(iter_gates(model))) == 1
    assert report.parameters == 16
    gate = next(gate for _, gate in iter_gates(model))
    with torch.no_grad():
        gate.log_alpha.uniform_(-3, 3)
    last = model[len(model) - 1]
    model.eval()
    assert torch.equal(model[0].weight, last.weight)
    model.train()
    model(torch.randn(2, 4)).sum().backward()
    assert bool(gate.log_alpha.grad.any())


@pytest.mark.parametrize(("embed", "decode"), [("weight", "weight"), ("input", "output"), ("output", "input")])
def test_embedding_and_decoder_share_gates_over_the_same_axis(embed, decode):
    model = Tied()
    sparsify(model, {"embed": embed, "decode": decode})
    gates = list(iter_gates(model))
    assert len(gates) == 1
    assert gates[0][1].log_alpha.shape == {"weight": (6, 4), "input": (6,), "output": (4,)}[embed]
    with torch.no_grad():
        gates[0][1].log_alpha.uniform_(-3, 3)
    model.eval()
    assert torch.equal(model.embed.weight, model.decode.weight)


@pytest.mark.parametrize(
    ("spec", "exclude", "left"),
    [
        ("weight", (), "'decode.weight'"),
        ({"*": "output"}, (), "'embed.weight', 'decode.weight'"),
        ({"*": "weight"}, "embed", "'decode.weight'"),
        ({"b*": "input", "*": "weight"}, (), None),
    ],
)
def test_a_weight_that_is_tied_to_one_left_out_stays_without_gates_and_the_others_get_theirs(spec, exclude, left):
    model = Tied()
    with (
        nullcontext() if left is None else pytest.warns(L0HooksWarning, match=f"(?s)without gates stays {left}. .*tied")
    ):
        sparsify(model, spec, exclude=exclude)
    names = {site.module_name for site in iter_sites(model)}
    assert names == ({"body"} if left else {"embed", "body", "decode"})
    assert model.decode.weight is model.embed.weight or left is None


def test_what_is_tied_to_a_weight_left_out_is_left_out_in_turn():
    buffer = torch.randn(8, 4)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    for start, layer in zip((0, 2, 3), model, strict=False):  # the first overlaps the second, the second the third
        layer.weight = nn.Parameter(buffer[start : start + 4])
    with pytest.warns(L0HooksWarning, match="'0.weight', '1.weight', '2.weight'"):
        sparsify(model, "weight")
    assert [site.module_name for site in iter_sites(model)] == ["3"]


def test_tied_blocks_are_named_from_each_side():
    model = Tied(tokens=6, size=4)
    sparsify(model, {"embed": (2, 3), "decode": (3, 2)})
    assert [tuple(gate.log_alpha.shape) for _, gate in iter_gates(model)] == [(2, 2)]


def test_one_draw_serves_both_places_of_a_tied_weight():
    model = Tied()
    sparsify(model, {"embed": GateSpec(init_keep_prob=0.5), "decode": GateSpec(init_keep_prob=0.5)})
    seen = []
    model.embed.register_forward_hook(lambda m, args, out: seen.append(m.weight.detach().clone()))
    model.decode.register_forward_hook(lambda m, args, out: seen.append(m.weight.detach().clone()))
    model(torch.tensor([[1, 2]]))
    assert torch.equal(*seen)


def test_halves_of_one_buffer_that_do_not_overlap_are_not_tied():
    buffer = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight, model[1].weight = nn.Parameter(buffer[:4]), nn.Parameter(buffer[4:])
    sparsify(model, "weight")
    assert len(list(iter_gates(model))) == 2


# -------------------------------------------------------------------------------------------------- checkpoints


class Nested(nn.Module):
    """Nested layers, tied weights, attention and buffers in one model."""

    def __init__(self):
        super().__init__()
        self.lm = Tied()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(6, 2, kdim=6, vdim=3, batch_first=True)
        self.head = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5)), nn.Conv1d(5, 4, 3))

    def forward(self, tokens):
        x = self.lm(tokens)
        x = x + self.attention(x, x, x)[0]
        x = x + self.cross(x, x, x[..., :3])[0]
        return self.head(x)


TOKENS = torch.randint(6, (2, 5), generator=torch.Generator().manual_seed(3))
ALL = {nn.Embedding: "weight", "all": "weight"}


def test_a_dense_checkpoint_loads_into_a_sparsified_model():
    dense = Nested().eval()
    torch.manual_seed(7)
    model = Nested()
    sparsify(model, ALL)
    gates = {name: gate.log_alpha.detach().clone() for name, gate in iter_gates(model)}
    checkpoint = dense.state_dict()
    keys = list(checkpoint)
    result = model.load_state_dict(checkpoint, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(checkpoint) == keys  # the caller's dictionary is left alone
    for name, gate in iter_gates(model):
        assert torch.equal(gate.log_alpha, gates[name])
        with torch.no_grad():
            gate.log_alpha.fill_(9.0)  # open: the model is the dense one
    torch.testing.assert_close(model.eval()(TOKENS), dense(TOKENS), rtol=0, atol=0)


def test_a_dense_checkpoint_with_missing_or_foreign_keys_is_still_refused():
    model = mlp()
    checkpoint = mlp().state_dict()
    sparsify(model, "weight")
    missing = {k: v for k, v in checkpoint.items() if k != "0.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.parametrizations\.weight\.original"):
        model.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other\.weight"):
        model.load_state_dict({**checkpoint, "other.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**checkpoint, "0.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("through", ["memory", "torch.save"])
def test_a_sparsified_checkpoint_reloads_with_its_temperature(close_gates, through, assign):
    model = Nested()
    sparsify(model, ALL)
    close_gates(model)
    set_temperature(model, 0.37)
    checkpoint = model.state_dict()
    if through == "torch.save":
        file = io.BytesIO()
        torch.save(checkpoint, file)
        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)
    torch.manual_seed(7)
    again = Nested()
    sparsify(again, ALL)
    result = again.load_state_dict(checkpoint, strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert {gate.temperature for _, gate in iter_gates(again)} == {0.37}
    assert torch.equal(again.eval()(TOKENS), model.eval()(TOKENS))


def test_a_checkpoint_survives_safetensors(close_gates):
    model = mlp()
    sparsify(model, {"0": "weight", "2.0": "output"})
    close_gates(model)
    set_temperature(model, 0.41)
    stored = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    again = mlp()
    sparsify(again, {"0": "weight", "2.0": "output"})
    again.load_state_dict(stored, strict=True)
    assert {gate.temperature for _, gate in iter_gates(again)} == {0.41}
    x = torch.randn(3, 4)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("kind", ["dense", "sparsified"])
def test_a_half_precision_checkpoint_that_is_assigned_leaves_the_gates_in_float32(kind):
    source = mlp()
    if kind == "sparsified":
        sparsify(source, "weight")
    checkpoint = {k: v.bfloat16() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    model = mlp()
    sparsify(model, "weight")
    next(iter_gates(model))[1].log_alpha.requires_grad_(False)
    model.load_state_dict(checkpoint, assign=True)
    flags = []
    for _, gate in iter_gates(model):
        assert gate.log_alpha.dtype == torch.float32
        flags.append(gate.log_alpha.requires_grad)
    assert flags == [False, True]
    assert model[0].weight.dtype == torch.bfloat16
    model(torch.randn(3, 4, dtype=torch.bfloat16)).sum().backward()


def test_a_pruned_checkpoint_loads_into_a_sparsified_model():
    model = mlp()
    sparsify(model, "weight")
    again = mlp()
    sparsify(again, "weight")
    again.load_state_dict(prune(model).state_dict(), strict=True)
    assert torch.equal(again[0].parametrizations.weight.original, model.eval()[0].weight)


# ------------------------------------------------------------------------------------------- frozen, dtype, device


def test_frozen_weights_stay_frozen_and_their_gates_learn():
    model = mlp().requires_grad_(False)
    sparsify(model, {"0": "weight", "2.0": "output"})
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "log_alpha" not in name}
    assert all(p.requires_grad == ("log_alpha" in name) for name, p in model.named_parameters())
    optimizer = torch.optim.SGD(param_groups(model, lr=1.0, gate_lr=1.0))
    (model(torch.randn(8, 4)).square().sum() + penalty(model, l0=1.0)).backward()
    before = [gate.log_alpha.detach().clone() for _, gate in iter_gates(model)]
    optimizer.step()
    for (_, gate), old in zip(iter_gates(model), before, strict=True):
        assert not torch.equal(gate.log_alpha, old)
    for name, p in model.named_parameters():
        if "log_alpha" not in name:
            assert p.grad is None
            assert torch.equal(p, weights[name])
    assert not prune(model)[0].weight.requires_grad


@pytest.mark.parametrize("granularity", ["weight", "input"])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gates_stay_in_float32_and_weights_in_the_models_dtype(cast, when, granularity):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    if when == "before":
        getattr(model, cast)()
    sparsify(model, granularity)
    if when == "after":
        getattr(model, cast)()
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[cast]
    for mode in (True, False):
        model.train(mode).zero_grad()
        out = model(torch.randn(3, 4, dtype=dtype))
        out.sum().backward()
        assert out.dtype == model[0].weight.dtype == dtype
        assert model[0].parametrizations.weight.original.grad.dtype == dtype
        for _, gate in iter_gates(model):
            assert gate.log_alpha.dtype == gate.log_alpha.grad.dtype == gate().dtype == torch.float32
    assert penalty(model, l0=1.0, l2=1.0).dtype == torch.float32


def test_autocast_computes_in_half_precision_and_trains_in_float32():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    sparsify(model, {"0": "weight", "2": "input"})
    for mode in (True, False):
        model.train(mode).zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(torch.randn(3, 4))
            assert all(gate().dtype == torch.float32 for _, gate in iter_gates(model))
            assert model[0].weight.dtype == torch.float32
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        for _, gate in iter_gates(model):
            assert gate.log_alpha.grad.dtype == torch.float32
        assert model[0].parametrizations.weight.original.grad.dtype == torch.float32


def test_a_sparsified_model_moves_to_meta_and_back(close_gates):
    model = mlp()
    sparsify(model, "weight")
    close_gates(model)
    checkpoint = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model.eval()(x := torch.randn(3, 4)).detach()
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(x.to("meta")).shape == (3, 4)
    model.to_empty(device="cpu")
    model.load_state_dict(checkpoint)
    assert torch.equal(model(x), expected)


def test_assigning_a_tensor_to_the_weight_puts_it_beneath_the_gates():
    model = gated("output")
    log_alpha = next(iter_gates(model))[1].log_alpha
    with torch.no_grad():
        log_alpha.copy_(torch.tensor([9.0, 9, 9, -9, -9, -9]))
    for mode in (False, True, False):
        model.train(mode)
        new = torch.randn(6, 4)
        model[0].weight = new
        assert torch.equal(model[0].parametrizations.weight.original, new)
        expected = torch.cat([new[:3], torch.zeros(3, 4)])
        if not mode:
            assert torch.equal(model[0].weight, expected)
    assert isinstance(model[0].parametrizations.weight.original, nn.Parameter)


# ------------------------------------------------------------------------------------------ beside other machinery


class Double(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize("copied", ["the original", "the copy"])
def test_gating_a_deepcopy_of_a_parametrized_layer_does_not_touch_its_twin(copied):
    original = nn.Linear(4, 4)
    parametrize.register_parametrization(original, "bias", Double())
    copy_of_it = copy.deepcopy(original)
    target, twin = (original, copy_of_it) if copied == "the original" else (copy_of_it, original)
    x = torch.randn(2, 4)
    expected = twin(x)
    before = state_of(twin)
    sparsify(target, "weight")
    assert state_of(twin) == before
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        next(iter_gates(target))[1].log_alpha.fill_(9.0)
    assert torch.equal(target.eval()(x), expected)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.LazyLinear(4),
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: nn.Linear(4, 4).to("meta"),
        lambda: nn.Embedding(4, 4, max_norm=1.0),
        lambda: nn.LSTM(4, 4),
    ],
    ids=["lazy", "weight_norm", "meta", "max_norm", "LSTM"],
)
def test_layers_that_cannot_be_gated_are_no_trouble_when_left_out(other):
    model = nn.Sequential(nn.Linear(4, 4), other())
    report = sparsify(model, {"0": "weight"})
    assert report.gates == 16
    assert float(penalty(model, l0=1.0, l2=1.0, params=1.0).detach()) > 0
    assert isinstance(prune(model, inplace=True)[0], nn.Linear)


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
def test_layers_compiled_by_torchscript_stay_what_they_are(close_gates):
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2))
    sparsify(model, "weight")
    assert {site.name for site in iter_sites(model)} == {"0.weight", "2.weight"}
    close_gates(model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(prune(model).eval()(x), model.eval()(x))


def test_a_deepcopy_of_a_gated_model_has_gates_of_its_own():
    model = gated()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(iter_gates(twin))[1].log_alpha.fill_(-9.0)
    assert float(next(iter_gates(model))[1].keep_prob().detach().min()) > 0.9
    assert not bool(twin.eval()[0].weight.any())


def test_standalone_gates_of_the_model_are_left_alone():
    model = nn.ModuleDict({"features": Gate(4, init_keep_prob=0.3), "fc": nn.Linear(4, 4)})
    gate = model["features"]
    sparsify(model, "weight")
    assert model["features"] is gate
    torch.testing.assert_close(gate.keep_prob(), torch.full((4,), 0.3))


@pytest.mark.parametrize(
    ("spec", "exclude"),
    [("weight", nn.Linear(2, 2)), ("weight", nn.Sequential(nn.ReLU())), ("weight", [nn.ReLU()]), ("weight", 3)],
)
def test_what_is_no_pattern_is_refused(spec, exclude):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SpecError, match=r"modules are named by patterns(?s:.)*got: an object of type"):
        sparsify(model, spec, exclude=exclude)
    with pytest.raises(SpecError, match=r"modules are named by patterns(?s:.)*got: an object of type"):
        sparsify(model, {model[0]: "weight"})
    assert type(model[0]) is nn.Linear
