"""The figures of the theory page, drawn from the library itself whenever the site is built."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from l0hooks import Budget, Gate, HardConcrete, set_budget
from l0hooks.gates import hard_concrete as hc
from l0hooks.gates import moments

INK = {"light": "#37474f", "dark": "#cfd8dc"}
BLUE, ORANGE, GREEN, RED = "#2196c9", "#ef8a17", "#3fa34d", "#d1495b"
LOCATIONS = {-2.0: BLUE, 0.0: ORANGE, 2.0: GREEN}


def _named(location: float) -> str:
    return f"log α = {location:.0f}".replace("-", "−")


def density(figure: Figure) -> None:
    """Density inside (0, 1), and the atoms at both ends."""
    curve, atoms = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 1]})
    x = torch.linspace(0.001, 0.999, 400)
    for shift, (location, colour) in zip((-0.08, 0.0, 0.08), LOCATIONS.items(), strict=True):
        gate = HardConcrete(torch.tensor(location))
        curve.plot(x, gate.log_prob(x).exp(), color=colour, label=_named(location))
        ends = [1 - float(gate.keep_prob), float(gate.prob_one)]
        atoms.bar([end + shift for end in (0, 0.5)], ends, 0.07, color=colour)
    curve.set(xlabel="gate z", ylabel="density", xlim=(0, 1), ylim=(0, 2))
    curve.legend(frameon=False, loc="upper center")
    atoms.set(ylabel="probability", ylim=(0, 1))
    atoms.set_xticks([0, 0.5], ["z = 0", "z = 1"])


def cdf(figure: Figure) -> None:
    """P(z ≤ x): jumps at 0 and 1."""
    axes = figure.subplots()
    x = torch.linspace(0, 0.9999, 400)
    for location, colour in LOCATIONS.items():
        gate = HardConcrete(torch.tensor(location))
        values = gate.cdf(x)
        axes.plot([-0.15, 0], [0, 0], color=colour, linewidth=1.5)
        axes.plot([0, 0], [0, float(values[0])], ":", color=colour)
        axes.plot(x, values, color=colour, label=_named(location))
        axes.plot([1, 1], [float(values[-1]), 1], ":", color=colour)
    axes.plot([1, 1.15], [1, 1], color=GREEN, linewidth=1.5)
    axes.set(xlabel="x", ylabel="P(z ≤ x)", xlim=(-0.15, 1.15), ylim=(-0.02, 1.04))
    axes.legend(frameon=False, loc="upper left")


def test_time_gates(figure: Figure) -> None:
    """The three estimates: over log α at β = ⅔, and over β."""
    left, right = figure.subplots(1, 2, sharey=True)
    location = torch.linspace(-5, 5, 400)
    closed = hc.log_alpha_from_keep_prob(0.5)
    left.axvspan(-5, closed, color=RED, alpha=0.12, lw=0)
    left.text(-4.8, 0.93, "keep probability ≤ ½", color=RED, fontsize=9)
    left.plot(location, hc.median(location), color=BLUE, label="median (default)")
    left.plot(location, hc.paper_estimate(location), color=ORANGE, label="paper")
    left.plot(location, moments.mean(location), color=GREEN, label="mean")
    left.set(xlabel="log α, at β = ⅔", ylabel="gate in evaluation", xlim=(-5, 5))
    left.legend(frameon=False, loc="lower right")
    temperature = torch.linspace(0.05, 2, 300)
    for value, style in ((-1.0, "-"), (1.0, "--")):
        at = torch.full_like(temperature, value)
        right.plot(temperature, hc.median(at, temperature), style, color=BLUE)
        right.plot(temperature, hc.paper_estimate(at), style, color=ORANGE)
        right.plot(temperature, moments.mean(at, temperature), style, color=GREEN)
    right.axvline(2 / 3, color="0.6", linewidth=0.8)
    right.set(xlabel="temperature β, at log α = −1 (solid) and +1 (dashed)", xlim=(0, 2))


def start(figure: Figure) -> None:
    """What a start at logit(p) gives, and what a keep probability does to the mean."""
    left, right = figure.subplots(1, 2)
    asked = torch.linspace(0.01, 0.99, 200)
    for temperature, colour in ((1 / 3, BLUE), (2 / 3, ORANGE), (1.0, RED)):
        got = hc.keep_prob(torch.logit(asked), temperature)
        left.plot(asked, got, color=colour, label=f"log α = logit p, β = {temperature:.2f}")
    left.plot(asked, asked, color=GREEN, label="init_keep_prob=p", linewidth=2.5)
    left.set(xlabel="keep probability asked for, p", ylabel="P(z ≠ 0) at the start", xlim=(0, 1), ylim=(0, 1))
    left.legend(frameon=False, fontsize=8, loc="lower right")
    locations = torch.tensor([hc.log_alpha_from_keep_prob(float(p)) for p in asked])
    right.plot(asked, moments.mean(locations), color=GREEN)
    right.plot([0.9, 0.9, 0], [0, 0.63, 0.63], ":", color=RED)
    right.text(0.04, 0.66, "0.9 leaves 0.63 of each weight", color=RED, fontsize=9)
    right.set(xlabel="keep probability", ylabel="E[z]: what a weight is multiplied by", xlim=(0, 1), ylim=(0, 1))


def budget(figure: Figure) -> None:
    """Sixty gates of different worth under a budget of twelve."""
    torch.manual_seed(0)
    worth = torch.linspace(0, 1, 60)
    gate = Gate(60)
    (rule,) = set_budget(gate, Budget(keep=12, steps=150))
    optimizer = torch.optim.Adam([gate.log_alpha], lr=0.08)
    scheduled, expected, keep = [], [], []
    for _ in range(200):
        loss = (worth * (1 - gate())).sum() / 10
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduled.append(rule.scheduled)
        expected.append(rule.expected())
        keep.append(gate.keep_prob().detach())
    left, right = figure.subplots(1, 2)
    left.plot(scheduled, color=ORANGE, linewidth=5, alpha=0.4, label="schedule (cubic)")
    left.plot(expected, color=BLUE, label="expected number of open gates")
    left.set(xlabel="step", ylabel="gates", ylim=(0, 62))
    left.legend(frameon=False)
    colours = mpl.colormaps["cool"](worth.numpy())
    for one, colour in zip(torch.stack(keep, 1), colours, strict=True):
        right.plot(one, color=colour, linewidth=0.8)
    right.axvline(150, color="0.6", linewidth=0.8)
    right.text(148, 1.03, "support fixed", fontsize=9, ha="center")
    right.set(xlabel="step (pink: worth most)", ylabel="keep probability", ylim=(-0.02, 1.02))


FIGURES: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "density": (density, (7.2, 2.9)),
    "cdf": (cdf, (7.2, 2.9)),
    "test-time-gates": (test_time_gates, (7.6, 3.1)),
    "start": (start, (7.6, 3.3)),
    "budget": (budget, (7.6, 3.1)),
}


@contextmanager
def style(ink: str) -> Iterator[None]:
    """Matplotlib with one colour for all that is written, nothing behind it, and the same file every time."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plain = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "l0hooks", "font.size": 10}
    with mpl.rc_context({**dict.fromkeys(inked, ink), **plain, "axes.facecolor": "none"}):
        yield


def svg(name: str, scheme: str) -> str:
    """One figure as SVG, for ``scheme`` "light" or "dark"."""
    draw, size = FIGURES[name]
    with style(INK[scheme]):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
