# %% [markdown]
# # Advanced: temperatures, budgets, hybrid selection, penalties of your own
#
# Five short parts, each of which can be read alone.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from statsmodels.datasets import anes96
from torch import nn
from torch.nn import functional as F

import l0hooks
from l0hooks.schedules import exponential

torch.set_num_threads(1)

pixels, labels = load_digits(return_X_y=True)
split = train_test_split(pixels / 16, labels, test_size=0.3, stratify=labels, random_state=0)
x, x_test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
y, y_test = (torch.tensor(part) for part in split[2:])


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, **strengths: float) -> list[tuple]:
    """Train with penalties; returns (expected, scheduled) size after every step if there is a budget."""
    network.train()
    (_, gate), *_ = l0hooks.iter_gates(network)
    history, batches = [], []
    for _ in range(steps):
        batches = batches or list(torch.randperm(len(x)).split(64))
        batch = batches.pop()
        loss = F.cross_entropy(network(x[batch]), y[batch])
        if strengths:
            loss = loss + l0hooks.penalty(network, **strengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if gate.rule is not None:
            history.append((gate.rule.expected(), gate.rule.scheduled))
    return history


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    network.eval()
    return (network(x_test).argmax(1) == y_test).float().mean().item()


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


# %% [markdown]
# ## 1. Temperature schedules
#
# The temperature $\beta$ says how much of a gate's distribution lies strictly between 0 and 1. A warm gate has useful
# gradients. A cold one is nearly binary, so that training sees nearly what evaluation does. `temperature_schedule`
# goes from warm to cold; it counts steps of the optimiser.

# %%
between, warm_or_cold = {}, {}
for name, stop in (("constant", 2 / 3), ("falling", 0.1)):
    network = perceptron()
    l0hooks.sparsify(network, "weight")
    l0hooks.temperature_schedule(network, exponential(2 / 3, stop, steps=300))
    train(network, torch.optim.Adam(l0hooks.param_groups(network, lr=5e-3, gate_lr=5e-2)), 400, l0=1e-3)
    with torch.no_grad():
        z = torch.cat([gate.sample().flatten() for _, gate in l0hooks.iter_gates(network)])
    between[name] = ((z > 0) & (z < 1)).float().mean().item()
    warm_or_cold[name] = accuracy(network)
    kept = 1 - l0hooks.summary(network).sparsity
    print(
        f"{name:8} β: {between[name]:.1%} of the gates between 0 and 1, {kept:.0%} kept, {warm_or_cold[name]:.1%} right"
    )

# %% [markdown]
# ## 2. Budgets: what is counted
#
# "Half the size" means half of what? With `unit="params"` half of the parameters, with `unit="macs"` half of the
# multiply-adds. In a convolutional network these are different networks: the first layers do most of the work, the
# last one holds many parameters.


# %%
class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * 16, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x.reshape(-1, 1, 8, 8)))))
        return self.fc2(torch.relu(self.fc1(F.max_pool2d(x, 2).flatten(1))))


def size(network: Network) -> dict[str, int]:
    convolutions, linears = (network.conv1, network.conv2), (network.fc1, network.fc2)
    macs = 64 * sum(layer.weight.numel() for layer in convolutions) + sum(layer.weight.numel() for layer in linears)
    return {"params": sum(parameter.numel() for parameter in network.parameters()), "macs": macs}


dense_size, halves = size(Network()), {}
for unit in ("params", "macs"):
    torch.manual_seed(0)
    network = Network()
    train_first = torch.optim.Adam(network.parameters(), lr=3e-3)
    for batch in torch.randperm(len(x)).repeat(3).split(64):
        F.cross_entropy(network(x[batch]), y[batch]).backward()
        train_first.step()
        train_first.zero_grad()
    budget = l0hooks.Budget(sparsity=0.5, unit=unit, steps=100)
    l0hooks.sparsify(network, "coupled", example_inputs=(x[:2],), budget=budget)
    train(network, torch.optim.Adam(l0hooks.param_groups(network, lr=3e-3, gate_lr=0.1)), 150)
    small = l0hooks.prune(network.eval(), example_inputs=(x[:4],))
    halves[unit] = {name: left / dense_size[name] for name, left in size(small).items()}
    widths = f"{small.conv1.out_channels}, {small.conv2.out_channels}, {small.fc1.out_features}"
    shares = ", ".join(f"{left:.0%} of the {name}" for name, left in halves[unit].items())
    print(f"half the {unit:6}: widths 16, 16, 32 become {widths}; {shares} left; {accuracy(small):.1%} right")

# %% [markdown]
# ## 3. Budgets: how they are met
#
# By default all gates move by one common shift after every step, so that the expected size is what the schedule says.
# `method="lagrangian"` learns a price instead, as much of the literature does: the price is a term of the loss, and
# its multiplier grows while the size is too large. It acts late and overshoots, as the picture at the end shows, and
# its learning rate has to be chosen. Either way exactly the number asked for stays in the end.

# %%
traces, exactly = {}, {}
for method, options in (
    ("shift", {}),
    ("shift, linear", {"schedule": "linear"}),
    ("lagrangian", {"method": "lagrangian", "constraint": "equality"}),
):
    network = perceptron()
    l0hooks.sparsify(network, "weight", budget=l0hooks.Budget(sparsity=0.9, steps=300, **options))
    if "method" in options:
        groups = l0hooks.param_groups(network, lr=5e-3, gate_lr=0.1, multiplier_lr=2.0)
        traces[method] = train(network, torch.optim.Adam(groups), 400, budget=1.0)
    else:
        groups = l0hooks.param_groups(network, lr=5e-3, gate_lr=0.1)
        traces[method] = train(network, torch.optim.Adam(groups), 400)
    exactly[method] = l0hooks.summary(network).parameters_kept
    gap = max(abs(expected - scheduled) for expected, scheduled in traces[method][:299]) / 2368
    print(f"{method:13}: {exactly[method]} of 2,368 gates left; at most {gap:.2%} off the schedule on the way")

# %% [markdown]
# ## 4. Hybrid selection
#
# A subsample of a survey shall represent all of it, and yet also contain people drawn at random. `HybridGate` chooses
# a part by gates and draws the rest at random. The data are 944 respondents of the American National Election Study
# of 1996; the gates are to keep the means of seven answers.

# %%
survey = anes96.load_pandas().data[["age", "educ", "income", "PID", "selfLR", "TVnews", "logpopul"]]
answers = torch.tensor(((survey - survey.mean()) / survey.std()).to_numpy(), dtype=torch.float32)  # means are 0 now


def chosen(gated_fraction: float) -> l0hooks.HybridGate:
    """A gate over all respondents, trained so that the gated ones have the means of all."""
    torch.manual_seed(0)
    gate = l0hooks.HybridGate(len(answers), 60, gated_fraction, 1 - gated_fraction, steps=600, init_keep_prob=0.5)
    l0hooks.temperature_schedule(gate, exponential(2 / 3, 0.1, steps=600))  # in the end nobody counts by half
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(600):
        z = gate.gate()
        loss = (z @ answers / z.sum()).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gate.eval()


def off(rows: torch.Tensor) -> float:
    """Root mean squared difference of the means, in standard deviations."""
    return rows.mean(0).square().mean().sqrt().item()


draw = torch.Generator().manual_seed(0)
misses = {"random": np.mean([off(answers[torch.randperm(944, generator=draw)[:60]]) for _ in range(200)])}
for name, fraction in (("half and half", 0.5), ("all by gates", 1.0)):
    gate = chosen(fraction)
    misses[name] = np.mean([off(gate.select(answers, generator=draw)[0]) for _ in range(200)])
for name, miss in misses.items():
    print(f"60 of 944 respondents, {name:13}: means off by {miss:.3f} standard deviations")

# %% [markdown]
# ## 5. A gate of your own, and a penalty of your own
#
# `Gate(shape)` is a module for any place in any model. Here an 8 × 8 array of gates lies over the pixels, under a
# budget of 16: the network may read a quarter of the picture. By itself it chooses pixels everywhere. Suppose that a
# sensor is cheaper when its pixels lie together. That is a penalty on borders between open and closed pixels, in
# expectation
#
# $$\sum_{\text{neighbours } i,\,j} (p_i - p_j)^2, \qquad p_i = P(z_i \ne 0),$$
#
# and any function of one gate becomes a penalty by `@register_penalty`. It combines with patterns, strengths and
# the other penalties like those that come with the library.


# %%
@l0hooks.register_penalty("borders")
def borders(gated) -> torch.Tensor:
    p = F.pad(gated.gate.keep_prob(), (1, 1, 1, 1))  # outside of the picture nothing is read
    return p.diff(dim=0).square().sum() + p.diff(dim=1).square().sum()


class Sensor(nn.Module):
    """A perceptron that reads 16 of 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = l0hooks.Gate((8, 8), init_keep_prob=0.8)
        l0hooks.set_budget(self.gate, l0hooks.Budget(keep=16, steps=500))
        self.layers = perceptron()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers((x.reshape(-1, 8, 8) * self.gate()).flatten(1))


masks, sensors = {}, {}
for name, strengths in (("No price on borders", {}), ("Borders cost 0.02", {"borders": 0.02})):
    torch.manual_seed(0)
    sensor = Sensor()
    train(sensor, torch.optim.Adam(l0hooks.param_groups(sensor, lr=5e-3, gate_lr=5e-2)), 700, **strengths)
    masks[name] = sensor.eval().gate.support()
    edge = F.pad(masks[name].int(), (1, 1, 1, 1))
    length = int(edge.diff(dim=0).abs().sum() + edge.diff(dim=1).abs().sum())
    sensors[name] = (length, accuracy(sensor))
    print(f"{name:19}: {int(masks[name].sum())} pixels, border of {length}, {sensors[name][1]:.1%} right")

# %% [markdown]
# ## The picture
#
# The two sensors over the average digit (grey pixels are not read), and how the budgets of section 3 were met.

# %%
figure = plt.figure(figsize=(6, 6.2))
left, right, below = figure.subplot_mosaic([["left", "right"], ["below", "below"]], height_ratios=(1.25, 1)).values()
for axes, (name, mask) in zip((left, right), masks.items(), strict=True):
    axes.imshow(x.mean(0).reshape(8, 8).numpy(), cmap="cividis")
    for row, column in (~mask).nonzero().tolist():
        axes.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="0.55", edgecolor="0.5", linewidth=0.5))
    axes.set(title=f"{name}\n{sensors[name][1]:.1%} right", xticks=[], yticks=[])
styles = {"shift": ("#0f8b8d", "-"), "shift, linear": ("#8073ac", "-"), "lagrangian": ("#e08214", "-")}
for name, trace in traces.items():
    expected, scheduled = np.array(trace).T
    below.plot(scheduled, color="0.5", linestyle=":", linewidth=1)
    below.plot(expected, styles[name][1], color=styles[name][0], label=name)
below.plot([], color="0.5", linestyle=":", label="schedule")
below.set(title="Three budgets of 10 %", xlabel="step", ylabel="expected open gates", ylim=(0, None))
below.grid()
below.legend()
