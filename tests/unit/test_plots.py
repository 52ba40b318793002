"""Pictures: what they draw is what the model says, nothing is cut off, and no display or global state is needed."""

import math

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from l0hooks import Gate, Tracker, iter_gates, plots, prune, sparsify, summary
from l0hooks.errors import StateError


def deep(layers, close_gates):
    names = [f"encoder.layers.{i}.attention.output.dense_projection" for i in range(layers)]
    model = nn.ModuleDict({name.replace(".", "_"): nn.Linear(8, 8) for name in names})
    sparsify(model, "weight")
    close_gates(model)
    return model


def inside(figure):
    """Every text that is shown lies within the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    texts = [t for axes in figure.axes for t in (*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label)]
    texts += [
        tick.label1
        for axes in figure.axes
        for tick in axes.yaxis.get_major_ticks()
        if min(axes.get_ylim()) <= tick.get_loc() <= max(axes.get_ylim())  # others are not drawn
    ]
    texts += [t for axes in figure.axes if axes.get_legend() for t in axes.get_legend().get_texts()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts if text.get_visible() and text.get_text()]
    return bool(boxes) and all(-1 <= b.x0 and b.x1 <= width + 1 and -1 <= b.y0 and b.y1 <= height + 1 for b in boxes)


@pytest.mark.parametrize("layers", [1, 5, 60])
def test_nothing_is_cut_off(layers, close_gates):
    model = deep(layers, close_gates)
    for figure in (plots.sparsity_plot(model), plots.gate_histogram(model), plots.gate_histogram(model, by_layer=True)):
        assert inside(figure)


def test_the_bars_are_the_shares_kept(close_gates):
    model = deep(4, close_gates)
    report = summary(model)
    for given in (model, report):
        axes = plots.sparsity_plot(given).axes[0]
        _, evaluated = axes.containers
        assert [bar.get_width() for bar in evaluated] == [1 - row.sparsity for row in report.rows]
        assert list(axes.lines[0].get_xdata()) == [1 - row.expected_sparsity for row in report.rows]
        assert axes.texts[0].get_text() == f"{report.rows[0].parameters_kept} of 64 weights"


def test_the_figure_grows_with_the_layers_and_names_lose_their_middle(close_gates):
    few, many = (plots.sparsity_plot(deep(n, close_gates)) for n in (5, 60))
    assert many.get_figheight() > 5 * few.get_figheight()
    labels = [tick.get_text() for tick in many.axes[0].get_yticklabels()]
    assert len(set(labels)) == 60
    assert all(len(label) <= 36 and "…" in label and label.endswith("dense_projection") for label in labels)


def test_the_histogram_counts_every_gate(close_gates):
    model = deep(3, close_gates)
    figure = plots.gate_histogram(model)
    counts, edges, _ = figure.axes[0].patches[0].get_data()
    probabilities = torch.cat([gate.keep_prob().detach().view(-1) for _, gate in iter_gates(model)])
    assert counts.sum() == probabilities.numel() == summary(model).gates
    half = list(edges).index(0.5)
    assert counts[half:].sum() == int((probabilities >= 0.5).sum())
    kept = sum(int(gate.support().sum()) for _, gate in iter_gates(model))
    assert figure.axes[0].get_title("left") == f"{kept} of 192 gates stay"
    by_layer = plots.gate_histogram(model, by_layer=True).axes[0].images[0].get_array()
    assert by_layer.shape == (3, len(counts))
    assert by_layer.sum(1).tolist() == pytest.approx([1.0] * 3)


def test_gates_that_are_certain_fall_into_the_outer_bins():
    gate = Gate(5)
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-80.0, -80.0, 80.0, 80.0, 80.0]))
    counts = plots.gate_histogram(gate).axes[0].patches[0].get_data().values
    assert (counts[0], counts[-1], counts.sum()) == (2, 3, 5)


def test_without_gates_there_is_nothing_to_draw():
    for draw in (plots.gate_histogram, plots.sparsity_plot, lambda model: plots.history_plot([])):
        with pytest.raises(StateError):
            draw(nn.Linear(2, 2))


def history(steps=20):
    model = nn.Linear(30, 20)
    sparsify(model, "weight")
    tracker = Tracker(model)
    for step in range(steps):
        with torch.no_grad():
            for _, gate in iter_gates(model):
                gate.log_alpha.uniform_(-4, 3)
        tracker.log(10 * step, loss=2.0 / (step + 1), accuracy=1 - 0.5**step, perplexity=400.0 - step, target=300)
    return model, tracker


def test_the_history_has_a_panel_for_each_scale(tmp_path):
    model, tracker = history()
    size = tracker.exported(prune(model), accuracy=0.5)
    figure = tracker.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 10_000
    sizes, small, large = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["parameters", "", "perplexity"]
    lines = {line.get_label().split(" ")[0]: line for line in sizes.lines}
    assert list(lines) == ["evaluated", "expected", "target", "exported"]
    assert lines["expected"].get_linestyle() == "--"  # seen where it lies on the other
    assert list(lines["expected"].get_ydata()) == [row["expected"] for row in tracker.rows[:-1]]
    assert list(lines["exported"].get_ydata()) == [size]
    assert [line.get_label() for line in small.lines] == [*("accuracy", "accuracy, pruned", "loss")]
    assert list(large.lines[0].get_xdata()) == list(range(0, 200, 10))
    assert all(axes.get_shared_x_axes().joined(sizes, axes) for axes in (small, large))
    assert inside(figure)


@pytest.mark.parametrize("metrics", [{}, {"loss": 0.0}, {"loss": math.nan}, {"loss": math.inf, "x": -1e9}])
@pytest.mark.parametrize("unit", ["params", "gates", "macs"])
def test_odd_histories_are_drawn(metrics, unit, tmp_path):
    model = nn.Linear(3, 2)
    sparsify(model, "weight", example_inputs=(torch.ones(1, 3),))
    tracker = Tracker(model, unit=unit)
    tracker.log(**metrics)
    tracker.plot(tmp_path / "history.svg")
    only_exported = [{"step": 0, "exported": 9, "accuracy": 1, "target": 8}]
    assert inside(plots.history_plot(only_exported, unit=unit))


def test_there_is_no_global_state(close_gates):
    model = deep(2, close_gates)
    before = [gate.log_alpha._version for _, gate in iter_gates(model)]
    figures = [plots.sparsity_plot(model), plots.gate_histogram(model), plots.history_plot([{"step": 0, "loss": 1}])]
    assert plt.get_fignums() == []
    assert len({id(figure) for figure in figures}) == 3
    assert [gate.log_alpha._version for _, gate in iter_gates(model)] == before


def test_long_legends_fit():
    row = {"step": 0, "expected": 12345678901.0, "evaluated": 12345678901, "target": 12345678901}
    names = [f"validation_accuracy_of_the_{n}th_head" for n in range(5)]
    rows = [{**row, **dict.fromkeys(names, 1.0)}, {"step": 0, "exported": 3}]
    assert inside(plots.history_plot(rows))
