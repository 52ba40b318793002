"""Every structure of the zoo: gate, train a step, close gates, prune, compare, count, save, load, compare."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from structure_oracle import gap, outputs
from torch import Tensor
from torch.utils import _pytree as pytree
from traced_models import ENTRIES, groups_of

from l0hooks import GateSpec, iter_gates, param_groups, penalty, prune, sparsify, summary
from l0hooks.errors import StateError
from l0hooks.export.save import load_pruned, save_pruned

TOLERANCE = 1e-5  # of the output's scale

NOT_TRAINABLE = {"InPlace"}  # the dense model has no gradient either
# Their code holds sizes by hand: the exported graph is cut instead.
GRAPHS = {
    "C2f",
    "InPlace",
    "MultiQuery",
    "OneMaskForAllHeads",
    "PlainAttention",
    "ComplexRotation",
    "RotaryAttention",
    "TransformerEncoder",
    "VGGWithView",
    "SizesInARegion",
    "ZeroBias",
}
INSIDE = {"CrossAttention", "ViT"}  # of which single modules are graphs
EITHER = {"ShuffleNetV2"}  # modules where both halves keep as many channels
REFUSED: set[str] = set()
# Their parameters share memory as views, which a deepcopy separates: a dense copy has more of them, too.
VIEWS = {"SharedStorage"}


# torch's own, whenever it exports a recurrent layer
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self.recurrent:UserWarning")


def enlarged(inputs, times=3):
    def more(value):
        return value.repeat(times, *[1] * (value.dim() - 1)).flip(0) if isinstance(value, Tensor) else value

    return pytree.tree_map(more, tuple(inputs))


def train_a_step(model, inputs, **penalties):
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-3, gate_lr=1e-2))
    leaves = pytree.tree_leaves(model.train()(*inputs))
    loss = sum(out.square().mean() for out in leaves if isinstance(out, Tensor) and out.is_floating_point())
    (loss + penalty(model, **penalties)).backward()
    untouched = [name for name, gate in iter_gates(model) if gate.log_alpha.grad is None]
    optimizer.step()
    optimizer.zero_grad()
    assert untouched == []


@torch.no_grad()
def close_members(model, share=1 / 3):
    """Close about a third of every group's gates, at least one and never all; the others stand somewhere open."""
    torch.manual_seed(3)
    for _, gate in iter_gates(model):
        size = gate.log_alpha.numel()
        gate.log_alpha.uniform_(-0.2, 3.0)
        gate.log_alpha[torch.randperm(size)[: min(max(1, round(share * size)), size - 1)]] = -4.0


def gated(name):
    """The entry's model with gates, trained for a step, a third of its gates closed; and its inputs."""
    groups = groups_of(name)
    torch.manual_seed(1)
    model, inputs = ENTRIES[name].make(), ENTRIES[name].inputs()
    sparsify(model, "coupled", example_inputs=inputs, groups=groups)
    if name not in NOT_TRAINABLE:
        train_a_step(model, inputs, params=1e-4, expected_l2=1e-4)
    close_members(model)
    return model.eval(), inputs


def gap_in_double(model, pruned, inputs):
    """The gap between float64 copies."""
    doubled = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    return gap(*(outputs(copy.deepcopy(m).double(), doubled) for m in (model, pruned)))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def assert_untouched(model, before):
    after = state_of(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in REFUSED])
def test_from_a_dense_model_to_a_smaller_one_and_back_from_its_file(name, tmp_path):
    model, inputs = gated(name)
    many = enlarged(inputs)
    expected, expected_many = outputs(model, inputs), outputs(model, many)
    assert all(bool(t.isfinite().all()) for t in expected if t.is_floating_point() and "Attention" not in name)
    before, report = state_of(model), summary(model)

    pruned, told = prune(model, example_inputs=inputs, return_report=True)

    assert_untouched(model, before)
    graphs = [path for path, module in pruned.named_modules() if isinstance(module, torch.fx.GraphModule)]
    assert bool(graphs) == bool(told.note)
    assert bool(graphs) == (name in GRAPHS | INSIDE) or name in EITHER
    assert isinstance(pruned, torch.fx.GraphModule) == (name in GRAPHS) or name in EITHER
    for given, wanted in ((inputs, expected), (many, expected_many)):
        # a sensitive network of fifty layers may lose more; in float64 the rounding of the folded weights is left
        assert gap(wanted, outputs(pruned, given)) <= TOLERANCE or gap_in_double(model, pruned, given) <= 1e-6

    dense = parameters(copy.deepcopy(ENTRIES[name].make()))
    assert parameters(pruned) < dense
    assert dense - parameters(pruned) == report.model_parameters - report.model_parameters_kept
    assert parameters(pruned) == report.model_parameters_kept or name in VIEWS
    assert told.exported_parameters == parameters(pruned)

    save_pruned(pruned, tmp_path / "small")
    loaded = load_pruned(ENTRIES[name].make, tmp_path / "small").eval()
    assert parameters(loaded) == parameters(pruned)
    assert gap(outputs(pruned, inputs), outputs(loaded, inputs)) <= 1e-7
    assert gap(outputs(pruned, many), outputs(loaded, many)) <= 1e-7


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_cut_yet_is_refused_and_left_untouched(name):
    model, inputs = gated(name)
    before, expected = state_of(model), outputs(model, inputs)
    with pytest.raises(StateError, match="must compute what the gated one computes"):
        prune(model, example_inputs=inputs)
    assert_untouched(model, before)
    assert gap(expected, outputs(model, inputs)) == 0


MASKED = [
    *("MLP", "VGG", "ResNetBasic", "ResNeXt", "MobileNetV3", "DenseNet", "UNet", "ConvNeXt", "GroupedTransposed"),
    *("TCN", "Conv3d", "UsedTwice", "DictOutput", "TiedLanguageModel", "Standardised", "SharedStorage", "Mixer"),
    *("ViT", "TransformerEncoder", "CrossAttention", "ComplexRotation", "RotaryAttention", "HFGPT2", "HFT5"),
]


@pytest.mark.parametrize("name", MASKED)
def test_noise_for_each_example_trains_and_prunes_to_the_same(name):
    groups = groups_of(name)
    torch.manual_seed(1)
    model, inputs = ENTRIES[name].make(), ENTRIES[name].inputs()
    by_step = ENTRIES[name].make()
    sparsify(by_step, "coupled", example_inputs=inputs, groups=groups)
    sparsify(model, GateSpec(granularity="coupled", noise="example"), example_inputs=inputs, groups=groups)
    train_a_step(model, inputs, l0=1e-3)
    by_step.load_state_dict(model.state_dict())
    close_members(model)
    for (_, mine), (_, other) in zip(iter_gates(model), iter_gates(by_step), strict=True):
        other.log_alpha.data.copy_(mine.log_alpha)
    expected = outputs(by_step.eval(), inputs)
    assert gap(expected, outputs(model.eval(), inputs)) == 0
    assert gap(expected, outputs(prune(model, example_inputs=inputs), inputs)) <= TOLERANCE


PLAIN = ["MLP", "ResNetBasic", "MobileNetV3", "DenseNet", "TiedLanguageModel", "ConvNeXt", "HFBertSdpa", "HFGPT2"]


@pytest.mark.parametrize("name", PLAIN)
def test_the_smaller_model_is_plain(name):
    model, inputs = gated(name)
    pruned = prune(model, example_inputs=inputs)
    dense = ENTRIES[name].make()
    assert [(n, type(m)) for n, m in pruned.named_modules()] == [(n, type(m)) for n, m in dense.named_modules()]
    assert list(pruned.state_dict()) == list(dense.state_dict())
    assert [list(vars(m)) for m in pruned.modules()] == [list(vars(m)) for m in dense.modules()]
    for module in pruned.modules():
        hooks = {k: v for k, v in vars(module).items() if "hooks" in k and k != "_non_persistent_buffers_set"}
        assert not any(hooks.values()) or name.startswith("HF")
    dumped = pickle.dumps(pruned)
    assert b"l0hooks" not in dumped
    assert gap(outputs(pruned, inputs), outputs(pickle.load(io.BytesIO(dumped)), inputs)) == 0
    copied = copy.deepcopy(pruned).train()
    sum(t.float().square().sum() for t in pytree.tree_leaves(copied(*inputs)) if isinstance(t, Tensor)).backward()
    assert all(p.grad is not None for p in copied.parameters() if p.requires_grad) or name.startswith("HF")


@pytest.mark.parametrize("name", ["MLP", "ResNetBasic", "ResNeXt", "UNet", "HFBertSdpa"])
def test_the_smaller_model_exports(name):
    model, inputs = gated(name)
    pruned = prune(model, example_inputs=inputs).eval()
    program = torch.export.export(pruned, inputs)
    assert gap(outputs(pruned, inputs), outputs(program.module(), inputs)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNetBasic", "ViT"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_smaller_model_runs_in_onnxruntime(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, inputs = gated(name)
    pruned = prune(model, example_inputs=inputs).eval()
    torch.onnx.export(pruned, inputs, tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    feeds = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    got = session.run(None, feeds)
    for expected, found in zip(outputs(pruned, inputs), got, strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_every_entry_is_dealt_with():
    assert set(ENTRIES) >= REFUSED | NOT_TRAINABLE | GRAPHS | INSIDE | EITHER | VIEWS
    assert not REFUSED & (GRAPHS | INSIDE | EITHER)
