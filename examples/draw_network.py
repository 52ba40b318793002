"""Draw a trained network before and after nine of ten of its weights are gone: the picture on the front page.

An MLP learns scikit-learn's 8×8 digits. Then it gets a gate on every weight and a budget, trains on, and is pruned.
``--output`` gets ``network-light.png``, ``network-dark.png`` and ``report.json``. About ten seconds:

    pip install "l0hooks[examples]"
    python examples/draw_network.py --output docs/images
"""

import argparse
import copy
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import l0hooks

INK = {"light": "#37474f", "dark": "#cfd8dc"}
POSITIVE, NEGATIVE = "#1e9bbf", "#e2574c"


def load_data(seed):
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    return train_test_split(x, y, test_size=0.25, stratify=y, random_state=seed)


def train(model, optimizer, x, y, epochs):
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def weights_of(model):
    return [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]


def draw(axes, weights, ink):
    """Neurons as points, one column for each layer; weights as lines, the larger the stronger."""
    sizes = [weights[0].shape[1], *(len(weight) for weight in weights)]
    heights = [torch.linspace(1, 0, size) if size > 12 else torch.linspace(0.8, 0.2, size) for size in sizes]
    for column, weight in enumerate(weights):
        outputs, inputs = weight.nonzero(as_tuple=True)
        values = weight[outputs, inputs]
        order = values.abs().argsort()
        ends = [heights[column][inputs[order]], heights[column + 1][outputs[order]]]
        lines = [[(column, a), (column + 1, b)] for a, b in zip(*map(torch.Tensor.tolist, ends), strict=True)]
        strength = (values[order].abs() / values.abs().max()).tolist()
        colours = [POSITIVE if value > 0 else NEGATIVE for value in values[order]]
        widths, alpha = [0.25 + 1.5 * s for s in strength], [0.25 + 0.7 * s for s in strength]
        axes.add_collection(LineCollection(lines, colors=colours, linewidths=widths, alpha=alpha))
    used = [(weights[0] != 0).any(0), *((weight != 0).any(1) for weight in weights)]
    for column, (height, alive) in enumerate(zip(heights, used, strict=True)):
        axes.scatter([column] * int(alive.sum()), height[alive], 12, color=ink, zorder=3)
        axes.scatter([column] * int((~alive).sum()), height[~alive], 12, facecolors="none", edgecolors=ink, lw=0.4)
    axes.set(xlim=(-0.05, len(weights) + 0.05), ylim=(-0.04, 1.04))
    axes.set_axis_off()


def picture(models, titles, ink):
    figure = Figure(figsize=(9, 3.9), layout="constrained", facecolor="none")
    for axes, model, title in zip(figure.subplots(1, 2), models, titles, strict=True):
        draw(axes, weights_of(model), ink)
        axes.set_title(title, color=ink, fontsize=11)
    return figure


def save(figure, path):
    """As PNG with few colours: half a megabyte is a lot for one picture."""
    file = io.BytesIO()
    figure.savefig(file, dpi=110)
    Image.open(file).quantize(48, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def run(options):
    torch.set_num_threads(1)  # so small a network only waits for its threads
    torch.manual_seed(options.seed)
    x, x_test, y, y_test = load_data(options.seed)
    dense = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    train(dense, torch.optim.Adam(dense.parameters(), lr=3e-3), x, y, options.epochs)

    model, steps = copy.deepcopy(dense), 2 * options.epochs * (len(x) // 64 + 1)
    l0hooks.sparsify(model, "weight", budget=l0hooks.Budget(sparsity=options.sparsity, steps=int(0.7 * steps)))
    train(model, torch.optim.Adam(l0hooks.param_groups(model, lr=3e-3, gate_lr=0.1)), x, y, 2 * options.epochs)
    pruned = l0hooks.prune(model.eval(), example_inputs=(x_test,))

    report = {"seed": options.seed, "weights": [], "accuracy": []}
    for network in (dense, pruned):
        report["weights"].append(sum(int(weight.count_nonzero()) for weight in weights_of(network)))
        report["accuracy"].append((network(x_test).argmax(1) == y_test).double().mean().item())
    pairs = zip(report["weights"], report["accuracy"], strict=True)
    titles = [f"{weights:,} weights, {accuracy:.1%} of the digits right" for weights, accuracy in pairs]
    options.output.mkdir(parents=True, exist_ok=True)
    for scheme, ink in INK.items():
        save(picture((dense, pruned), titles, ink), options.output / f"network-{scheme}.png")
    (options.output / "report.json").write_text(json.dumps(report, indent=1))
    print(*titles, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40, help="of the dense training; twice as many follow with gates")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "draw_network")
    run(parser.parse_args())
