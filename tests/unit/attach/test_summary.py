"""The report's figures against counting, and its three forms."""

import json
import math

import pandas as pd
import pytest
import torch
from torch import nn

from l0hooks import Budget, Gate, GateSpec, iter_gates, param_groups, prune, sparsify, summary
from l0hooks import summary as summarise
from l0hooks.errors import MissingExtraError, import_extra


class Net(nn.Module):
    """Gated, standalone and ungated parts in one model."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)
        self.table = nn.Embedding(5, 4)
        self.select = Gate(4, init_keep_prob=0.75)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x)[0] + self.table.weight[0]
        return self.head(x * self.select())


X = torch.zeros(2, 3, 2, 2)
SPEC = {"conv": "output", "attention": "input", "head": GateSpec(init_keep_prob=0.5)}


def gated(**options):
    """The net with the first gate of every layer closed, exactly."""
    model = Net()
    sparsify(model, SPEC, **options)
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha.fill_(2.0)
            gate.log_alpha.view(-1)[0] = -9.0
    return model


TEXT = """\
layer                     type                             gates on  gates  expected  evaluated  weights kept   MACs kept
─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
conv                      Conv2d                           output        4    26.98%     25.00%     81 of 108  324 of 432
attention.out_proj        NonDynamicallyQuantizableLinear  input         4    26.98%     25.00%      12 of 16    48 of 64
attention.in_proj_weight  MultiheadAttention               input         4    26.98%     25.00%      36 of 48  144 of 192
head                      Linear                           weight        8    14.82%     12.50%        7 of 8    28 of 32
select                    Gate                             –             4    26.98%     25.00%        0 of 0      0 of 0
─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
total                                                                   24    26.44%     24.44%    136 of 180  544 of 720
whole model: 174 of 218 parameters
not gated: table (Embedding)"""  # noqa: E501

BARS = """\
conv                      ███████████████░░░░░   75.00% kept
attention.out_proj        ███████████████░░░░░   75.00% kept
attention.in_proj_weight  ███████████████░░░░░   75.00% kept
head                      ██████████████████░░   87.50% kept
select                    ███████████████░░░░░   75.00% kept"""


def test_the_report_prints_as_a_table():
    assert str(summary(gated(example_inputs=(X,)))) == TEXT


def test_without_example_inputs_there_is_no_column_for_multiply_adds():
    text = str(summary(gated()))
    assert text.splitlines()[0] == TEXT.splitlines()[0].replace("   MACs kept", "")
    assert "324" not in text


def test_the_bars_show_what_each_row_keeps():
    assert summary(gated()).bars() == BARS


def test_a_small_model_prints_small():
    model = nn.Linear(3, 2)
    sparsify(model, "input")
    assert str(summary(model)) == "\n".join(
        [
            "layer   type    gates on  gates  expected  evaluated  weights kept",
            "──────────────────────────────────────────────────────────────────",
            "(root)  Linear  input         3     0.81%      0.00%        6 of 6",
            "──────────────────────────────────────────────────────────────────",
            "total                         3     0.81%      0.00%        6 of 6",
            "whole model: 8 of 8 parameters",
        ]
    )


def test_every_figure_is_what_counting_gives():
    """Against the zeros in the weights that evaluation really uses, and the gates' own probabilities."""
    model = gated()
    dense = sum(p.numel() for p in Net().parameters()) - 4  # less the standalone gate's own
    report = summary(model, example_inputs=(X,))
    model.eval()
    weights = {
        "conv": (model.conv.weight, 4),
        "attention.out_proj": (model.attention.out_proj.weight, 4),
        "attention.in_proj_weight": (model.attention.in_proj_weight, 4),
        "head": (model.head.weight, 4),
    }
    gates = {one.name: one for one in report.rows}
    assert set(gates) == {*weights, "select"}
    for name, (weight, positions) in weights.items():
        row, kept = gates[name], int((weight != 0).sum())
        assert (row.parameters, row.parameters_kept) == (weight.numel(), kept)
        assert (row.macs, row.macs_kept) == (weight.numel() * positions, kept * positions)
        assert row.sparsity == pytest.approx(1 - kept / weight.numel())
    open_gate, closed_gate = (1 / (1 + math.exp(-(x - 2 / 3 * math.log(0.1 / 1.1)))) for x in (2.0, -9.0))
    for row in report.rows:
        expected = ((row.gates - 1) * open_gate + closed_gate) / row.gates
        assert row.expected_sparsity == pytest.approx(1 - expected, rel=1e-5)
    total = sum(w.numel() for w, _ in weights.values())
    kept = sum(int((w != 0).sum()) for w, _ in weights.values())
    assert (report.parameters, report.parameters_kept) == (total, kept)
    assert (report.model_parameters, report.model_parameters_kept) == (dense, dense - total + kept)
    assert report.sparsity == pytest.approx(1 - kept / total)
    assert report.gates == sum(gate.log_alpha.numel() for _, gate in iter_gates(model))
    shares = [(row.expected_sparsity, row.parameters) for row in report.rows]
    assert report.expected_sparsity == pytest.approx(sum(s * n for s, n in shares) / total)


def test_expected_sparsity_is_the_share_of_zeros_among_samples():
    model = nn.Linear(100, 50)
    sparsify(model, GateSpec(init_keep_prob=0.3))
    gate = next(gate for _, gate in iter_gates(model))
    sampled = float((gate.sample().detach() == 0).float().mean())
    assert summary(model).expected_sparsity == pytest.approx(0.7, rel=1e-5)
    assert abs(sampled - 0.7) < 4 * (0.21 / 5000) ** 0.5


def test_the_evaluated_sparsity_is_what_prune_leaves(close_gates):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 4))
    sparsify(model, {"0": "input", "2": "weight"})
    closed = close_gates(model)
    report = summary(model)
    pruned = prune(model)
    zeros = sum(int((pruned[i].weight == 0).sum()) for i in (0, 2))
    assert 0 < closed
    assert report.parameters - report.parameters_kept == zeros
    assert report.model_parameters_kept == sum(int((p != 0).sum()) for p in pruned.parameters())


def test_standalone_gates_alone_are_counted_as_gates():
    model = nn.ModuleDict({"a": Gate(3, init_keep_prob=0.9), "b": Gate(1, init_keep_prob=0.1)})
    report = summary(model)
    assert (report.gates, report.parameters, report.model_parameters) == (4, 0, 0)
    assert report.sparsity == pytest.approx(0.25)
    assert report.expected_sparsity == pytest.approx(1 - (3 * 0.9 + 0.1) / 4, rel=1e-5)


@pytest.mark.parametrize("kind", ["one parameter", "two parameters", "one layer, two names"])
def test_tied_weights_are_one_row_and_counted_once(kind):
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    if kind == "one parameter":
        model["b"].weight = model["a"].weight
    elif kind == "two parameters":
        model["b"].weight = nn.Parameter(model["a"].weight.data)
    else:
        model["b"] = model["a"]
    report = sparsify(model, "weight")
    assert [row.name for row in report.rows] == ["a" if kind == "one layer, two names" else "a = b"]
    assert (report.gates, report.parameters, report.model_parameters) == (16, 16, 16)


def test_new_example_inputs_replace_the_old_ones():
    model = nn.Linear(4, 2)
    sparsify(model, "weight", example_inputs=(torch.zeros(1, 4),))
    assert summary(model).macs == 8
    assert summary(model, example_inputs=(torch.zeros(2, 5, 4),)).macs == 40
    assert summary(model).macs == 8


def test_the_whole_model_counts_layers_without_gates():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    sparsify(model, {"2": "input"})
    with torch.no_grad():
        next(iter_gates(model))[1].log_alpha[:2] = -9.0
    x = torch.zeros(5, 1, 2, 2)
    report = summary(model, example_inputs=(x,))
    assert (report.macs, report.model_macs, report.model_macs_kept) == (24, 8 + 24, 8 + 18)
    assert "whole model: 25 of 31 parameters, 26 of 32 MACs" in str(report)
    assert (summary(model).model_macs, summary(model).model_macs_kept) == (None, None)
    assert "MACs" not in str(summary(model))


def test_the_whole_models_multiply_adds_are_those_of_a_budget():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3))
    x = torch.zeros(1, 1, 6, 6)
    sparsify(model, "coupled", example_inputs=(x,), budget=Budget(sparsity=0.5, unit="macs", steps=1))
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, gate_lr=0.1))
    model(x).sum().backward()
    optimizer.step()
    dense = 16 * 72 + 4 * 576 + 96
    report = summary(model.eval(), example_inputs=(x,))
    assert report.model_macs == dense
    first, second = (int(gate.support().sum()) for _, gate in iter_gates(model))
    assert report.model_macs_kept == 16 * 9 * first + 4 * 9 * first * second + 4 * 3 * second <= dense / 2
    more = summary(model, example_inputs=(torch.zeros(3, 1, 6, 6),))  # of one example
    assert (more.macs, more.model_macs_kept) == (dense, report.model_macs_kept)


def test_the_plain_form_survives_json():
    report = summary(gated(example_inputs=(X,)))
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert (data["gates"], data["parameters"], data["parameters_kept"]) == (24, 180, 136)
    assert (data["model_parameters"], data["model_parameters_kept"]) == (218, 174)
    assert (data["macs"], data["macs_kept"]) == (720, 544)
    assert data["ungated"] == ["table (Embedding)"]
    assert [row["name"] for row in data["rows"]] == [row.name for row in report.rows]
    assert data["rows"][0]["granularity"] == "output"


def test_blocks_survive_json_as_lists():
    model = nn.Linear(4, 4)
    sparsify(model, (2, 2))
    row = json.loads(json.dumps(summary(model).to_dict()))["rows"][0]
    assert (row["granularity"], row["gates"], row["macs"]) == ([2, 2], 4, None)


def test_the_frame_has_a_row_for_each_layer():
    report = summary(gated(example_inputs=(X,)))
    frame = report.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.index) == [row.name for row in report.rows]
    assert frame["parameters_kept"].sum() == report.parameters_kept
    assert frame.loc["head", "gates"] == 8
    assert frame.loc["conv", "sparsity"] == 0.25


def test_a_model_without_gates_gives_an_empty_report():
    report = summary(nn.Linear(3, 2))
    assert report.rows == ()
    assert (report.gates, report.parameters, report.sparsity) == (0, 0, 0.0)
    assert (report.model_parameters, report.model_parameters_kept) == (8, 8)
    assert report.ungated == ("the model itself (Linear)",)
    assert report.bars() == ""
    assert "whole model: 8 of 8 parameters" in str(report)
    assert len(report.to_frame()) == 0
    assert json.dumps(report.to_dict())


def test_summary_changes_nothing():
    model = gated()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, random_state = [m.training for m in model.modules()], torch.get_rng_state()
    summary(model, example_inputs=(X,))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_report_is_of_its_moment():
    model = gated()
    report = summary(model)
    kept = report.parameters_kept
    with torch.no_grad():
        for _, gate in iter_gates(model):
            gate.log_alpha.fill_(-9.0)
    assert report.parameters_kept == kept
    assert summary(model).parameters_kept == 0
    assert report is not summarise(model)


def test_a_missing_package_names_the_extra_to_install():
    with pytest.raises(MissingExtraError, match=r"here: the package 'no_such_package'(.|\n)*l0hooks\[plots\]"):
        import_extra("no_such_package", extra="plots", where="here")
    assert issubclass(MissingExtraError, ImportError)
    assert import_extra("json", extra="plots", where="here") is json


def test_an_installed_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        import_extra("broken_package", extra="plots", where="here")
    assert not isinstance(caught.value, MissingExtraError)
